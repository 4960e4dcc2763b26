"""What a user's annotated code looks like; checked by pyright and mypy, both strict."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as ce

import skipscope as ss

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.branch(x)
        return x + branch


@ss.objective
def penalty(model: nn.Module, batch: Tensor) -> Tensor:
    output = cast(Tensor, model(batch))
    return output.square().mean()


@ss.objective(weight=lambda batch: len(batch))
def weighted(model: nn.Module, batch: Tensor) -> Tensor:
    output = cast(Tensor, model(batch))
    return output.square().mean()


def study(model: nn.Module, batch: Batch) -> str:
    found: ss.Shortcuts = ss.find_shortcuts(model, batch[0])
    first: ss.Shortcut = found[0]
    some: ss.Shortcuts = found.select(kind="identity")
    plain: nn.Module = ss.ablate(model, some, how="detach")
    other: nn.Module = ss.rewire(model, found, kind="rezero")
    added: nn.Module = ss.add_shortcuts(plain, batch[0], ss.nn.Highway, span=2)
    picture: str = found.draw("svg")
    flow: ss.GradientFlow = ss.gradient_flow(plain, batch, ce)
    verdict: ss.Verdict = flow.verdict
    saturates = verdict.state == "vanishing" and verdict.cause == "saturation"
    rms: float | None = flow.boundaries[0].gradient_rms
    paths: ss.PathSpectrum = ss.path_spectrum(model, batch, ce)
    rank: ss.Importance = ss.importance(model, batch, ce)
    alike: ss.GradientCorrelation = ss.gradient_correlation(model, batch, ce, of="loss")
    parts: ss.GradientSplit = ss.gradient_split(model, batch, ce)
    advice: ss.Prescription = ss.prescribe(model, batch, ce)
    runs: ss.Training = ss.train_twins({"with": other, "added": added}, batch, ce, steps=2)
    result: ss.Comparison = ss.compare(model, batch, ce, quick=True)
    result.save("report.html")
    loss: Tensor = penalty(model, batch[0]) + weighted(model, batch[0])
    again: ss.Result = ss.load("flow.json")
    numbers = f"{alike.mean} {parts.loss} {advice.advice} {again.table()} {picture}"
    return f"{numbers} {first.name} {saturates} {rms} {paths.norms} {len(rank)} {runs.steps} {loss.item()}"


def surfaces(model: nn.Module, batch: Batch) -> float:
    surface: ss.Surface = ss.landscape(model, batch, ce, grid=5, normalize="filter")
    band: ss.SurfaceBand = ss.landscape(model, batch, ce, grid=5, seed=[0, 1])
    twins = {"with": model, "without": ss.ablate(model, inputs=batch[0])}
    pair: ss.PairedSurfaces = ss.paired_landscapes(twins, batch, ce, zero=("biases",), engine="local")
    pair_band: ss.PairedBand = ss.paired_landscapes(twins, batch, ce, seed=[0, 1], precision="bf16")
    lines: ss.Surface = ss.landscape(model, batch, ce, grid=(51,), batch_norm="recalibrate")
    one_map: ss.CurvatureMap = ss.curvature_map(model, batch, ce, grid=5, matrix="gauss_newton")
    maps: ss.PairedMaps = ss.curvature_map(twins, batch, ce, grid=5)
    trace: ss.TraceEstimate = ss.curvature_trace(model, batch, ce, method="hutchinson")
    density: ss.SpectralDensity = ss.spectral_density(model, batch, ce)
    with ss.style("paper"):
        ss.side_by_side({"with": pair, "band": pair_band, "lines": lines}).save("surfaces.svg")
    print(one_map.matrix, list(maps.maps), trace.value, density.negative_share)
    ends: ss.ExtremeEigenvalues = ss.extreme_eigenvalues(model, batch, ce, k=1)
    return float(surface.values.min()) + float(band.alphas[0]) + float(ends.largest[0])


def warn(event: ss.VerdictEvent) -> None:
    print(event.step, event.before == "unknown", event.verdict.state)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> ss.History:
    with ss.watch(model, optimizer, every=1, on_verdict=warn) as monitor:
        optimizer.step()
    print(monitor.history.matrix("flow")["label"])
    return monitor.history
