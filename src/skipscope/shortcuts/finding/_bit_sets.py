"""Bit sets of nodes, and the ancestors of each node of a graph in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Ancestors:
    """For each node the bit set of those it was computed from, including itself.

    Stored are the nodes that are missing: nearly every earlier activation of a network is an ancestor of a
    later one, and the others are near it (the other branch). So memory grows with the number of nodes of a
    narrow network, however deep; only where n of N nodes never merge again does it grow like n N / 8 bytes.

    Args:
        parents: for each node the indices of what it was computed from; those beyond the list do not count.
    """

    def __init__(self, parents: list[tuple[int, ...]]):
        # Offset and bits: absent is each offset + i where bit i is set.
        self._missing: list[tuple[int, int]] = []
        for v, above in enumerate(parents):
            known = sorted((p for p in above if p < len(parents)), reverse=True)
            base, mask = (0, (1 << v) - 1) if not known else self._as_seen_from(v, known[0])
            for parent in known[1:]:
                if not mask:
                    break
                other, more = self._as_seen_from(v, parent)
                start = max(base, other)
                base, mask = start, (mask >> start - base) & (more >> start - other)
            if mask and not mask & 1:
                zeros = (mask & -mask).bit_length() - 1
                base, mask = base + zeros, mask >> zeros
            self._missing.append((base, mask))

    def _as_seen_from(self, v: int, parent: int) -> tuple[int, int]:
        """The nodes that ``v`` lacks if it was computed from ``parent`` only."""
        base, mask = self._missing[parent]
        base = base if mask else parent + 1
        gap = v - parent - 1
        return (base, mask | ((1 << gap) - 1) << parent + 1 - base) if gap else (base, mask)

    def __getitem__(self, v: int) -> int:
        if v >= len(self._missing):
            return 0
        base, mask = self._missing[v]
        return ((2 << v) - 1) ^ (mask << base)

    def reaches(self, u: int, v: int) -> bool:
        """Whether ``v`` is ``u`` or was computed from it."""
        if u > v or v >= len(self._missing):
            return False
        base, mask = self._missing[v]
        return u < base or not mask >> u - base & 1


_WINDOW = 1024
_ONES = (1 << _WINDOW) - 1


def bits(mask: int) -> Iterator[int]:
    """The positions of the ones, lowest first; a window at a time, since many callers stop early."""
    base = 0
    while mask:
        zeros = (mask & -mask).bit_length() - 1
        base, mask = base + zeros, mask >> zeros
        if mask == 1:  # most sets have one member
            yield base
            return
        digits = bin(mask & _ONES)[:1:-1]
        at = 0
        while at >= 0:
            yield base + at
            at = digits.find("1", at + 1)
        base, mask = base + _WINDOW, mask >> _WINDOW


def as_bits(flags: list[Any]) -> int:
    """The set of positions where a flag is true."""
    return int("".join("1" if flag else "0" for flag in reversed(flags)) or "0", 2)


def chosen(mask: int, keep: list[bool]) -> int:
    """The set without those ones for which ``keep``, one for each from the lowest, is false."""
    flags = [False] * mask.bit_length()
    for i, kept in zip(bits(mask), keep, strict=True):
        flags[i] = kept
    return as_bits(flags)
