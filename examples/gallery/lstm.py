"""
LSTM: how far back does the gradient reach?
===========================================

A recurrent network read at its last step only gets hardly any gradient from the first ones. The reach says after how
many steps a thousandth is left.
"""

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import nn

import skipscope as ss


class Reader(nn.Module):
    """An LSTM that answers after the last step."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, width, batch_first=True), nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[n, steps, 4]`` to ``[n, 2]``."""
        return self.head(self.lstm(x)[0][:, -1])


torch.manual_seed(0)
model, rows = Reader(), []
for steps in (5, 10, 20, 50, 100):
    batch = torch.randn(32, steps, 4), torch.randint(0, 2, (32,))
    verdict = ss.gradient_flow(model, batch, F.cross_entropy).verdict
    print(f"{steps:>4} steps: {verdict.state}, reach {verdict.reach}")

# %%
# The gradient at each step of the longest sequence.
flow = ss.gradient_flow(model, batch, F.cross_entropy)
steps = [site for site in flow.sites if site.step is not None]
plt.semilogy([site.step for site in steps], [site.gradient_rms for site in steps], ".-")
plt.xlabel("step of the sequence")
plt.ylabel("RMS of dL/dx")
plt.title("The first steps get next to nothing")
plt.show()

# %%
# A forget gate that starts open (Jozefowicz et al. 2015) carries it further.
with torch.no_grad():
    model.lstm.bias_hh_l0[32:64] = 4.0
print(ss.gradient_flow(model, batch, F.cross_entropy).verdict)
