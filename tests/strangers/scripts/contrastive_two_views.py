"""Contrastive learning: two augmented views, InfoNCE over the batch, a projection head."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import skipscope as ss


class SimCLR(nn.Module):
    def __init__(self, dim=32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU()
        )
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 16))

    def forward(self, x):
        return F.normalize(self.projector(self.encoder(x)), dim=1)


def augment(x):
    return x + 0.2 * torch.randn_like(x)


def info_nce(model, images, temperature=0.5):
    z = torch.cat([model(augment(images)), model(augment(images))])
    sim = z @ z.T / temperature
    sim = sim.masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    target = torch.arange(len(z)).roll(len(images))
    return F.cross_entropy(sim, target)


torch.manual_seed(0)
images, model = torch.randn(24, 1, 8, 8), SimCLR()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)

flow = ss.gradient_flow(model, images, ss.objective(info_nce))
with ss.watch(model, optimizer) as monitor:
    for _ in range(10):
        optimizer.zero_grad()
        info_nce(model, images).backward()
        optimizer.step()
        scheduler.step()

assert flow.verdict.state == "healthy", flow.verdict
assert monitor.verdict.state == "healthy", monitor.verdict
