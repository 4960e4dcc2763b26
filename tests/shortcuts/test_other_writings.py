"""Kinds and writings of shortcuts that were met in other people's code, each with the network that removing gives."""

from __future__ import annotations

import functools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


class Net(nn.Module):
    """A network of one function of itself and x."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.up, self.third = (
            nn.Linear(i, o) for i, o in ((6, 6), (6, 6), (6, 6), (12, 6), (3, 3))
        )
        self.p, self.q, self.memory = (nn.Parameter(torch.rand(shape) + 0.2) for shape in (6, 3, (2, 6)))
        self.w, self.mix, self.to_mix, self.filter = (
            nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (3, 4), (6, 4), (1, 4))
        )
        self.first, self.last = nn.Linear(1, 4), nn.Linear(4, 2)
        self.conv, self.function = nn.Conv1d(6, 6, 3, padding=1), function

    def branch(self, x):
        return self.b(self.a(x).relu())

    def forward(self, x):
        return self.function(self, x)


KINDS: dict = {}


def kind(name, kinds, without=None, shape=(4, 6)):
    """Register a forward with the kinds of its shortcuts, and the forward without them."""

    def register(function):
        KINDS[name] = function, kinds, without, shape
        return function

    return register


def only_branch(n, x):
    return n.branch(x)


TOKENS = (2, 5, 6)
FEW = torch.tensor([0, 2, 3])
MASK = torch.tensor([True, True, True, False, False]).view(1, 5, 1)


# --- what is written into ---


@kind("the sum written into the branch", ["identity"], lambda n, x: n.c(n.branch(x)))
def into_the_branch(n, x):
    h = n.branch(x)
    torch.add(x, h, out=h)
    return n.c(h)


@kind(
    "the sum written into the branch, and from there into x",
    ["identity"] * 2,
    lambda n, x: n.c(n.branch(x)).tanh(),
)
def into_the_branch_and_back(n, x):
    stream, h = x.clone(), n.branch(x)
    torch.add(stream, h, out=h)
    stream.copy_(h)
    h = n.c(h).tanh()
    return torch.add(stream, h, out=h)


@kind("an activation in place before the fork", ["identity"], lambda n, x: n.branch(F.relu(n.c(x))))
def relu_before_the_fork(n, x):
    x = n.c(x)
    h = n.branch(F.relu_(x))
    return x + h


@kind("steps shifted by one", ["identity"], lambda n, x: F.pad(n.branch(x[:, :-1]), (0, 0, 1, 0)), TOKENS)
def shifted(n, x):
    x = x.clone()
    x[:, 1:] += n.branch(x[:, :-1])
    return x


@kind(
    "routed tokens added by index_add",
    ["identity"],
    lambda n, x: torch.zeros_like(x).index_add(0, FEW, n.branch(x[FEW])),
)
def routed(n, x):
    return x.index_add(0, FEW, n.branch(x[FEW]))


@kind(
    "routed tokens put back",
    ["identity"],
    lambda n, x: torch.zeros_like(x).index_put((FEW,), n.branch(x[FEW])),
)
def routed_and_put_back(n, x):
    out = x.clone()
    out[FEW] = out[FEW] + n.branch(x[FEW])
    return out


# --- scales, blends and masks ---


@kind("the first embedding again in every block", ["scaled", "identity", "scaled"])
def embedding_again(n, x):
    y = n.q[0] * n.branch(x) + n.q[1] * x
    return (y + n.c(y).tanh()) * n.q[0] + n.q[1] * x


@kind("on the sphere", ["scaled"], lambda n, x: F.normalize(n.p * F.normalize(n.branch(x), dim=-1), dim=-1))
def on_the_sphere(n, x):
    return F.normalize(x.lerp(F.normalize(n.branch(x), dim=-1), n.p), dim=-1)


def _on_the_sphere_again(norm):
    def forward(n, x):
        h, side = norm(n.branch(x)), norm(x)
        return norm(side + n.p * (h - side))

    return forward


for name, norm in {
    "a function": lambda x: F.normalize(x, dim=-1),
    "hand": lambda x: x / x.norm(p=2, dim=-1, keepdim=True),
    "hand, safe": lambda x: x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12),
    "a norm of rows": lambda x: F.layer_norm(x, (6,)),
    "a root": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "mean and deviation": lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5),
    "half a length": lambda x: 0.5 * x / torch.linalg.vector_norm(x, dim=-1, keepdim=True),
}.items():
    kind(
        f"on the sphere again by {name}",
        ["scaled"],
        lambda n, x, norm=norm: norm(n.p * norm(n.branch(x))),
    )(_on_the_sphere_again(norm))
    kind(f"normed by {name} beside the branch", ["scaled"], only_branch)(
        lambda n, x, norm=norm: norm(x) + n.branch(x)
    )


@kind("over the norm of another", [])
def over_anothers_norm(n, x):
    return x / n.branch(x).norm(dim=-1, keepdim=True)


@kind("a softmax by hand", [])
def softmax_by_hand(n, x):
    e = x.exp()
    return e / e.sum(-1, keepdim=True) + n.branch(x)


@kind("times a function of its mean", [])
def by_its_mean(n, x):
    return x * x.mean(-1, keepdim=True).sigmoid() + n.branch(x)


@kind("a sum that preserves magnitude", ["scaled"], lambda n, x: 0.3 * n.branch(x) / 0.58**0.5)
def magnitude_preserving(n, x):
    return x.lerp(n.branch(x), 0.3) / (0.7**2 + 0.3**2) ** 0.5


@kind("the mean of two", ["scaled"], lambda n, x: n.branch(x) / 2)
def mean_of_two(n, x):
    return torch.stack([x, n.branch(x)], 1).mean(1)


@kind("a learned gate without data", ["scaled"], lambda n, x: (1 - torch.sigmoid(n.p)) * n.branch(x))
def gate_without_data(n, x):
    g = torch.sigmoid(n.p)
    return g * x + (1 - g) * n.branch(x)


@kind("half the way to the branch", ["scaled"], lambda n, x: 0.5 * n.branch(x))
def half_way(n, x):
    return x - (x - n.branch(x)) * 0.5


@kind("a cross-attention's tanh gate on the branch", ["identity"], lambda n, x: n.q[0].tanh() * n.branch(x))
def tanh_gate(n, x):
    return x + n.q[0].tanh() * n.branch(x)


@kind("padded steps left out", ["identity"], lambda n, x: n.branch(x) * MASK, TOKENS)
def masked(n, x):
    return x + n.branch(x) * MASK


@kind("padded steps kept", ["gated"], lambda n, x: n.branch(x) * MASK, TOKENS)
def kept(n, x):
    return torch.where(MASK, n.branch(x), x)


@kind(
    "a layer's weight in a mean over layers",
    ["scaled"] * 2,
    lambda n, x: n.q.softmax(0)[2] * n.b(n.a(x).relu()).relu(),
)
def mean_over_layers(n, x):
    w, h = n.q.softmax(0), n.a(x).relu()
    return w[0] * x + w[1] * h + w[2] * n.b(h).relu()


# --- sums by other names ---


@kind("the built-in sum", ["identity"], only_branch)
def built_in_sum(n, x):
    return sum([x, n.branch(x)])


@kind("reduced by operator.add", ["identity"], only_branch)
def reduced(n, x):
    return functools.reduce(operator.add, [x, n.branch(x)])


@kind("a stack summed by einsum", ["identity"], only_branch)
def summed_by_einsum(n, x):
    return torch.einsum("sbd->bd", torch.stack([x, n.branch(x)]))


@kind("a stack times ones", ["scaled"], only_branch)
def times_ones(n, x):
    return torch.stack([x, n.branch(x)], -1) @ torch.ones(2)


@kind("a stack times ones by tensordot", ["scaled"], only_branch)
def times_ones_by_tensordot(n, x):
    return torch.tensordot(torch.ones(2), torch.stack([x, n.branch(x)]), dims=1)


@kind("rsub", ["identity"], lambda n, x: -n.branch(x))
def reversed_difference(n, x):
    return torch.rsub(n.branch(x), x)


@kind("addmm of turned operands", ["identity"], lambda n, x: F.linear(x, n.w))
def addmm_of_turned_operands(n, x):
    return torch.addmm(x.T, n.w, x.T).T


@kind("outputs kept in a list", ["identity"], lambda n, x: n.b(n.a(x).tanh()).tanh())
def kept_in_a_list(n, x):
    outputs = [x]
    for layer in (n.a, n.b):
        outputs.append(layer(sum(outputs)).tanh())
    return outputs[-1]


@kind("in the frequencies", ["identity"], only_branch)
def in_the_frequencies(n, x):
    return torch.fft.irfft(torch.fft.rfft(x) + torch.fft.rfft(n.branch(x)), n=6)


# --- skips that are resampled ---


@kind("a pooled and enlarged branch", ["identity"], shape=(2, 6, 8))
def enlarged(n, x):
    return F.interpolate(F.avg_pool1d(n.conv(x).relu(), 2), scale_factor=2) + x


@kind("a blurred skip", ["identity"], lambda n, x: n.conv(x).relu(), (2, 6, 8))
def blurred(n, x):
    return F.conv1d(x, torch.ones(6, 1, 3) / 3, padding=1, groups=6) + n.conv(x).relu()


@kind("memory slots beside the tokens", ["identity"], None, TOKENS)
def memory_slots(n, x):
    h = torch.cat([n.memory.expand(2, 2, 6), x], 1)
    return (h + n.branch(h))[:, 2:]


@kind("a leapfrog step", ["identity"] * 2)
def leapfrog(n, x):
    q, p = x.chunk(2, -1)
    p = p - n.third(q).tanh()
    q = q + n.third(p).tanh()
    return torch.cat([q, p], -1)


# --- streams, couplings and graphs ---


@kind("streams mixed by a matrix made of them", ["projection"], shape=(4, 3, 6))
def dynamic_streams(n, x):
    weights = n.mix + 0.1 * (F.layer_norm(x, (6,)) @ n.to_mix).tanh()
    mixed = torch.einsum("bst,bsd->btd", weights, x)
    return mixed[:, 1:] + n.branch(mixed[:, :1]) * n.q.view(1, 3, 1)


@kind("a coupling of two numbers", ["gated", "concat"], shape=(4, 2))
def coupled_numbers(n, x):
    one, other = x.chunk(2, -1)
    scale, shift = n.last(n.first(one).relu()).chunk(2, -1)
    return torch.cat([one, other * scale.exp() + shift], -1)


@kind("a gate that looks at both sides", ["gated"])
def gate_of_both_sides(n, x):
    y, h = n.c(x), n.branch(x)
    t = torch.sigmoid(n.up(torch.cat([h, y], -1)))
    return t * y + (1 - t) * h


@kind("a branch of messages weighted by exp", ["projection"])
def weighted_messages(n, x):
    weights = (n.a(x) * n.b(x)).exp()
    return n.c(x) + weights / weights.sum(0) * F.linear(x, n.w)


# --- what is none ---


@kind("the larger of two layers", [])
def larger(n, x):
    h = n.a(x).relu()
    return torch.stack([h, n.b(h).relu()], -1).max(-1)[0]


@kind("a product with its own logarithm", [])
def entropies(n, x):
    p = n.a(x).softmax(-1)
    later = n.b(p).softmax(-1)
    return (p * p.log()).sum(-1) + (later * later.log()).sum(-1)


@kind("the noise of an encoder", [])
def reparametrised(n, x):
    return n.a(x) + (n.b(x) / 2).exp() * torch.ones(6)


@kind("a filter in the frequencies beside a linear map", [])
def spectral(n, x):
    return torch.fft.irfft(torch.fft.rfft(x) * n.filter, n=6) + n.c(x)


@kind("a square", [])
def square(n, x):
    return x * x + n.branch(x)


@kind("a swish written out", [])
def swish(n, x):
    return x * torch.sigmoid(x) + n.branch(x)


@kind("two factors", [])
def two_factors(n, x):
    return x.exp() * n.branch(x).exp()


@kind("a rounding with the gradient of the identity", [])
def straight_through(n, x):
    h = n.a(x)
    return h + (h.round() - h).detach()


@pytest.mark.parametrize("name", KINDS)
def test_the_shortcuts_of_other_peoples_writings(name):
    function, kinds, without, shape = KINDS[name]
    model, x = Net(function), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = ss.find_shortcuts(model, x)
    assert [s.kind for s in found] == kinds, [(r.reason, r.source) for r in found.rejected]
    if not kinds:
        return
    with torch.no_grad():
        built = model(x)
        assert torch.equal(ss.ablate(model, found, "detach")(x), built)
        assert torch.equal(ss.ablate(model, found, strength=1.0)(x), built)
        removed = ss.ablate(model, found)(x)
        assert torch.equal(ss.ablate(model, found, strength=0.0)(x), removed)
        assert not torch.equal(removed, built)
        if without is not None:
            torch.testing.assert_close(removed, without(model, x))
