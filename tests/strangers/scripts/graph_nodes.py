"""Node classification: edge lists, index_add_, a mask of training nodes."""

import torch
import torch.nn.functional as F
from torch.nn import BatchNorm1d, Linear, Module, ModuleList

import skipscope as ss


class Data:
    def __init__(self, x, edge_index, y, train_mask):
        self.x, self.edge_index, self.y, self.train_mask = x, edge_index, y, train_mask


class SAGEConv(Module):
    def __init__(self, channels):
        super().__init__()
        self.lin_l, self.lin_r = Linear(channels, channels), Linear(channels, channels, bias=False)

    def forward(self, x, edge_index):
        row, col = edge_index
        total = torch.zeros_like(x).index_add_(0, col, x[row])
        degree = torch.zeros(len(x)).index_add_(0, col, torch.ones(len(row))).clamp(min=1)
        return self.lin_l(total / degree[:, None]) + self.lin_r(x)


class Net(Module):
    def __init__(self, inputs, hidden, classes, layers=3):
        super().__init__()
        self.lin1, self.lin2 = Linear(inputs, hidden), Linear(hidden, classes)
        self.convs = ModuleList([SAGEConv(hidden) for _ in range(layers)])
        self.norms = ModuleList([BatchNorm1d(hidden) for _ in range(layers)])

    def forward(self, x, edge_index):
        x = self.lin1(x)
        for conv, norm in zip(self.convs, self.norms):
            x = x + F.relu(norm(conv(x, edge_index)))
        return self.lin2(x)


torch.manual_seed(0)
data = Data(
    torch.randn(60, 16), torch.randint(0, 60, (2, 240)), torch.randint(0, 4, (60,)), torch.rand(60) < 0.5
)
model = Net(16, 32, 4)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4)


@ss.objective
def masked(model, data):
    out = model(data.x, data.edge_index)
    return F.cross_entropy(out[data.train_mask], data.y[data.train_mask])


flow = ss.gradient_flow(model, ss.batches([data]), masked)
rank = ss.importance(model, ss.batches([data]), masked)
with ss.watch(model, optimizer, flow_every=3) as monitor:
    for _ in range(9):
        optimizer.zero_grad()
        masked(model, data).backward()
        optimizer.step()

assert len(ss.find_shortcuts(model, (data.x, data.edge_index))) == len(rank) == 3
assert flow.verdict.state == monitor.verdict.state == "healthy", (flow.verdict, monitor.verdict)
