"""What a user's annotated code looks like; checked by pyright in strict mode."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import skipscope as ss


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


@ss.objective
def penalty(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


@ss.objective(weight=lambda batch: len(batch))
def weighted(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def study(model: nn.Module, batch: tuple[Tensor, Tensor]) -> str:
    found: ss.Shortcuts = ss.find_shortcuts(model, batch[0])
    first: ss.Shortcut = found[0]
    some: ss.Shortcuts = found.select(kind="identity")
    plain: nn.Module = ss.ablate(model, some, how="detach")
    flow: ss.GradientFlow = ss.gradient_flow(plain, batch, cross_entropy)
    verdict: ss.Verdict = flow.verdict
    rms: float | None = flow.boundaries[0].gradient_rms
    paths: ss.PathSpectrum = ss.path_spectrum(model, batch, cross_entropy)
    rank: ss.Importance = ss.importance(model, batch, cross_entropy)
    runs: ss.Training = ss.train_twins({"with": model}, batch, cross_entropy, steps=2)
    result: ss.Comparison = ss.compare(model, batch, cross_entropy, quick=True)
    result.save("report.html")
    loss: Tensor = penalty(model, batch[0]) + weighted(model, batch[0])
    return f"{first.name} {verdict.state} {rms} {paths.norms} {len(rank)} {runs.steps} {loss.item()}"


def surfaces(model: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    surface: ss.Surface = ss.landscape(model, batch, cross_entropy, grid=5, normalize="filter")
    band: ss.SurfaceBand = ss.landscape(model, batch, cross_entropy, grid=5, seed=[0, 1])
    ends: ss.ExtremeEigenvalues = ss.extreme_eigenvalues(model, batch, cross_entropy, k=1)
    return float(surface.values.min()) + float(band.alphas[0]) + float(ends.largest[0])


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> ss.History:
    with ss.watch(model, optimizer, every=1) as monitor:
        optimizer.step()
    return monitor.history
