"""An edited twin is a module like any other: files, checkpointing, autocast, compiled regions, shared parameters."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import skipscope as ss
from needs import compiled_code_shows_assignments
from shortcuts.architectures import Basic, Layer, ResNet, features, images, seq, sequences
from skipscope._errors import SkipscopeError
from skipscope.shortcuts import ablate, find_shortcuts

EDITS = {
    "remove": {},
    "detach": {"how": "detach"},
    "lesion": {"how": "lesion"},
    "strength": {"strength": 0.3},
    "tensor": {"strength": torch.tensor(0.3)},
}


def resnet():
    torch.manual_seed(0)
    return ResNet(Basic, [4, 8], [2, 2]).eval()


def layers():
    torch.manual_seed(0)
    return seq(Layer(), Layer(form="post"), nn.Linear(8, 3))


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def agree(one, other, x):
    torch.testing.assert_close(one(x), other(x))
    for a, b in zip(gradients(one, x), gradients(other, x), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


# --- files ---


@pytest.mark.parametrize("make, x", [(resnet, images()), (layers, sequences())])
def test_safetensors_both_ways(make, x, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = make()
    twin = ablate(model, inputs=x)
    safetensors.save_model(twin, str(tmp_path / "twin.safetensors"))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    changed = twin(x)
    safetensors.load_model(twin, str(tmp_path / "twin.safetensors"))
    assert torch.equal(twin(x), ablate(model, inputs=x)(x)) and not torch.equal(twin(x), changed)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    other = ablate(make(), inputs=x)
    safetensors.load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(x), twin(x))


@pytest.mark.parametrize("how", EDITS)
def test_copies_of_every_kind_run_alike(how):
    model, x = layers(), sequences()
    twin = ablate(model, inputs=x, **EDITS[how])
    stream = io.BytesIO()
    torch.save(twin, stream)
    stream.seek(0)
    for same in (
        copy.deepcopy(twin),
        pickle.loads(pickle.dumps(twin)),
        torch.load(stream, weights_only=False),
    ):
        agree(same, twin, x)
    fresh = ablate(layers(), inputs=x, **EDITS[how])
    fresh.load_state_dict(twin.state_dict())
    agree(fresh, twin, x)


def test_a_model_that_keeps_tensors_with_a_history_in_a_container_is_copied():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.bias, self.cache = nn.Linear(8, 8), nn.Parameter(torch.ones(8)), {}

        def forward(self, x):
            self.cache["bias"] = [self.bias * 2]
            return x + self.lin(x) + self.cache["bias"][0]

    model, x = Caching(), features()
    model(x)
    torch.testing.assert_close(ablate(model, inputs=x)(x), model.lin(x) + 2 * model.bias)


# --- how it is run ---


class Checkpointed(nn.Module):
    """A model that checkpoints its own blocks."""

    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.blocks = nn.Linear(8, 8), nn.ModuleList([Layer(), Layer(form="post")])
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_inside_an_edited_model(reentrant, how):
    x = sequences()
    agree(
        ablate(Checkpointed(reentrant), inputs=x, **EDITS[how]),
        ablate(Checkpointed(None), inputs=x, **EDITS[how]),
        x,
    )


class Around(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.first, self.inner, self.reentrant = nn.Linear(8, 8), inner, reentrant

    def forward(self, x):
        x = self.first(x)
        return (
            self.inner(x)
            if self.reentrant is None
            else checkpoint(self.inner, x, use_reentrant=self.reentrant)
        )


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_around_an_edited_block(reentrant, how):
    x = sequences()
    block = ablate(Layer(), inputs=x, **EDITS[how])
    plain = Around(block, None)
    wrapped = copy.deepcopy(plain)
    wrapped.reentrant = reentrant
    agree(wrapped, plain, x)


@pytest.mark.parametrize("how", EDITS)
def test_autocast(how):
    model, x = layers(), sequences()
    twin = ablate(model, inputs=x, **EDITS[how])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = twin(x)
        low.float().square().mean().backward()
        assert len(find_shortcuts(model, x)) == 4
    torch.testing.assert_close(low.float(), twin(x), rtol=0.1, atol=0.1)
    assert all(p.grad is None or p.grad.isfinite().all() for p in twin.parameters())


@pytest.mark.parametrize("how", EDITS)
def test_functional_call_and_vmap_over_stacked_parameters(how):
    model, x = layers(), sequences()
    twins = [ablate(model, inputs=x, **EDITS[how]) for _ in range(3)]
    for k, twin in enumerate(twins):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1 + 0.1 * k)
    parameters, buffers = torch.func.stack_module_state(twins)

    def run(p, b):
        return torch.func.functional_call(twins[0], (p, b), (x,))

    out = torch.vmap(run)(parameters, buffers)
    torch.testing.assert_close(out, torch.stack([twin(x) for twin in twins]))
    grads = torch.vmap(torch.func.grad(lambda p, b: run(p, b).square().sum()))(parameters, buffers)
    for k, twin in enumerate(twins):
        for (name, _), g in zip(twin.named_parameters(), gradients(twin, x), strict=True):
            torch.testing.assert_close(grads[name][k], torch.zeros_like(grads[name][k]) if g is None else g)


# --- compiled regions ---


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.head = nn.ModuleList([Layer(), Layer(form="post")]), nn.Linear(8, 8)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x + self.head(x).relu()


def by_method(model):
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    return model


def by_wrapper(model):
    model.blocks = nn.ModuleList([torch.compile(b, backend="eager", fullgraph=True) for b in model.blocks])
    return model


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("compiled", [by_method, by_wrapper])
def test_compiled_blocks_inside_an_eager_model(compiled, how):
    torch._dynamo.reset()
    x = sequences()
    expected = ablate(Stack(), inputs=x, **EDITS[how])
    after = compiled(ablate(Stack(), inputs=x, **EDITS[how]))
    before = compiled(Stack())
    before(x)
    found = find_shortcuts(before, x)
    assert len(found) == 5
    for twin in (
        after,
        ablate(before, found, **EDITS[how]),
        ablate(compiled(Stack()), inputs=x, **EDITS[how]),
    ):
        agree(twin, expected, x)
        agree(copy.deepcopy(twin), expected, x)


@pytest.mark.parametrize("compiled", [by_method, by_wrapper])
def test_compiled_blocks_with_an_edit_each_of_their_own(compiled):
    torch._dynamo.reset()
    x = sequences()
    model = Stack()
    model.blocks = nn.ModuleList([Layer() for _ in range(10)])  # more than dynamo compiles of one code

    def edited():
        found = find_shortcuts(model, x)
        twin = ablate(model, found[2:4])
        for part, edit in ((found[5:6], "detach"), (found[6:8], "lesion")):
            twin = ablate(twin, part, edit)
        return ablate(ablate(twin, found[8:10], strength=0.3), found[10:11], strength=0.7)

    agree(compiled(edited()), edited(), x)


class Heads(nn.Module):
    """A branch that takes its activations apart by a method of tensors that is written in Python."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x + self.inner(x).unflatten(-1, (2, 3)).tanh().flatten(-2))


def test_an_edited_twin_that_takes_heads_apart_is_compiled_in_one_graph():
    x = features()[..., :6]
    twin = ablate(Heads().to(x.dtype), inputs=x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(twin, backend="eager", fullgraph=True)(x), twin(x))


def test_an_edited_block_compiled_inside_an_unedited_model():
    torch._dynamo.reset()
    x = sequences()
    block = ablate(Layer(), inputs=x)
    model = seq(nn.Linear(8, 8), block)
    expected = model(x)
    block.compile(backend="eager", fullgraph=True)
    assert torch.equal(model(x), expected)


# --- shared parameters ---


def test_twins_that_share_their_parameters_are_not_trained():
    model, x = layers(), sequences()
    found = find_shortcuts(model, x)
    data = (x, torch.zeros(2, 6, 3))
    shared = ablate(model, found, share=True)
    cases = [
        {"removed": shared, "lesioned": ablate(model, found, "lesion", share=True)},
        {"with": model, "without": shared},
        {"without": lambda: ablate(model, found, share=True)},
        {"without": nn.Sequential(shared)},
    ]
    before = copy.deepcopy(model.state_dict())
    for twins in cases:
        with pytest.raises(SkipscopeError, match=r"(?s)shares its parameters.*share=False"):
            ss.train_twins(twins, data, F.mse_loss, steps=2, seeds=1)
    for change in (lambda: shared.load_state_dict(before), lambda: shared.requires_grad_(False)):
        with pytest.raises(SkipscopeError, match=r"(?s)shares its parameters.*share=False"):
            change()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for own in (ablate(model, found), ablate(shared, found, strength=0.5), copy.deepcopy(shared)):
        ss.train_twins({"own": own}, data, F.mse_loss, steps=2, seeds=1)
        own.double()


# --- slices ---


class Sliced(nn.Module):
    """x + F where F is zero outside a slice, written in place."""

    def __init__(self, form, how=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 2)
        self.form, self.how = form, how

    def branch(self, x):
        return self.b(torch.tanh(self.a(x)))

    def edit(self, x, f):
        wide = F.pad(f, (2, 2))
        if self.how is None:
            return x + wide
        return {
            "remove": lambda: wide,
            "detach": lambda: x.detach() + wide,
            "lesion": lambda: x,
            "strength": lambda: 0.3 * x + wide,
            "tensor": lambda: 0.3 * x + wide,
        }[self.how]()

    def forward(self, x):
        if self.how is not None:
            return self.head(self.edit(x, self.branch(x)))
        out = x.clone()
        INTO_A_SLICE[self.form](out, self.branch(x))
        return self.head(out)


def plus_equals(out, f):
    out[:, 2:6] += f


def assigned_back(out, f):
    out[:, 2:6] = out[:, 2:6] + f


def assigned_back_by_indices(out, f):
    out[:, torch.arange(2, 6)] += f  # what is taken by indices is a copy


def assigned_back_to_a_view(out, f):
    view = out.transpose(0, 1)
    view[2:6] = f.transpose(0, 1) + view[2:6]


INTO_A_SLICE = {
    "slice": plus_equals,
    "method": lambda out, f: out[:, 2:6].add_(f),
    "view": lambda out, f: out.narrow(1, 2, 4).view(-1, 2, 2).add_(f.view(-1, 2, 2)),
    "assigned back": assigned_back,
    "assigned back by indices": assigned_back_by_indices,
    "assigned back to a view": assigned_back_to_a_view,
}


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("form", INTO_A_SLICE)
def test_an_addition_into_a_slice_is_the_whole_of_x_plus_f(form, how):
    x = features()
    model = Sliced(form)
    found = find_shortcuts(model, x)
    assert [s.kind for s in found] == ["identity"]
    twin = ablate(model, found, **EDITS[how])
    agree(twin, Sliced(form, how), x)
    torch._dynamo.reset()
    whole = torch.compile(twin, backend="eager", fullgraph=True)
    # A lesion is made where x + F is added up, the other edits where the sum is written back.
    if how == "lesion" or not form.startswith("assigned") or compiled_code_shows_assignments():
        assert torch.equal(whole(x), twin(x))
        return
    # What cannot be edited in compiled code is refused there, and runs uncompiled where torch may do so.
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(x)
    assert torch.equal(torch.compile(twin, backend="eager")(x), twin(x))


class Chosen(nn.Module):
    """x where a mask is false, F where it is true: a gate that is 0 or 1."""

    def __init__(self, how=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head, self.how = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2), how

    def forward(self, x):
        mask, f = torch.arange(8) % 3 == 0, self.b(torch.tanh(self.a(x)))
        if self.how is None:
            return self.head(torch.where(mask, f, x))
        x = {"detach": x.detach, "lesion": lambda: x, "remove": lambda: 0 * x}.get(
            self.how, lambda: 0.3 * x
        )()
        return self.head(~mask * x if self.how == "lesion" else mask * f + ~mask * x)


@pytest.mark.parametrize("how", EDITS)
def test_a_choice_by_a_mask_is_a_gate(how):
    x, model = features(), Chosen()
    found = find_shortcuts(model, x)
    assert [s.kind for s in found] == ["gated"]
    twin = ablate(model, found, **EDITS[how])
    agree(twin, Chosen(how), x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(twin, backend="eager", fullgraph=True)(x), twin(x))
