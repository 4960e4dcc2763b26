"""Results of landscapes: surfaces with checks, provenance and scores, and twins' surfaces side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from skipscope._numbers import short
from skipscope._result import Result, Table
from skipscope.surfaces.results._grid_exports import Exported, Layer
from skipscope.surfaces.results._score_result import Scores, scores_table


@dataclass(frozen=True)
class Checks(Result):
    """Checks of a surface, measured on the run itself.

    Attributes:
        axis_cosine: cosine between the two directions (0 for a line).
        filter_norm_ratio: |d_f| / |w_f| of the filter where it is furthest from 1 (1 is right; normalisations
            other than by filter need not give it).
        centre_loss: the loss at the plane's origin, by the evaluator.
        model_loss: the loss of the user's own model, computed without the evaluator, in the same mode.
        centre_is_model: whether the two are equal bit for bit.
        weights_restored: whether the hash of the user's weights and buffers is unchanged.
        strategy_error: largest relative difference between the chosen strategy and the plain loop, at points
            of the plane (rounding; 0 for the plain loop itself).
        samples: number of samples behind every point.
        nonfinite: number of points whose value is NaN or infinite; they are kept as they are.
    """

    axis_cosine: float
    filter_norm_ratio: float
    centre_loss: float
    model_loss: float
    centre_is_model: bool
    weights_restored: bool
    strategy_error: float
    samples: int
    nonfinite: int

    @property
    def passed(self) -> bool:
        """Whether the checks that every surface must pass hold."""
        return self.centre_is_model and self.weights_restored

    def table(self) -> Table:
        rows = [
            ["centre equals the model's loss", _yes(self.centre_is_model), f"{self.centre_loss:.9g}"],
            ["weights unchanged", _yes(self.weights_restored), "bit for bit"],
            ["cosine between the axes", short(self.axis_cosine), "0 is best"],
            ["worst filter norm ratio", f"{self.filter_norm_ratio:.6g}", "1 when normalised by filter"],
            ["strategy against plain loop", short(self.strategy_error), "relative"],
            ["samples per point", short(self.samples), ""],
            ["points not finite", short(self.nonfinite), "kept as they are"],
        ]
        return Table("checks", ["check", "value", "meaning"], rows)


@dataclass(frozen=True)
class Provenance(Result):
    """Provenance of a surface: all that is needed to reproduce it.

    Attributes:
        seed: random seed of the directions (and of the subset of the data).
        directions: kind of directions.
        normalize: "filter", "layer", "tensor" or "none".
        zeroed: kinds of parameters without a direction, e.g. ("biases", "norms").
        span_in_weights: |span * d| / |w| for each axis: the plane's half width in units of the moved weights'
            norm.
        weights_hash: hash of the model's parameters and buffers.
        data_hash: hash of the data behind every point.
        loss: name of the loss.
        batch_norm: "frozen", "recalibrated at each point" or "batch statistics"; "none" without batch norm.
        strategy: strategy that evaluated the points.
        why: reason for this strategy.
        dtype: dtype of the weights.
        device: device of the weights.
        versions: versions of skipscope, torch and numpy.
        points_computed: number of points that the model was run for.
        seconds: duration of the whole call.
    """

    seed: int
    directions: str
    normalize: str
    zeroed: tuple[str, ...]
    span_in_weights: tuple[float, ...]
    weights_hash: str
    data_hash: str
    loss: str
    batch_norm: str
    strategy: str
    why: str
    dtype: str
    device: str
    versions: dict[str, str]
    points_computed: int
    seconds: float

    def table(self) -> Table:
        rows = [
            [
                "directions",
                (
                    f"{self.directions}, seed {self.seed}, normalised by {self.normalize}; no direction: "
                    f"{', '.join(self.zeroed) or 'nothing'}"
                ),
            ],
            ["half width", ", ".join(short(s) for s in self.span_in_weights) + " |w|"],
            ["loss", self.loss],
            ["batch norm", self.batch_norm],
            ["evaluated", f"{self.strategy}: {self.why}"],
            ["points computed", short(self.points_computed)],
            ["weights, data", f"{self.weights_hash[:12]}, {self.data_hash[:12]}"],
            ["dtype, device", f"{self.dtype}, {self.device}"],
            ["versions", ", ".join(f"{k} {v}" for k, v in self.versions.items())],
            ["seconds", short(self.seconds)],
        ]
        return Table("provenance", ["what", "value"], rows)


@dataclass(frozen=True, eq=False)
class KnownPoints(Result):
    """Known weights on the plane: other solutions, or the checkpoints of a training trajectory.

    Attributes:
        names: names of the points, in order.
        coordinates: coordinates on the axes, [points, axes].
        distances: distance from the plane, as a share of the distance from the origin, [points]. A point far
            from the plane has another loss than the surface under it.
        losses: each point's own loss, [points].
        explained: each axis's share of the squared distances from the origin.
    """

    names: tuple[str, ...]
    coordinates: np.ndarray
    distances: np.ndarray
    losses: np.ndarray
    explained: tuple[float, ...]

    def table(self) -> Table:
        rows = [
            [name, ", ".join(short(float(c)) for c in place), short(float(far)), short(float(loss))]
            for name, place, far, loss in zip(self.names, self.coordinates, self.distances, self.losses)
        ]
        shares = ", ".join(f"{share:.1%}" for share in self.explained)
        notes = [
            f"The axes hold {shares} of the squared distances from the origin; 'distance': what is off the"
            " plane."
        ]
        return Table("points on the plane", ["point", "coordinates", "distance", "own loss"], rows, notes)


@dataclass(frozen=True, eq=False)
class Surface(Exported):
    """The loss on a plane (or a line) of weight space: w + a d1 + b d2.

    Attributes:
        name: name of the network.
        values: the loss, [a, b]; [a] for a line. NaN and inf are kept; points not reached yet are NaN with
            ``computed`` False.
        alphas: the first axis, [a].
        betas: the second axis, [b]; empty for a line.
        computed: True where the model was run, [a, b]; elsewhere the value is interpolated (or missing).
        stderr: standard error of each value over the samples, [a, b]; None without per-sample losses.
        centre_stderr: standard error of (value - value at the origin) over the same samples, [a, b], or None.
            It is paired, so much smaller than ``stderr`` near the origin.
        why_no_stderr: reason why there is no standard error, or "".
        label: warning about the surface, e.g. "flat: this network has not learnt", or "".
        axis_names: names of the axes.
        metrics: name -> values on the same plane, [a, b].
        interpolation_error: largest error of interpolated values, in units of the loss, at ``held_out``
            points drawn at random that the fit had not seen; None if every point was computed.
            ``interpolation_error_share`` is relative to the range, and ``beyond`` tells how much it bounds.
        scores: scores of the surface.
        checks: checks measured on this run.
        provenance: how to reproduce the surface.
        points: known weights on the plane (other solutions, checkpoints), or None.
        held_out: number of points that the interpolation was tested on; 0 if every point was computed.
        beyond: upper 95 % bound on the share of interpolated values that are further off than
            ``interpolation_error`` (0.12 for 24 points drawn from many). None if every point was computed,
            and for the surface after a level of an unfinished run, whose test points are not random.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> surface = ss.landscape(model, data, loss, grid=5)
        >>> surface.values.shape, surface.alphas.tolist(), surface.checks.passed
        ((5, 5), [-1.0, -0.5, 0.0, 0.5, 1.0], True)
    """

    name: str
    values: np.ndarray
    alphas: np.ndarray
    betas: np.ndarray
    computed: np.ndarray
    stderr: np.ndarray | None
    centre_stderr: np.ndarray | None
    why_no_stderr: str
    label: str
    axis_names: tuple[str, ...]
    metrics: dict[str, np.ndarray]
    interpolation_error: float | None
    scores: Scores
    checks: Checks
    provenance: Provenance
    points: KnownPoints | None = None
    held_out: int = 0
    beyond: float | None = None

    def __post_init__(self):
        # A loaded file holds numbers instead of booleans.
        object.__setattr__(self, "computed", np.asarray(self.computed, dtype=bool))

    @property
    def complete(self) -> bool:
        """Whether every point has a value (not so after an interrupted run)."""
        return self.interpolation_error is not None or bool(self.computed.all())

    @property
    def value_range(self) -> tuple[float, float]:
        """The lowest and the highest finite value; (nan, nan) without one."""
        finite = self.values[np.isfinite(self.values)]
        return (float(finite.min()), float(finite.max())) if finite.size else (float("nan"), float("nan"))

    @property
    def interpolation_error_share(self) -> float | None:
        """``interpolation_error`` as a share of the surface's range, like ``tolerance``.

        None if every point was computed.
        """
        if self.interpolation_error is None:
            return None
        low, high = self.value_range
        return self.interpolation_error / (high - low) if high > low else 0.0

    def table(self) -> Table:
        low, high = self.value_range
        how = f"{int(self.computed.sum())} of {self.values.size} points computed"
        if self.interpolation_error_share is not None:
            how += (
                f", the rest interpolated: off by {short(100 * self.interpolation_error_share, 2)} % of the"
                f" range ({short(self.interpolation_error)}) at most at {self.held_out} points "
            )
            how += (
                _UNSEEN
                if self.beyond is None
                else (
                    "drawn at random, and so, with 95 % confidence, by no more at"
                    f" {short(100 * (1 - self.beyond), 2)} % of the others"
                )
            )
        rows = [
            ["centre", short(self.scores.centre)],
            ["lowest, highest", f"{short(low)}, {short(high)}"],
            ["convexity share", self.scores.text("convexity_share")],
            ["roughness", self.scores.text("roughness")],
            ["barrier", self.scores.text("barrier")],
            [f"width at loss {short(self.scores.level)}", self.scores.text("width")],
            ["grid", " x ".join(str(n) for n in self.values.shape)],
            ["median standard error", self.why_no_stderr or short(_median(self.stderr))],
            ["checks", "passed" if self.checks.passed else "FAILED: see .checks"],
        ]
        notes = [
            f"The loss at w + a d1{' + b d2' if self.betas.size else ''}; {how}.",
            (
                f"Directions: {self.provenance.directions}, normalised by {self.provenance.normalize}, seed "
                f"{self.provenance.seed}. {self.provenance.strategy}: {self.provenance.why}."
            ),
        ]
        if self.points is not None and self.provenance.batch_norm.startswith("frozen"):
            notes.append(
                "Batch norm is frozen as at the origin: another point's own loss, with its own statistics,"
                ' may lie off the surface there (batch_norm="recalibrate" measures them again at each point).'
            )
        if self.label:
            notes.insert(0, self.label[0].upper() + self.label[1:] + ".")
        return Table(f"loss surface of {self.name}", ["what", "value"], rows, notes)

    def layers(self) -> Iterator[Layer]:
        yield self.layer()

    def layer(self, name: str = "", **more: np.ndarray) -> Layer:
        """The surface's values on its grid, and ``more``; ``name`` distinguishes several surfaces."""
        own = {"values": self.values, "computed": self.computed}
        errors = {"stderr": self.stderr, "centre_stderr": self.centre_stderr}
        own |= {key: error for key, error in errors.items() if error is not None} | more
        own |= {f"metric/{key}" if key in own else key: metric for key, metric in self.metrics.items()}
        known = (
            {}
            if self.points is None
            else {
                "points/names": np.array(self.points.names),
                "points/coordinates": self.points.coordinates,
                "points/distances": self.points.distances,
                "points/losses": self.points.losses,
            }
        )
        return Layer(name or self.name, self.alphas, self.betas, own, name, known)

    def paper_table(self) -> Table:
        return scores_table(f"scores of the loss surface of {self.name}", {self.name: self.scores})


@dataclass(frozen=True, eq=False)
class Difference(Result):
    """One surface minus another, point by point, for twins that share weights.

    Attributes:
        name: e.g. "without - with".
        values: the difference, [a, b].
        stderr: paired standard error (the same samples in both), [a, b], or None.
        low: lower end of the 95 % interval at each point, [a, b], or None.
        high: upper end of the 95 % interval at each point, [a, b], or None.
    """

    name: str
    values: np.ndarray
    stderr: np.ndarray | None
    low: np.ndarray | None
    high: np.ndarray | None

    @property
    def clear_share(self) -> float | None:
        """Share of points whose interval excludes zero; None without intervals."""
        if self.low is None or self.high is None:
            return None
        return float(np.mean((self.low > 0) | (self.high < 0)))

    def table(self) -> Table:
        rows = [
            ["median", short(_median(self.values))],
            ["median paired standard error", short(_median(self.stderr))],
            ["share of points clearly not zero", short(self.clear_share)],
        ]
        return Table(
            f"difference: {self.name}", ["what", "value"], rows, ["Intervals are 95 %, point by point."]
        )


@dataclass(frozen=True, eq=False)
class PairedSurfaces(Exported):
    """Surfaces that can be compared: the same data, seed and plane for every twin.

    Attributes:
        surfaces: twin -> surface.
        shared_weights: whether every twin has the first twin's weights (removed, detached, other strength).
        differences: twin -> its surface minus the first twin's, for twins with the first twin's weights.
        notes: what may and what must not be compared.

    Example:
        >>> import torch, skipscope as ss
        >>> model, data = ss.reference.deep_mlp(4, width=16, shortcut="identity"), ss.reference.digits(32)
        >>> loss = torch.nn.functional.cross_entropy
        >>> twins = {"with": model, "without": ss.ablate(model, inputs=data[0])}
        >>> pair = ss.paired_landscapes(twins, data, loss, grid=5)
        >>> list(pair.surfaces), pair.shared_weights
        (['with', 'without'], True)
    """

    surfaces: dict[str, Surface]
    shared_weights: bool
    differences: dict[str, Difference]
    notes: tuple[str, ...]

    @property
    def difference(self) -> np.ndarray | None:
        """The last twin's surface minus the first twin's, [a, b]. None for twins trained separately."""
        return list(self.differences.values())[-1].values if self.differences else None

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Ends of the difference's 95 % interval, each [a, b]; None without per-sample losses."""
        last = list(self.differences.values())[-1] if self.differences else None
        return None if last is None or last.low is None or last.high is None else (last.low, last.high)

    @property
    def scores(self) -> dict[str, Scores]:
        """Scores by twin."""
        return {name: surface.scores for name, surface in self.surfaces.items()}

    @property
    def checks(self) -> dict[str, Checks]:
        """Checks by twin."""
        return {name: surface.checks for name, surface in self.surfaces.items()}

    def table(self) -> Table:
        scores = scores_table("paired loss surfaces", self.scores)
        return Table(scores.title, scores.columns, scores.rows, [*self.notes, *scores.notes])

    def layers(self, lead: str = "") -> Iterator[Layer]:
        for name, surface in self.surfaces.items():
            found = self.differences.get(name)
            parts = (
                {}
                if found is None
                else {
                    "difference": found.values,
                    "difference_stderr": found.stderr,
                    "difference_low": found.low,
                    "difference_high": found.high,
                }
            )
            yield surface.layer(lead + name, **{key: part for key, part in parts.items() if part is not None})


_UNSEEN = (
    "that the fit had not seen. This is the surface after a level; the same call continues with the next one"
)


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def _median(values: np.ndarray | None) -> float | None:
    finite = values[np.isfinite(values)] if values is not None else None
    return float(np.median(finite)) if finite is not None and finite.size else None
