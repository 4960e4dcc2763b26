"""Multi-task learning: a shared trunk, two losses weighed by learned uncertainty."""

import torch
import torch.nn as nn

import skipscope as ss


class MultiTask(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(10, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
        self.heads = nn.ModuleDict({"kind": nn.Linear(32, 4), "price": nn.Linear(32, 1)})
        self.log_vars = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        h = self.trunk(x)
        return {name: head(h) for name, head in self.heads.items()}


class UncertaintyLoss:
    def __init__(self):
        self.ce, self.mse = nn.CrossEntropyLoss(), nn.MSELoss()

    def __call__(self, model, batch):
        out = model(batch["x"])
        losses = torch.stack(
            [self.ce(out["kind"], batch["kind"]), self.mse(out["price"].squeeze(1), batch["price"])]
        )
        return (torch.exp(-model.log_vars) * losses + model.log_vars).sum()


torch.manual_seed(0)
model, compute_loss = MultiTask(), UncertaintyLoss()
batch = {"x": torch.randn(64, 10), "kind": torch.randint(0, 4, (64,)), "price": torch.randn(64)}
optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3)

flow = ss.gradient_flow(model, batch, ss.objective(compute_loss))
with ss.watch(model, optimizer, every=2) as monitor:
    for _ in range(8):
        optimizer.zero_grad()
        compute_loss(model, batch).backward()
        optimizer.step()

assert flow.verdict.state == "healthy", flow.verdict
assert monitor.verdict.state == "healthy", monitor.verdict
