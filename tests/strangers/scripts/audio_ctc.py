"""Speech recognition: a bidirectional LSTM and CTC, batches of four tensors."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import skipscope as ss


class Recogniser(nn.Module):
    def __init__(self, mels=20, hidden=32, symbols=12):
        super().__init__()
        self.conv = nn.Conv1d(mels, hidden, 3, stride=2, padding=1)
        self.rnn = nn.LSTM(hidden, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.proj = nn.Linear(2 * hidden, symbols)

    def forward(self, feats):
        x = F.gelu(self.conv(feats.transpose(1, 2))).transpose(1, 2)
        return self.proj(self.rnn(x)[0]).log_softmax(-1)


def step_loss(model, batch):
    feats, feat_lens, labels, label_lens = batch
    log_probs = model(feats).transpose(0, 1)
    return F.ctc_loss(log_probs, labels, feat_lens // 2, label_lens, zero_infinity=True)


torch.manual_seed(0)
batch = (
    torch.randn(4, 40, 20), torch.tensor([40, 36, 40, 30]), torch.randint(1, 12, (4, 6)), torch.tensor([6, 5, 4, 6])
)  # fmt: skip
model = Recogniser()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

flow = ss.gradient_flow(model, batch, ss.objective(step_loss))
with ss.watch(model, optimizer) as monitor:
    for _ in range(5):
        optimizer.zero_grad()
        step_loss(model, batch).backward()
        optimizer.step()

assert flow.verdict.state == "healthy", flow.verdict
assert monitor.verdict.state == "healthy", monitor.verdict
