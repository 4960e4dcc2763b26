"""A DCGAN loop with two criteria, a detached fake batch, and betas of 0.5."""

import torch
import torch.nn as nn

import skipscope as ss


def weights_init(m):
    if isinstance(m, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


torch.manual_seed(999)
netG = nn.Sequential(
    nn.ConvTranspose2d(16, 32, 4, 1, 0, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
    nn.ConvTranspose2d(32, 1, 4, 2, 1, bias=False), nn.Tanh(),
)  # fmt: skip
netD = nn.Sequential(
    nn.Conv2d(1, 32, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True),
    nn.Conv2d(32, 1, 4, 1, 0, bias=False), nn.Flatten(0),
)  # fmt: skip
netG.apply(weights_init)
netD.apply(weights_init)
criterion = nn.BCEWithLogitsLoss()
optimizerD = torch.optim.Adam(netD.parameters(), lr=2e-4, betas=(0.5, 0.999))
optimizerG = torch.optim.Adam(netG.parameters(), lr=2e-4, betas=(0.5, 0.999))
real = torch.rand(16, 1, 8, 8)

with ss.watch([netG, netD], [optimizerG, optimizerD]) as monitor:
    for _ in range(6):
        netD.zero_grad()
        loss_real = criterion(netD(real), torch.full((16,), 1.0))
        loss_real.backward()
        fake = netG(torch.randn(16, 16, 1, 1))
        loss_fake = criterion(netD(fake.detach()), torch.full((16,), 0.0))
        loss_fake.backward()
        optimizerD.step()
        netG.zero_grad()
        criterion(netD(fake), torch.full((16,), 1.0)).backward()
        optimizerG.step()

assert monitor.verdict.state == "healthy", monitor.verdict
assert len(monitor.history.steps) == 12
