"""Who gets what of a step, and whose cells: over a cache that is only counted. See slots.py."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import OpenVino
from blocks import Blocks
from engine import EngineSpec, Sampling
from slots import Piece, Slots

numpy: Any = pytest.importorskip("numpy", reason="numpy comes with every engine")


class Counted(Slots):
    """Tokens are drawn from logits that always want token 3; nothing is computed."""

    numpy, vocabulary, bos, eos, guides, unified = numpy, 8, 1, frozenset({2}), None, True
    BATCH = BATCH_TOGETHER = BATCH_BUSY = 64
    BATCH_LEAST = 8

    def __init__(self, slots, cells):
        self.cells = self.context = cells
        self.make_slots(EngineSpec("counted", "", slots))
        self.yielded, self.batches = [], []

    def find(self, ids, limit):
        return next(slot for slot in self.ring if slot.sampler is None), 0

    def free_cells(self):
        return self.cells - sum(len(slot.kv) for slot in self.ring)

    def cut(self, slot):
        pass

    def drop(self, slot):
        self.yielded.append((slot.seq, slot.answering))

    def compute(self, pieces):
        assert sum(len(slot.kv) for slot in self.ring) <= self.cells, "more is held than there is"
        assert [len(piece.slot.kv) for piece in pieces] == [piece.position + len(piece.ids) for piece in pieces]
        self.batches.append([piece.slot.seq for piece in pieces])

    def cancel(self, seq):
        super().cancel(seq)
        self.ring[seq].kv = []

    def logits(self, row):
        return numpy.array([0, 0, 0, 9, 0, 0, 0, 0], dtype=numpy.float32)

    def begin(self, prompt, most=4):
        """`prompt`: tokens, or how many."""
        ids = prompt if isinstance(prompt, list) else [5] * prompt
        return self.start(ids, Sampling(max_tokens=most, temperature=0))[0]

    def run(self, steps=10_000):
        """Returns, in the order in which they ended, (sequence, tokens it got)."""
        got, ended = dict.fromkeys((slot.seq for slot in self.ring if slot.sampler), 0), []
        for _ in range(steps):
            if not got:
                break
            for step in self.step():
                got[step.seq] += len(step.tokens)
                if not self.ring[step.seq].left:
                    ended.append((step.seq, got.pop(step.seq)))
                    self.cancel(step.seq)
        return ended


class Paged(Counted):
    """OpenVINO's blocks, with nothing in them."""

    find, look_again, need, drop = OpenVino.find, OpenVino.look_again, OpenVino.need, OpenVino.drop
    free_cells, cut, take_blocks, fill_blocks = OpenVino.free_cells, OpenVino.cut, OpenVino.take_blocks, OpenVino.fill_blocks

    def __init__(self, slots, cells):
        super().__init__(slots, cells)
        self.blocks = Blocks(cells // 16, 16)
        self.told = {}

    def compute(self, pieces):
        self.take_blocks(pieces)
        assert [len(piece.slot.kv) for piece in pieces] == [piece.position + len(piece.ids) for piece in pieces]
        self.fill_blocks(pieces)

    def begin(self, prompt, most=4):
        ids = prompt if isinstance(prompt, list) else [5 + next(self.clock)] * prompt
        seq, cached = self.start(ids, Sampling(max_tokens=most, temperature=0))
        self.told[seq] = cached
        return seq

    def step(self):
        steps = super().step()
        for step in steps:
            self.told[step.seq] += step.cached or 0
        return steps

    def cancel(self, seq):
        super().cancel(seq)
        OpenVino.drop(self, self.ring[seq])


@pytest.mark.parametrize("kind", [Counted, Paged])
@pytest.mark.parametrize("others", [1, 2])
def test_a_prompt_of_one_token_waits_for_room_as_any_other(kind, others):
    engine = kind(3, 320)
    hog = engine.begin(300, most=20)
    engine.run(9)
    small = [engine.begin(1, most=2) for _ in range(others)]
    assert {name for name, _ in engine.run()} == {hog, *small}


def test_prompts_that_begin_alike_are_read_once_though_they_come_together():
    engine = Paged(3, 1024)
    names = [engine.begin([*range(600), 700 + i], most=40) for i in range(3)]
    assert not engine.run(25)  # nobody has ended
    assert all(engine.ring[name].answering for name in names)
    engine.run()
    first, second, third = (engine.told[name] for name in names)
    assert (first, third) == (0, 592) and 0 < second <= 592  # it began while the first was being read


def test_a_guess_is_shared_with_nobody_before_it_has_turned_out_right():
    engine = Paged(1, 64)
    slot = engine.ring[engine.begin([*range(14)])]
    engine.step()
    slot.kv, slot.drafts = [*slot.kv, 3, 7, 7], [7, 7]
    piece = Piece(slot, [3, 7, 7], 14, 3)
    engine.take_blocks([piece])
    engine.fill_blocks([piece])
    assert not engine.blocks.known
    slot.kv = slot.kv[:16]  # one of them was right
    engine.cut(slot)
    assert len(engine.blocks.known) == 1


def test_what_was_found_is_told_once():
    engine = Paged(3, 320)
    before = engine.begin([*range(130)], most=1)
    engine.run()
    hog = engine.begin(150, most=100)
    engine.run(4)
    late = engine.begin([*range(128), *range(500, 590)], most=3)  # found at its start, lost while it waits
    told = engine.told[late]
    engine.run()
    assert before == hog and told == engine.told[late] == 128
    half = Paged(2, 200)
    names = [half.begin(60, most=90), half.begin(100, most=5)]
    half.run()
    assert [half.told[name] for name in names] == [0, 0]  # what it had computed itself before it yielded


def test_a_short_prompt_passes_a_long_one():
    engine = Counted(4, 4096)
    long, short = engine.begin(1000), engine.begin(20)
    assert engine.run() == [(short, 4), (long, 4)]


def test_a_prompt_that_waits_for_room_is_passed_but_not_for_ever():
    engine = Counted(3, 400)
    holder, waits = engine.begin(200, most=99), engine.begin(250, most=1)
    passed = 0
    while True:
        short = engine.begin(40, most=2)
        engine.run(4)
        if engine.ring[waits].begun or not engine.ring[short].begun:
            break
        passed += 1
    assert passed == engine.PASSED
    assert [name for name, _ in engine.run()] == [holder, waits, short]


def test_prompts_that_do_not_fit_together_come_one_after_the_other():
    engine = Counted(3, 160)
    engine.begin(10, most=40)
    engine.run(2)
    engine.begin(100, most=5)
    engine.begin(101, most=5)
    assert len(engine.run()) == 3 and engine.yielded == []


def test_whoever_is_answered_does_not_yield_to_one_that_is_read():
    engine = Counted(3, 170)
    read = engine.begin(140, most=3)
    engine.run(1)
    first, second = engine.begin(20, most=40), engine.begin(10, most=40)
    engine.room = lambda decoding: len(decoding) + 8  # so it takes its time
    assert [name for name, _ in engine.run()] == [first, second, read]
    assert engine.yielded == [(read, False)]


def test_the_youngest_of_those_that_are_answered_yields_and_gets_its_tokens_all_the_same():
    engine = Counted(3, 120)
    names = [engine.begin(20, most=50) for _ in range(3)]
    assert sorted(engine.run()) == [(name, 50) for name in names]
    assert engine.yielded[0] == (names[-1], True) and names[0] not in dict(engine.yielded)


@pytest.mark.parametrize("kind", [Counted, Paged])
@settings(max_examples=150, deadline=None)
@given(requests=st.lists(st.tuples(st.integers(1, 126), st.integers(1, 60)), min_size=1, max_size=30), slots=st.integers(1, 5))
def test_everyone_gets_all_that_was_asked_for(kind, requests, slots):
    engine, ended = kind(slots, 128), []
    wanted = [(prompt, min(most, 128 - prompt)) for prompt, most in requests]
    waiting, names = list(wanted), {}
    for _ in range(20_000):
        while waiting and any(slot.sampler is None for slot in engine.ring):
            prompt, most = waiting.pop(0)
            names[engine.begin([5] * prompt, most)] = (prompt, most)
        if not names:
            break
        for step in engine.step():
            if not engine.ring[step.seq].left:
                ended.append(names.pop(step.seq))
                assert kind is Counted or engine.told[step.seq] < ended[-1][0]
                engine.cancel(step.seq)
    assert sorted(ended) == sorted(wanted)
