"""A run that stops after two epochs and is resumed from its checkpoint, the history with it."""

import os

import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

import skipscope as ss

CHECKPOINT = "checkpoint.pt"


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 1))
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(epochs):
    model, optimizer = build()
    start = 0
    if os.path.exists(CHECKPOINT):
        state = torch.load(CHECKPOINT, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"] + 1
    monitor = ss.watch(model, optimizer, folder="run", resume=start > 0)
    for epoch in range(start, epochs):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}, CHECKPOINT
        )
    monitor.close()


torch.manual_seed(1)
x = torch.randn(48, 6)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)
train(2)
train(4)

history = ss.load("run")
assert history.steps.tolist() == list(range(1, 13))
assert history.verdict.state == "healthy", history.verdict
