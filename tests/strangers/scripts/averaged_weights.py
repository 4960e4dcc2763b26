"""Exponential moving averages of the weights, and stochastic weight averaging with its batch norms."""

import torch
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

import skipscope as ss

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 3))
data = TensorDataset(torch.randn(60, 8), torch.randint(0, 3, (60,)))
loader = DataLoader(data, batch_size=20, shuffle=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
swa, swa_scheduler = AveragedModel(model), SWALR(optimizer, swa_lr=0.05)

with ss.watch(model, optimizer) as monitor:
    for epoch in range(4):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            ema.update_parameters(model)
        if epoch >= 2:
            swa.update_parameters(model)
            swa_scheduler.step()
update_bn(loader, swa)

# Is the averaged solution flatter? Both along one line, from the same data.
fixed = ss.batches([(data.tensors[0], data.tensors[1])])
line = ss.landscape(
    model, fixed, nn.functional.cross_entropy, directions=ss.solutions_plane(model, swa.module), grid=(7,)
)
assert monitor.verdict.state == "healthy" and len(monitor.history.steps) == 12, monitor.verdict
assert line.values.shape == (7,) and line.checks.passed
