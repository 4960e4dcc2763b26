"""The recorded trace: which value comes from which, against gradients; views, writes, hidden code, and the loss."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shortcuts.architectures import CASES, Layer, features, sequences
from skipscope import _data
from skipscope._untouched import untouched
from skipscope.shortcuts import Trace, ablate, find_shortcuts, record


def recorded(model, inputs, loss=None):
    def call():
        output = _data.call_model(model, _data.map_tensors(inputs, torch.clone))
        return output if loss is None else loss(output)

    with untouched(model, seed=0):
        return record(model, call)


def by_function(trace, name):
    return [call for call in trace.calls if call.function == name]


class Of(nn.Module):
    """A model made of one function of itself and x."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.gain, self.function = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), function

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize("name", CASES)
def test_every_output_comes_from_the_inputs_and_weights_that_have_a_gradient(name):
    """The dataflow of the trace against autograd's: what gets a gradient is an ancestor of the outputs."""
    make, inputs, _ = CASES[name]
    torch.manual_seed(0)
    model = make()
    trace = recorded(model, inputs)
    above = set().union(*map(trace.ancestors, trace.outputs))
    given = _data.map_tensors(inputs, lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
    with untouched(model, seed=0):
        outputs = [t for t in _data.tensors_in(_data.call_model(model, given)) if t.requires_grad]
        sum(t.float().sum() for t in outputs).backward()
        with_gradient = {n for n, p in model.named_parameters(remove_duplicate=True) if p.grad is not None}
    reached = {trace.values[v].name for v in above if trace.values[v].name}
    assert with_gradient <= reached
    leaves = _data.tensors_in(given)
    assert len(leaves) == len(trace.inputs)
    for leaf, value in zip(leaves, trace.inputs):
        assert leaf.grad is None or value in above


def test_calls_are_plain_data():
    trace = recorded(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), features(2, 4), lambda y: y.square().mean())
    assert [(c.function, c.module) for c in trace.calls if c.function != "clone"] == [
        ("linear", "0"), ("relu", "1"), ("square", ""), ("mean", ""),
    ]  # fmt: skip
    (linear,) = by_function(trace, "linear")
    assert trace.weights_of(linear) == {"0.weight", "0.bias"}
    assert [trace.values[v].shape for v in linear.operands] == [(2, 4), (3, 4), (3,)]
    (value,) = linear.results
    assert trace.values[value].is_activation and trace.values[value].numel == 6
    assert [trace.calls[c].function for c in trace.consumers(value)] == ["relu"]
    assert trace.ancestors(trace.result[0]) >= {*trace.inputs, value}
    assert linear.source.startswith("linear.py:") and not trace.with_gradients


def test_a_spelling_does_not_matter():
    def forward(net, x):
        return torch.add(x, 1) + torch.ops.aten.add.Tensor(x, x).add_(x).subtract(x) + x.T.T + 1 - (1 - x)

    functions = [c.function for c in recorded(Of(forward), features(2, 4)).calls if c.function != "clone"]
    assert functions == ["add", "add", "add", "sub", "add", "T", "T", "add", "add", "rsub", "sub"]


def into_a_slice(net, x):
    y = x.clone()
    y[:, 1:3] += net.lin(x)[:, 1:3]
    return y


def into_a_view_of_a_view(net, x):
    y = x.clone()
    y.t()[1:].transpose(0, 1).add_(net.lin(x)[:, 1:])
    return y


def seen_by_an_older_view(net, x):
    y = x.clone()
    view = y.view(-1)
    y.mul_(net.gain)
    return view * 1


def seen_by_another_view(net, x):
    y = x.clone()
    one, other = y[:1], y.view(-1)
    one.copy_(net.lin(x)[:1])
    return other + 0


def put_by_indices(net, x):
    y = torch.zeros_like(x)
    y[torch.tensor([1, 0, 2])] = net.lin(x)
    return y


def through_detach(net, x):
    y = x.clone()
    y.detach()[0].add_(net.lin(x)[0])
    return y


def by_out(net, x):
    y = torch.empty_like(x)
    torch.mul(x, net.gain, out=y)
    return y


WRITES = [into_a_slice, into_a_view_of_a_view, seen_by_an_older_view, seen_by_another_view, put_by_indices,
          through_detach, by_out]  # fmt: skip


@pytest.mark.parametrize("forward", WRITES)
def test_what_is_written_into_shared_memory_is_seen_by_all_that_share_it(forward):
    trace = recorded(Of(forward), features(3, 4))
    above = trace.ancestors(trace.outputs[0])
    names = {trace.values[v].name for v in above}
    assert ("gain" in names) == (forward in {seen_by_an_older_view, by_out})
    assert ("lin.weight" in names) == ("gain" not in names)


def test_a_view_that_was_read_before_the_write_does_not_see_it():
    def forward(net, x):
        y = x.clone()
        before = y.view(-1) * 2
        y.mul_(net.gain)
        return before

    trace = recorded(Of(forward), features(3, 4))
    assert all(trace.values[v].name == "" for v in trace.ancestors(trace.outputs[0]))


def test_a_loop_counts_its_steps():
    def forward(net, x):
        for _ in range(3):
            x = net.lin(x).tanh()
        return x

    trace = recorded(Of(forward), features(3, 4))
    assert [c.run for c in by_function(trace, "linear")] == [0, 1, 2]
    assert [c.step for c in by_function(trace, "tanh")] == [0, 1, 2]
    assert [(r.path, r.nth) for r in trace.runs] == [("", 0), ("lin", 0), ("lin", 1), ("lin", 2)]


def test_torchs_composite_functions_do_not_hide_their_calls():
    """The fast paths of nn.TransformerEncoder and nn.MultiheadAttention are taken without gradients and a mode."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    trace = recorded(layer, sequences())
    linear = [sorted(trace.weights_of(c)) for c in by_function(trace, "linear")]
    assert ["self_attn.out_proj.bias", "self_attn.out_proj.weight"] in linear and len(linear) == 4
    assert len(by_function(trace, "add")) >= 2 and not trace.hidden


@pytest.mark.parametrize("make, shape, name", [
    (lambda: nn.LSTM(4, 4), (3, 2, 4), "lstm"), (lambda: nn.GRUCell(4, 4), (2, 4), "gru_cell"),
])  # fmt: skip
def test_fused_recurrent_cells_are_listed(make, shape, name):
    assert [h.name for h in recorded(make(), torch.randn(shape)).hidden] == [name]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        out = torch.empty_like(x)
        return out.copy_(x * w)

    @staticmethod
    def backward(ctx, g):
        return g, None


def test_an_autograd_function_is_one_call():
    def forward(net, x):
        one, other = Doubled.apply(x, net.gain), Doubled.apply(net.lin(x), net.gain)
        return one + other.tanh()

    trace = recorded(Of(forward), features(3, 4))
    assert [(h.name, h.module) for h in trace.hidden] == [("Doubled", "")] and len(
        by_function(trace, "Doubled")
    ) == 2
    one, other = by_function(trace, "add")[-1].operands
    names = [{trace.values[v].name for v in trace.ancestors(at)} - {""} for at in (one, other)]
    assert names == [{"gain"}, {"gain", "lin.weight", "lin.bias"}]


def test_an_input_whose_memory_the_model_frees_is_left_as_found():
    """Reversible networks free what they can compute again."""

    def forward(net, x):
        y = x + net.lin(x).tanh()
        x.untyped_storage().resize_(0)
        return y

    x = features(3, 4)
    before = x.clone()
    assert [s.kind for s in find_shortcuts(Of(forward), x)] == ["identity"]
    assert torch.equal(x, before)


class RunsModule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module, *weights):
        return module(x)

    @staticmethod
    def backward(ctx, *grads: torch.Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0], None, None, None


class Inside(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x):
        return x + self.lin(x).tanh()


class RunInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inside, self.outside = Inside(), Inside()

    def forward(self, x):
        return self.outside(RunsModule.apply(x, self.inside, *self.inside.parameters()))


def test_what_a_function_runs_by_modules_is_as_little_seen_as_what_it_runs_itself():
    found = find_shortcuts(RunInside(), torch.randn(2, 3))
    assert [s.name for s in found] == ["outside"]
    assert not found.rejected
    assert [hidden.name for hidden in found.opaque] == ["RunsModule"]


@torch.library.custom_op("skipscope_tests::residual", mutates_args=())
def residual(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x + torch.tanh(x @ w)


@torch.library.custom_op("skipscope_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_an_operator_of_a_library_that_takes_weights_is_opaque():
    trace = recorded(Of(lambda net, x: residual(doubled(x), net.lin.weight)), features(3, 4))
    assert [h.name for h in trace.hidden] == ["residual"]


class Reversible(torch.autograd.Function):
    """Takes a single activation, and modules: so reversible blocks are written."""

    @staticmethod
    def forward(ctx, x, block):
        one, other = x.chunk(2, -1)
        return torch.cat([one + block(other), other], -1)


def test_a_function_that_runs_modules_is_listed_and_one_of_an_activation_alone_is_not():
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

    block = nn.Linear(2, 2)
    trace = recorded(Of(lambda net, x: Reversible.apply(Rounded.apply(net.lin(x)), block)), features(3, 4))
    assert [h.name for h in trace.hidden] == ["Reversible"]


@pytest.mark.parametrize("transform", [
    lambda net, x: torch.vmap(lambda r: r + net.lin(r))(x), lambda net, x: torch.vmap(net.lin)(x),
    lambda net, x: torch.func.grad(lambda r: net.lin(r).square().sum())(x),
])  # fmt: skip
def test_what_a_transformation_gives_comes_from_what_went_in(transform):
    def forward(net, x):
        y = x.tanh()
        return transform(net, y) * 2

    trace = recorded(Of(forward), features(3, 4))
    above = trace.ancestors(trace.outputs[0])
    assert set(by_function(trace, "tanh")[0].results) <= above
    assert "lin.weight" in {trace.values[v].name for v in above}


def test_a_model_that_differentiates_is_run_with_gradients_and_says_so():
    def forces(net, x):
        x = x.requires_grad_()
        energy = net.lin(x).square().sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    trace = recorded(Of(forces), features(3, 4))
    assert trace.with_gradients and "lin.weight" in {
        trace.values[v].name for v in trace.ancestors(trace.outputs[0])
    }


def test_token_ids_count_however_they_enter():
    for enter in (lambda net, i: net.gain[i], lambda net, i: net.gain.index_select(0, i.view(-1)),
                  lambda net, i: net.lin(F.one_hot(i, 4).float())):  # fmt: skip
        trace = recorded(Of(enter), torch.tensor([[0, 3], [2, 1]]))
        assert trace.values[trace.outputs[0]].is_activation


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_looked_into(reentrant):
    def forward(net, x):
        return torch.utils.checkpoint.checkpoint(lambda y: y + net.lin(y), x, use_reentrant=reentrant) * 2

    trace = recorded(Of(forward), features(3, 4))
    (add,) = by_function(trace, "add")
    assert add.checkpointed and not trace.hidden and add.results[0] in trace.ancestors(trace.outputs[0])


def test_the_terms_of_a_loss():
    def loss(y):
        first, second = y.square().mean(), y.abs().mean()
        return (torch.stack([first, 2 * second]).mean() + 0.1 * y[0].sum() - y.std() / 3) / 2

    trace = recorded(Of(lambda net, x: net.lin(x)), features(3, 4), loss)
    made = [trace.calls[trace.values[v].call].function for v in trace.addends(trace.result[0])]
    assert made == ["mean", "mean", "sum", "std"]
    alone = recorded(
        Of(lambda net, x: net.lin(x)), features(3, 4), lambda y: F.mse_loss(y, torch.zeros(3, 4))
    )
    assert alone.addends(alone.result[0]) == [alone.result[0]]


def test_a_trace_holds_no_activation():
    model, alive = nn.Sequential(*[nn.Linear(4, 4) for _ in range(10)]), []
    for module in model:
        module.register_forward_hook(lambda module, args, output: alive.append(weakref.ref(output)))
    trace = record(model, lambda: model(features(3, 4)))
    assert isinstance(trace, Trace) and len(alive) == 10 and all(ref() is None for ref in alive)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_attribute_that_holds_itself():
    @dataclasses.dataclass
    class Node:
        other: object = None

    model = Of(lambda net, x: net.lin(x))
    model.node = Node()
    model.node.other = model.node
    assert len(by_function(recorded(model, features(3, 4)), "linear")) == 1


def most_alive(model, run):
    """How many outputs of modules are alive at once, at most."""
    outputs, most = [], 0

    def count(module, args, output):
        nonlocal most
        outputs.append(weakref.ref(output))
        most = max(most, sum(ref() is not None for ref in outputs))

    handles = [module.register_forward_hook(count) for module in model.modules()]
    run()
    for handle in handles:
        handle.remove()
    return most


def test_finding_keeps_no_more_activations_than_a_forward_pass_without_gradients():
    model, x = nn.Sequential(*[Layer() for _ in range(8)]), sequences()
    with torch.no_grad():
        expected = most_alive(model, lambda: model(x))
    assert most_alive(model, lambda: find_shortcuts(model, x)) <= expected + 1


def test_nothing_is_left_of_a_trace():
    """Without the help of the garbage collector: what it took is given back at once."""
    model, x = Layer(), sequences()
    gc.collect()
    gc.disable()
    try:
        trace = weakref.ref(record(model, lambda: model(x)))
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        # Torch's compiler, once loaded, drops its own dead code in whatever pass comes next.
        ours = [kept for kept in gc.garbage if type(kept).__module__.startswith("skipscope")]
        assert trace() is None and not ours
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("reset", [False, True])
def test_nothing_is_left_of_a_trace_once_something_was_compiled(reset):
    model, x = Layer(), sequences()
    torch.compile(Layer(), backend="eager")(x)
    if reset:
        torch._dynamo.reset()
    test_nothing_is_left_of_a_trace()
    twin = ablate(model, inputs=x)
    torch.compile(twin, backend="eager")(x)
    test_nothing_is_left_of_a_trace()


def test_an_input_that_leaves_torch_is_told():
    """Ids that are read as Python numbers: what is made of them cannot be seen, which is not that there is none."""

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.lin = nn.Embedding(20, 6), nn.Linear(6, 6)

        def forward(self, ids):
            x = torch.stack([self.table.weight[i] for i in ids.tolist()])
            return x + self.lin(x).tanh()

    found = find_shortcuts(Looking(), torch.tensor([3, 4, 5]))
    assert not len(found) and [o.name for o in found.opaque] == ["input"]
    assert not find_shortcuts(nn.Linear(6, 6), torch.ones(2, 6)).opaque
