"""Independent pieces of work side by side: one copy of this process, with one thread, for each core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from skipscope.surfaces import CAN_FORK, Forked, one_thread

Question = TypeVar("Question")
Answer = TypeVar("Answer")

_PATIENCE_S = 300.0  # without any answer: longer than one piece takes on a busy machine


def workers() -> int:
    """How many pieces run at a time: the cores that this process may use, or 1 where it cannot fork."""
    return len(os.sched_getaffinity(0)) if CAN_FORK else 1


def in_processes(
    compute: Callable[[Question], Answer], questions: Sequence[Question]
) -> Iterator[tuple[int, Answer]]:
    """Number of a question and its answer, as they come; the bits are those of one process with one thread.

    Args:
        compute: question -> answer; both are pickled where there are several workers.
        questions: the longest first, so that no worker is left alone at the end.
    """
    count = min(workers(), len(questions))
    if count < 2:
        for i, question in enumerate(questions):
            with one_thread():
                answer = compute(question)
            yield i, answer
        return
    copies = Forked(compute, count, _PATIENCE_S)
    try:
        yield from copies.surely(questions)
    finally:
        copies.close()
