"""Scores of a surface, and their tables."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from skipscope._numbers import short, student_quantile
from skipscope._result import Table
from skipscope.surfaces.evaluation._point_loss import FOLDS
from skipscope.surfaces.results._grid_exports import Exported


@dataclass(frozen=True)
class Scores(Exported):
    """Scores of one surface, with their standard errors over the samples (jackknife) if known.

    Attributes:
        label: "" for the surface of a network that has learnt. Otherwise a reason, such as "flat: this
            network has not learnt", why the scores say nothing about smoothness.
        centre: the loss at the origin.
        convexity_share: share of the interior where the discrete 2 x 2 Hessian has no negative eigenvalue.
        roughness: share of the total variation, along rows and columns, beyond that of a single valley: 0 if
            every line has a single valley, towards 1 for noise.
        barrier: highest rise out of a valley other than the deepest, on the best path to a deeper valley
            (0: there is one valley, or the others are shallower than the noise).
        width: radius of the disc with the area of the region around the origin where the loss is below
            ``level``, in units of the axes.
        level: the loss at which the width is read.
        width_is_bound: whether the region reaches the edge, so that the width is a lower bound.
        errors: standard errors of centre, convexity_share, roughness, barrier, level and width (including
            the level's error); on an adaptive surface they include the error of interpolation.
    """

    label: str
    centre: float
    convexity_share: float
    roughness: float
    barrier: float
    width: float
    level: float
    width_is_bound: bool
    errors: dict[str, float] = field(default_factory=dict)

    def interval(self, name: str) -> tuple[float, float] | None:
        """95 % confidence interval of a score, by Student's t. None if the score has no error.

        Ten groups of samples give nine degrees of freedom.
        """
        if name not in self.errors:
            return None
        value, half = getattr(self, name), student_quantile(0.975, FOLDS - 1) * self.errors[name]
        lowest, highest = _POSSIBLE.get(name, (-np.inf, np.inf))
        return max(lowest, value - half), min(highest, value + half)

    def text(self, name: str) -> str:
        """Format a score with its error: ``0.42 +- 0.03``."""
        value = short(getattr(self, name))
        bound = ">= " if name == "width" and self.width_is_bound else ""
        error = self.errors.get(name)
        return f"{bound}{value}" + (f" +- {short(error, 2)}" if error is not None else "")

    def table(self) -> Table:
        return scores_table("scores", {"": self})


_POSSIBLE = {
    "convexity_share": (0.0, 1.0), "roughness": (0.0, 1.0), "barrier": (0.0, np.inf), "width": (0.0, np.inf),
}  # fmt: skip


def scores_table(title: str, scores: dict[str, Scores]) -> Table:
    """Table of several surfaces' scores side by side."""
    level = ", ".join(dict.fromkeys(short(s.level) for s in scores.values()))
    names = ["centre", "convexity_share", "roughness", "barrier", "width"]
    rows = [[name, *(s.text(key) for key in names), s.label or "-"] for name, s in scores.items()]
    notes = [
        "Convexity: share of the plane where the surface curves up in both directions. Roughness: share of"
        " the ups and downs along rows and columns that a single valley would not need. Barrier: highest"
        " rise from a side valley to a deeper one. Width: radius of the region around the centre with"
        f" a loss below {level}. +-: standard error over the samples."
    ]
    flat = [name for name, s in scores.items() if s.label]
    if flat:
        notes.append(f"The scores of {', '.join(flat) or 'it'} do not show smoothness: see the label.")
    return Table(
        title, ["surface", "centre", "convexity", "roughness", "barrier", "width", "label"], rows, notes
    )
