"""Folders of a monitor that were damaged, made by a later version or hold what is no file: refused in words."""

import json
import os
import random
import shutil

import pytest
import torch
from torch import nn

import skipscope as ss


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer, x, y = torch.optim.SGD(model.parameters(), 0.1), torch.randn(6, 8), torch.arange(6) % 3
    with ss.watch(model, optimizer, folder=folder):
        for _ in range(4):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return folder


def test_a_folder_of_a_later_format_is_refused(kept, tmp_path):
    folder = shutil.copytree(kept, tmp_path / "run")
    about = json.loads((folder / "monitor.json").read_text())
    (folder / "monitor.json").write_text(json.dumps(about | {"format": about["format"] + 1}))
    with pytest.raises(ss.SkipscopeError, match=r"(?s)a later skipscope.*update skipscope"):
        ss.load(folder)


@pytest.mark.parametrize("file", ["events.jsonl", "gradients-0-000.rows"])
def test_a_pipe_in_a_folder_is_refused(kept, tmp_path, file):
    folder = shutil.copytree(kept, tmp_path / "run")
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(ss.SkipscopeError, match="a pipe"):
        ss.load(folder)


def test_a_folder_with_values_of_other_types_is_refused_or_prints(kept, tmp_path):
    """One value of monitor.json, of an event or of a file's first line is of another type, in 200 folders."""
    draw, others = random.Random(0), (None, "text", -1, 1e400, [], {}, True, [[]], {"a": 1})
    refused = 0
    for i in range(200):
        folder = shutil.copytree(kept, tmp_path / f"{i}")
        path = folder / draw.choice(["monitor.json", "events.jsonl", "gradients-0-000.rows"])
        is_rows = path.suffix == ".rows"
        head, _, rows = path.read_bytes().partition(b"\n") if is_rows else (path.read_bytes(), b"", b"")
        content = [json.loads(line) for line in head.splitlines()]
        holder, key = draw.choice([place for line in content for place in places(line)])
        holder[key] = draw.choice(others)
        path.write_bytes(b"\n".join(json.dumps(line).encode() for line in content) + b"\n" + rows)
        try:
            history = ss.load(folder)
        except ss.SkipscopeError:
            refused += 1
        else:
            assert str(history) and history.to_dict()
        shutil.rmtree(folder)
    assert 20 < refused < 180


def places(value):
    """Each holder and key of the values in plain data."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(item, dict | list):
            yield from places(item)
