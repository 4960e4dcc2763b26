"""Surfaces for other programs: every number comes back as it was."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


@pytest.fixture(scope="module")
def pair():
    batch = torch.randn(30, 4), torch.randn(30, 2)
    return ss.paired_landscapes(
        {"a_1": nn.Linear(4, 2), "b": nn.Linear(4, 2)}, batch, F.mse_loss, grid=(3, 4)
    )


def test_npz(pair, tmp_path):
    with np.load(pair.surfaces["b"].save(tmp_path / "b.npz")) as file:
        assert np.array_equal(file["values"], pair.surfaces["b"].values) and file["stderr"].shape == (3, 4)
    with np.load(pair.save(tmp_path / "pair.npz")) as file:
        assert np.array_equal(file["a_1/values"], pair.surfaces["a_1"].values)


def test_csv(pair, tmp_path):
    with open(pair.save(tmp_path / "pair.csv")) as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 12
    values = np.array([float(line["values"]) for line in lines if line["surface"] == "b"]).reshape(3, 4)
    assert np.array_equal(values, pair.surfaces["b"].values)


def test_tex(pair, tmp_path):
    text = pair.save(tmp_path / "pair.tex").read_text()
    assert r"a\_1" in text and r"\pm" in text and text.count(r" \\") == 3


def test_a_place_that_cannot_be_written(pair, tmp_path):
    with pytest.raises(ss.SkipscopeError, match="cannot write"):
        pair.save(tmp_path / "nowhere" / "pair.csv")
