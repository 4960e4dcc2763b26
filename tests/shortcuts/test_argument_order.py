"""Arguments by keyword, in any order, are read as the same arguments by position."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss
from skipscope.shortcuts.trace import in_order, recording

# Of each function: its arguments in order, of a square input, what a layer makes of it, and a weight.
CALLS = {
    "linear": (F.linear, lambda x, h, w: {"input": x, "weight": w, "bias": w[0]}),
    "matmul": (torch.matmul, lambda x, h, w: {"input": h, "other": w}),
    "bmm": (torch.bmm, lambda x, h, w: {"input": h[None], "mat2": x[None]}),
    "addmm": (torch.addmm, lambda x, h, w: {"input": x, "mat1": h, "mat2": w}),
    "baddbmm": (torch.baddbmm, lambda x, h, w: {"input": x[None], "batch1": h[None], "batch2": w[None]}),
    "addcmul": (torch.addcmul, lambda x, h, w: {"input": x, "tensor1": h, "tensor2": x.sigmoid()}),
    "add": (torch.add, lambda x, h, w: {"input": x, "other": h}),
    "sub": (torch.sub, lambda x, h, w: {"input": x, "other": h}),
    "mul": (torch.mul, lambda x, h, w: {"input": h, "other": x}),
    "div": (torch.div, lambda x, h, w: {"input": h, "other": x + 3}),
    "lerp": (torch.lerp, lambda x, h, w: {"input": x, "end": h, "weight": x.sigmoid()}),
    "where": (torch.where, lambda x, h, w: {"condition": x > 0, "input": x, "other": h}),
    "index_add": (torch.index_add, lambda x, h, w: {"input": x, "dim": 0, "index": torch.arange(4), "source": h}),
    "cat": (torch.cat, lambda x, h, w: {"tensors": [x, h], "dim": 1}),
    "mean": (torch.mean, lambda x, h, w: {"input": h, "dim": 1}),
    "softmax": (torch.softmax, lambda x, h, w: {"input": h, "dim": 1}),
    "layer_norm": (F.layer_norm, lambda x, h, w: {"input": h, "normalized_shape": (4,), "weight": w[0], "bias": w[1]}),
    "embedding": (F.embedding, lambda x, h, w: {"input": (x > 0).long(), "weight": w}),
    "conv1d": (F.conv1d, lambda x, h, w: {"input": h[..., None], "weight": w[:, :, None], "bias": w[0]}),
    "scaled_dot_product_attention": (
        F.scaled_dot_product_attention, lambda x, h, w: {"query": x, "key": h, "value": 2 * x},
    ),
}  # fmt: skip


class Calls(nn.Module):
    """One function of its input, by position or by keywords in some order."""

    def __init__(self, name, order):
        super().__init__()
        torch.manual_seed(0)
        self.func, self.arguments = CALLS[name]
        self.layer, self.weight, self.order = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), order

    def forward(self, x):
        given = self.arguments(x, self.layer(x), self.weight)
        if self.order == "by position":
            return self.func(*given.values())
        return self.func(**dict(reversed(given.items()) if self.order == "reversed" else given.items()))


X = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


def read(name, order):
    with recording(model := Calls(name, order), None, gradients=True) as recorder:
        output = model(X)
    call = next(c for c in reversed(recorder.trace.calls) if c.function == name)
    made = [recorder.trace.values[v].call for v in call.operands]
    functions = [None if at is None else recorder.trace.calls[at].function for at in made]
    flow = ss.gradient_flow(model, (X, None), lambda output, _: output.float().square().mean())
    found = [(s.kind, s.name) for s in ss.find_shortcuts(model, X)]
    return output, functions, [str(flow.verdict), found, [row.gradient_rms for row in flow]]


@pytest.mark.parametrize("order", ["in order", "reversed"])
@pytest.mark.parametrize("name", CALLS)
def test_keywords_in_any_order_are_the_same_call(name, order):
    output, functions, found = read(name, order)
    expected = read(name, "by position")
    assert torch.equal(output, expected[0])
    assert (functions, found) == expected[1:]


class OneKey(nn.Module):
    """Attention over one position: what queries and keys are makes no difference."""

    def __init__(self, module):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if module else None

    def forward(self, x):
        query, key, value = self.q(x), self.k(x[:, :1]), self.v(x[:, :1])
        if self.attention is not None:
            return self.out(self.attention(value=value, key=key, query=query)[0])
        return self.out(F.scaled_dot_product_attention(value=value, key=key, query=query))


@pytest.mark.parametrize("module", [False, True])
def test_attention_by_keywords_over_one_position(module):
    data = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(4, 5, 8)
    verdict = ss.gradient_flow(OneKey(module), data, nn.functional.mse_loss).verdict
    assert (verdict.state, verdict.cause) == ("healthy", "one position")
    assert {"q.weight", "k.weight"} <= set(verdict.starved) and "v.weight" not in verdict.starved


def test_what_is_in_order_or_not_known_is_left_alone():
    x = torch.ones(1)
    for func, args, kwargs in [
        (torch.add, (x,), {"other": x}),
        (torch.add, (x, x), {"alpha": 2}),
        (torch.add, (), {"input": x, "what": x}),
        (print, (), {"file": x}),
    ]:
        assert in_order(func, args, kwargs) == (args, kwargs)


def test_what_goes_by_keyword_alone_stays_a_keyword():
    x, out = torch.ones(1), torch.zeros(1)
    args, kwargs = in_order(torch.add, (), {"out": out, "alpha": 2, "other": x, "input": out})
    assert args[0] is out and args[1] is x
    assert kwargs["alpha"] == 2 and kwargs["out"] is out and len(kwargs) == 2
