"""Mixup with soft labels, label smoothing, warmup by a lambda, gradient clipping."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import skipscope as ss


def mixup(x, y, alpha=0.2):
    lam = float(np.random.default_rng(0).beta(alpha, alpha))
    index = torch.randperm(x.size(0))
    soft = F.one_hot(y, 10).float()
    return lam * x + (1 - lam) * x[index], lam * soft + (1 - lam) * soft[index]


def train(model, images, labels, steps=12):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min(1, (s + 1) / 5))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    with ss.watch(model, opt, flow_every=4) as monitor:
        for _ in range(steps):
            x, y = mixup(images, labels)
            loss = criterion(model(x), y)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            sched.step()
    return monitor


torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
)  # fmt: skip
monitor = train(net, torch.randn(32, 1, 8, 8), torch.randint(0, 10, (32,)))
assert monitor.verdict.state == "healthy", monitor.verdict
assert len(monitor.history.steps) == 12
total = np.sqrt((monitor.history.norm**2).sum(1))
assert (total <= 0.5 + 1e-4).all() and (monitor.history.total_before_clip > 0).all()
