"""What people get wrong, in every public call: one kind of error, in the name of the call, with what was expected and a cure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import SkipscopeError
from skipscope._public_call import public_call


class Raises(nn.Module):
    """A model whose own code fails."""

    def __init__(self, error: Exception):
        super().__init__()
        self.linear, self.error = nn.Linear(16, 4), error

    def forward(self, x):
        raise self.error


def model() -> nn.Module:
    return ss.reference.deep_mlp(2, width=16, inputs=16, classes=4, shortcut="identity")


def batch(width: int = 16, samples: int = 6, shift: int = 0):
    return torch.ones(samples, width), torch.arange(samples) % 4 + shift


# Every public call that takes a model, data and a loss: the smallest there is of each.
CALLS = {
    "gradient_flow": ss.gradient_flow,
    "gradient_split": ss.gradient_split,
    "path_spectrum": ss.path_spectrum,
    "importance": ss.importance,
    "prescribe": lambda *given: ss.prescribe(*given, steps=1),
    "extreme_eigenvalues": lambda *given: ss.extreme_eigenvalues(*given, max_products=4),
    "spectral_density": lambda *given: ss.spectral_density(*given, steps=2, probes=2),
    "curvature_trace": lambda *given: ss.curvature_trace(*given, products=6),
    "curvature_operator": lambda *given: ss.curvature_operator(*given),
    "landscape": lambda *given: ss.landscape(*given, grid=3),
    "paired_landscapes": lambda model, *given: ss.paired_landscapes({"a": model}, *given, grid=3),
    "curvature_map": lambda *given: ss.curvature_map(*given, grid=3),
    "compare": lambda *given: ss.compare(*given, train=False, grid=3, quick=True),
    "train_twins": lambda model, *given: ss.train_twins({"a": model}, *given, steps=2, seeds=1),
}

# What is wrong -> how to call, and words that the error must have.
WRONG = {
    "no module": (lambda: (3, batch(), F.cross_entropy), "got:      int"),
    "inputs of another width": (lambda: (model(), batch(15), F.cross_entropy), "Linear(in_features=16, out_features=16"),
    "inputs in numpy": (lambda: (model(), (np.ones((3, 16), np.float32), torch.zeros(3).long()), F.cross_entropy), "torch.as_tensor"),
    "classes out of range": (lambda: (model(), batch(shift=4), F.cross_entropy), "class indices from 0 to 3"),
    "no samples": (lambda: (model(), batch(samples=0), F.cross_entropy), "no samples"),
    "no data": (lambda: (model(), None, F.cross_entropy), "(inputs, target)"),
    "a class for a loss": (lambda: (model(), batch(), nn.CrossEntropyLoss), "CrossEntropyLoss()"),
    "a loss of each sample": (lambda: (model(), batch(), lambda output, target: output.sum(1)), "not a scalar"),
    "a number for a loss": (lambda: (model(), batch(), lambda output, target: 1.0), "not a scalar"),
    "a loss that fails": (lambda: (model(), batch(), lambda output, target: {}["class"]), "the loss does not accept"),
    "a model that fails": (lambda: (Raises(KeyError("mask")), batch(), F.cross_entropy), "KeyError: 'mask'"),
    "a model that says nothing": (lambda: (Raises(AssertionError()), batch(), F.cross_entropy), "(AssertionError)"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_wrong_is_told_in_the_name_of_the_call(call, wrong):
    make, words = WRONG[wrong]
    with pytest.raises(SkipscopeError) as refusal:
        CALLS[call](*make())
    assert words in str(refusal.value)
    assert refusal.value.operation == call and str(refusal.value).startswith(call)
    assert refusal.value.cure


NEEDS_A_GRADIENT = sorted(set(CALLS) - {"landscape", "paired_landscapes"})


@pytest.mark.parametrize("call", NEEDS_A_GRADIENT)
def test_a_loss_without_a_gradient_is_refused(call):
    with pytest.raises(SkipscopeError, match="the loss has no gradient") as refusal:
        CALLS[call](model(), batch(), lambda output, target: F.cross_entropy(output.detach(), target))
    assert refusal.value.operation == call


def test_a_loss_that_leads_to_other_parameters_has_the_hessian_zero():
    # Frozen weights too: of the chosen ones the loss knows nothing, and zero is their Hessian.
    frozen = HasUnused()
    frozen.used.requires_grad_(False)
    ends = ss.extreme_eigenvalues(frozen, batch(), F.cross_entropy, parameters="unused.*")
    assert ends.largest[0] == ends.smallest[0] == 0 and ends.converged


class HasUnused(nn.Module):
    """One layer is never run."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(16, 4), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


class Overwrites(nn.Module):
    """Changes in place what the backward pass needs, as torch itself refuses."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        h = self.linear(x).tanh()
        h.add_(x)
        return h + self.linear(h)


@pytest.mark.parametrize("call", ["gradient_flow", "gradient_split", "path_spectrum"])
def test_a_backward_pass_that_fails_is_told(call):
    with pytest.raises(SkipscopeError, match=r"the backward pass fails .*inplace operation") as refusal:
        CALLS[call](Overwrites(), batch(), F.cross_entropy)
    assert refusal.value.operation == call


def test_a_twin_that_is_no_model_is_refused():
    with pytest.raises(SkipscopeError, match="neither a module nor a function"):
        ss.train_twins({"a": 3}, batch(), F.cross_entropy)  # type: ignore[dict-item]


def test_an_error_of_a_call_inside_is_told_as_the_call_outside():
    @public_call("outside")
    def outside():
        raise SkipscopeError("inside", "something is wrong", layer="block.3", cure="put it right")

    with pytest.raises(SkipscopeError) as refusal:
        outside()
    assert str(refusal.value) == "outside: something is wrong\n  layer:    block.3\n  cure:     put it right"
    assert (refusal.value.operation, refusal.value.layer) == ("outside", "block.3")


def test_keys_that_forward_does_not_take_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, input_ids, mask, scale=1.0):
            return self.linear(input_ids * mask * scale)

    x = torch.ones(2, 4)
    with pytest.raises(SkipscopeError) as caught:
        ss.find_shortcuts(Net(), {"ids": x, "mask": x})
    message = str(caught.value)
    assert "expected: input_ids, mask, scale (optional)" in message
    assert "got:      ids, mask" in message
    assert "leave out or rename ids; add input_ids" in message
    assert len(ss.find_shortcuts(Net(), {"input_ids": x, "mask": x})) == 0


def test_control_characters_of_a_name_are_not_in_an_error_a_report_or_a_verdict(tmp_path, capsys):
    """A terminal prints the text of an error as it is."""
    sly = "a\x1b]0;title\x07\u202e"
    net = nn.Sequential()
    net.add_module(sly, nn.Sequential(nn.Linear(16, 16), nn.Tanh()))
    net.add_module("head", nn.Linear(16, 4))
    said = []
    for call in (
        lambda: ss.path_spectrum(net, batch(), F.cross_entropy, wrt="nothing"),
        lambda: ss.load(tmp_path / f"{sly}.json"),
        lambda: ss.gradient_flow(net, batch(), F.cross_entropy).save(tmp_path / sly / "x.json"),
    ):
        with pytest.raises(SkipscopeError) as refused:
            call()
        said.append(str(refused.value))
    ss.add_shortcuts(net, batch()[0])
    said.append(capsys.readouterr().out)
    net = nn.Sequential()
    for i in range(12):
        net.add_module(f"{sly}{i}", nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()))
    net.add_module("head", nn.Linear(16, 4))
    verdict = ss.gradient_flow(net, batch(), F.cross_entropy).verdict
    said.append(str(verdict))
    assert verdict.state == "vanishing"
    for text in said:
        assert "\N{REPLACEMENT CHARACTER}" in text and not {"\x1b", "\x07", "\u202e"} & set(text)
