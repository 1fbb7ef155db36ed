"""Turns: a queue that is shared fairly, each client with a line of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Turns(Generic[T]):
    """The lines stand in a ring: whose turn it was goes behind the others. Not for several threads."""

    def __init__(self) -> None:
        self.lines: dict[str, deque[T]] = {}  # never an empty one; the first is next

    def __bool__(self) -> bool:
        return bool(self.lines)

    def __len__(self) -> int:
        return sum(map(len, self.lines.values()))

    def __iter__(self) -> Iterator[T]:
        return (item for line in self.lines.values() for item in line)

    def put(self, client: str, item: T) -> None:
        self.lines.setdefault(client, deque()).append(item)

    def put_first(self, client: str, items: Iterable[T]) -> None:
        self.lines.setdefault(client, deque()).extendleft(reversed(list(items)))

    def take(self, client: str | None = None) -> T:
        """The first item of a client, or of the one whose turn it is. Raises LookupError where there is none."""
        client = next(iter(self.lines), "") if client is None else client
        line = self.lines.pop(client)
        item = line.popleft()
        if line:
            self.lines[client] = line
        return item

    def keep(self, wanted: Callable[[T], bool]) -> None:
        """Drop all others."""
        kept = {client: deque(filter(wanted, line)) for client, line in self.lines.items()}
        self.lines = {client: line for client, line in kept.items() if line}
