"""Audio classification: waveforms to log-spectrograms inside the model, a residual 1-D network."""

import torch
from torch import nn, optim

import skipscope as ss


class LogSpectrogram(nn.Module):
    def __init__(self, n_fft=64, hop=32):
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft))

    def forward(self, wave):
        spec = torch.stft(wave, self.n_fft, self.hop, window=self.window, return_complex=True)
        return torch.log1p(spec.abs())


class ResidualUnit(nn.Module):
    def __init__(self, channels, dilation):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation), nn.BatchNorm1d(channels),
            nn.ELU(), nn.Conv1d(channels, channels, 1), nn.BatchNorm1d(channels),
        )  # fmt: skip

    def forward(self, x):
        return nn.functional.elu(x + self.net(x))


class AudioNet(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        self.features = LogSpectrogram()
        self.stem = nn.Conv1d(33, 32, 3, padding=1)
        self.units = nn.Sequential(*[ResidualUnit(32, 2**k) for k in range(3)])
        self.head = nn.Linear(32, classes)

    def forward(self, wave):
        return self.head(self.units(self.stem(self.features(wave))).mean(-1))


def tones(n):
    t = torch.arange(1024) / 1024
    label = torch.randint(0, 4, (n,))
    return torch.sin(2 * torch.pi * (40 + 60 * label[:, None]) * t) + 0.1 * torch.randn(n, 1024), label


torch.manual_seed(0)
net, loss_fn = AudioNet(), nn.CrossEntropyLoss()
opt = optim.AdamW(net.parameters(), lr=3e-3)
wave, label = tones(32)

found = ss.find_shortcuts(net, wave)
flow = ss.gradient_flow(net, (wave, label), loss_fn)
with ss.watch(net, opt, flow_every=5) as monitor:
    for _ in range(15):
        opt.zero_grad()
        loss = loss_fn(net(wave), label)
        loss.backward()
        opt.step()

assert [s.name for s in found] == ["units.0", "units.1", "units.2"]
assert flow.verdict.state == monitor.verdict.state == "healthy", (flow.verdict, monitor.verdict)
assert loss.item() < 0.8
