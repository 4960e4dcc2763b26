"""The embedded data: the right values, fixed subsets, and refusals that say what to write."""

import numpy as np
import pytest
import torch

from skipscope import SkipscopeError, reference


def test_digits_are_the_source_in_its_order():
    inputs, target = reference.digits()
    assert inputs.shape == (1797, 64) and inputs.dtype == torch.float32 and target.dtype == torch.int64
    assert inputs.min() == 0 and inputs.max() == 1
    assert target[:10].tolist() == list(range(10))
    assert target.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert float((inputs.double() * 16).sum()) == 561718  # the sum of all pixels in the source
    assert (inputs[0, :8] * 16).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_digits_as_images_are_the_same_numbers():
    assert torch.equal(reference.digits(7, image=True)[0].reshape(7, 64), reference.digits(7)[0])


def test_split_is_a_partition():
    parts = [reference.digits(split=split)[0] for split in ("train", "test")]
    assert torch.equal(torch.cat(parts), reference.digits()[0])


@pytest.mark.parametrize("n", [1, 10, 64, 355, 1797])
def test_a_subset_is_fixed_balanced_and_without_repetition(n):
    inputs, target = reference.digits(n, seed=3)
    again = reference.digits(n, seed=3)
    assert torch.equal(inputs, again[0]) and torch.equal(target, again[1])
    assert len(np.unique(inputs.numpy(), axis=0)) == n
    if n <= 1740:
        counts = target.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
    assert n in {1, 1797} or not torch.equal(inputs, reference.digits(n, seed=4)[0])


def test_data_leave_the_global_generators_alone():
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    reference.digits(5), reference.english(5)
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_english_is_next_token_text():
    inputs, target = reference.english(8, context=32, seed=1)
    text = reference.english_text()
    assert inputs.shape == target.shape == (8, 32) and inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], target[:, :-1])
    assert text.decode(inputs[0]) in text.decode(text.ids) and int(text.ids.min()) >= 0
    assert int(text.ids.max()) < text.vocabulary and len(text.sha256) == 64
    assert not torch.equal(inputs, reference.english(8, context=32, seed=2)[0])


def test_english_from_a_short_text_stays_inside_it():
    inputs, target = reference.english(200, context=8, length=9)
    assert torch.equal(inputs, reference.english_text(8).ids.expand(200, 8))
    assert target.shape == (200, 8)


def test_no_passage_of_the_training_part_reaches_into_the_test_part():
    text = reference.english_text(100).ids
    for split, part in (("train", text[:80]), ("test", text[80:])):
        inputs, target = reference.english(3000, context=7, length=100, split=split)
        windows = {tuple(w.tolist()) for w in part.unfold(0, 8, 1)}
        drawn = {(*one.tolist(), int(last)) for one, last in zip(inputs, target[:, -1])}
        assert drawn == windows  # every one of them, and no other


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: reference.english(split="dev"), "'dev'"),
        (lambda: reference.digits(0), "1 to 1797"),
        (lambda: reference.digits(361, split="test"), "1 to 360"),
        (lambda: reference.digits(split="dev"), "'dev'"),
        (lambda: reference.english(0), "n=0"),
        (lambda: reference.english(context=10, length=10), "from 1 to 9"),
        (lambda: reference.english_text(10**9), "bytes"),
        (lambda: reference.data_for("nothing"), "resnet20"),
    ],
)
def test_refusals_name_what_fits(call, words):
    with pytest.raises(SkipscopeError, match=words):
        call()
