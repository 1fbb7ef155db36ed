"""The pool of KV cache blocks, held against a plain record of what was written where. See blocks.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blocks import Blocks

SIZE = 4


class Cache:
    """Blocks, and what a library would have written to them."""

    def __init__(self, count):
        self.blocks = Blocks(count, SIZE)
        self.written = [[None] * SIZE for _ in range(count)]
        self.sequences = {}

    def start(self, name, ids):
        """Returns how many tokens were found."""
        table = self.blocks.find(ids)
        self.blocks.hold(table)
        self.sequences[name] = (table, [*ids[: len(table) * SIZE]])
        return len(table) * SIZE

    def write(self, name, ids):
        table, kv = self.sequences[name]
        begin = len(kv)
        kv += ids
        while len(table) * SIZE < len(kv):
            table.append(self.blocks.take())
        for at in range(begin, len(kv)):
            self.written[table[at // SIZE]][at % SIZE] = kv[at]
        self.blocks.fill(table, kv, begin, len(kv))

    def reads(self, name):
        table, kv = self.sequences[name]
        return [self.written[table[at // SIZE]][at % SIZE] for at in range(len(kv))]

    def end(self, name):
        self.blocks.release(self.sequences.pop(name)[0])


def test_a_prompt_finds_whole_blocks_of_one_that_begins_alike():
    cache = Cache(8)
    assert cache.start("a", range(10)) == 0
    cache.write("a", range(10))
    assert cache.start("b", [*range(9), 99]) == 8  # the third block is not full
    cache.write("b", [8, 99])
    assert cache.reads("a") == [*range(10)] and cache.reads("b") == [*range(9), 99]
    assert cache.blocks.free == 8 - 4
    cache.end("a")
    cache.end("b")
    assert cache.blocks.free == 8 and cache.start("c", [*range(12)]) == 8  # kept, held by nobody
    assert cache.start("d", [7, *range(1, 12)]) == 0


def test_the_same_computed_twice_is_one_beginning():
    cache = Cache(8)
    for name in "ab":
        cache.start(name, range(8))
    for name in "ab":
        cache.write(name, range(4))
    for name in "ab":
        cache.write(name, range(4, 8))
    cache.end("b")
    assert not cache.blocks.kept  # its blocks are empty: nobody would find them
    assert cache.blocks.free == 6 and cache.start("c", [*range(8)]) == 8
    cache.end("a")
    assert cache.reads("c") == [*range(8)]


def test_what_was_left_longest_ago_goes_first_and_of_a_text_its_end():
    cache = Cache(4)
    for name, first in (("old", 0), ("new", 100)):
        cache.start(name, [])
        cache.write(name, range(first, first + 8))
        cache.end(name)
    cache.start("next", [])
    cache.write("next", [55] * 4)
    assert cache.start("old", [*range(8)]) == 4
    assert cache.start("new", [*range(100, 108)]) == 8
    with pytest.raises(IndexError, match="no block"):
        cache.write("next", [56])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 9)), max_size=60), st.integers(6, 20))
def test_nobody_reads_what_another_wrote(acts, count):
    cache = Cache(count)
    for name, letter, length in acts:
        if name not in cache.sequences:
            prompt = [letter] * length
            found = cache.start(name, prompt)
            assert found == 0 or cache.reads(name) == prompt[:found]
        elif length == 1:
            cache.end(name)
        elif cache.blocks.free > length // SIZE + 1:
            cache.write(name, [letter] * length)
        for one, (table, kv) in cache.sequences.items():
            assert cache.reads(one) == kv and len(set(table)) == len(table)
    for name in [*cache.sequences]:
        cache.end(name)
    assert cache.blocks.free == count
