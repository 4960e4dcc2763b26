"""Models and loops as strangers bring them: each number against a float64 copy read with plain autograd, or an error."""

import copy
import math

import pytest
import torch
from torch import nn

import skipscope as ss
from flow import oracles

mse, entropy = nn.functional.mse_loss, nn.functional.cross_entropy


def wide(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: wide(v) for k, v in value.items()}
    return type(value)(wide(v) for v in value) if isinstance(value, tuple | list) else value


def by_hand(model, batch, loss, at):
    """In float64, by retained gradients: RMS of dL/d(output of each module in ``at``) over |dL/d(model's output)|, and
    {weight: (mean |g|, RMS)}.
    """
    model, batch = copy.deepcopy(model).double(), wide(batch)
    kept, outputs = {}, []

    def keep(name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            if name not in kept and output.requires_grad:
                output.retain_grad()
                kept[name] = output

        return hook

    modules = dict(model.named_modules())
    for name in at:
        modules[name].register_forward_hook(keep(name))
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    if isinstance(batch, dict):
        output = model(**batch)
        value, last = output.loss, output.logits
    else:
        inputs, target = batch
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
        value, last = loss(output, target), output
    if isinstance(last, torch.Tensor):
        last.retain_grad()
    value.backward()
    unit = float(last.grad.norm()) if isinstance(last, torch.Tensor) else 1.0
    flow = {
        name: float(k.grad.square().mean().sqrt()) / unit for name, k in kept.items() if k.grad is not None
    }
    weights = {
        name: None if p.grad is None
        else (float(p.grad.to_dense().abs().mean()), float(p.grad.to_dense().abs().square().mean().sqrt()))
        for name, p in model.named_parameters() if p.ndim >= 2
    }  # fmt: skip
    return flow, weights, float(value.detach())


def check(model, batch, loss=None, tolerance=1e-4, at=(), measured=None, **options):
    """Measure; compare with the copy at the modules named in ``at``, and at every weight."""
    flow = measured or ss.gradient_flow(model, batch, loss, **options)
    expected, weights, value = by_hand(model, batch, loss, at)
    found = {b.name: b.gradient_rms for b in flow.boundaries}
    assert set(at) <= set(found) and set(at) <= set(expected), (found, expected)
    for name in at:
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name
    for layer in flow.layers:
        right = weights[layer.name]
        if right is None:
            assert layer.state == "not_connected" and layer.weight_grad_rms is None, layer
        elif right[1] == 0:
            assert layer.state == "exact_zero" and layer.weight_grad_rms == 0, layer
        else:
            assert layer.state == "ok", layer
            assert (layer.weight_grad_mean_abs, layer.weight_grad_rms) == pytest.approx(right, rel=tolerance)
    assert flow.loss == pytest.approx(value, rel=tolerance)
    return flow


def rows(n=8, width=8, out=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator), torch.randn(n, out, generator=generator)


def plain(depth=4, width=8):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)])


# --- precision ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 2.0**16])
def test_autocast_with_and_without_a_scaler(dtype, scale):
    model = plain()
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    with torch.autocast("cpu", dtype):
        flow = ss.gradient_flow(model, rows(), mse, scaler=scaler)
    check(model, rows(), mse, 0.05, ["0.0", "2.0"], measured=flow)
    assert str(dtype).removeprefix("torch.") in flow.dtype


def test_double_is_exact():
    check(plain().double(), wide(rows()), mse, 1e-12, ["0.0", "1.0", "3.0"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype):
    model = plain().to(dtype)
    check(model, tuple(t.to(dtype) for t in rows()), mse, 0.1, ["0.0", "3.0"])


def test_complex_parameters():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
            self.turn = nn.Parameter(
                torch.randn(8, 8, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
            )

        def forward(self, x):
            hidden = self.first(x).to(self.turn.dtype) @ self.turn
            return self.last(hidden.abs())

    torch.manual_seed(0)
    model = Complex()
    flow = ss.gradient_flow(model, rows(), mse)
    mse(model(rows()[0]), rows()[1]).backward()
    layer = next(w for w in flow.layers if w.name == "turn")
    parts = torch.view_as_real(model.turn.grad).double()
    assert layer.weight_grad_rms == pytest.approx(float(parts.square().mean().sqrt()), rel=1e-5)
    assert flow.verdict.state == "healthy"


# --- how models are built ---


class InPlace(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x)
        out += x
        return out


def test_in_place_residuals():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *[InPlace(nn.Linear(8, 8)) for _ in range(3)])
    flow = check(model, rows(), mse)
    expected, _, _ = by_hand(model, rows(), mse, ["1", "2", "3"])
    merges = [b.gradient_rms for b in flow.boundaries if b.kind == "merge"]
    assert merges == pytest.approx([expected[str(i)] for i in (1, 2, 3)], rel=1e-4)


@pytest.mark.parametrize("which", [(0,), (1, 2), (3,)])
def test_frozen_layers(which):
    model = plain()
    for i in which:
        model[i].requires_grad_(False)
    flow = check(model, rows(), mse, at=["1.0", "3.0"] if which != (0,) else ["1.0"])
    assert [w.trainable for w in flow.layers] == [i not in which for i in range(4)]
    assert flow.verdict.state == "healthy" and len(flow.boundaries) == 5


def test_tied_weights_of_a_language_model():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.hidden = nn.Embedding(11, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens):
            return self.head(self.hidden(self.embed(tokens)).relu()).transpose(1, 2)

    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(0))
    check(Tied(), (tokens, tokens.roll(1, 1)), entropy, at=["embed", "hidden"])


def test_several_outputs_of_which_one_is_not_used():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.left, self.right, self.idle = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            hidden = self.body(x).tanh()
            return self.left(hidden), self.right(hidden)

    torch.manual_seed(0)
    model = Two()
    flow = ss.gradient_flow(model, rows(), lambda output, target: mse(output[0], target))
    states = {w.name: w.state for w in flow.layers}
    assert states == {
        "body.weight": "ok", "left.weight": "ok", "right.weight": "not_connected", "idle.weight": "not_connected",
    }  # fmt: skip
    mse(model(rows()[0])[0], rows()[1]).backward()
    assert flow.layers[0].weight_grad_rms == pytest.approx(
        float(model.body.weight.grad.square().mean().sqrt()), rel=1e-5
    )
    assert flow.verdict.state == "healthy"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("both_ways", [False, True])
def test_recurrent_networks(kind, both_ways):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.rnn = kind(8, 8, num_layers=2, batch_first=True, bidirectional=both_ways)
            self.head = nn.Linear(16 if both_ways else 8, 5)

        def forward(self, tokens):
            return self.head(self.rnn(self.embed(tokens))[0]).transpose(1, 2)

    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(0))
    check(Tagger(), (tokens, tokens % 5), entropy, at=["embed", "rnn", "head"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_torchs_own_transformer(training, frozen):
    """In eval mode, when nothing needs a gradient, torch runs each layer as one fused call that hides what is inside."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(
        nn.Linear(8, 8), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(8, 4)
    )
    model.train(training)
    model[:2].requires_grad_(not frozen)
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    y = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    flow = check(model, (x, y), mse, 1e-3)
    assert sum(b.kind == "merge" for b in flow.boundaries) == 6
    assert flow.verdict.state == "healthy"


def test_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = (x.to(memory_format=torch.channels_last), torch.tensor([0, 1, 2, 3]))
    check(model.to(memory_format=torch.channels_last), batch, entropy, at=["0", "2", "5"])


def test_hugging_face_models_bring_their_loss():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    flow = check(model, batch, tolerance=1e-3)
    assert sum(b.kind == "merge" for b in flow.boundaries) >= 6
    expected, _, _ = by_hand(model, batch, None, [f"transformer.h.{i}" for i in range(3)])
    merges = [b.gradient_rms for b in flow.boundaries if b.kind == "merge"]
    for value in expected.values():  # a block's output is its second merge
        assert any(m == pytest.approx(value, rel=1e-3) for m in merges)


@pytest.mark.parametrize("re_entrant", [False, True])
def test_checkpointed_blocks(re_entrant):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=re_entrant)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 8), *[Checkpointed(oracles.Residual(oracles.layer(8))) for _ in range(3)]
    )
    check(model, rows(), mse, at=["0"])


# --- data and losses ---


def test_accumulated_batches_are_one_batch():
    x, y = rows(12)
    whole = ss.gradient_flow(plain(), (x, y), mse)
    parts = ss.gradient_flow(plain(), ss.batches([(x[:5], y[:5]), (x[5:], y[5:])]), mse)
    assert [b.gradient_rms for b in parts.boundaries] == pytest.approx(
        [b.gradient_rms for b in whole.boundaries], rel=1e-5
    )


@pytest.mark.parametrize("how", ["leaf", "made of a leaf", "inference"])
def test_inputs_that_carry_a_gradient_or_were_made_for_inference(how):
    x, y = rows()
    expected = ss.gradient_flow(plain(), (x, y), mse)
    source = x.clone().requires_grad_()
    if how == "inference":
        with torch.inference_mode():
            given = x.clone()
    else:
        given = source if how == "leaf" else source * 1.0
    flow = ss.gradient_flow(plain(), (given, y), mse)
    assert flow.boundaries == expected.boundaries and flow.layers == expected.layers
    assert source.grad is None


def test_data_that_are_not_finite_are_named():
    x, y = rows()
    x[3, 2] = math.nan
    verdict = ss.gradient_flow(plain(), (x, y), mse).verdict
    assert verdict.state == "nonfinite" and verdict.cause == "data" and "data" in verdict.reason
    x, y = rows()
    y[0, 0] = math.nan
    verdict = ss.gradient_flow(plain(), (x, y), mse).verdict
    assert verdict.state == "nonfinite" and verdict.cause == "data"


def test_a_weight_that_is_nan_is_named():
    model = plain()
    with torch.no_grad():
        model[2][0].weight[1, 1] = math.nan
    verdict = ss.gradient_flow(model, rows(), mse).verdict
    assert verdict.state == "nonfinite" and verdict.cause == "weights" and "2.0.weight" in verdict.reason


def test_an_empty_batch_is_refused():
    with pytest.raises(ss.SkipscopeError, match="the batch is empty"):
        ss.gradient_flow(plain(), (torch.zeros(0, 8), torch.zeros(0, 8)), mse)


def test_a_model_without_numbers_is_refused():
    with pytest.raises(ss.SkipscopeError, match="meta device"):
        ss.gradient_flow(plain().to("meta"), rows(), mse)


def test_a_loss_without_gradient_is_refused():
    with pytest.raises(ss.SkipscopeError, match="the loss has no gradient"):
        ss.gradient_flow(plain(), rows(), lambda output, target: mse(output, target).detach())


def test_an_output_of_integers_is_refused():
    class Choice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(x).argmax(-1)

    with pytest.raises(ss.SkipscopeError, match="the loss has no gradient"):
        ss.gradient_flow(Choice(), (rows()[0], torch.zeros(8)), lambda o, t: (o.float() - t).square().mean())


# --- why ---


def test_two_causes_are_both_named():
    """Saturated and small weights at once: the greater first, the other besides."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(10)])
    with torch.no_grad():
        for layer in model:
            nn.init.normal_(layer[0].weight, std=0.5 / math.sqrt(32))
            layer[0].bias.fill_(2.0)
    verdict = ss.gradient_flow(model, rows(16, 32, 32), mse).verdict
    assert verdict.state == "vanishing" and verdict.cause == "saturation"
    assert "saturated" in verdict.reason and "besides, the weights' gain" in verdict.reason
    assert "0.49" in verdict.reason


def test_one_cause_is_not_two():
    model = nn.Sequential(*[oracles.orthogonal(8, 0.3) for _ in range(10)])
    assert "besides" not in ss.gradient_flow(model, rows(), lambda o, t: (o * t).sum()).verdict.reason


def test_underflow_says_what_it_would_be():
    torch.manual_seed(0)
    model = nn.Sequential(*[oracles.orthogonal(8, 1e-2) for _ in range(30)])
    flow = ss.gradient_flow(model, rows(), lambda o, t: (o * t).sum())
    assert flow.verdict.cause == "underflow"
    where = next(b for b in reversed(flow.boundaries) if b.state == "underflow")
    assert where.name in flow.verdict.reason and 0 < flow.verdict.evidence < 1e-38


@pytest.mark.parametrize("at", [0, 2, 4])
@pytest.mark.parametrize("weights", [False, True])
def test_the_layer_that_silences_all_after_it_is_the_one_named(at, weights):
    """Without biases a dead layer makes every later one dead too; the first is the cause."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)], nn.Linear(8, 8))
    with torch.no_grad():
        for part in model[:6]:
            nn.init.kaiming_normal_(part[0].weight)
            part[0].bias.zero_()
        if weights:
            model[at][0].weight.zero_()
        else:
            model[at][0].bias.fill_(-100)
    verdict = ss.gradient_flow(model, rows(), mse).verdict
    assert verdict.state == "dead" and verdict.hinders == ("SGD", "Adam")
    if weights:
        assert verdict.cause == "gain" and f"{at}.0.weight are all 0" in verdict.reason
    else:
        assert verdict.cause == "inactive" and verdict.where == f"{at}.0" and verdict.evidence == 1


def test_whom_it_hinders():
    def of(gain, depth):
        model = nn.Sequential(*[oracles.orthogonal(8, gain) for _ in range(depth)]).double()
        return ss.gradient_flow(model, wide(rows()), lambda o, t: (o * t).sum()).verdict

    assert of(1.0, 10).hinders == ()
    assert of(0.4, 10).hinders == ("SGD",)  # 3.2 decades between hidden boundaries
    assert of(0.05, 10).hinders == ("SGD", "Adam")
    assert of(2.7, 10).hinders == ("SGD",)  # 3.5 decades gained
    assert of(4.0, 10).hinders == ("SGD", "Adam")


def test_a_weak_stem_is_no_part_of_the_fall():
    """Its own gradient is what arrives at its output; only what goes on to the input is small."""
    torch.manual_seed(0)
    model = nn.Sequential(
        oracles.orthogonal(8, 1e-4),
        oracles.orthogonal(8, 1.0),
        *[oracles.Residual(nn.Linear(8, 8)) for _ in range(5)],
    )
    verdict = ss.gradient_flow(model, rows(), mse).verdict
    assert verdict.state == "healthy"
