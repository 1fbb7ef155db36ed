"""Which block of a KV cache holds what: blocks of tokens that sequences share where they begin alike, and that are kept for the next such prompt.

Nothing here knows a library. A block is shared once it is full, and then never written to again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


class Blocks:
    """A pool of `count` blocks of `size` tokens. Of what no sequence holds any more the one left longest ago is overwritten first."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.empty = list(range(count))[::-1]
        self.holders = [0] * count  # sequences that hold it
        self.kept: dict[int, None] = {}  # full, and held by nobody: the one that was left longest ago first
        self.known: dict[tuple[int, tuple[int, ...]], int] = {}  # (what stands before, its tokens) → block
        self.content: dict[int, tuple[int, tuple[int, ...]]] = {}  # block → its key in `known`
        self.names: dict[int, int] = {}  # full block → a number for all that stands up to its end, and for nothing else ever
        self.numbers = itertools.count(1)

    @property
    def free(self) -> int:
        """Blocks that may be taken."""
        return len(self.empty) + len(self.kept)

    def find(self, ids: Sequence[int]) -> list[int]:
        """The blocks that hold the beginning of these tokens, each full; nothing is taken."""
        found: list[int] = []
        before = 0
        for at in range(0, len(ids) - self.size + 1, self.size):
            block = self.known.get((before, tuple(ids[at : at + self.size])))
            if block is None:
                break
            found.append(block)
            before = self.names[block]
        return found

    def hold(self, table: Sequence[int]) -> None:
        for block in table:
            self.kept.pop(block, None)
            self.holders[block] += 1

    def take(self) -> int:
        """A block to write to. Raises IndexError: none is free."""
        if not self.empty:
            if not self.kept:
                raise IndexError("no block of the KV cache is free")
            self.forget(next(iter(self.kept)))
        block = self.empty.pop()
        self.holders[block] = 1
        return block

    def fill(self, table: Sequence[int], ids: Sequence[int], begin: int, end: int) -> None:
        """Of a sequence of tokens those from `begin` to `end` have been computed: the next may share the blocks that became full."""
        for at in range(begin // self.size, end // self.size):
            block = table[at]
            key = (self.names[table[at - 1]] if at else 0, tuple(ids[at * self.size : (at + 1) * self.size]))
            if block in self.names:
                continue
            if (same := self.known.get(key)) is not None:  # it is the one that is found
                self.names[block] = self.names[same]
            else:
                self.names[block], self.known[key], self.content[block] = next(self.numbers), block, key

    def release(self, table: Sequence[int]) -> None:
        """A sequence lets go of its blocks; of what is kept the end is forgotten first."""
        for block in reversed(table):
            self.holders[block] -= 1
            if self.holders[block]:
                continue
            if block in self.content:
                self.kept[block] = None
            else:
                self.names.pop(block, None)
                self.empty.append(block)

    def forget(self, block: int) -> None:
        del self.kept[block], self.known[self.content.pop(block)], self.names[block]
        self.empty.append(block)
