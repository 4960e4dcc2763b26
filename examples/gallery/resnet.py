"""
ResNet: which blocks matter?
============================

A ResNet-20 learns to read digits. Then each shortcut is removed alone, and each block is taken out alone.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import skipscope as ss
from skipscope import reference

torch.manual_seed(0)
model, data = reference.resnet20(), reference.digits(256, image=True)

# %%
# Its shortcuts, found by running it once. Two are projections, where the width doubles.
found = ss.find_shortcuts(model, data[0])
found

# %%
# Sixty steps of training.
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for step in range(60):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(data[0]), data[1])
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.3f}")

# %%
# What each one costs when it is taken out, without further training.
rank = ss.importance(model, data, F.cross_entropy)
rank.plot()
plt.show()

# %%
print(rank)
