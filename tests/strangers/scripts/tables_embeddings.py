"""Tabular data: embeddings of categories beside numbers, an imbalanced target, early stopping."""

import numpy as np
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

import skipscope as ss

rng = np.random.default_rng(0)
cat = rng.integers(0, 10, (200, 3))
num = rng.normal(size=(200, 5)).astype(np.float32)
y = (num[:, 0] + 0.3 * cat[:, 0] > 2.5).astype(np.float32)
loader = DataLoader(
    TensorDataset(torch.from_numpy(cat), torch.from_numpy(num), torch.from_numpy(y)),
    batch_size=64,
    drop_last=False,
)


class TabularModel(nn.Module):
    def __init__(self, cardinalities, n_num, hidden=32, p=0.1):
        super().__init__()
        self.embeds = nn.ModuleList([nn.Embedding(c, 4) for c in cardinalities])
        self.bn = nn.BatchNorm1d(n_num)
        self.lin1 = nn.Linear(4 * len(cardinalities) + n_num, hidden)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(p)) for _ in range(3)]
        )
        self.out = nn.Linear(hidden, 1)

    def forward(self, x_cat, x_num):
        x = torch.cat([e(x_cat[:, i]) for i, e in enumerate(self.embeds)] + [self.bn(x_num)], 1)
        x = torch.relu(self.lin1(x))
        for block in self.blocks:
            x = x + block(x)
        return self.out(x).squeeze(1)


torch.manual_seed(0)
model = TabularModel([10, 10, 10], 5)
criterion = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

objective = ss.objective(lambda model, batch: criterion(model(batch[0], batch[1]), batch[2]))
flow = ss.gradient_flow(model, loader, objective)

best, patience = float("inf"), 0
with ss.watch(model, optimizer) as monitor:
    for _epoch in range(4):
        running = 0.0
        for x_cat, x_num, target in loader:
            optimizer.zero_grad()
            loss = criterion(model(x_cat, x_num), target)
            loss.backward()
            optimizer.step()
            running += loss.item()
        if running < best:
            best, patience = running, 0
        else:
            patience += 1
            if patience == 2:
                break

assert flow.batches == 4 and flow.verdict.state == "healthy", flow.verdict
assert monitor.verdict.state == "healthy" and len(monitor.history.steps) == 16, monitor.verdict
