"""
GPT-2: how long are the gradient's paths?
=========================================

With 2 L shortcuts the gradient comes back along 2^(2 L) paths. Sorted by how many branches they cross, exactly: most of
it takes short ones.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import skipscope as ss
from skipscope import reference

torch.manual_seed(0)
model, data = reference.gpt(layers=6), reference.english(16)
found = ss.find_shortcuts(model, data[0])
print(found.draw("text"))

# %%
# Cross-entropy of each next byte.
paths = ss.path_spectrum(model, data, F.cross_entropy)
paths.plot()
plt.show()

# %%
print(f"mean length {paths.mean_length:.1f} of {paths.branches}; residual {paths.residual:.0e}")

# %%
# The same without shortcuts: one path, through every branch. What of the gradient is left?
plain = ss.ablate(model, found)
for name, net in {"with": model, "without": plain}.items():
    print(f"{name:<8}", ss.gradient_flow(net, data, F.cross_entropy).verdict)
