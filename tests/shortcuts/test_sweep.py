"""What a sweep over other people's models has shown, each as the smallest network that has it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


class FrozenNorm(nn.Module):
    """A batch norm whose gain is a buffer; detectors' last norm of a block starts at zero."""

    def __init__(self, width, gain):
        super().__init__()
        self.register_buffer("gain", torch.full((width,), gain))
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, x):
        return x * self.gain.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class FrozenResNet(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.norm = FrozenNorm(3, gain)

    def forward(self, x):
        for conv in self.convs:
            x = torch.relu(x + self.norm(conv(x)))
        return x


class Codec(nn.Module):
    """An encoder, a codebook in a buffer, a decoder: integers lie between the two."""

    def __init__(self):
        super().__init__()
        self.register_buffer("book", torch.randn(20, 6))
        self.encoder, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x + self.encoder(x).tanh()
        h = F.embedding((x @ self.book.T).argmax(-1), self.book)
        return h + self.decoder(h).tanh()


class Snake(nn.Module):
    """An activation function with a number for each channel, x + sin(a x)^2 / a, inside a residual block."""

    def __init__(self):
        super().__init__()
        self.conv, self.alpha = nn.Conv1d(4, 4, 3, padding=1), nn.Parameter(torch.ones(1, 4, 1))

    def forward(self, x):
        y = x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).pow(2)
        return x + self.conv(y)


class Additive(nn.Module):
    """A recurrent decoder that attends by v . tanh(U h + W s)."""

    def __init__(self):
        super().__init__()
        self.keys, self.query, self.score = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.cell = nn.GRUCell(6, 6)

    def forward(self, x):
        state = x.mean(1)
        for _ in range(3):
            seen = torch.tanh(self.keys(x) + self.query(state).unsqueeze(1))
            weights = self.score(seen).softmax(1)
            state = self.cell((weights.transpose(1, 2) @ x).squeeze(1), state)
        return state


class Pooled(nn.Module):
    """A block with a projection, and attention over what comes out of it: the sum is more than a score."""

    def __init__(self):
        super().__init__()
        self.skip, self.inner, self.outer = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 8)
        self.score = nn.Linear(8, 1)

    def forward(self, x):
        y = torch.tanh(self.skip(x) + self.outer(self.inner(x).relu()))
        return self.score(y).softmax(1).transpose(1, 2) @ y


class Decoder(nn.Module):
    """Learned queries that attend to the data, with position embeddings added anew in every layer where asked."""

    def __init__(self, layers, again=False, norm_first=True):
        super().__init__()
        self.queries, self.places = nn.Parameter(torch.randn(1, 4, 8)), nn.Parameter(torch.randn(1, 4, 8))
        self.attend = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(layers))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(layers))
        self.again, self.norm_first = again, norm_first

    def forward(self, x):
        q = self.queries.expand(len(x), -1, -1)
        for attend, feed, norm in zip(self.attend, self.feed, self.norms):
            read = norm(q) if self.norm_first else q
            read = read + self.places if self.again else read
            q = q + attend(read, x, x)[0]
            q = q if self.norm_first else norm(q)
            q = q + feed(q)
        return q


class Gains(nn.Module):
    """A branch of vectors only that makes one value of several: no activation function."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1))

    def forward(self, x):
        return x + self.gain * (F.avg_pool1d(x, 3, 1, 1) - x)


class GainOnCurve(nn.Module):
    """A branch without matrices whose gains come last: they weigh what the branch adds."""

    def __init__(self, *shape):
        super().__init__()
        self.gain = nn.Parameter(torch.full(shape, 0.5))

    def forward(self, x):
        return x + self.gain * torch.tanh(x)


class Modulated(nn.Module):
    """FiLM: gain and shift are two linear maps of the condition, side by side, whatever it is that they modulate."""

    def __init__(self):
        super().__init__()
        self.condition, self.gain, self.shift = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    def forward(self, x):
        c = torch.relu(self.condition(x))
        return self.gain(c) * self.body(x) + self.shift(c)


class PredictedKernel(nn.Module):
    """As in UnivNet: kernel and bias of a convolution are predicted, for each place, from a condition."""

    def __init__(self):
        super().__init__()
        self.condition, self.conv = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 1)
        self.kernel, self.bias = nn.Conv1d(4, 4 * 4 * 3, 1), nn.Conv1d(4, 4, 1)

    def forward(self, x):
        c = F.leaky_relu(self.condition(x))
        h = F.pad(F.leaky_relu(self.conv(x)), (1, 1)).unfold(2, 3, 1)
        y = torch.einsum("bilk,boikl->bol", h, self.kernel(c).view(len(x), 4, 4, 3, -1)) + self.bias(c)
        return x + torch.sigmoid(y) * torch.tanh(y)


CASES = {
    "gain and shift from a condition": (Modulated, (3, 6), []),
    "a predicted kernel and bias": (PredictedKernel, (2, 4, 7), ["identity"]),
    "a frozen norm that starts at zero": (lambda: FrozenResNet(0.0), (2, 3, 5, 5), ["identity"] * 3),
    "a frozen norm": (lambda: FrozenResNet(1.0), (2, 3, 5, 5), ["identity"] * 3),
    "a codec": (Codec, (4, 6), ["identity"] * 2),
    "an activation function with gains": (Snake, (2, 4, 7), ["identity"]),
    "additive attention": (Additive, (2, 5, 6), []),
    "attention over a sum with a projection": (Pooled, (2, 5, 6), ["projection"]),
    "learned queries": (lambda: Decoder(2), (2, 5, 8), ["identity"] * 4),
    "learned queries, normed after each sum": (
        lambda: Decoder(2, norm_first=False),
        (2, 5, 8),
        ["identity"] * 4,
    ),
    "learned queries with places": (lambda: Decoder(2, again=True), (2, 5, 8), ["identity"] * 4),
    "gains after a curve": (lambda: GainOnCurve(4, 1), (2, 4, 7), ["identity"]),
    "one number for all after a curve": (lambda: GainOnCurve(), (2, 4, 7), []),
    "gains around a pool": (Gains, (2, 4, 7), ["identity"]),
}


@pytest.mark.parametrize("name", CASES)
def test_known_shortcuts_and_edits(name):
    make, shape, kinds = CASES[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    found = ss.find_shortcuts(model, x)
    assert [s.kind for s in found] == kinds, [(r.name, r.reason) for r in found.rejected]
    if kinds:
        assert torch.equal(ss.ablate(model, found, "detach")(x), model(x))
        assert not torch.equal(ss.ablate(model, found)(x), model(x))


def test_a_state_that_has_not_begun_carries_nothing():
    """c0 = 0 times the first gate: as large as the product, and no gain."""

    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.i = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            state = torch.zeros(x.shape[0], 6)
            return torch.sigmoid(self.f(x)) * state + torch.tanh(self.i(x))

    assert not len(ss.find_shortcuts(Cell(), torch.randn(3, 6)))


@pytest.mark.parametrize(
    "inner",
    [
        lambda net, x: torch.vmap(lambda r: r * net(r).sigmoid() + net(r))(x),
        lambda net, x: torch.vmap(torch.add)(x, net(x)),
        lambda net, x: torch.func.grad(lambda r: (r + net(r).tanh()).square().sum())(x),
    ],
)
def test_what_is_joined_under_a_transformation_is_told_not_guessed(inner):
    """Its tensors are one sample's, or of another derivative: no gradient of the loss can be read from them."""

    class Transformed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            x = inner(self.net, x)
            return x + self.last(x).tanh()

    torch.manual_seed(0)
    model, x = Transformed(), torch.randn(3, 6)
    found = ss.find_shortcuts(model, x)
    assert [s.name for s in found] == ["last"]
    (told,) = found.opaque
    assert told.name == "torch.func" and told.source.startswith("test_sweep.py:")
    assert torch.equal(ss.ablate(model, found, "detach")(x), model(x))
    assert ss.gradient_flow(model, (x, x), F.mse_loss).boundaries[-1].name == "last"


def test_the_flow_through_a_codec_starts_at_its_codes():
    """No gradient passes the integers: the second part says so of the first."""
    flow = ss.gradient_flow(Codec(), (torch.randn(4, 6), torch.zeros(4, 6)), F.mse_loss)
    assert flow.verdict.state == "unconnected" and flow.boundaries[-1].gradient_rms > 0


class Viewed(nn.Module):
    """The branch comes out of a convolution over tokens, transposed; the sum is viewed as heads."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x):
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return x.view(len(x), -1)


@pytest.mark.parametrize(
    "edit", [{"how": "remove"}, {"how": "detach"}, {"how": "lesion"}, {"strength": 0.0}, {"strength": 0.5}]
)
def test_an_edited_sum_keeps_its_layout(edit):
    model, x = Viewed(), torch.randn(2, 5, 8)
    twin = ss.ablate(model, inputs=x, **edit)
    assert twin(x).shape == (2, 40)


def test_a_stream_that_begins_in_weights_is_named_and_edited():
    model, x = Decoder(1).eval(), torch.randn(2, 5, 8)
    found = ss.find_shortcuts(model, x)
    assert [s.fork for s in found] == ["weights", "attend (merged)"] and not found.rejected
    q = model.queries.expand(2, -1, -1)
    by_hand = model.attend[0](model.norms[0](q), x, x)[0]
    twin = ss.ablate(model, found[:1])
    torch.testing.assert_close(twin(x), by_hand + model.feed[0](by_hand))


def test_the_way_back_to_learned_queries_is_split_too():
    model, x = Decoder(1).double().eval(), torch.randn(2, 5, 8).double()
    (row, _) = ss.gradient_split(model, (x, torch.zeros(2, 4, 8).double()), F.mse_loss)
    q = model.queries.expand(2, -1, -1).detach().requires_grad_()
    y = q.detach() + model.attend[0](model.norms[0](q), x, x)[0]
    y.retain_grad()
    F.mse_loss(y + model.feed[0](y), torch.zeros(2, 4, 8).double()).backward()
    assert row.branch_rms == pytest.approx(float(q.grad.square().mean().sqrt()))
    assert row.shortcut_rms == pytest.approx(float(y.grad.square().mean().sqrt()))


class OfBytes(nn.Module):
    """A network that makes numbers of its bytes itself."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        x = self.stem(x.float() / 255)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.head(x)


def test_integers_that_become_numbers():
    torch.manual_seed(0)
    model, y = OfBytes(), torch.randint(0, 3, (5,))
    x = torch.randint(0, 256, (5, 6), dtype=torch.uint8)
    loss = nn.functional.cross_entropy
    found, right = ss.find_shortcuts(model, x), ss.find_shortcuts(model, x.float())
    assert [(s.name, s.kind, s.fork) for s in found] == [(s.name, s.kind, s.fork) for s in right]
    assert [s.name for s in found] == ["layers.0", "layers.1"]
    for how in ("remove", "detach", "lesion"):
        assert torch.equal(ss.ablate(model, found, how)(x), ss.ablate(model, right, how)(x.float()))
    here, there = (ss.gradient_flow(model, (v, y), loss).boundaries for v in (x, x.float()))
    assert [(b.name, b.gradient_rms) for b in here] == [(b.name, b.gradient_rms) for b in there[1:]]
    here, there = (ss.path_spectrum(model, (v, y), loss, wrt="stem").norms for v in (x, x.float()))
    torch.testing.assert_close(torch.tensor(here), torch.tensor(there))
    for one, other in zip(*(ss.gradient_split(model, (v, y), loss) for v in (x, x.float()))):
        assert one.branch_rms == pytest.approx(other.branch_rms, rel=1e-6)
