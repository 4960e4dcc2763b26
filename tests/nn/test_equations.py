"""Every shortcut module against its paper's equation, written out in float64."""

import math
import pydoc
from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
import skipscope.nn as sn
from skipscope import SkipscopeError

N, WIDTH = 5, 6


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def branch(out=WIDTH):
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, out))


def norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()


def gate(module, x):
    return 1 / (1 + torch.exp(-(x @ module.gate.weight.T + module.gate.bias)))


def gru(module, f, x):
    r, z = (torch.sigmoid(module.of_branch[k](f) + x @ module.of_state[k].weight.T) for k in "rz")
    h = torch.tanh(f @ module.of_branch["g"].weight.T + (r * x) @ module.of_state["g"].weight.T)
    return (1 - z) * x + z * h


def rms_normed(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def last_layer(f):
    """The branch's last linear map, without the norm before it."""
    return lambda h: h @ f[-1].weight.T + f[-1].bias


def gated_mean(gates, streams, n):
    """Qwen4's read: the mean over streams of a gate a feature times the normed stream."""
    u = torch.cat([rms_normed(s) for s in streams], -1) * gates.gain
    hidden = u @ gates.down.weight.T / n
    gate = torch.sigmoid((hidden * torch.sigmoid(hidden)) @ gates.up.weight.T)
    return sum((gate * u).split(WIDTH, -1)) / n


def gated_layer(layer, f, streams):
    """One layer of Qwen4's gated streams, stream by stream."""
    u = torch.cat([rms_normed(s) for s in streams], -1) * layer.gates.gain
    inject = 2 * torch.sigmoid(u @ layer.inject.weight.T / len(streams))
    out = f(gated_mean(layer.gates, streams, len(streams)))
    return [s + inject[..., [i]] * out for i, s in enumerate(streams)]


def attended(values, query):
    """Kimi Team 2026, equations 2 and 3: the kernel is exp(w . RMSNorm(v))."""
    kernels = [torch.exp((rms_normed(v) * query).sum(-1, keepdim=True)) for v in values]
    return sum(k * v for k, v in zip(kernels, values)) / sum(kernels)


def dense(module, i, outputs, way):
    """Xiao et al. 2025, equations 3 to 5: the sum of one way after block i, token by token."""
    sums, size = [], len(outputs)
    for token in range(len(outputs[0])):
        h = F.gelu(module.inner[i].weight @ rms_normed(outputs[-1][token]))
        weights = (module.outer[i].weight @ h)[way * size : (way + 1) * size] + module.static[i][way]
        sums.append(sum(weights[j] * outputs[j][token] for j in range(size)))
    return torch.stack(sums)


EQUATIONS = {
    "identity": lambda m, f, x: x + f(x),
    "post-activation": lambda m, f, x: (x + f(x)).clamp_min(0),
    "pre-activation": lambda m, f, x: x + f(norm(x).clamp_min(0)),
    "pad": lambda m, f, x: x + f(x),
    "projection": lambda m, f, x: x @ m.projection.weight.T + f(x),
    "scaled": lambda m, f, x: x / 2 + f(x) / 2,
    "depth-scaled": lambda m, f, x: x + f(x) / 3,
    "exclusive-gate": lambda m, f, x: (1 - gate(m, x)) * x + gate(m, x) * f(x),
    "shortcut-only-gate": lambda m, f, x: (1 - gate(m, x)) * x + f(x),
    "highway": lambda m, f, x: gate(m, x) * f(x) + (1 - gate(m, x)) * x,
    "gru-gate": lambda m, f, x: gru(m, f(norm(x)).clamp_min(0), x),
    "dropout": lambda m, f, x: x + f(x),
    "stochastic-depth": lambda m, f, x: x + f(x),
    "dense": lambda m, f, x: torch.cat([x, f(x)], -1),
    "skipinit": lambda m, f, x: x + m.alpha * f(x),
    "rezero": lambda m, f, x: x + m.alpha * f(x),
    "layer-scale": lambda m, f, x: x + f(x) @ torch.diag(m.gamma),
    "fixup": lambda m, f, x: x + m.multiplier * f(x + m.bias_in) + m.bias_out,
    "pre-norm": lambda m, f, x: x + f(norm(x)),
    "post-norm": lambda m, f, x: norm(x + f(x)),
    "sandwich-norm": lambda m, f, x: x + norm(f(norm(x))),
    "deep-norm": lambda m, f, x: norm(8**0.25 * x + f(x)),
    "admin": lambda m, f, x: norm(x @ torch.diag(m.omega) + f(x)),
    "parallel": lambda m, f, x: x + f(norm(x)) + m.branches[1](norm(x)),
    "hyper": lambda m, f, x: x + f(x),
    "dynamic-hyper": lambda m, f, x: x + f(x),
    "manifold-hyper": lambda m, f, x: x + f(x),
    "residual-streams": lambda m, f, x: norm(x + f(x)) + norm(x + f(x)),
    "shake-shake": lambda m, f, x: x + (f(x) + m.other(x)) / 2,
    "depth-averaged": lambda m, f, x: m.weights[0][1] * (x + f(x)) + m.weights[0][0] * x,
    "depth-attention": lambda m, f, x: attended([x, f(x)], m.queries[0]),
    "dynamic-dense": lambda m, f, x: dense(m, 0, [x, x + f(x)], 0),
    "reversible": lambda m, f, x: (x + f(x)) / 2 + (x + m.branches[1](x + f(x))) / 2,
    "laurel-weights": lambda m, f, x: m.weights[0] * f(x) + m.weights[1] * x,
    "laurel-low-rank": lambda m, f, x: f(x) + x + x @ (m.up @ m.down).T,
    "variance-gate": lambda m, f, x: x * (1 - (g := torch.sigmoid(m.gate / 0.3)) ** 2).sqrt() + g * f(x),
    "affine": lambda m, f, x: m.scale[0] * (x + m.offset[0]) + m.scale[1] * (f(x) + m.offset[1]),
    "sub-norm": lambda m, f, x: x + last_layer(f)(norm(torch.tanh(f[0](norm(x))))),
    "keel": lambda m, f, x: norm(9 * x + f(norm(x))),
    "collapsed-hyper": lambda m, f, x: x + f(x),
    "unmixed-hyper": lambda m, f, x: x + f(x),
    "gated-streams": lambda m, f, x: gated_mean(m.collapse, gated_layer(m.layers[0], f, [x] * 4), 4),
    "frac": lambda m, f, x: x + f(x),
    "altup": lambda m, f, x: x + f(x),
    "stream-scalars": lambda m, f, x: (m.weights[0][0] + m.weights[0][2]) * x + m.weights[0][1] * f(x),
    "block-attention": lambda m, f, x: attended([x, f(x)], m.queries[0]),
    "delta-attention": lambda m, f, x: x + f(x),
    "laurel-previous": lambda m, f, x: f(x) + x + m.weights[0] * x @ (m.up[0] @ m.down[0]).T,
}


def inside(module):
    """The first branch of a registered module."""
    first = (
        module.branches[0] if hasattr(type(module), "branches") or "branches" in module._modules else module
    )
    return getattr(first, "branch", first)


def test_every_registered_module_has_its_equation():
    assert sn.registry().keys() == EQUATIONS.keys()


OWN = {
    "gamma", "omega", "gate", "gate.bias", "weights", "weights.0", "up", "up.0", "queries.0", "static.0", "outer.0.weight",
    "scale", "offset",
}  # fmt: skip


def scrambled(module):
    """The module with its own scalars away from their start, so that each factor shows (norms and streams stay)."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 0 or name in OWN:
                parameter.add_(torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("name", EQUATIONS)
def test_equation(name):
    module = scrambled(sn.registry()[name](branch(), WIDTH, depth=9)).eval()
    inner = inside(module)
    if name == "fixup":
        nn.init.normal_(inner[2].weight)
    x = torch.randn(N, WIDTH)
    torch.testing.assert_close(module(x), EQUATIONS[name](module, inner, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EQUATIONS)
def test_gradcheck(name):
    torch.manual_seed(2)
    chain = [branch() for _ in range(2)] if sn.registry()[name].spans_depth else branch()
    module = shaken(sn.registry()[name](chain, WIDTH, depth=2)).eval()
    own = tuple(p for key, p in module.named_parameters() if "branch" not in key and p.numel() < 40)
    x = torch.randn(2, WIDTH, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *own), fast_mode=True)


@pytest.mark.parametrize("name", EQUATIONS)
def test_images_are_rows_of_features_with_the_features_second(name):
    """On [n, c, h, w] with dim=1 every module does to each pixel what it does to a row."""

    class PixelBranch(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x.movedim(1, -1)).movedim(-1, 1)

    torch.manual_seed(1)
    rows = sn.registry()[name](branch(), WIDTH, depth=4).eval()
    torch.manual_seed(1)
    pixels = sn.registry()[name](PixelBranch(branch()), WIDTH, dim=1, depth=4).eval()
    x = torch.randn(2, WIDTH, 3, 4)
    expected = rows(x.movedim(1, -1).reshape(-1, WIDTH)).reshape(2, 3, 4, -1).movedim(-1, 1)
    torch.testing.assert_close(pixels(x), expected)


@pytest.mark.parametrize("name", EQUATIONS)
def test_identity_at_start_is_claimed_where_it_holds(name):
    module, x = sn.registry()[name](branch(), WIDTH, depth=4).eval(), torch.randn(N, WIDTH)
    y = module(x)
    assert module.identity_at_start == (y.shape == x.shape and torch.equal(y, x))


def test_more_arguments_go_to_the_branch():
    class Masked(nn.Module):
        def forward(self, x, mask, scale=1.0):
            return x * mask * scale

    x, mask = torch.randn(N, WIDTH), torch.randint(2, (N, WIDTH))
    torch.testing.assert_close(sn.IdentityShortcut(Masked())(x, mask, scale=3.0), x + 3 * x * mask)


# --- where the shape changes ---


@pytest.mark.parametrize("stride", [1, 2])
def test_options_a_and_b_on_images(stride):
    conv = nn.Conv2d(4, 8, 3, stride, 1)
    x = torch.randn(2, 4, 6, 6)
    padded = F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, 2, 2))
    a = sn.option("A", conv, 4, 8, stride=stride, dim=1)
    torch.testing.assert_close(a(x), conv(x) + padded)
    assert sum(p.numel() for p in a.parameters()) == sum(p.numel() for p in conv.parameters())
    b = sn.option("B", conv, 4, 8, stride=stride, dim=1)
    as_conv = F.conv2d(x, b.projection.weight[:, :, None, None], stride=stride)
    torch.testing.assert_close(b(x), conv(x) + as_conv)


def test_options_differ_where_the_shape_stays():
    kinds = {letter: sn.option(letter, nn.Linear(4, 4), 4).kind for letter in "ABC"}
    assert kinds == {"A": "identity", "B": "identity", "C": "projection"}


def test_unknown_option_is_refused():
    with pytest.raises(SkipscopeError, match="'A', 'B' or 'C'"):
        sn.option("D", nn.Linear(4, 4), 4)


# --- gates ---


def test_gates_start_where_they_are_told():
    x = torch.zeros(1, WIDTH)
    for module, bias in [(sn.Highway(branch(), WIDTH), -2), (sn.ShortcutOnlyGate(branch(), WIDTH), -6)]:
        assert torch.sigmoid(module.gate(x)).unique().item() == pytest.approx(1 / (1 + math.exp(-bias)))


def test_a_closed_gate_is_the_identity_and_an_open_one_the_branch():
    x = torch.randn(N, WIDTH)
    torch.testing.assert_close(sn.Highway(branch(), WIDTH, bias=-800.0)(x), x)
    opened = sn.Highway(branch(), WIDTH, bias=800.0)
    torch.testing.assert_close(opened(x), opened.branch(x))


# --- chance ---


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_stochastic_depth_drops_rows_or_batches_and_keeps_the_mean(mode):
    f, p = torch.ones(4000, 2), 0.3
    draws = torch.stack([sn.stochastic_depth(f, p, True, mode) for _ in range(200)])
    assert set(draws.unique().tolist()) == {0.0, 1 / 0.7}
    assert (draws[..., 0] == draws[..., 1]).all()
    one_for_all = bool((draws == draws[:, :1]).all())
    assert one_for_all == (mode == "batch")
    assert draws.mean().item() == pytest.approx(1, abs=0.01 if mode == "row" else 0.2)


def test_stochastic_depth_edges():
    f = torch.randn(3, 2)
    assert torch.equal(sn.stochastic_depth(f, 0.0, True), f)
    assert torch.equal(sn.stochastic_depth(f, 0.9, False), f)
    assert not sn.stochastic_depth(f, 1.0, True).any()


def test_shake_shake_mixes_forward_by_one_draw_and_backward_by_another():
    f1, f2 = torch.randn(3, 2).requires_grad_(), torch.randn(3, 2).requires_grad_()
    a, b, seed = torch.rand(3, 1), torch.rand(3, 1), torch.randn(3, 2)
    y = sn.shake_shake(f1, f2, a, b)
    torch.testing.assert_close(y, a * f1 + (1 - a) * f2)
    g1, g2 = torch.autograd.grad(y, (f1, f2), seed)
    torch.testing.assert_close(g1, b * seed)
    torch.testing.assert_close(g2, (1 - b) * seed)


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_shake_shake_draws_rows_or_batches_anew(mode):
    one, zero = nn.Linear(2, 1), nn.Linear(2, 1)
    for layer, value in ((one, 1.0), (zero, 0.0)):
        nn.init.zeros_(layer.weight), nn.init.constant_(layer.bias, value)
    module, x = sn.ShakeShake(one, zero, mode).train(), torch.zeros(4000, 1).expand(-1, 2)
    y = module(x[:, :2])[:, :1]
    assert (
        y.min() >= 0 and y.max() <= 1 and (len(y.unique()) > 3900 if mode == "row" else len(y.unique()) == 1)
    )
    assert not torch.equal(module(x)[:, :1], y)
    if mode == "row":
        assert y.mean().item() == pytest.approx(0.5, abs=0.02) and y.var().item() == pytest.approx(
            1 / 12, abs=0.005
        )
    torch.testing.assert_close(module.eval()(x)[:, :1], torch.full((4000, 1), 0.5))


def test_dropout_shortcut_drops_the_shortcut_and_not_the_branch():
    x, f = torch.ones(1000, 3), torch.full((1000, 3), 5.0)
    y = sn.dropout_shortcut(x, f, 0.5, True)
    assert set(y.unique().tolist()) == {5.0, 7.0}


# --- initialisations ---


@pytest.mark.parametrize("weights", [1, 2, 3])
@pytest.mark.parametrize("depth", [4, 64])
def test_fixup_scales_by_depth_and_zeroes_the_last(weights, depth):
    layers = nn.Sequential(*[nn.Linear(8, 8) for _ in range(weights)])
    before = [layer.weight.clone() for layer in layers]
    sn.fixup_(layers, depth)
    for old, layer in list(zip(before, layers))[:-1]:
        torch.testing.assert_close(layer.weight.detach(), old * depth ** (-1 / (2 * weights - 2)))
    assert not layers[-1].weight.any() and not any(layer.bias.any() for layer in layers)


def test_fixup_refuses_a_branch_without_weights():
    with pytest.raises(SkipscopeError, match="no weights"):
        sn.Fixup(nn.ReLU(), 4)


def test_fixup_updates_do_not_grow_with_depth():
    """Its purpose: one SGD step changes the output by about as much at L = 4 and at L = 64."""

    def change(depth):
        torch.manual_seed(0)
        blocks = []
        for _ in range(depth):
            f = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
            nn.init.kaiming_normal_(f[0].weight)
            blocks.append(sn.Fixup(f, depth))
        model, x = nn.Sequential(*blocks), torch.randn(32, 16)
        before = model(x)
        before.square().mean().backward()
        with torch.no_grad():
            for block in blocks:  # the paper trains its scalars at a tenth of the rate
                block.branch[2].weight -= 0.05 * block.branch[2].weight.grad
            return (model(x) - before).norm().item()

    assert 0.5 < change(64) / change(4) < 2


def test_deep_norm_weights_and_factor():
    layer = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "v_proj": nn.Linear(4, 4)})
    before = {name: p.clone() for name, p in layer.named_parameters()}
    sn.deep_norm_(layer, layers=18)
    torch.testing.assert_close(layer.v_proj.weight.detach(), before["v_proj.weight"] * (8 * 18) ** -0.25)
    assert torch.equal(layer.q_proj.weight, before["q_proj.weight"])
    assert torch.equal(layer.v_proj.bias, before["v_proj.bias"])
    assert sn.DeepNorm(branch(), WIDTH, layers=18).scale == pytest.approx(36**0.25)


# --- hyper-connections ---


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_fresh_hyper_connections_are_a_residual_network(streams):
    branches, x = [branch() for _ in range(3)], torch.randn(N, WIDTH)
    y = x
    for f in branches:
        y = y + f(y)
    torch.testing.assert_close(sn.HyperConnected(*branches, streams=streams)(x), y)


def test_hyper_connection_is_its_matrix_form():
    module = sn.HyperConnection(branch(), 3, layer=1)
    for p in (module.pre, module.residual, module.post):
        nn.init.normal_(p)
    x = torch.randn(3, N, WIDTH)
    f = module.branch(sum(module.pre[j] * x[j] for j in range(3)))
    expected = torch.stack([
        sum(module.residual[i, j] * x[j] for j in range(3)) + module.post[i] * f for i in range(3)
    ])  # fmt: skip
    torch.testing.assert_close(module(x), expected)


# --- hyper-connections whose weights depend on the data ---


def shaken(module):
    """The module with all of its parameters away from their start, as far as they stay reasonable."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.5)
    return module


def test_dynamic_hyper_connection_is_the_papers_equation():
    """Zhu et al. 2024, equations 2, 5 and 10 to 13, token by token; A_r is our matrix, transposed."""
    n, module = 3, shaken(sn.DynamicHyperConnection(branch(), 3, width=WIDTH, layer=1))
    X = torch.randn(n, N, WIDTH)
    got = module(X)
    for token in range(N):
        H = X[:, token]
        normed = nn.functional.layer_norm(H, (WIDTH,), module.norm.weight, module.norm.bias)
        B = module.scale_post * torch.tanh(normed @ module.to_post) + module.post
        A_m = module.scale * torch.tanh(normed @ module.to_pre) + module.pre
        A_r = module.scale * torch.tanh(normed @ module.to_residual.T) + module.residual.T
        expected = torch.outer(B, module.branch(A_m @ H)) + A_r.T @ H
        torch.testing.assert_close(got[:, token], expected)


def test_manifold_hyper_connection_is_the_papers_equation():
    """Xie et al. 2025, equations 3, 7 and 8, token by token."""
    n, module = 3, shaken(sn.ManifoldHyperConnection(branch(), 3, width=WIDTH))
    X = torch.randn(n, N, WIDTH)
    got, (w, b), a = module(X), module.to_weights.parameters(), module.scales
    for token in range(N):
        x = X[:, token].reshape(-1)
        x = x / (x.square().mean() + 1e-6).sqrt()
        pre = 1 / (1 + torch.exp(-(a[0] * (w[:n] @ x) + b[:n])))
        post = 2 / (1 + torch.exp(-(a[1] * (w[n : 2 * n] @ x) + b[n : 2 * n])))
        M = torch.exp(a[2] * (w[2 * n :] @ x) + b[2 * n :]).reshape(n, n)
        for _ in range(20):
            M = M / M.sum(0)
            M = M / M.sum(1, keepdim=True)
        expected = M @ X[:, token] + torch.outer(post, module.branch(pre @ X[:, token]))
        torch.testing.assert_close(got[:, token], expected)


def test_sinkhorn_is_doubly_stochastic_also_of_great_numbers():
    for scale in (1.0, 3.0):
        matrix = sn.sinkhorn(torch.randn(50, 4, 4) * scale, iterations=400)
        torch.testing.assert_close(matrix.sum(-1), torch.ones(50, 4), atol=1e-6, rtol=0)
        torch.testing.assert_close(matrix.sum(-2), torch.ones(50, 4), atol=1e-6, rtol=0)
    assert sn.sinkhorn(torch.tensor([[900.0, 0.0], [0.0, 900.0]])).isfinite().all()


@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("kind", [sn.DynamicHyperConnection, sn.ManifoldHyperConnection])
def test_fresh_dynamic_hyper_connections_are_a_residual_network(kind, streams):
    branches, x = [branch() for _ in range(3)], torch.randn(N, WIDTH)
    y = x
    for f in branches:
        y = y + f(y)
    module = sn.HyperConnected(*branches, streams=streams, connect=partial(kind, width=WIDTH))
    exact = (
        kind is sn.DynamicHyperConnection or streams > 1
    )  # one stream is read by a sigmoid, which is never 1
    torch.testing.assert_close(module(x), y, rtol=1e-6 if exact else 0.2, atol=1e-6 if exact else 0.2)


# --- reads over depth, learned shortcuts ---


def test_depth_averaged_blocks_are_the_papers_recursion():
    blocks = [branch() for _ in range(4)]
    module, x = shaken(sn.DepthAveraged(*blocks)), torch.randn(N, WIDTH)
    X, Y = [x], x
    for i, block in enumerate(blocks):
        X.append(block(Y))
        Y = sum(module.weights[i][j] * X[j] for j in range(i + 2))
    torch.testing.assert_close(module(x), Y)


def test_fresh_depth_averaged_blocks_are_the_network_that_they_were():
    blocks, x = [sn.IdentityShortcut(branch()) for _ in range(4)], torch.randn(N, WIDTH)
    torch.testing.assert_close(sn.DepthAveraged(*blocks)(x), nn.Sequential(*blocks)(x))


def test_a_fresh_low_rank_shortcut_is_the_identity_shortcut():
    f, x = branch(), torch.randn(N, WIDTH)
    torch.testing.assert_close(sn.LaurelLowRank(f, WIDTH)(x), x + f(x))
    assert sn.LaurelLowRank(f, WIDTH, rank=2).down.shape == (2, WIDTH)


def test_residual_streams_are_the_papers_recursion():
    branches, x = [branch() for _ in range(3)], torch.randn(N, WIDTH)
    post = pre = x
    for f in branches:
        out = f(post)
        post, pre = norm(post + out), pre + out
    torch.testing.assert_close(sn.ResidualStreams(*branches, width=WIDTH)(x), post + norm(pre))


def test_depth_attention_is_the_papers_recursion():
    branches, x = [branch() for _ in range(3)], torch.randn(N, WIDTH)
    module, v, h = shaken(sn.DepthAttention(*branches, width=WIDTH)), [x], x
    for f, query in zip(branches, module.queries):
        v.append(f(h))
        h = attended(v, query)
    torch.testing.assert_close(module(x), h)


def test_depth_attention_starts_as_a_mean():
    branches, x = [branch() for _ in range(2)], torch.randn(N, WIDTH)
    first = branches[0](x)
    expected = (x + first + branches[1]((x + first) / 2)) / 3
    torch.testing.assert_close(sn.DepthAttention(*branches, width=WIDTH)(x), expected)


def test_block_attention_is_the_papers_recursion():
    """Kimi Team 2026, section 3.2: the sources are x, the sums of the blocks before, and the sum of the block so far."""
    branches, x = [branch() for _ in range(5)], torch.randn(N, WIDTH)
    module = shaken(sn.BlockAttention(*branches, width=WIDTH, blocks=3))  # blocks of 2, 2 and 1
    done, partial, h = [x], None, x
    for i, (f, query) in enumerate(zip(branches, module.queries)):
        out = f(h)
        partial = out if partial is None else partial + out
        h = attended([*done, partial], query)
        if i % 2 == 1:
            done, partial = [*done, partial], None
    torch.testing.assert_close(module(x), h)
    one_each = sn.BlockAttention(*branches, width=WIDTH, blocks=5)
    torch.testing.assert_close(one_each(x), sn.DepthAttention(*branches, width=WIDTH)(x))


def test_delta_attention_is_the_papers_recursion():
    """Luo et al. 2026: what each layer added is attended over, and added to the stream that the layer reads."""
    branches, x = [branch() for _ in range(4)], torch.randn(N, WIDTH)
    module = shaken(sn.DeltaAttention(*branches, width=WIDTH))
    assert len(module.queries) == 3
    stream, deltas = x, []
    for i, f in enumerate(branches):
        read = stream + attended(deltas, module.queries[i - 1]) if deltas else stream
        out = f(read)
        deltas = [*(deltas or [stream]), out]
        stream = stream + out
    torch.testing.assert_close(module(x), stream)


@pytest.mark.parametrize(("dilation", "period"), [(2, 1), (1, 3), (2, 3), (4, 2)])
def test_depth_averages_with_dilation_and_period_are_the_papers_sums(dilation, period):
    """Pagliardini et al. 2024, section 3: Y_i averages the X_j with j = i mod k, for each i that p divides."""
    blocks = [branch() for _ in range(7)]
    module = shaken(sn.DepthAveraged(*blocks, dilation=dilation, period=period))
    x, averages = torch.randn(N, WIDTH), iter(module.weights)
    X, Y = {0: x}, x
    for i, block in enumerate(blocks, 1):
        X[i] = block(Y)
        Y = X[i]
        if i % period == 0:
            chosen, weights = [j for j in range(i + 1) if (i - j) % dilation == 0], next(averages)
            assert len(weights) == len(chosen)
            Y = sum(w * X[j] for w, j in zip(weights, chosen))
    assert next(averages, None) is None
    torch.testing.assert_close(module(x), Y)


def test_stream_scalars_are_nanochats_after_the_first_layer():
    """There a layer reads r x + m x_0 and adds to it; here the same numbers stand after the layer before."""
    branches, x = [branch() for _ in range(3)], torch.randn(N, WIDTH)
    module = sn.StreamScalars(*branches)
    torch.testing.assert_close(module(x), nn.Sequential(*map(sn.IdentityShortcut, branches))(x))
    shaken(module)
    r, m = torch.randn(3), torch.randn(3)
    with torch.no_grad():
        module.weights[:2] = torch.stack([r[1:], r[1:], m[1:]], -1)
        module.weights[2] = torch.tensor([1.0, 1.0, 0.0])
    y = x
    for i, f in enumerate(branches):
        read = r[i] * y + m[i] * x if i else x
        y = read + f(read)
    torch.testing.assert_close(module(x), y)


def test_laurel_previous_is_the_papers_sum():
    """Menghani et al. 2024, section 2.3: x_i + sum over j < k of c_ij h_i(x_(i-j)), h_i of low rank."""
    branches, x = [branch() for _ in range(4)], torch.randn(N, WIDTH)
    module = shaken(sn.LaurelPrevious(*branches, width=WIDTH, rank=2, previous=2))
    outputs = [x]
    for i, f in enumerate(branches):
        mapped = [outputs[i - j] @ module.down[i].T @ module.up[i].T for j in range(min(i + 1, 2))]
        y = f(outputs[i]) + outputs[i] + sum(c * h for c, h in zip(module.weights[i], mapped, strict=True))
        outputs.append(y)
    torch.testing.assert_close(module(x), outputs[-1])


def test_altup_predicts_computes_and_corrects():
    """Baykal et al. 2023, algorithm 1, element by element."""
    branches, x, n = [branch() for _ in range(5)], torch.randn(N, WIDTH), 3
    module = sn.HyperConnected(*branches, streams=n, connect=sn.AltUp)
    torch.testing.assert_close(module(x), nn.Sequential(*map(sn.IdentityShortcut, branches))(x))
    shaken(module)
    streams = [x] * n
    for number, (f, layer) in enumerate(zip(branches, module.layers)):
        j = number % n
        predicted = [sum(layer.predict[i, k] * streams[k] for k in range(n)) for i in range(n)]
        computed = streams[j] + f(streams[j])
        streams = [p + layer.correct[i] * (computed - predicted[j]) for i, p in enumerate(predicted)]
    torch.testing.assert_close(module(x), sum(streams) / n)


def test_frac_connections_are_the_papers_pseudocode():
    """Zhu et al. 2025, algorithm 2, token by token: [Y A] = alpha, beta = b; alpha^T H holds what is read and kept."""
    m, module = 3, shaken(sn.FracConnection(branch(), WIDTH, parts=3))
    x = torch.randn(N, WIDTH)
    parts = x.reshape(N, m, WIDTH // m)
    rows = F.layer_norm(parts, (WIDTH // m,), module.norm.weight, module.norm.bias)
    static = torch.cat([module.matrices[0].T, module.matrices[1].T], 1)
    read, kept, betas = [], [], []
    for token in range(N):
        alpha = static + module.scale * torch.tanh(rows[token] @ module.to_matrices.T)
        mixed = alpha.T @ parts[token]
        read.append(mixed[:m].reshape(-1)), kept.append(mixed[m:])
        betas.append(module.vector + module.scale_vector * torch.tanh(rows[token] @ module.to_vector))
    out = module.branch(torch.stack(read)).reshape(N, m, -1)
    expected = torch.stack(betas).unsqueeze(-1) * out + torch.stack(kept)
    torch.testing.assert_close(module(x), expected.reshape(N, WIDTH))
    torch.testing.assert_close(sn.FracConnection(module.branch, WIDTH)(x), x + module.branch(x))


def test_gated_streams_are_qwens_recursion():
    branches, x = [branch() for _ in range(3)], torch.randn(N, WIDTH)
    connect = partial(sn.GatedStreams, width=WIDTH, rank=2)
    module = shaken(sn.HyperConnected(*branches, streams=3, connect=connect))
    streams = [x] * 3
    for f, layer in zip(branches, module.layers):
        streams = gated_layer(layer, f, streams)
    torch.testing.assert_close(module(x), gated_mean(module.collapse, streams, 3))


@pytest.mark.parametrize("kind", [sn.CollapsedHyperConnection, sn.UnmixedHyperConnection])
def test_streams_end_in_a_learned_sum(kind):
    branches, x, n = [branch() for _ in range(2)], torch.randn(N, WIDTH), 3
    module = shaken(sn.HyperConnected(*branches, streams=n, connect=partial(kind, width=WIDTH)))
    X = torch.stack([x] * n)
    for layer in module.layers:
        pre, post, mixing = layer.weights(X)
        kept = X if mixing is None else torch.einsum("tij,jtd->itd", mixing, X)
        X = kept + post.T.unsqueeze(-1) * layer.branch((pre.T.unsqueeze(-1) * X).sum(0))
    (w, b), a = module.collapse.to_weights.parameters(), module.collapse.scales
    flat = rms_normed(X.movedim(0, 1).flatten(1))
    h = torch.sigmoid(a * (flat @ w.T) + b)
    torch.testing.assert_close(module(x), torch.einsum("ti,itd->td", h, X))


def test_a_variance_gate_keeps_the_variance():
    x, f = torch.randn(2, 40000, 1)
    for gate in (0.1, 0.5, 0.9):
        assert sn.variance_gate(x, f, torch.tensor(gate)).var().item() == pytest.approx(1, abs=0.03)


def test_sub_norm_scales_weights_and_refuses_what_calls_no_linear_map():
    layer = nn.Linear(WIDTH, WIDTH)
    before = layer.weight.detach().clone()
    sn.registry()["sub-norm"](layer, WIDTH, depth=24)
    torch.testing.assert_close(layer.weight.detach(), before * math.log(24) ** 0.5)
    for given in (nn.ReLU(), nn.MultiheadAttention(WIDTH, 1)):
        with pytest.raises(SkipscopeError, match="no linear map"):
            sn.SubNorm(given, WIDTH, 4)


class FourWays(nn.Module):
    """A block with four inputs, as the paper's: something of the first three, and the fourth past it."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(branch() for _ in range(3))

    def forward(self, q, k, v, r):
        return r + torch.tanh(self.maps[0](q) * self.maps[1](k)) + self.maps[2](v)


@pytest.mark.parametrize("ways", [1, 4])
def test_dynamic_dense_blocks_are_the_papers_recursion(ways):
    blocks = [branch() if ways == 1 else FourWays() for _ in range(3)]
    module, x = shaken(sn.DynamicDense(*blocks, width=WIDTH, ways=ways)), torch.randn(N, WIDTH)
    outputs, inputs = [x], [x] * ways
    for i, block in enumerate(blocks):
        outputs.append(block(*inputs))
        inputs = [dense(module, i, outputs, way) for way in range(ways if i < 2 else 1)]
    torch.testing.assert_close(module(x), inputs[0])


def test_fresh_dynamic_dense_blocks_are_the_network_that_they_were():
    blocks, x = [sn.IdentityShortcut(branch()) for _ in range(4)], torch.randn(N, WIDTH)
    torch.testing.assert_close(sn.DynamicDense(*blocks, width=WIDTH)(x), nn.Sequential(*blocks)(x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_value_residual_is_the_papers_recursion(heads, causal):
    module, x = shaken(sn.ValueResidual(WIDTH, 3, heads, causal=causal)), torch.randn(2, N, WIDTH)
    first, y, d = None, x, WIDTH // heads
    for n, layer in zip(module.norms, module.attentions):
        q, k, v = layer.project(F.layer_norm(y, (WIDTH,), n.weight, n.bias)).split(WIDTH, -1)
        first = v if first is None else first
        a, b = layer.weights if layer is not module.attentions[0] else (1, 0)
        used, parts = a * v + b * first, []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            scores = q[..., part] @ k[..., part].transpose(-1, -2) / d**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf)
            parts.append(scores.softmax(-1) @ used[..., part])
        y = y + torch.cat(parts, -1) @ layer.out.weight.T + layer.out.bias
    torch.testing.assert_close(module(x), y)


def test_a_gru_gate_starts_near_the_identity():
    x = torch.randn(N, WIDTH)
    far = [(sn.GRUGate(branch(), WIDTH, bias=b)(x) - x).norm().item() for b in (2.0, 8.0, 800.0)]
    assert far[0] > 50 * far[1] and far[2] == 0


def test_reversible_layers_can_be_run_backward():
    branches, x = [branch() for _ in range(6)], torch.randn(N, WIDTH)
    one = two = x
    for f, g in zip(branches[::2], branches[1::2]):
        one, two = sn.reversible(one, two, f, g)
    torch.testing.assert_close(sn.Reversible(*branches)(x), (one + two) / 2)
    for i in (4, 2, 0):
        one, two = sn.reversed_from(one, two, branches[i], branches[i + 1])
    torch.testing.assert_close(one, x)
    torch.testing.assert_close(two, x)


def test_parallel_branches_have_one_shortcut_past_all():
    branches, x = [branch() for _ in range(3)], torch.randn(N, WIDTH)
    torch.testing.assert_close(
        sn.ParallelBranches(*branches, width=WIDTH)(x), x + sum(f(norm(x)) for f in branches)
    )


# --- what find_shortcuts says of whole stacks ---

STACKS = {
    "depth attention": (lambda f: sn.DepthAttention(*f, width=WIDTH), {"gated": 6}),
    "dynamic dense": (lambda f: sn.DynamicDense(*map(sn.IdentityShortcut, f), width=WIDTH), {"identity": 3, "gated": 6}),
    "reversible": (lambda f: sn.Reversible(*f, branch()), {"identity": 5}),
    "residual streams": (lambda f: sn.ResidualStreams(*f, width=WIDTH), {"identity": 6}),
    "depth averaged": (lambda f: sn.DepthAveraged(*f), {"scaled": 6}),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_every_shortcut_of_a_stack_is_found(name):
    make, kinds = STACKS[name]
    found = ss.find_shortcuts(make([branch() for _ in range(3)]).eval(), torch.randn(N, WIDTH))
    assert Counter(s.kind for s in found) == kinds


def test_the_last_sum_of_two_residual_streams_skips_nothing():
    """Both streams come to it from the last branch through one norm each."""
    model = sn.ResidualStreams(branch(), branch(), width=WIDTH)
    found = ss.find_shortcuts(model, torch.randn(N, WIDTH))
    assert [(merge.name, merge.reason) for merge in found.rejected] == [("add", "parallel branches")]


# --- as the papers start them ---


def test_every_weight_of_a_value_residual_gets_a_gradient():
    module = sn.ValueResidual(WIDTH, 3)
    module(torch.randn(2, N, WIDTH)).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_deep_norm_leaves_queries_and_keys_of_a_fused_weight_alone():
    attention = nn.MultiheadAttention(WIDTH, 2)
    before = attention.in_proj_weight.detach().clone()
    sn.deep_norm_(attention, layers=2)
    factors = (attention.in_proj_weight.detach() / before).chunk(3)
    for factor, expected in zip(factors, (1, 1, 16**-0.25)):
        torch.testing.assert_close(factor, torch.full_like(factor, expected))

    class Otherwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH)

    with pytest.raises(SkipscopeError, match="order that is not known"):
        sn.deep_norm_(Otherwise(), layers=2)


def test_deep_norms_constants_are_the_papers_table():
    assert sn.deep_norm_constants(18) == pytest.approx((36**0.25, 144**-0.25))
    assert sn.deep_norm_constants(6, decoder_layers=3) == pytest.approx(
        (0.81 * (6**4 * 3) ** (1 / 16), 0.87 * (6**4 * 3) ** (-1 / 16))
    )
    assert sn.deep_norm_constants(3, encoder_layers=6) == pytest.approx((9**0.25, 36**-0.25))


def test_deep_norm_by_name_scales_its_branch():
    layer = nn.Linear(WIDTH, WIDTH)
    before = layer.weight.detach().clone()
    sn.registry()["deep-norm"](layer, WIDTH, depth=24)
    torch.testing.assert_close(layer.weight.detach(), before * (8 * 12) ** -0.25)


def test_admin_starts_at_the_summed_variances():
    branches, x = [branch() for _ in range(3)], torch.randn(4000, WIDTH)
    network = sn.admin_(nn.Sequential(*[sn.Admin(f, WIDTH) for f in branches]), x)
    y, total = x, x.var()
    for block, f in zip(network, branches):
        torch.testing.assert_close(block.omega.detach(), total.sqrt().detach().expand(WIDTH))
        total, y = total + f(y).var(), norm(y + f(y))


@pytest.mark.parametrize(
    "initialise", [nn.init.orthogonal_, nn.init.zeros_, partial(nn.init.normal_, std=7.0)]
)
def test_second_branches_keep_the_initialisation_that_was_asked_for(initialise):
    first = nn.Linear(WIDTH, WIDTH)
    initialise(first.weight), nn.init.zeros_(first.bias)
    second = sn.ShakeShake(first).other
    assert not second.bias.any() and torch.equal(second.weight.sort(1).values, first.weight.sort(1).values)
    torch.testing.assert_close(second.weight @ second.weight.T, first.weight @ first.weight.T)
    assert not first.weight.any() or not torch.equal(first.weight, second.weight)


class Masked(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)

    def forward(self, x, mask, *, scale=1.0):
        return super().forward(x) * mask * scale


@pytest.mark.parametrize("name", sn.registry())
def test_masks_and_other_arguments_go_to_every_branch(name):
    module, x = sn.registry()[name](Masked(), WIDTH, depth=4).eval(), torch.randn(N, WIDTH)
    masks = torch.zeros(N, 1), torch.ones(N, 1)
    alone, whole, doubled = (
        module(x, m, scale=s) for m, s in ((masks[0], 1.0), (masks[1], 1.0), (masks[1], 2.0))
    )
    starts_at_zero = module.identity_at_start
    assert starts_at_zero or not (torch.equal(alone, whole) or torch.equal(whole, doubled))


@pytest.mark.parametrize("name", sn.registry())
def test_each_kind_says_what_it_is_and_takes_what_it_says(name):
    kind = sn.registry()[name]
    module = kind(branch(), WIDTH, depth=4, **kind.arguments)
    assert isinstance(module, nn.Module) and kind.equation
    assert "arXiv" in kind.paper or "github.com" in kind.paper
    assert f"- {name} ({kind.module.__name__}" in sn.__doc__ and kind.paper in sn.__doc__
    with pytest.raises(SkipscopeError, match="no such argument"):
        kind(branch(), WIDTH, no_such_thing=1)


def test_attributes_that_a_connection_lacks_are_its_branchs():
    block = sn.ReZero(nn.Linear(WIDTH, WIDTH))
    assert block.out_features == WIDTH and not hasattr(block, "nothing_of_the_kind")


# --- further instances ---


class SplitsByHand(nn.Module):
    """Attention with one weight for queries, keys and values, under the name that ``name`` says."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.Linear(WIDTH, 3 * WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)


class TransposedWeight(nn.Module):
    """As in GPT-2, whose weights are input x output."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(WIDTH, 3 * WIDTH)),
            nn.Parameter(torch.zeros(3 * WIDTH)),
        )


@pytest.mark.parametrize("name", ["qkv", "Wqkv", "to_qkv", "in_proj"])
def test_deep_norm_scales_the_values_alone_of_weights_in_rows(name):
    torch.manual_seed(0)
    attention = SplitsByHand(name)
    fused, bias, out = attention.get_submodule(name), attention.get_submodule(name).bias, attention.proj
    before, before_out, before_bias = fused.weight.clone(), out.weight.clone(), bias.clone()
    sn.deep_norm_(attention, layers=32)
    torch.testing.assert_close(fused.weight[: 2 * WIDTH], before[: 2 * WIDTH], rtol=0, atol=0)
    torch.testing.assert_close(fused.weight[2 * WIDTH :], before[2 * WIDTH :] * 256**-0.25)
    torch.testing.assert_close(out.weight, before_out * 256**-0.25)
    assert torch.equal(bias, before_bias)


def test_deep_norm_scales_the_values_alone_of_weights_in_columns_and_refuses_unknown_orders():
    attention = nn.Module()
    attention.c_attn = TransposedWeight()
    before = attention.c_attn.weight.detach().clone()
    sn.deep_norm_(attention, layers=32)
    expected = torch.cat([before[:, : 2 * WIDTH], before[:, 2 * WIDTH :] / 4], 1)
    torch.testing.assert_close(attention.c_attn.weight.detach(), expected)
    grouped = nn.Module()
    grouped.qkv = nn.Linear(WIDTH, WIDTH + 2)  # fewer keys and values than queries: no thirds
    known_first = nn.Sequential(nn.Linear(WIDTH, WIDTH), SplitsByHand("qkv_proj"))
    for case in (grouped, SplitsByHand("query_key_value"), known_first):
        weights = [p.detach().clone() for p in case.parameters()]
        with pytest.raises(SkipscopeError, match="order that is not known") as refusal:
            sn.deep_norm_(case, layers=32)
        assert "skip=" in refusal.value.cure
        assert all(torch.equal(a, b) for a, b in zip(weights, case.parameters())), "refused, and half done"


def causal_attention():
    class Attends(nn.MultiheadAttention):
        def forward(self, x, mask, *, padding=None):
            return super().forward(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]

    return Attends(WIDTH, 2, batch_first=True)


STACK_KINDS = [name for name, kind in sn.registry().items() if kind.spans_depth]


@pytest.mark.parametrize("name", STACK_KINDS)
def test_a_causal_mask_holds_through_every_layer_of_a_stack(name):
    """With the mask no token sees a later one; without it they do; padded tokens are seen by none."""
    torch.manual_seed(0)
    stack = sn.registry()[name]([causal_attention() for _ in range(4)], WIDTH, depth=4).eval()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x, mask = torch.randn(2, 5, WIDTH), torch.ones(5, 5).triu(1).bool()
    other = torch.cat([x[:, :3], torch.randn(2, 2, WIDTH)], 1)
    torch.testing.assert_close(stack(x, mask)[:, :3], stack(other, mask)[:, :3])
    assert not torch.allclose(stack(x, None)[:, :3], stack(other, None)[:, :3])
    padding = torch.tensor([[False] * 3 + [True] * 2] * 2)
    hidden = stack(x, None, padding=padding)[:, :3], stack(other, None, padding=padding)[:, :3]
    torch.testing.assert_close(*hidden)


@pytest.mark.parametrize("name", sn.registry())
def test_help_names_each_kind_with_its_class_equation_arguments_and_paper(name, help_text):
    """``help(skipscope.nn)`` as a person sees it."""
    kind = sn.registry()[name]
    line = next(one for one in help_text.splitlines() if one.strip().startswith(f"- {name} ("))
    assert kind.module.__name__ in line and kind.equation in line and kind.paper in line
    assert all(f"{argument}={default!r}" in line for argument, default in kind.arguments.items())
    assert ("spans depth" in line) == kind.spans_depth


@pytest.fixture(scope="module")
def help_text():
    return pydoc.plain(pydoc.render_doc(sn))


@pytest.mark.parametrize(
    ("scale", "branch_scale"), [(0.5, 2.0), (1.0, 3.0), (2.0, 1.0), (1.0, 1.0), (3.0, 0.0)]
)
def test_a_constant_scale_may_be_on_either_side_of_one(scale, branch_scale):
    f, x = branch(), torch.randn(N, WIDTH)
    block = sn.ScaledShortcut(f, scale=scale, branch_scale=branch_scale)
    torch.testing.assert_close(block(x), scale * x + branch_scale * f(x))
