"""Independent pieces of work side by side: one copy of this process, with one thread, for each core."""

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

# Seconds without any answer: longer than one piece takes on a busy machine.
_PATIENCE_S = 300.0


def workers() -> int:
    """How many pieces run at a time: the cores that this process may use, or 1 where it cannot fork."""
    can_fork = CAN_FORK and not multiprocessing.current_process().daemon
    return len(os.sched_getaffinity(0)) if can_fork else 1


@contextmanager
def side_by_side(
    compute: Callable[[Question], Answer], count: int, patience: float = _PATIENCE_S
) -> Iterator[Answering[Question, Answer]]:
    """Lend what answers questions: number of a question and its answer, as they come.

    Args:
        compute: question -> answer; both are pickled where there are several copies.
        count: how many copies, each with one thread; below two the questions are answered here, one after
            the other.
        patience: seconds without any answer, twice, after which the copies are given up, and the questions
            answered here.
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
