"""The prompts that came last, as token ids: tells why one that comes now was not in its engine's cache. Nothing here knows a library.

What a client is shown comes from what itself has sent before, and from nobody else's.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Known(NamedTuple):
    """A prompt, and what has been generated after it so far: both are the engine loop's own, which go on growing there."""

    client: str
    ids: array[int]
    made: array[int]


class Prefixes:
    """What an engine's cache may hold, bounded in prompts and tokens; the oldest is forgotten first."""

    PROMPTS, TOKENS = 64, 1 << 18
    AROUND = 8  # tokens that are shown before and after a difference

    def __init__(self) -> None:
        self.known: deque[Known] = deque()  # the latest last

    def remember(self, client: str, ids: array[int], made: array[int]) -> None:
        self.known.append(Known(client, ids, made))
        while len(self.known) > self.PROMPTS or sum(len(one.ids) + len(one.made) for one in self.known) > self.TOKENS:
            self.known.popleft()

    def best(self, client: str, ids: array[int]) -> tuple[int, array[int]]:
        """(how many tokens this client's best match shares with the beginning of these, the whole of that match)."""
        found, match = -1, array("i")
        for one in reversed(self.known):
            if one.client != client:
                continue
            whole = one.ids + one.made
            if (length := common(ids, whole)) > found:
                found, match = length, whole
        return max(found, 0), match

    def explain(self, client: str, ids: array[int], cached: int | None, text: Callable[[Sequence[int]], str]) -> dict[str, Any]:
        """The member `cache` of what `return_prompt` tells; `text` is what tokens read as."""
        at, match = self.best(client, ids)
        difference = None
        if at < min(len(ids), len(match)):
            here, there = (text(tokens[max(0, at - self.AROUND) : at + self.AROUND]) for tokens in (ids, match))
            difference = {"token": at, "prompt": here, "cached": there if is_one(client) else None}
        return {"cached_tokens": cached, "best_match_tokens": at, "first_difference": difference}


def is_one(client: str) -> bool:
    """Is what this client has sent nobody else's? An address beyond this machine may be a whole office's."""
    return not client or client.startswith(("key ", "127.", "local")) or client == "::/64"


def common(a: array[int], b: array[int]) -> int:
    """Length of the common beginning. By halves: to compare two slices costs less than their hundredth token in Python."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
