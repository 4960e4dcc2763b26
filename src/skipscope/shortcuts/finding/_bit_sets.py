"""Bit sets of nodes, and a memory-efficient ancestor relation of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class Ancestors:
    """For each node, the bit set of the nodes it was computed from, including itself.

    Stored are the earlier nodes that are not ancestors: nearly every earlier activation of a network is an
    ancestor of a later one, and the others are close to it (the other branch). So for a narrow network memory
    is linear in the number of nodes, at any depth. Only if n of N nodes never merge again is it about
    n N / 8 bytes.

    Args:
        parents: for each node, the indices of the nodes it was computed from; indices beyond the list are
            ignored.
    """

    def __init__(self, parents: list[tuple[int, ...]]):
        # Offset and bits: node offset + i is missing if bit i is set.
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
        """The nodes before ``v`` that would not be its ancestors if ``parent`` were its only parent."""
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
    """Yield the positions of the set bits, lowest first."""
    # A window at a time, since many callers stop early.
    base = 0
    while mask:
        zeros = (mask & -mask).bit_length() - 1
        base, mask = base + zeros, mask >> zeros
        # A fast path: most sets have one member.
        if mask == 1:
            yield base
            return
        digits = bin(mask & _ONES)[:1:-1]
        at = 0
        while at >= 0:
            yield base + at
            at = digits.find("1", at + 1)
        base, mask = base + _WINDOW, mask >> _WINDOW


def as_bits(flags: list[Any]) -> int:
    """The set of positions at which ``flags`` is true."""
    return int("".join("1" if flag else "0" for flag in reversed(flags)) or "0", 2)


def chosen(mask: int, keep: list[bool]) -> int:
    """The subset of ``mask`` whose members, counted from the lowest, have a true entry in ``keep``."""
    flags = [False] * mask.bit_length()
    for i, kept in zip(bits(mask), keep, strict=True):
        flags[i] = kept
    return as_bits(flags)
