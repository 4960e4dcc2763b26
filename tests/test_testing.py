"""The contract suite over every registered shortcut module, and proof that each of its clauses can fail."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope.nn as sn
from skipscope import SkipscopeError
from skipscope.testing import BrokenContract, check_shortcut

WIDTH = 8
ALL = (
    "shape", "repeatable", "samples", "strides", "gradient", "weights", "found", "ablatable", "state_dict", "compile", "autocast",
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


# --- each clause can fail ---


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


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad


class Planted(Block):
    """Whatever a planted mistake may need."""

    def __init__(self):
        super().__init__()
        self.extra, self.weight, self.last, self.count = branch(), torch.ones(()), None, 0
        self.register_buffer("mean", torch.zeros(WIDTH))


def remembers(self, x):
    self.last = x
    return x + self.branch(x)


def counts(self, x):
    self.count += 1
    return x + self.branch(x)


def follows_the_data(self, x):
    self.mean.mul_(0.9).add_(x.detach().mean(0))
    return x + self.branch(x)


def fresh_dtype(self, x):
    y = torch.empty(x.shape)
    y[:] = x + self.branch(x)
    return y


def scaled_gradient(self, x):
    y = x + 0
    if y.requires_grad:
        y.register_hook(lambda grad: 3 * grad)
    return y + self.branch(x)


def in_place(self, x):
    x.relu_()
    return x + self.branch(x)


# One line a mistake; each block is `Planted` with this forward pass (its `extra` is dropped where it is not used).
# Rounding to float32 alone is not refused: sound blocks do it in their norms.
MISTAKES = {
    "dropout in evaluation": lambda s, x: x + nn.functional.dropout(s.branch(x), 0.5, True),
    "noise in evaluation": lambda s, x: x + s.branch(x) + 0.1 * torch.randn_like(x),
    "noise on the shortcut": lambda s, x: x * torch.rand(()) + s.branch(x),
    "a counter on the module": counts,
    "keeps its last input": remembers,
    "a buffer that follows the data in evaluation": follows_the_data,
    "a tensor outside the state_dict": lambda s, x: x + s.weight * s.branch(x),
    "trains without a shortcut": lambda s, x: s.branch(x) if s.training else x + s.branch(x),
    "a shortcut only in training": lambda s, x: x + s.branch(x) if s.training else s.branch(x),
    "trains with one shortcut more": lambda s, x: (
        x + s.branch(x) + (x * s.branch(x) + x if s.training else 0)
    ),
    "detached branch": lambda s, x: x + s.branch(x).detach(),
    "branch without gradients": lambda s, x: x + torch.no_grad()(s.branch)(x),
    "detached shortcut": lambda s, x: x.detach() + s.branch(x),
    "half of the gradient lost": lambda s, x: x / 2 + (x / 2).detach() + s.branch(x),
    "the shortcut by .data": lambda s, x: x.data + s.branch(x),
    "a wrong backward pass": lambda s, x: WrongBackward.apply(x) + s.branch(x),
    "a hook that scales the gradient": scaled_gradient,
    "a branch that is forgotten": lambda s, x: x + s.branch(x),
    "half of a layer unused": lambda s, x: x + s.branch(x) + s.extra[2](x) * 0.5,
    "a batch of four only": lambda s, x: x + s.branch(x.view(4, WIDTH)),
    "fails for one sample": lambda s, x: (
        x + s.branch(x) / (len(x) - 1) * (len(x) - 1) if len(x) > 1 else x[5]
    ),
    "the batch's mean": lambda s, x: x - x.mean(0) + s.branch(x),
    "samples change places": lambda s, x: x.flip(0) + s.branch(x),
    "one sample's shortcut": lambda s, x: x[:1] + s.branch(x),
    "the first sample is special": lambda s, x: (
        x + s.branch(x) * torch.arange(1, len(x) + 1).clamp(max=2)[:, None]
    ),
    "a mean in place of x": lambda s, x: x.mean(-1, keepdim=True) + s.branch(x),
    "one feature in place of x": lambda s, x: x[:, :1] + s.branch(x),
    "rounds to float32": lambda s, x: x.float() + s.branch(x),
    "a new tensor's dtype": fresh_dtype,
    "reads memory, not numbers": lambda s, x: x.as_strided(x.shape, (WIDTH, 1)) + s.branch(x),
    "changes its input": in_place,
    "divides by zero": lambda s, x: x + s.branch(x) / 0.0,
}
KEEPS_EXTRA = {"a branch that is forgotten", "half of a layer unused"}


@pytest.mark.parametrize("mistake", sorted(MISTAKES.keys() - {"rounds to float32"}))
def test_planted_mistakes_are_refused(mistake):
    torch.manual_seed(0)
    block = type("Block", (Planted,), {"forward": MISTAKES[mistake]})()
    if mistake not in KEEPS_EXTRA:
        del block.extra
    if mistake != "a tensor outside the state_dict":
        del block.weight
    with pytest.raises(BrokenContract):
        check_shortcut(block, torch.randn(4, WIDTH), compile=False)


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


def stock_blocks():
    """Blocks of other libraries, each with an input."""
    from timm.models import convnext, mlp_mixer, regnet, resnet, resnetv2, vision_transformer
    from torchvision.models import convnext as their_convnext
    from torchvision.models import mobilenetv2, swin_transformer
    from torchvision.models import resnet as their_resnet
    from torchvision.models import vision_transformer as their_vit

    images, tokens = torch.randn(3, 8, 6, 6), torch.randn(3, 4, 16)
    yield "timm BasicBlock", resnet.BasicBlock(8, 8), images
    yield "timm Bottleneck", resnet.Bottleneck(8, 2), images
    yield (
        "timm PreActBottleneck",
        resnetv2.PreActBottleneck(32, 32, bottle_ratio=1.0),
        torch.randn(3, 32, 4, 4),
    )
    yield "timm ViT", vision_transformer.Block(16, 2), tokens
    yield "timm ViT, parallel", vision_transformer.ParallelScalingBlock(16, 2), tokens
    yield "timm ViT, layer scale", vision_transformer.Block(16, 2, init_values=0.1), tokens
    yield "timm ConvNeXt", convnext.ConvNeXtBlock(8), images
    yield "timm Mixer", mlp_mixer.MixerBlock(16, 4), tokens
    yield "timm ResMLP", mlp_mixer.ResBlock(16, 4, mlp_ratio=4, norm_layer=mlp_mixer.Affine), tokens
    yield "timm RegNet", regnet.Bottleneck(8, 8, group_size=4), images
    yield "torchvision BasicBlock", their_resnet.BasicBlock(8, 8), images
    yield "torchvision Bottleneck", their_resnet.Bottleneck(8, 2), images
    yield "torchvision inverted residual", mobilenetv2.InvertedResidual(8, 8, 1, 2), images
    yield "torchvision ConvNeXt", their_convnext.CNBlock(8, 1e-6, 0.0), images
    yield "torchvision ViT", their_vit.EncoderBlock(2, 16, 32, 0.0, 0.0), tokens
    yield (
        "torchvision Swin",
        swin_transformer.SwinTransformerBlock(16, 2, [2, 2], [1, 1]),
        torch.randn(2, 4, 4, 16),
    )


def stock_layers():
    """Layers of transformers, each with an input."""
    import transformers
    from transformers.models.bert.modeling_bert import BertLayer
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer
    from transformers.models.t5.modeling_t5 import T5LayerFF
    from transformers.models.vit.modeling_vit import ViTLayer

    tokens = torch.randn(2, 5, 16)
    small = {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "attn_implementation": "eager",
    }
    yield "BERT", BertLayer(transformers.BertConfig(**small)), tokens
    yield "ViT", ViTLayer(transformers.ViTConfig(**small)), tokens
    yield "T5", T5LayerFF(transformers.T5Config(d_model=16, d_ff=32)), tokens
    config = transformers.GPTNeoXConfig(**small)
    rotary = torch.randn(2, 5, 2), torch.randn(2, 5, 2)
    yield (
        "GPT-NeoX",
        GPTNeoXLayer(config, 0),
        {"hidden_states": tokens, "attention_mask": None, "position_embeddings": rotary},
    )


class FirstOutput(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **keywords):
        out = self.block(*args, **keywords)
        return out if isinstance(out, torch.Tensor) else out[0]


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("blocks", "library", "count"), [(stock_blocks, "timm", 16), (stock_layers, "transformers", 4)]
)
def test_sound_blocks_of_other_libraries_are_not_refused(blocks, library, count):
    pytest.importorskip(library)
    torch.manual_seed(0)
    refused, checked = {}, 0
    for name, block, inputs in blocks():
        checked += 1
        try:
            check_shortcut(FirstOutput(block), inputs, compile=False)
        except SkipscopeError as error:
            refused[name] = str(error)
    assert not refused and checked == count


# --- further mistakes, and sound blocks ---


class InAList(nn.Module):
    """Its second branch is in a list, which torch does not look into."""

    def __init__(self):
        super().__init__()
        self.branch, self.more = branch(), [branch()]

    def forward(self, x):
        return x + self.branch(x) + self.more[0](x)


class InADict(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch, self.gains = branch(), {"out": torch.full((WIDTH,), 0.5)}

    def forward(self, x):
        return x + self.gains["out"] * self.branch(x)


class CachesByShape(Block):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def write(self, x, f):
        return x + f * self.cache.setdefault(x.shape, torch.sigmoid(x.detach()))


LAST = [torch.zeros(())]


def reads_a_global(self, x):
    before, LAST[0] = LAST[0], x.detach().mean()
    return x + self.branch(x) + before


def shrinks_its_weights(self, x):
    with torch.no_grad():
        self.branch[0].weight.mul_(0.99)
    return x + self.branch(x)


class GateAsANumber(Block):
    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.5))

    def write(self, x, f):
        return x + self.gate.item() * f


def by_numpy(self, x):
    return x + torch.from_numpy(self.branch(x).detach().numpy())


def with_forward(forward):
    return lambda: type("Block", (Block,), {"forward": forward})()


FURTHER_MISTAKES = {
    "layers in a list": InAList,
    "a tensor in a dict": InADict,
    "a cache by shape": CachesByShape,
    "the last input in a global": with_forward(reads_a_global),
    "a batch of one squeezed": with_forward(lambda s, x: x.squeeze() + s.branch(x.squeeze())),
    "softmax over samples": with_forward(lambda s, x: x + s.branch(x).softmax(0)),
    "the gradient of large numbers lost": with_forward(
        lambda s, x: torch.where(x > 0.5, x.detach(), x) + s.branch(x)
    ),
    "weights that shrink at each pass": with_forward(shrinks_its_weights),
    "a gate as a number": GateAsANumber,
    "a reshape in place of a transpose": with_forward(lambda s, x: x.T.reshape(x.shape) + s.branch(x)),
    "a branch by numpy": with_forward(by_numpy),
    "a rounded shortcut": with_forward(lambda s, x: x.round() + s.branch(x)),
}


@pytest.mark.parametrize("mistake", FURTHER_MISTAKES)
def test_further_planted_mistakes_are_refused(mistake):
    torch.manual_seed(0)
    block = FURTHER_MISTAKES[mistake]()
    with pytest.raises(BrokenContract):
        check_shortcut(block, torch.randn(4, WIDTH), compile=False)


class Residual(nn.Module):
    """``x + body(norm(x))``, as most people write it."""

    def __init__(self, norm, body):
        super().__init__()
        self.norm, self.body = norm, body

    def forward(self, x):
        return x + self.body(self.norm(x))


class SqueezeExcite(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        x = self.conv(x)
        return x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))


class CausalAttention(nn.Module):
    """Grouped queries, rotated by tables that are no weights."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * self.size, bias=False)
        angles = torch.arange(16)[:, None] / 100 ** (torch.arange(self.size // 2) / (self.size // 2))
        self.register_buffer("turns", torch.cat([angles, angles], -1), persistent=False)

    def turned(self, x):
        turns = self.turns[: x.shape[-2]].to(x.dtype)
        half = torch.cat([-x[..., self.size // 2 :], x[..., : self.size // 2]], -1)
        return x * turns.cos() + half * turns.sin()

    def forward(self, x):
        q = self.q(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        k, v = (t.unsqueeze(1).expand_as(q) for t in self.kv(x).chunk(2, -1))
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v, is_causal=True)
        return y.transpose(1, 2).flatten(2)


class GatedMLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.gate, self.down = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ParallelLayer(nn.Module):
    """GPT-J's: one norm, attention and MLP side by side."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(width), CausalAttention(width, 2), GatedMLP(width)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h) + self.mlp(h)


class FourierMix(nn.Module):
    def forward(self, x):
        return torch.fft.fft2(x).real


class Recurrent(nn.GRU):
    def forward(self, x):
        return super().forward(x)[0]


class CausalConv(nn.Conv1d):
    def forward(self, x):
        return super().forward(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


class Experts(nn.Module):
    """A softmax over three experts."""

    def __init__(self, width):
        super().__init__()
        self.router, self.experts = nn.Linear(width, 3), nn.ModuleList(branch() for _ in range(3))

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        return sum(shares[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class TokenShift(nn.Module):
    """RWKV's: each token mixed with the one before it."""

    def __init__(self, width):
        super().__init__()
        self.mix, self.key, self.value = (
            nn.Parameter(torch.rand(width)),
            nn.Linear(width, 9),
            nn.Linear(9, width),
        )

    def forward(self, x):
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.value(self.key(x * self.mix + before * (1 - self.mix)).relu().square())


class DropsPaths(nn.Module):
    """Stochastic depth with a layer scale."""

    def __init__(self, width):
        super().__init__()
        self.mlp, self.scale = branch(), nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x):
        f = self.scale * self.mlp(x)
        if self.training:
            f = f * torch.empty(len(x), 1, 1).bernoulli_(0.8) / 0.8
        return x + f


def normalised_weights():
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        nn.GELU(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)),
    )


class KnowsItsOwner(Residual):
    """A list keeps torch from taking the owner for a part."""

    def __init__(self):
        super().__init__(nn.LayerNorm(WIDTH), branch())
        self.owner = [nn.ModuleList([self, nn.Linear(2, 2)])]


TOKENS, IMAGES = (3, 5, WIDTH), (3, WIDTH, 6, 6)
SOUND = {
    "group norm and squeeze-excite": (lambda: Residual(nn.GroupNorm(2, WIDTH), SqueezeExcite(WIDTH)), IMAGES),
    "grouped queries, rotary": (lambda: Residual(nn.RMSNorm(WIDTH), CausalAttention(WIDTH, 2)), TOKENS),
    "SwiGLU": (lambda: Residual(nn.RMSNorm(WIDTH), GatedMLP(WIDTH)), TOKENS),
    "attention and MLP in parallel": (lambda: ParallelLayer(WIDTH), TOKENS),
    "Fourier mixing": (lambda: Residual(nn.LayerNorm(WIDTH), nn.Sequential(FourierMix(), nn.Linear(WIDTH, WIDTH))), TOKENS),
    "a recurrent branch": (lambda: Residual(nn.LayerNorm(WIDTH), Recurrent(WIDTH, WIDTH, batch_first=True)), TOKENS),
    "a causal convolution": (lambda: Residual(nn.LayerNorm(WIDTH), CausalConv(WIDTH, WIDTH, 3)), TOKENS),
    "soft experts": (lambda: Residual(nn.LayerNorm(WIDTH), Experts(WIDTH)), (4, WIDTH)),
    "token shift": (lambda: Residual(nn.LayerNorm(WIDTH), TokenShift(WIDTH)), TOKENS),
    "dropped paths": (lambda: DropsPaths(WIDTH), TOKENS),
    "normalised weights": (lambda: Residual(nn.Identity(), normalised_weights()), (4, WIDTH)),
    "a list with its owner": (KnowsItsOwner, TOKENS),
    "batch norm": (lambda: Residual(nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)), IMAGES),
}  # fmt: skip


@pytest.mark.parametrize("name", SOUND)
def test_sound_blocks_of_several_styles_are_not_refused(name):
    torch.manual_seed(0)
    make, shape = SOUND[name]
    check_shortcut(make(), torch.randn(shape), compile=False)
