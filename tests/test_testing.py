"""The contract suite over every registered shortcut module, and proof that each of its clauses can fail."""

import pytest
import torch
from torch import nn

import skipscope.nn as sn
from skipscope import SkipscopeError
from skipscope.testing import BrokenContract, check_shortcut

WIDTH = 8
ALL = (
    "shape", "repeatable", "samples", "gradient", "weights", "found", "ablatable", "state_dict", "compile", "autocast",
)  # fmt: skip


def branch():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


@pytest.mark.parametrize("name", sn.registry())
def test_every_registered_module_keeps_the_contract(name):
    torch.manual_seed(0)
    module = sn.registry()[name](branch(), WIDTH, depth=4)
    compiles = name == "identity"
    held = check_shortcut(module, compile=compiles)
    expected = set(ALL) - (set() if compiles else {"compile"})
    assert set(held) == expected | ({"identity_at_start"} if module.identity_at_start else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", sn.registry())
def test_every_registered_module_compiles(name):
    torch.manual_seed(0)
    assert "compile" in check_shortcut(sn.registry()[name](branch(), WIDTH, depth=4))


@pytest.mark.parametrize("name", sn.registry())
def test_every_registered_module_keeps_it_on_images(name):
    torch.manual_seed(0)
    convolutions = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    check_shortcut(sn.registry()[name](convolutions, 4, dim=1, depth=4), compile=False)


@pytest.mark.parametrize("letter", "ABC")
def test_options_where_the_shape_changes(letter):
    convolutions = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
    module = sn.option(letter, convolutions, 4, 8, stride=2, dim=1)
    check_shortcut(module, torch.randn(3, 4, 6, 6), same_shape=False, compile=False)


def test_hyper_connection_on_streams():
    check_shortcut(sn.HyperConnection(branch(), 3), torch.randn(3, 5, WIDTH), compile=False)


def test_value_residual_on_tokens():
    check_shortcut(sn.ValueResidual(WIDTH, 3, 2), torch.randn(2, 5, WIDTH))


# --- each clause can fail ---------------------------------------------------------------------------------------


class Block(sn.Connection):
    """A correct block; the broken ones below differ from it in one thing."""

    def __init__(self):
        super().__init__(branch())


class OutputIsATuple(Block):
    def forward(self, x):
        return (super().forward(x),)


class OtherShape(Block):
    def forward(self, x):
        return super().forward(x)[:, :4]


class NotFinite(Block):
    def write(self, x, f):
        return x + f / 0.0


class NotTheIdentity(Block):
    identity_at_start = True


class NoGradient(Block):
    def forward(self, x):
        return super().forward(x.detach()) + 0 * self.branch[0].weight.sum()


class NoGradientInTraining(Block):
    def forward(self, x):
        return super().forward(x.detach() if self.training else x)


class ChangesItsInput(Block):
    def forward(self, x):
        x += self.branch(x)
        return x


class OnlyTheBranchHasAGradient(Block):
    def write(self, x, f):
        return x.detach() + f


class NoShortcut(Block):
    def write(self, x, f):
        return f


class OtherKind(Block):
    kind = "gated"


class TwoBranches(Block):
    """Parallel branches: a merge, but not a shortcut."""

    def __init__(self):
        super().__init__()
        self.other = branch()

    def write(self, x, f):
        return f + self.other(x)


class ForgetsStateWhenSaved(Block):
    def state_dict(self, *args, **keywords):
        state = super().state_dict(*args, **keywords)
        state.pop(next(iter(state)))
        return state


class LoadsWrong(Block):
    def load_state_dict(self, state, *args, **keywords):
        return super().load_state_dict({k: v * 1.5 for k, v in state.items()}, *args, **keywords)


class BreaksTheGraph(Block):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class NeedsFullPrecision(Block):
    def write(self, x, f):
        if f.dtype != x.dtype:
            raise TypeError("another dtype")
        return x + f


class FarOffInHalfPrecision(Block):
    def write(self, x, f):
        return x + f + (3 if f.dtype == torch.bfloat16 else 0)


class RaisesAnything(Block):
    def forward(self, x):
        raise KeyError("what now")


class NoiseInEvaluation(Block):
    def write(self, x, f):
        return x + nn.functional.dropout(f, 0.5, True)


class Counts(Block):
    calls = 0

    def write(self, x, f):
        self.calls += 1
        return x + f * (1 + 0.1 * self.calls)


class CountsInABuffer(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def write(self, x, f):
        self.calls += 1
        return x + f


class KeepsTheFirstInput(Block):
    first = None

    def write(self, x, f):
        self.first = x.detach() if self.first is None else self.first
        return x + f + self.first.mean()


class OneSamplesShortcut(Block):
    def write(self, x, f):
        return x[:1] + f


class FourSamplesOnly(Block):
    def forward(self, x):
        return super().forward(x.view(4, WIDTH))


class HalfOfTheGradient(Block):
    def write(self, x, f):
        return x / 2 + (x / 2).detach() + f


class ForgetsAFactor(Block):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))


class DetachedBranch(Block):
    def write(self, x, f):
        return x + f.detach()


class OnlyFloat(Block):
    def write(self, x, f):
        return (x + f).float()


class NoShortcutInTraining(Block):
    def write(self, x, f):
        return f if self.training else x + f


BROKEN = {
    OutputIsATuple: "shape: the output is not one tensor",
    OtherShape: "shape: the output has another shape",
    NotFinite: "shape: the output is not finite",
    NotTheIdentity: "identity_at_start: a fresh module does not return its input",
    NoGradient: "gradient: none reaches the input in evaluation mode",
    NoGradientInTraining: "gradient: none reaches the input in training mode",
    ChangesItsInput: "shape: the block changes its input in place",
    OnlyTheBranchHasAGradient: "gradient: it is not that of the output",
    NoiseInEvaluation: "repeatable: two passes in evaluation mode differ",
    Counts: "repeatable: two passes in evaluation mode differ",
    CountsInABuffer: "repeatable: a pass in evaluation mode changes the state",
    KeepsTheFirstInput: "repeatable: the output depends on what the module was called with before",
    OneSamplesShortcut: "samples: a sample's output depends on its place",
    FourSamplesOnly: "samples: 1 of them raise",
    HalfOfTheGradient: "gradient: it is not that of the output",
    ForgetsAFactor: "weights: no gradient reaches some trainable weights",
    DetachedBranch: "gradient: it is not that of the output",
    OnlyFloat: "gradient: float64 goes in and another dtype comes out",
    NoShortcutInTraining: "found: another number of shortcuts in training mode",
    NoShortcut: "found: find_shortcuts does not find it",
    TwoBranches: "found: find_shortcuts does not find it",
    OtherKind: "found: as another kind",
    ForgetsStateWhenSaved: "state_dict: it raises RuntimeError",
    LoadsWrong: "state_dict: a copy that loads it gives another output",
    BreaksTheGraph: "compile: it raises",
    NeedsFullPrecision: "autocast: it raises TypeError",
    FarOffInHalfPrecision: "autocast: the output is far",
    RaisesAnything: "shape: it raises KeyError",
}


def test_the_correct_block_passes():
    assert check_shortcut(Block()) == ALL


@pytest.mark.parametrize("broken", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_block_fails_and_says_why(broken):
    with pytest.raises(BrokenContract, match=BROKEN[broken]) as caught:
        check_shortcut(broken())
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, SkipscopeError)
    assert broken.__name__ in str(caught.value)


@pytest.mark.parametrize(
    "how, says",
    [
        ("detach", "detach changes the output"),
        ("remove", "strength 1 is not as built, or strength 0 is not remove"),
        ("nothing", "removing the shortcut changes nothing"),
        ("keys", "changes the keys"),
    ],
)
def test_ablatable_fails_when_an_edit_is_wrong(monkeypatch, how, says):
    from skipscope import testing

    honest = testing.ablate

    def planted(module, found, *, how_=how, **options):
        if how_ == "nothing":
            return module
        twin = honest(module, found, **options)
        if how_ == "keys":
            twin.register_buffer("extra", torch.zeros(1))
        elif options.get("how") == how_:
            twin.register_forward_hook(lambda module, args, output: output + 1)
        return twin

    monkeypatch.setattr(testing, "ablate", planted)
    with pytest.raises(BrokenContract, match=says):
        check_shortcut(Block(), compile=False)


def test_a_state_that_is_not_tensors_fails():
    class Extra(Block):
        def get_extra_state(self):
            return Block()

        def set_extra_state(self, state):
            pass

    with pytest.raises(BrokenContract, match="state_dict"):
        check_shortcut(Extra(), compile=False)


def test_the_module_and_the_generators_stay_as_they_were():
    module = nn.Sequential(Block(), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5)).train()
    before, rng = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    check_shortcut(module, torch.randn(5, WIDTH), compile=False)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert module.training and all(p.grad is None for p in module.parameters())
    assert not torch.equal(rng, torch.get_rng_state())  # the inputs above were drawn; nothing else was
    torch.set_rng_state(rng)
    torch.randn(5, WIDTH)
    after = torch.get_rng_state()
    check_shortcut(module, torch.ones(5, WIDTH), compile=False)
    assert torch.equal(after, torch.get_rng_state())


class Masked(Block):
    def forward(self, x, mask, *, scale=1.0):
        return x + scale * mask * self.branch(x)


@pytest.mark.parametrize("form", [tuple, dict])
def test_blocks_with_several_inputs(form):
    x, mask = torch.randn(3, WIDTH), torch.ones(3, WIDTH, dtype=torch.long)
    inputs = (x, mask) if form is tuple else {"mask": mask, "x": x, "scale": 0.5}
    assert check_shortcut(Masked(), inputs) == ALL
    with pytest.raises(BrokenContract, match="shape: it raises TypeError"):
        check_shortcut(Masked(), x)
    with pytest.raises(SkipscopeError, match="nothing that a shortcut could carry"):
        check_shortcut(Masked(), (mask, mask))


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_layers_keep_the_contract(norm_first):
    x = torch.randn(2, 5, WIDTH)
    encoder = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=norm_first)
    decoder = nn.TransformerDecoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=norm_first)
    check_shortcut(encoder, x, kind="identity", compile=False)
    check_shortcut(decoder, (x, torch.randn(2, 3, WIDTH)), kind="identity", compile=False)


def test_layers_of_transformers_keep_the_contract():
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block
    from transformers.models.llama import modeling_llama as llama

    x = torch.randn(2, 5, 16)
    config = transformers.GPT2Config(n_embd=16, n_head=2, attn_implementation="eager")
    check_shortcut(GPT2Block(config, layer_idx=0), x, kind="identity", compile=False)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    rotary = llama.LlamaRotaryEmbedding(config)(x, torch.arange(5)[None])
    inputs = {"hidden_states": x, "position_embeddings": rotary}
    check_shortcut(llama.LlamaDecoderLayer(config, 0), inputs, kind="identity", compile=False)


def test_inputs_that_cannot_be_guessed():
    with pytest.raises(SkipscopeError, match="pass inputs="):
        check_shortcut(sn.IdentityShortcut(nn.Tanh()))
