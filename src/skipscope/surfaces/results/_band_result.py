"""Results over several seeds' directions: one network's band, and how far the seeds agree on twins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from skipscope._numbers import short
from skipscope._result import Table
from skipscope.surfaces.results._grid_exports import Exported, Layer
from skipscope.surfaces.results._surface_result import PairedSurfaces, Surface


@dataclass(frozen=True, eq=False)
class SurfaceBand(Exported):
    """Surfaces along several seeds' directions, to separate the network from the random direction.

    Attributes:
        surfaces: seed -> surface.
        alphas: the first axis.
        betas: the second axis; empty for a line.
        median: median over seeds at each point, [a, b].
        low: lowest value over seeds, [a, b].
        high: highest value over seeds, [a, b].
        scores: name -> (mean over seeds, standard deviation over seeds).

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> band = ss.landscape(model, data, loss, grid=5, seed=[0, 1])
        >>> list(band.surfaces), band.alphas.shape
        (['0', '1'], (5,))
    """

    surfaces: dict[str, Surface]
    alphas: np.ndarray
    betas: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    scores: dict[str, tuple[float, float]]

    def table(self) -> Table:
        rows = [[name, short(mean), short(deviation)] for name, (mean, deviation) in self.scores.items()]
        title = (
            f"loss surface of {next(iter(self.surfaces.values())).name} over {len(self.surfaces)} seeds of"
            " directions"
        )
        return Table(title, ["score", "mean", "spread"], rows, ["Spread: standard deviation over the seeds."])

    def layers(self) -> Iterator[Layer]:
        over = {"median": self.median, "low": self.low, "high": self.high}
        yield Layer("over seeds", self.alphas, self.betas, over)
        for seed, surface in self.surfaces.items():
            yield surface.layer(f"seed {seed}")


@dataclass(frozen=True, eq=False)
class PairedBand(Exported):
    """Paired surfaces along several seeds' directions, and how far the seeds agree.

    Attributes:
        pairs: seed -> the twins' surfaces along that seed's directions.
        scores: twin -> score -> (mean over seeds, standard deviation over seeds).
        agreement: twin -> score -> share of seeds on which this twin's score is higher than the first twin's.
            Near 0 or 1 the direction does not matter; near a half the direction decides.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> twins = {"with": model, "without": ss.ablate(model, inputs=data[0])}
        >>> band = ss.paired_landscapes(twins, data, loss, grid=5, seed=[0, 1])
        >>> list(band.pairs)
        ['0', '1']
    """

    pairs: dict[str, PairedSurfaces]
    scores: dict[str, dict[str, tuple[float, float]]]
    agreement: dict[str, dict[str, float]]

    def table(self) -> Table:
        rows = [
            [twin, name, short(mean), short(deviation), short(self.agreement.get(twin, {}).get(name))]
            for twin, scores in self.scores.items()
            for name, (mean, deviation) in scores.items()
        ]
        first = next(iter(self.scores))
        return Table(
            f"paired loss surfaces over {len(self.pairs)} seeds of directions",
            ["twin", "score", "mean", "spread", f"higher than {first}"],
            rows,
            [f"The last column is the share of seeds on which the twin scores higher than {first}."],
        )

    def layers(self) -> Iterator[Layer]:
        for seed, pair in self.pairs.items():
            yield from pair.layers(f"seed {seed}/")
