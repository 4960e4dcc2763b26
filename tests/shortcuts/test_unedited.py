"""No twin is silently the network as built: it is edited, refused, or says that none of its edits was met."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import skipscope as ss
from skipscope._errors import SkipscopeError
from skipscope.shortcuts import ablate, find_shortcuts, meaning

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.lin(x).tanh()


def chain(depth=3) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(depth)))


def without(blocks, x=X):
    for block in blocks:
        x = block.lin(x).tanh()
    return x


# --- methods of their own ---


class Coder(nn.Module):
    """A model whose forward calls its other methods, and one that merges by code of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def encode(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x

    def decode(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.decode(self.encode(x))

    def encode_quietly(self, x):
        for layer in self.layers:
            x = x + layer(x).sigmoid()
        return x

    def penalty(self):
        layers: Any = self.layers
        first, second, _ = (layer.weight for layer in layers)
        return (first + second).square().sum()

    def loss(self, x, y):
        return (self(x) - y).square().mean() + 0.1 * self.penalty()

    def mixed(self, x):
        return self(0.5 * x + 0.5 * x.flip(0))

    def sample(self, x, steps):
        for _ in range(steps):
            x = self(x)
        return x


def encoded(net, x=X):
    for layer in net.layers:
        x = layer(x).tanh()
    return x


def test_methods_are_edited_as_the_forward_that_calls_them():
    net: Any = Coder()
    twin: Any = ablate(net, inputs=X)
    whole = without(net.blocks, encoded(net))
    torch.testing.assert_close(twin(X), whole)
    torch.testing.assert_close(twin.encode(X), encoded(net))
    torch.testing.assert_close(twin.decode(X), without(net.blocks))
    torch.testing.assert_close(twin.loss(X, X), (whole - X).square().mean() + 0.1 * net.penalty())
    assert torch.equal(twin.penalty(), net.penalty())
    mixed = 0.5 * X + 0.5 * X.flip(0)
    torch.testing.assert_close(twin.mixed(X), without(net.blocks, encoded(net, mixed)))
    twice = without(net.blocks, encoded(net, whole))
    torch.testing.assert_close(twin.sample(X, 2), twice)
    same = copy.deepcopy(twin)
    torch.testing.assert_close(same.encode(X), encoded(net))


def test_a_method_with_other_merges_is_refused():
    twin: Any = ablate(Coder(), inputs=X)
    with pytest.raises(SkipscopeError, match=r"(?s)encode_quietly merges by code of its own.*encode_quietly"):
        twin.encode_quietly(X)


def test_some_of_the_merges_of_one_line_are_edited_only_where_the_twin_runs_as_a_whole():
    net: Any = Coder()
    twin: Any = ablate(net, find_shortcuts(net, X)[1:2])
    x = net.layers[0](X).tanh() + X
    x = net.layers[1](x).tanh()
    torch.testing.assert_close(twin(X), net.decode(net.layers[2](x).tanh() + x))
    torch.testing.assert_close(twin.sample(X, 2), twin(twin(X)))
    with pytest.raises(SkipscopeError, match=r"(?s)run by itself.*call the twin itself"):
        twin.encode(X)


class Holder(nn.Module):
    """The merges are in a method of a child that has no forward of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.part = Part()

    def forward(self, x):
        return self.part.run(x)


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def run(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x


def test_a_method_of_a_child():
    net: Any = Holder()
    twin: Any = ablate(net, inputs=X)
    torch.testing.assert_close(twin(X), encoded(net.part))
    torch.testing.assert_close(twin.part.run(X), encoded(net.part))


def test_parts_of_a_twin_are_edited_by_themselves():
    net = chain()
    twin: Any = ablate(net, inputs=X)
    torch.testing.assert_close(twin[1](X), without([net[1]]))
    torch.testing.assert_close(twin[1].forward(X), without([net[1]]))
    torch.testing.assert_close(twin[1:](X), without(net[1:]))
    part: Any = nn.Sequential(Adds(), Adds())
    for one in part:
        one.register_forward_hook(Adding().hook)
    edited: Any = ablate(part, inputs=X)
    torch.testing.assert_close(edited[0](X), part[0].lin(X))


class Adds(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(x)


class Adding:
    def hook(self, module, args, output):
        return args[0] + output


def test_a_compiled_method():
    net: Any = Coder()
    twin: Any = ablate(net, inputs=X)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), without(net.blocks, encoded(net)))
    torch.testing.assert_close(torch.compile(lambda x: twin(x), backend="eager", fullgraph=True)(X), twin(X))
    with pytest.raises(Exception, match=r"run_method|compiled by itself"):
        torch.compile(twin.encode, backend="eager", fullgraph=True)(X)


class CompiledInTheClass(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    @torch.compile(backend="eager")
    def encode(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        return x

    @torch.compile(backend="eager")
    def forward(self, x):
        return self.encode(x)


def test_methods_that_the_class_compiles():
    net: Any = CompiledInTheClass()
    found = find_shortcuts(net, X)
    assert len(found) == 3
    twin: Any = ablate(net, found)
    torch.testing.assert_close(twin(X), encoded(net))
    torch.testing.assert_close(twin.encode(X), encoded(net))


# --- tracers ---


class Wrapping(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapping, lambda m: nn.Sequential(nn.Tanh(), m)])
def test_scripts_and_symbols_are_refused_and_traces_keep_the_edits(wrap):
    twin = wrap(ablate(chain(), inputs=X))
    with pytest.raises(SkipscopeError, match=r"(?s)jit\.script.*torch\.jit\.trace"):
        torch.jit.script(twin)
    with pytest.raises(SkipscopeError, match=r"(?s)symbolic_trace.*torch\.export"):
        torch.fx.symbolic_trace(twin)
    expected = twin(X)
    traced: Any = torch.jit.trace(twin, X)
    torch.testing.assert_close(traced(X), expected)
    torch.testing.assert_close(torch.export.export(twin, (X,)).module()(X), expected)


def test_a_tracer_may_take_an_edited_block_as_a_whole():
    twin: Any = ablate(chain(), inputs=X)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, Block)

    model = Wrapping(twin[0])
    graph: Any = torch.fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(graph(X), twin[0](X) * 2)


def test_a_graph_module_is_edited_and_so_is_its_copy():
    net = chain()
    traced: Any = torch.fx.symbolic_trace(net)
    found = find_shortcuts(traced, X)
    assert len(found) == 3
    twin: Any = ablate(traced, found)
    torch.testing.assert_close(twin(X), without(net))
    for same in (copy.deepcopy(twin), ablate(twin, found, strength=0.5)):
        torch.testing.assert_close(same(X), without(net))
    twin.recompile()
    torch.testing.assert_close(twin(X), without(net))


# --- passes that meet no edit ---


class Choosing(nn.Module):
    """Runs one of its experts; a mask chooses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts, self.which = nn.ModuleList(Block() for _ in range(3)), 0

    def forward(self, x):
        return self.experts[self.which](x)


def test_a_pass_in_which_no_edit_was_met_says_so_once():
    net: Any = Choosing()
    twin: Any = ablate(net, inputs=X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin(X)
    twin.which = 1
    with pytest.warns(UserWarning, match="none of the edited shortcuts was reached"):
        assert torch.equal(twin(X), twin.experts[1](X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin(X)


class Otherwise(nn.Module):
    def __init__(self, other):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.lin2, self.other, self.mode = nn.Linear(6, 6), nn.Linear(6, 6), other, "traced"

    def forward(self, x):
        if self.mode == "traced":
            x = x + self.lin(x).tanh()
            return x + self.lin2(x).tanh()
        return self.other(self, x)


@pytest.mark.parametrize(
    "other",
    [
        lambda self, x: torch.add(self.lin(x), x),
        lambda self, x: torch.lerp(x, self.lin(x), 0.5),
        lambda self, x: torch.cat([x, self.lin(x)], -1),
        lambda self, x: x - self.lin(x),
    ],
)
def test_other_code_is_refused_by_whatever_it_merges(other):
    twin: Any = ablate(Otherwise(other), inputs=X)
    twin(X)
    twin.mode = "other"
    with pytest.raises(SkipscopeError, match="ran other code"):
        twin(X)


def test_a_pass_without_merges_is_nobodys_business():
    twin: Any = ablate(Otherwise(lambda self, x: self.lin(x)), inputs=X)
    twin.mode = "other"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(twin(X), twin.lin(X))


# --- nothing to edit ---


def test_a_typo_is_refused_and_near_names_are_told():
    found = find_shortcuts(chain(), X)
    with pytest.raises(SkipscopeError, match=r"(?s)unknown kind 'identiy'.*did you mean 'identity'"):
        found.select(kind="identiy")
    with pytest.raises(SkipscopeError, match=r"(?s)unknown kind 'gate'.*did you mean 'gated'"):
        found.select(kind=["identity", "gate"])
    with pytest.raises(SkipscopeError, match=r"(?s)has a name that matches.*'layer\.\*'.*begin with 0"):
        found.select(name="layer.*")
    deep = find_shortcuts(ss.reference.deep_mlp(4, shortcut="identity"), ss.reference.digits(8)[0])
    with pytest.raises(SkipscopeError, match=r"(?s)'layer\.\*'.*did you mean 'layers\.\d'"):
        deep.select(name="layer.*")
    assert len(found.select(kind="projection")) == 0
    assert len(found.select(name="[01]")) == 2


def test_an_empty_selection_is_refused_unless_asked_for():
    net = chain()
    found = find_shortcuts(net, X)
    none = found.select(kind="gated")
    plain = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    for call in (
        lambda **o: ablate(net, none, **o),
        lambda **o: ablate(net, [], **o),
        lambda **o: ablate(plain, inputs=X, **o),
    ):
        with pytest.raises(SkipscopeError, match=r"(?s)no shortcut to edit.*allow_empty=True"):
            call()
        assert call(allow_empty=True)(X).shape == X.shape
    assert torch.equal(ablate(net, none, allow_empty=True)(X), net(X))
    data = X, torch.zeros(4, 6)
    with pytest.raises(
        SkipscopeError, match=r"(?s)importance: there is no shortcut to try.*allow_empty=True"
    ):
        ss.importance(plain, data, nn.functional.mse_loss)
    with pytest.raises(SkipscopeError, match="no shortcut to try"):
        ss.importance(net, data, nn.functional.mse_loss, found=none)
    assert len(ss.importance(plain, data, nn.functional.mse_loss, allow_empty=True)) == 0


def test_shortcuts_of_a_deeper_model_of_the_same_class_are_refused():
    class Deep(nn.Module):
        def __init__(self, depth):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x).tanh()
            return x

    shallow, deep = Deep(2), Deep(4)
    found = find_shortcuts(deep, X)
    for chosen in (found, found[2:], list(found), found[3]):
        with pytest.raises(SkipscopeError, match=r"(?s)another architecture.*layers\.[23]"):
            ablate(shallow, chosen)
    with pytest.raises(SkipscopeError, match=r"(?s)another architecture.*no module layers\.2"):
        ablate(deep, find_shortcuts(shallow, X))
    with pytest.raises(SkipscopeError, match=r"(?s)importance: .*another architecture"):
        ss.importance(shallow, (X, torch.zeros(4, 6)), nn.functional.mse_loss, found=found)


@pytest.mark.parametrize("depths", [(2, 4), (4, 2)])
def test_so_are_those_of_blocks_that_hold_several_layers(depths):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return x + self.b(self.a(x).relu())

    one, other = (nn.Sequential(*(Block() for _ in range(depth))) for depth in depths)
    found = find_shortcuts(one, X)
    with pytest.raises(SkipscopeError, match=r"(?s)another architecture.*module 2"):
        ablate(other, found)
    # An adapter that was put in later is no other depth.
    one[0].adapter = nn.Linear(6, 6)
    assert ablate(one, found)(X).shape == X.shape


def test_a_strength_for_each_is_refused():
    with pytest.raises(SkipscopeError, match="a strength is one factor for all"):
        ablate(nn.Linear(6, 6), inputs=X, strength=[0.5, 1.0])  # pyright: ignore[reportArgumentType]


def test_what_the_pass_did_not_run_is_in_the_meaning_of_the_twin():
    net: Any = Choosing()
    found = find_shortcuts(net, X)
    assert meaning(ablate(net, found)).startswith("removed")
    assert meaning(nn.Sequential(ablate(net, found), nn.Tanh())).startswith("removed")
    assert meaning(ablate(net, found)) == "removed, unknown in 2 modules that did not run"


# --- compiled parts of eager models ---


def summed(x, layer):
    return x + layer(x).tanh()


compiled_sum = torch.compile(summed, backend="eager")


class CallsCompiled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.last = Block()

    def forward(self, x):
        for layer in self.layers:
            x = compiled_sum(x, layer)
        return self.last(x)


def test_a_function_that_is_compiled_by_itself_is_edited():
    model: Any = CallsCompiled()
    found = find_shortcuts(model, X)
    expected = model.last.lin(model.layers[1](model.layers[0](X).tanh()).tanh()).tanh()
    twin = ablate(model, found)
    torch.testing.assert_close(twin(X), expected)
    torch.testing.assert_close(copy.deepcopy(twin)(X), expected)
    torch.testing.assert_close(ablate(ablate(model, found[0]), found[1:])(X), expected)
    torch.testing.assert_close(torch.compile(twin, backend="eager")(X), expected)
    assert torch.equal(ablate(model, found, strength=1.0)(X), model(X))


@pytest.mark.parametrize("when", ["before", "after"])
def test_no_warning_where_the_edited_block_is_compiled(when):
    model: Any = chain(2)
    expected = model[1](model[0].lin(X).tanh())
    if when == "before":
        model[0].compile(backend="eager")
    twin: Any = ablate(model, find_shortcuts(model, X)[0])
    if when == "after":
        twin[0] = torch.compile(twin[0], backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            torch.testing.assert_close(twin(X), expected)


class Switch(nn.Module):
    """x + F(x), or F(x) + b with a weight b."""

    def __init__(self):
        super().__init__()
        self.lin, self.bias, self.is_shifted = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6)), False

    def forward(self, x):
        if self.is_shifted:
            return self.lin(x) + self.bias
        return x + self.lin(x)


def test_adding_a_weight_is_no_merge_in_which_a_shortcut_could_be():
    twin: Any = ablate(Switch(), inputs=X)
    twin.is_shifted = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(twin(X), twin.lin(X) + twin.bias)
