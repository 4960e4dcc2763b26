"""Pool of forked worker processes for independent tasks, each with one thread."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from skipscope._progress import progress
from skipscope.surfaces import CAN_FORK, Forked

Question = TypeVar("Question")
Answer = TypeVar("Answer")
Answering = Callable[[Sequence[Question]], Iterator[tuple[int, Answer]]]

# Seconds without any answer, longer than a task takes on a busy machine.
_PATIENCE_S = 300.0


def workers() -> int:
    """Number of worker processes: the cores available to this process, or 1 if it cannot fork."""
    can_fork = CAN_FORK and not multiprocessing.current_process().daemon
    return len(os.sched_getaffinity(0)) if can_fork else 1


@contextmanager
def side_by_side(
    compute: Callable[[Question], Answer], count: int, patience: float = _PATIENCE_S
) -> Iterator[Answering[Question, Answer]]:
    """Yield a function that computes answers in worker processes, as (index of the question, answer) pairs.

    Pairs come in order of completion.

    Args:
        compute: question -> answer; both are pickled if there are several workers.
        count: number of workers, each with one thread; below two, questions are answered in this process,
            one after the other.
        patience: seconds without any answer. After two such periods the workers are abandoned and the
            questions answered in this process.
    """
    if count < 2:
        yield lambda questions: ((i, compute(question)) for i, question in enumerate(questions))
        return

    def silently(question: Question) -> Answer:
        with progress(show=False):
            return compute(question)

    copies: Forked[Question, Answer] = Forked(silently, count, patience)
    try:
        yield copies.surely
    finally:
        copies.close()
