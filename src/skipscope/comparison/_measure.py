"""What is measured on each twin, one function a question, and a clock that keeps to the budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skipscope._errors import SkipscopeError
from skipscope._progress import track
from skipscope._subject import Subject
from skipscope.comparison._results import StrengthSweep
from skipscope.flow import flow_of
from skipscope.shortcuts import ablate

STRENGTHS = np.linspace(0.0, 1.0, 11)


@dataclass
class Clock:
    """Seconds by stage, and whether another stage fits into the budget.

    Attributes:
        budget: seconds for everything; None: no limit.
        stages: stage -> seconds it took.
        notes: what was left out, and why.
    """

    budget: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    @property
    def spent(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self.start

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begun

    def fits(self, name: str, seconds: float) -> bool:
        """Whether ``seconds`` more are within the budget; if not, a note says what was left out."""
        if self.budget is None or self.spent + seconds <= self.budget:
            return True
        self.notes.append(
            f"{name} was left out: about {seconds:.0f} s more would have passed the budget of {self.budget:.0f} s"
        )
        return False


def strength_sweep(subject: Subject, name: str) -> StrengthSweep:
    """The flow at each strength of all shortcuts."""
    twins = (ablate(subject.model, subject.found, strength=float(s), share=True) for s in STRENGTHS)
    flows = [
        flow_of(subject.twin(twin)) for twin in track(twins, f"shortcut strength of {name}", len(STRENGTHS))
    ]
    return StrengthSweep(
        strengths=STRENGTHS,
        names=tuple(b.name for b in flows[0].boundaries),
        gradient_rms=np.array([[_number(b.gradient_rms) for b in f.boundaries] for f in flows]),
        fall_decades=np.array([_number(f.verdict.fall_decades) for f in flows]),
        states=tuple(f.verdict.state for f in flows),
    )


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def attempt(clock: Clock, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run one stage; what skipscope refuses becomes a note, and the page goes on without it."""
    with clock.stage(name.partition(":")[0]):
        try:
            return function(*arguments)
        except SkipscopeError as error:
            clock.notes.append(f"{name} could not be measured: {error.problem}")
            return None
