"""
Graph network: deep without shortcuts?
======================================

Each layer of a graph convolution averages over neighbours. After many layers all nodes look alike, and the gradient
goes with the difference. Shortcuts keep both.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


class GraphConv(nn.Module):
    """Average over neighbours, then a linear map."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """``[nodes, width]`` to the same."""
        return torch.relu(self.linear(adjacency @ x))


class GCN(nn.Module):
    """A deep graph network, residual."""

    def __init__(self, inputs: int, classes: int, width: int = 32, layers: int = 16):
        super().__init__()
        self.first, self.head = nn.Linear(inputs, width), nn.Linear(width, classes)
        self.layers = nn.ModuleList(GraphConv(width) for _ in range(layers))

    def forward(self, x: torch.Tensor, adjacency: torch.Tensor) -> torch.Tensor:
        """Features ``[nodes, inputs]`` to logits ``[nodes, classes]``."""
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x, adjacency)
        return self.head(x)


torch.manual_seed(0)
nodes = 120
label = torch.arange(nodes) % 3
same = label[:, None] == label
edges = torch.rand(nodes, nodes) < torch.where(same, 0.12, 0.02)
adjacency = (edges | edges.T | torch.eye(nodes, dtype=torch.bool)).float()
adjacency = adjacency / adjacency.sum(1, keepdim=True)
features = F.one_hot(label, 3).float() + torch.randn(nodes, 3)

model, data = GCN(3, 3), ((features, adjacency), label)
found = ss.find_shortcuts(model, (features, adjacency))
plain = ss.ablate(model, found)
print(len(found), "shortcuts")

# %%
# The gradient on its way back, with and without.
figure, ax = plt.subplots()
for name, net in {"with shortcuts": model, "without": plain}.items():
    flow = ss.gradient_flow(net, data, F.cross_entropy)
    flow.plot(ax=ax, label=name)
    print(f"{name}: {flow.verdict}")
ax.legend()
plt.show()

# %%
runs = ss.train_twins(
    {"with": model, "without": plain},
    data,
    F.cross_entropy,
    batch_size=nodes,  # the whole graph at each step
    seeds=1,
    steps=60,
    optimizers=["Adam"],
)
print(runs)
