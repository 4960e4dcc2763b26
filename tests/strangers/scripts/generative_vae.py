"""A variational autoencoder: outputs are a tuple, the loss is reconstruction and KL, noise is drawn inside."""

import torch
from torch import nn
from torch.nn import functional as F

import skipscope as ss


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(64, 48), nn.Linear(48, 8), nn.Linear(48, 8)
        self.fc3, self.fc4 = nn.Linear(8, 48), nn.Linear(48, 64)

    def encode(self, x):
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu, logvar):
        return mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)

    def decode(self, z):
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x):
        mu, logvar = self.encode(x.view(-1, 64))
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


def loss_function(output, x):
    recon_x, mu, logvar = output
    bce = F.binary_cross_entropy(recon_x, x.view(-1, 64), reduction="sum")
    kld = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return bce + kld


torch.manual_seed(1)
x = torch.rand(32, 1, 8, 8)
model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

flow = ss.gradient_flow(model, (x, x), loss_function)
surface = ss.landscape(model, (x, x), loss_function, grid=5)
with ss.watch(model, optimizer) as monitor:
    for _ in range(8):
        optimizer.zero_grad()
        loss_function(model(x), x).backward()
        optimizer.step()

assert len(ss.find_shortcuts(model, x)) == 0
assert flow.verdict.state == monitor.verdict.state == "healthy", (flow.verdict, monitor.verdict)
assert surface.checks.passed
