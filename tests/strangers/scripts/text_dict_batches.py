"""Text classification: a collate function that pads, batches as dictionaries, a masked mean."""

import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

import skipscope as ss

random.seed(0)
torch.manual_seed(0)
corpus = [([random.randrange(2, 50) for _ in range(random.randrange(3, 12))], k % 2) for k in range(40)]


def collate(batch):
    ids = pad_sequence([torch.tensor(words) for words, _ in batch], batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "label": torch.tensor([y for _, y in batch]),
    }


class Encoder(nn.Module):
    def __init__(self, vocab=50, dim=32):
        super().__init__()
        self.embedding = nn.Embedding(vocab, dim, padding_idx=0)
        layer = nn.TransformerEncoderLayer(dim, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(dim, 2)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        mask = attention_mask[..., None].float()
        return self.classifier((hidden * mask).sum(1) / mask.sum(1))


loader = DataLoader(corpus, batch_size=8, shuffle=False, collate_fn=collate)
model = Encoder()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)


@ss.objective
def objective(model, batch):
    return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["label"])


flow = ss.gradient_flow(model, loader, objective)
with ss.watch(model, optimizer) as monitor:
    for batch in loader:
        optimizer.zero_grad()
        objective(model, batch).backward()
        optimizer.step()

batch = next(iter(loader))
found = ss.find_shortcuts(model, (batch["input_ids"], batch["attention_mask"]))
assert len(found) == 4 and {s.kind for s in found} == {"identity"}
assert flow.verdict.state == "healthy", flow.verdict
assert monitor.verdict.state == "healthy", monitor.verdict
