"""Rewired twins: each kind equals a network written by hand, and what does not fit is refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope import SkipscopeError
from skipscope.nn import Connection, registry
from skipscope.shortcuts import meaning
from skipscope.shortcuts._rewire import rewirable

WIDTH, DEPTH = 6, 4


class Branch(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = Branch()

    def forward(self, x):
        return x + self.branch(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def setup():
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, WIDTH).double()
    return model, x, ss.find_shortcuts(model, x)


def shaken(twin):
    """With the new weights away from their start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.startswith("shortcuts."):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return twin


def by_hand(kind, model, twin, x):
    """The network that a person would write with this kind's own modules around the branches."""
    branches = [copy.deepcopy(block.branch) for block in model.blocks]
    one = [registry()[kind](branch, WIDTH, depth=DEPTH) for branch in branches]
    if registry()[kind].spans_depth:
        one = [registry()[kind](branches, WIDTH, depth=DEPTH)]
    for i, module in enumerate(one):
        own = getattr(twin.shortcuts.blocks, str(i)).state_dict()
        missing, unexpected = module.double().eval().load_state_dict(own, strict=False)
        assert not unexpected and all("branch" in key or "blocks" in key for key in missing)
        for branch, block in zip(branches, twin.blocks):
            branch.load_state_dict(block.branch.state_dict())
    y = twin.stem(x)
    for module in one:
        y = module(y)
    return twin.head(y)


FITTING = [name for name, kind in registry().items() if kind.keeps_width and not kind.own_branches]


@pytest.mark.parametrize("kind", FITTING)
def test_each_kind_is_the_network_written_by_hand(kind):
    model, x, found = setup()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin = shaken(ss.rewire(model, found, kind=kind)).eval()
    torch.testing.assert_close(twin(x), by_hand(kind, model, twin, x))
    assert list(model.state_dict()) == [k for k in twin.state_dict() if not k.startswith("shortcuts.")]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert meaning(twin) == f"rewired: {kind}"


@pytest.mark.parametrize("kind", FITTING)
def test_each_kind_trains_is_copied_and_pickled(kind):
    model, x, found = setup()
    twin = ss.rewire(model, found, kind=kind, inputs=x)
    optimizer = torch.optim.SGD(twin.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(twin(x), torch.arange(5) % 3).backward()
        optimizer.step()
    new = [p for name, p in twin.named_parameters() if name.startswith("shortcuts.")]
    assert all(p.grad is not None for p in new)
    twin.eval()
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    for other in (copy.deepcopy(twin), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), twin(x))
        for parameter in other.parameters():
            parameter.data.zero_()
        assert not torch.equal(other(x), twin(x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", FITTING)
def test_each_kind_is_compiled_in_one_graph(kind):
    model, x, found = setup()
    twin = shaken(ss.rewire(model, found, kind=kind)).eval()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), twin(x))


def test_rezero_with_factor_one_is_the_original_bit_for_bit():
    model, x, found = setup()
    twin = ss.rewire(model, found, kind="rezero")
    assert not torch.equal(twin(x), model(x)) and torch.equal(twin(x), twin.head(twin.stem(x)))
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(1.0)
    assert torch.equal(twin(x), model(x))
    assert [k for k in twin.state_dict() if k.startswith("shortcuts.")] == [
        f"shortcuts.blocks.{i}.alpha" for i in range(DEPTH)
    ]


@pytest.mark.parametrize("inside", ["x += f", "f += x", "torch.add", "relu in place after"])
def test_sums_however_written(inside):
    class Written(Block):
        def forward(self, x):
            f = self.branch(x)
            if inside == "x += f":
                x = x.clone()
                x += f
                return x
            if inside == "f += x":
                f += x
                return f
            return F.relu(x + f, inplace=True) if "relu" in inside else torch.add(f, other=x)

    torch.manual_seed(0)
    model, x = Written(), torch.randn(5, WIDTH, requires_grad=True)
    twin = shaken(ss.rewire(model, ss.find_shortcuts(model, x), kind="highway"))
    gate = torch.sigmoid(next(twin.shortcuts.children()).gate(x))
    y = x + gate * (model.branch(x) - x)
    y = y.relu() if "relu" in inside else y
    torch.testing.assert_close(twin(x), y)
    torch.testing.assert_close(
        torch.autograd.grad(twin(x).square().sum(), x)[0], torch.autograd.grad(y.square().sum(), x)[0]
    )


def test_arguments_classes_and_functions():
    model, x, found = setup()
    for kind in ("layer-scale", ss.nn.LayerScale):
        twin = ss.rewire(model, found, kind=kind, init=0.5)
        assert twin.shortcuts.blocks.get_submodule("1").gamma.tolist() == [0.5] * WIDTH

    class Half(Connection):
        def __init__(self, width, dim, depth):
            super().__init__(nn.Identity())
            self.asked = width, dim, depth

        def write(self, x, f):
            return x / 2 + f

    twin = ss.rewire(model, found, kind=lambda *given: Half(*given))
    assert twin.shortcuts.blocks.get_submodule("0").asked == (WIDTH, -1, DEPTH)
    y = model.stem(x)
    for block in model.blocks:
        y = y / 2 + block.branch(y)
    torch.testing.assert_close(twin(x), model.head(y))


def test_images_have_their_features_second_and_containers_keep_running():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return x + self.conv(x)

    model, x = nn.Sequential(Pixels(), Pixels()), torch.randn(2, 4, 4, 4)
    twin = shaken(ss.rewire(model, inputs=x, kind="layer-scale"))
    y = x
    for i, block in enumerate(model):
        gamma = twin.state_dict()[f"shortcuts.{i}.gamma"]
        y = y + gamma[:, None, None] * block.conv(y)
    torch.testing.assert_close(twin(x), y)


def test_a_rewired_twin_is_a_model_like_any_other():
    """Found, cut and measured."""
    model, x, found = setup()
    twin = shaken(ss.rewire(model, found, kind="rezero"))
    again = ss.find_shortcuts(twin, x)
    assert [s.kind for s in again] == ["identity"] * DEPTH
    y = model.stem(x)
    for i, block in enumerate(model.blocks):
        y = twin.shortcuts.blocks.get_submodule(str(i)).alpha * block.branch(y)
    removed = ss.ablate(twin, again)
    torch.testing.assert_close(removed(x), model.head(y))
    flow = ss.gradient_flow(twin, (x, torch.arange(5) % 3), F.cross_entropy)
    assert flow.verdict.state == "healthy"


class TwoReaders(Block):
    """The fork feeds a gate beside the branch."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.branch(x) * torch.sigmoid(self.gate(x))


class Between(nn.Module):
    """A norm between two merges: not one chain."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = Branch(), Branch(), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = self.norm(x + self.one(x))
        return x + self.two(x)


class Gated(Block):
    def forward(self, x):
        gate = torch.sigmoid(x)
        return gate * x + (1 - gate) * self.branch(x)


class Taken(Block):
    shortcuts = None


class NormFirst(nn.Module):
    """The block of a vision transformer: each fork feeds a norm beside the branch that names the merge."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            nn.LayerNorm(WIDTH),
            Branch(),
            nn.LayerNorm(WIDTH),
            Branch(),
        )

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def test_kinds_that_read_read_before_the_norm_of_a_block():
    torch.manual_seed(0)
    model, x = nn.Sequential(NormFirst(), NormFirst()), torch.randn(5, WIDTH)
    found = ss.find_shortcuts(model, x)
    twin = shaken(ss.rewire(model, found, kind="fixup", inputs=x))
    y = x
    for i, block in enumerate(twin[:2]):
        for name, norm, branch in (("attn", block.norm1, block.attn), ("mlp", block.norm2, block.mlp)):
            own = twin.shortcuts.get_submodule(f"{i}.{name}")
            y = y + own.multiplier * branch(norm(y + own.bias_in)) + own.bias_out
    torch.testing.assert_close(twin(x), y)
    streams = ss.rewire(model, found, kind="hyper", inputs=x)
    torch.testing.assert_close(streams(x), model(x))


class Projected(Block):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.map(x) + self.branch(x)


REFUSED = {
    "a projection before the sum": (Projected, "pre-norm", "a projection stands between"),
    "two modules read the fork": (TwoReaders, "pre-norm", "something else uses the fork"),
    "no chain": (Between, "hyper", "do not form one chain"),
    "a gate": (Gated, "rezero", "not the sum of a shortcut and a branch"),
    "wider": (Block, "dense", "cannot take the place of a sum"),
    "a second branch": (Block, "shake-shake", "cannot take the place of a sum"),
    "pairs": (Block, "reversible", "in pairs"),
    "unknown": (Block, "skip", "unknown kind"),
    "no write": (Block, lambda width, dim, depth: nn.Linear(width, width), "without write"),
    "the name is taken": (Taken, "rezero", "has an attribute 'shortcuts'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_with_the_cure(case):
    make, kind, words = REFUSED[case]
    model, x = make(), torch.randn(5, WIDTH)
    found = ss.find_shortcuts(model, x)
    with pytest.raises(SkipscopeError, match=words) as refusal:
        ss.rewire(model, found, kind=kind)(x)
    assert refusal.value.cure or case == "unknown"
    assert refusal.value.operation == "rewire"


@pytest.mark.parametrize(
    "refused",
    [
        lambda model, x: ss.rewire(model),
        lambda model, x: ss.rewire(model, "all"),
        lambda model, x: torch.jit.script(ss.rewire(model, inputs=x)),
        lambda model, x: torch.fx.symbolic_trace(ss.rewire(model, inputs=x)),
    ],
    ids=["nothing chosen", "not a shortcut", "scripted", "symbols"],
)
def test_a_refusal_names_the_call_that_made_the_twin(refused):
    with pytest.raises(SkipscopeError) as refusal:
        refused(Block(), torch.randn(5, WIDTH))
    assert refusal.value.operation == "rewire"
    assert "ablate" not in str(refusal.value)


def test_a_kind_that_reads_may_not_leave_out_a_reader_unseen():
    """The right answer for one module that reads, and a refusal for two: never a silently wrong one."""
    model, x = TwoReaders(), torch.randn(5, WIDTH)
    twin = ss.rewire(model, ss.find_shortcuts(model, x), kind="rezero")
    assert torch.equal(twin(x), x)


@pytest.mark.heavy
@pytest.mark.parametrize("kind", registry())
def test_a_stock_vision_transformer_trains_with_each_kind_or_is_refused_in_words(kind):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model, x = timm.create_model("vit_tiny_patch16_224", **small), torch.randn(2, 3, 16, 16)
    found = ss.find_shortcuts(model, x)
    if kind not in FITTING:
        with pytest.raises(SkipscopeError, match="cannot take the place of a sum"):
            ss.rewire(model, found, kind=kind, inputs=x)
        return
    twin = ss.rewire(model, found, kind=kind, inputs=x).train()
    optimizer = torch.optim.SGD(twin.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(twin(x), torch.tensor([0, 1])))
        losses[-1].backward()
        optimizer.step()
    assert all(p.grad is not None for n, p in twin.named_parameters() if n.startswith("shortcuts."))
    assert torch.stack(losses).isfinite().all() and losses[-1] < losses[0]


# --- stock models of other libraries ---


class Logits(nn.Module):
    """One tensor out of a model of transformers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).last_hidden_state.mean(1)


def stock_models():
    """Name -> a small model that takes one tensor, and the tensor."""
    import timm
    import transformers

    images, words = torch.randn(2, 3, 32, 32), torch.randint(0, 50, (2, 7))
    small = {"num_classes": 3, "drop_path_rate": 0.0}
    of_width = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    yield "ResNet", timm.create_model("resnet10t", **small), images
    yield (
        "ConvNeXt",
        timm.create_model("convnext_atto", depths=(2, 1, 1, 1), dims=(8, 8, 16, 16), **small),
        images,
    )
    mixer = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_blocks": 2}
    yield "Mixer", timm.models.mlp_mixer.MlpMixer(**mixer, **small), images
    bert = transformers.BertConfig(vocab_size=50, **of_width, **quiet)
    yield "BERT", Logits(transformers.BertModel(bert, add_pooling_layer=False)), words
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gpt = transformers.GPT2Config(
        vocab_size=50, bos_token_id=0, eos_token_id=0, n_positions=16, n_embd=16, n_layer=2, n_head=2, **none
    )
    yield "GPT-2", Logits(transformers.GPT2Model(gpt)), words
    llama = transformers.LlamaConfig(vocab_size=50, **of_width)
    yield "Llama", Logits(transformers.LlamaModel(llama)), words


# Why a kind may be refused, by model: the width changes, a norm stands on the stream, its layers are no nn.Linear.
WHY_NOT = {
    "ResNet": {
        "the merges do not form one chain",
        "this kind reads what the branch and the sum read, and a projection stands between",
    },
    "ConvNeXt": {"the merges do not form one chain", "reversible layers come in pairs of branches"},
    "Mixer": set(),
    "BERT": {"the merges do not form one chain", "this kind of connection does not fit this merge"},
    "GPT-2": {"the branch calls no linear map before which the second norm could stand"},
    "Llama": set(),
}


def five_steps(twin, x):
    twin.train()
    optimizer = torch.optim.SGD(twin.parameters(), 1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(twin(x), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
    return loss.detach()


@pytest.mark.heavy
@pytest.mark.slow
@pytest.mark.parametrize("index", range(6))
def test_stock_models_train_compile_and_pickle_with_each_kind(index):
    """What does not fit is refused in words; a kind that goes around one branch always fits."""
    pytest.importorskip("timm")
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    name, model, x = list(stock_models())[index]
    model.eval()
    keys, expected = list(model.state_dict()), model(x).detach()
    found = rewirable(ss.find_shortcuts(model, x))
    assert len(found) >= 2
    refused = {}
    for kind in FITTING:
        try:
            twin = ss.rewire(model, found, kind=kind, inputs=x)
        except SkipscopeError as error:
            refused[kind] = error.problem
            assert error.cure, kind
            continue
        own = [key for key in twin.state_dict() if not key.startswith("shortcuts.")]
        assert own == keys, kind
        assert five_steps(twin, x).isfinite(), kind
        twin.eval()
        if kind in {"rezero", "highway", "hyper"}:
            torch._dynamo.reset()
            torch.testing.assert_close(torch.compile(twin, backend="eager")(x), twin(x), msg=kind)
        again = pickle.loads(pickle.dumps(twin))
        assert torch.equal(again(x), twin(x)), kind
    assert torch.equal(model(x), expected) and list(model.state_dict()) == keys
    assert set(refused.values()) <= WHY_NOT[name]
    assert {
        "rezero",
        "scaled",
        "layer-scale",
        "highway",
        "skipinit",
        "post-norm",
        "stochastic-depth",
    }.isdisjoint(refused)
    rezero = ss.rewire(model, found, kind="rezero", inputs=x)
    with torch.no_grad():
        for key, parameter in rezero.named_parameters():
            if key.endswith("alpha"):
                parameter.fill_(1.0)
    assert torch.equal(rezero(x), expected)
    for kind in (ss.nn.LayerScale, lambda width, dim, depth: ss.nn.LayerScale(nn.Identity(), width, dim=dim)):
        assert five_steps(ss.rewire(model, found, kind=kind, inputs=x), x).isfinite()


class WritesItsFork(Net):
    """What it looks at is written over before a branch reads it."""

    def forward(self, x):
        x = self.stem(x)
        self.seen = x.detach().abs().mean()
        x.mul_(2)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class LooksAtItsFork(Net):
    """Something else than a branch and its merge uses the fork's tensor."""

    def forward(self, x):
        x = self.stem(x)
        self.seen = x.detach().abs().mean()
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_a_tensor_written_in_place_is_used_by_nobody_yet():
    x = torch.randn(5, WIDTH)
    model = WritesItsFork()
    twin = ss.rewire(model, ss.find_shortcuts(model, x), kind="pre-norm")
    y = model.stem(x) * 2
    for block in model.blocks:
        y = y + block.branch(F.layer_norm(y, (WIDTH,)))
    torch.testing.assert_close(twin(x), model.head(y))
    other = LooksAtItsFork()
    twin = ss.rewire(other, ss.find_shortcuts(other, x), kind="pre-norm")
    with pytest.raises(SkipscopeError, match="does not fit this merge"):
        twin(x)


@pytest.mark.parametrize(
    "kind", [3, None, [], nn.Identity(), torch.ones(1)], ids=lambda kind: type(kind).__name__
)
def test_what_makes_no_connection_is_no_kind(kind):
    x = torch.randn(5, WIDTH)
    model = Net()
    with pytest.raises(SkipscopeError, match="kind"):
        ss.rewire(model, ss.find_shortcuts(model, x), kind=kind)
