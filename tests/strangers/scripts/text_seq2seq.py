"""Translation: a GRU encoder and decoder, teacher forcing, packed sequences, padding ignored by the loss."""

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import skipscope as ss

PAD = 0


class Encoder(nn.Module):
    def __init__(self, vocab, hidden):
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden, padding_idx=PAD)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)

    def forward(self, src, lengths):
        packed = pack_padded_sequence(self.embedding(src), lengths, batch_first=True, enforce_sorted=False)
        output, hidden = self.gru(packed)
        return pad_packed_sequence(output, batch_first=True)[0], hidden


class Seq2Seq(nn.Module):
    def __init__(self, vocab=30, hidden=24):
        super().__init__()
        self.encoder = Encoder(vocab, hidden)
        self.embedding = nn.Embedding(vocab, hidden, padding_idx=PAD)
        self.decoder = nn.GRU(hidden, hidden, batch_first=True)
        self.out = nn.Linear(hidden, vocab)

    def forward(self, src, lengths, tgt):
        _, hidden = self.encoder(src, lengths)
        return self.out(self.decoder(self.embedding(tgt[:, :-1]), hidden)[0])


torch.manual_seed(0)
lengths = torch.tensor([7, 5, 6, 3])
src = torch.randint(1, 30, (4, 7)) * (torch.arange(7) < lengths[:, None])
tgt = torch.randint(1, 30, (4, 6))
tgt[2, 4:] = PAD
model, criterion = Seq2Seq(), nn.CrossEntropyLoss(ignore_index=PAD)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)


@ss.objective
def loss_fn(model, batch):
    src, lengths, tgt = batch
    logits = model(src, lengths, tgt)
    return criterion(logits.reshape(-1, logits.size(-1)), tgt[:, 1:].reshape(-1))


flow = ss.gradient_flow(model, (src, lengths, tgt), loss_fn)
with ss.watch(model, optimizer, every=2) as monitor:
    for _ in range(6):
        optimizer.zero_grad()
        loss_fn(model, (src, lengths, tgt)).backward()
        optimizer.step()

assert flow.verdict.state == "healthy", flow.verdict
assert monitor.verdict.state == "healthy", monitor.verdict
