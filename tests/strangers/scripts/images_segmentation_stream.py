"""Segmentation from a stream: an IterableDataset, Dice + BCE with an ignored border, gradient accumulation, OneCycle."""

import random

import torch
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

import skipscope as ss

IGNORE = 255


class Discs(IterableDataset):
    """Never the same sample twice; nobody knows how long it is."""

    def __init__(self, size=32, n=48):
        self.size, self.n = size, n

    def __iter__(self):
        grid = torch.arange(self.size)
        for _ in range(self.n):
            x, y, r = random.randint(8, 24), random.randint(8, 24), random.randint(3, 8)
            mask = ((grid[:, None] - y) ** 2 + (grid[None] - x) ** 2 < r * r).long()
            image = mask + 0.3 * torch.randn(1, self.size, self.size)
            mask[0] = mask[-1] = IGNORE
            yield image, mask


def conv_block(cin, cout):
    return nn.Sequential(
        nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
        nn.Conv2d(cout, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self, chs=(8, 16, 32)):
        super().__init__()
        self.enc = nn.ModuleList([conv_block(a, b) for a, b in zip((1, *chs), chs)])
        self.ups = nn.ModuleList([nn.ConvTranspose2d(b, a, 2, 2) for a, b in zip(chs[-2::-1], chs[:0:-1])])
        self.dec = nn.ModuleList([conv_block(2 * a, a) for a in chs[-2::-1]])
        self.head = nn.Conv2d(chs[0], 1, 1)

    def forward(self, x):
        skips = []
        for i, block in enumerate(self.enc):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for up, block in zip(self.ups, self.dec):
            x = block(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)


def dice_bce(logits, mask):
    valid = (mask != IGNORE).float()
    target = (mask == 1).float()
    logits = logits.squeeze(1)
    bce = (F.binary_cross_entropy_with_logits(logits, target, reduction="none") * valid).sum() / valid.sum()
    p = logits.sigmoid() * valid
    dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + (target * valid).sum() + 1)
    return bce + dice


if __name__ in {"__main__", "<run_path>"}:
    random.seed(0)
    torch.manual_seed(0)
    net, loader = UNet(), DataLoader(Discs(), batch_size=4)
    opt = optim.AdamW(net.parameters(), lr=3e-3)
    accumulate, steps = 3, 4
    sched = optim.lr_scheduler.OneCycleLR(opt, max_lr=3e-3, total_steps=steps)

    report = ss.gradient_flow(net, next(iter(loader)), dice_bce)
    skips = ss.find_shortcuts(net, next(iter(loader))[0])
    with ss.watch(net, opt) as run:
        for i, (image, mask) in enumerate(loader):
            (dice_bce(net(image), mask) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                opt.step()
                sched.step()
                opt.zero_grad(set_to_none=True)

    assert report.verdict.state == "healthy", report.verdict
    assert [s.kind for s in skips] == ["concat", "concat"], skips
    assert run.history.steps.tolist() == [1, 2, 3, 4]
