"""Forecasting: a temporal convolution network, three quantiles, windows over a series, ReduceLROnPlateau."""

import torch
import torch.nn as nn
from torch.nn.utils.parametrizations import weight_norm

import skipscope as ss


class Chomp1d(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, inputs, outputs, dilation, k=3):
        super().__init__()
        pad = (k - 1) * dilation
        self.net = nn.Sequential(
            weight_norm(nn.Conv1d(inputs, outputs, k, padding=pad, dilation=dilation)), Chomp1d(pad), nn.ReLU(),
            weight_norm(nn.Conv1d(outputs, outputs, k, padding=pad, dilation=dilation)), Chomp1d(pad), nn.ReLU(),
        )  # fmt: skip
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x):
        res = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.net(x) + res)


class TCN(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(
            TemporalBlock(1, 16, 1), TemporalBlock(16, 16, 2), TemporalBlock(16, 16, 4)
        )
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(self.blocks(x[:, None])[:, :, -1])


class PinballLoss(nn.Module):
    def __init__(self, quantiles=(0.1, 0.5, 0.9)):
        super().__init__()
        self.register_buffer("q", torch.tensor(quantiles))

    def forward(self, prediction, target):
        error = target[:, None] - prediction
        return torch.maximum(self.q * error, (self.q - 1) * error).mean()


torch.manual_seed(0)
series = torch.sin(torch.arange(200) / 5) + 0.1 * torch.randn(200)
windows = series.unfold(0, 33, 2)
x, y = windows[:, :32], windows[:, 32]
model, criterion = TCN(), PinballLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)

found = ss.find_shortcuts(model, x)
flow = ss.gradient_flow(model, (x, y), criterion)
with ss.watch(model, optimizer, flow_every=4) as monitor:
    for _ in range(12):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step(loss)

assert [s.kind for s in found] == ["projection", "identity", "identity"]
assert flow.verdict.state == monitor.verdict.state == "healthy", (flow.verdict, monitor.verdict)
