"""Knowledge distillation: a frozen teacher inside the loss, temperature, a mix of soft and hard targets."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import skipscope as ss


class Distiller(nn.Module):
    def __init__(self, student, teacher, T=2.0, alpha=0.5):
        super().__init__()
        self.student, self.teacher, self.T, self.alpha = student, teacher, T, alpha
        for p in self.teacher.parameters():
            p.requires_grad = False

    def training_step(self, x, y):
        with torch.no_grad():
            soft = self.teacher(x)
        out = self.student(x)
        kl = (
            F.kl_div(F.log_softmax(out / self.T, 1), F.softmax(soft / self.T, 1), reduction="batchmean")
            * self.T**2
        )
        return self.alpha * kl + (1 - self.alpha) * F.cross_entropy(out, y)


torch.manual_seed(0)
net = lambda width: nn.Sequential(
    nn.Linear(16, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 5)
)  # noqa: E731
distiller = Distiller(net(16), net(64).eval())
optimizer = torch.optim.AdamW(distiller.student.parameters(), lr=1e-3)
x, y = torch.randn(40, 16), torch.randint(0, 5, (40,))

objective = ss.objective(lambda student, batch: distiller.training_step(*batch))
flow = ss.gradient_flow(distiller.student, (x, y), objective)
with ss.watch(distiller.student, optimizer) as monitor:
    for _ in range(6):
        loss = distiller.training_step(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

assert flow.verdict.state == monitor.verdict.state == "healthy", (flow.verdict, monitor.verdict)
