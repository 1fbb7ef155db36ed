"""How tokens are drawn, held against the distribution worked out by sorting everything. No engine."""

import math
from types import SimpleNamespace

import pytest

from engine import Sampling

numpy = pytest.importorskip("numpy", reason="numpy comes with an engine")

from sampler import BLOCK, Sampler, Weights  # noqa: E402

VOCABULARY = 3 * BLOCK + 17
LOGITS = (numpy.random.default_rng(1).standard_normal(VOCABULARY) * 2).astype(numpy.float32)
TURNS = 20_000
SAMPLINGS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.5, "top_k": VOCABULARY - 3},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 0.5, "top_p": 0.01},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
]


def expected(logits, s):
    """The probability of each token."""
    weights = numpy.exp((logits.astype(float) - logits.max()) / s.temperature)
    order = (-weights).argsort(kind="stable")
    weights[order[s.top_k or len(order) :]] = 0
    if s.top_p is not None:
        sums = (weights / weights.sum())[order].cumsum()
        weights[order[int(sums.searchsorted(s.top_p)) + 1 :]] = 0
    weights[weights < s.min_p * weights.max()] = 0
    return weights / weights.sum()


def drawn(sampler, *given):
    """How often each token comes as the dice go once evenly from 0 to 1."""
    rolls = iter((turn + 0.5) / TURNS for turn in range(TURNS))
    sampler.dice = SimpleNamespace(random=lambda: next(rolls))
    return numpy.bincount([sampler.choose(*given) for _ in range(TURNS)], minlength=VOCABULARY)


@pytest.mark.parametrize("fields", SAMPLINGS, ids=str)
def test_tokens_come_as_often_as_they_should(fields):
    s = Sampling(**fields)
    counts, share = drawn(Sampler(Weights(numpy, VOCABULARY), [0], [1], s), LOGITS), expected(LOGITS, s)
    assert set(numpy.flatnonzero(counts)) <= set(numpy.flatnonzero(share))
    # A token's share of the rolls has two ends, and where it lies in a block one more: each may be off by one, and by float32
    assert numpy.abs(counts - share * TURNS).max() < 4


def test_masks_bans_and_biases():
    weights = Weights(numpy, VOCABULARY)
    allowed = numpy.zeros(VOCABULARY, dtype=bool)
    allowed[[5, 700]] = True
    for fields in (
        {"temperature": 1.0},
        {"temperature": 0},
        {"temperature": 2.0, "top_p": 0.5},
        {"temperature": 1, "top_k": 9},
    ):
        sampler = Sampler(weights, [0], [1], Sampling(seed=3, **fields))
        assert {sampler.choose(LOGITS, allowed) for _ in range(200)} <= {5, 700}
        sampler = Sampler(weights, [0], [1], Sampling(logit_bias=((5, -100.0),), seed=3, **fields))
        assert {sampler.choose(LOGITS, allowed) for _ in range(50)} == {700}
        sampler = Sampler(weights, [0], [1], Sampling(logit_bias=((5, -100.0), (700, -100.0)), **fields))
        assert sampler.choose(LOGITS, allowed) is None
        sampler = Sampler(weights, [0], [1], Sampling(logit_bias=((9, 99.0),), **fields))
        assert sampler.choose(LOGITS) == 9
    assert not Weights(numpy, 3).blocks[0, 3:].any()


def test_no_end_before_min_tokens():
    logits = LOGITS.copy()
    logits[0] = 99
    sampler = Sampler(Weights(numpy, VOCABULARY), [0], [1], Sampling(temperature=1.0, min_tokens=2, seed=1))
    tokens = []
    for _ in range(3):
        tokens.append(sampler.choose(logits))
        sampler.accept(tokens[-1])
    assert 0 not in tokens[:2] and tokens[2] == 0


def test_penalties():
    """Presence and frequency count the completion, repetition the prompt too; of a negative logit it makes a more negative one."""
    logits = numpy.full(VOCABULARY, -2.0, dtype=numpy.float32)
    logits[[3, 4]] = 2.0, 1.9
    weights = Weights(numpy, VOCABULARY)
    assert Sampler(weights, [0], [3], Sampling(temperature=0, presence_penalty=1.0)).choose(logits) == 3
    assert Sampler(weights, [0], [3], Sampling(temperature=0, repetition_penalty=1.5)).choose(logits) == 4
    sampler = Sampler(weights, [0], [9], Sampling(temperature=0, frequency_penalty=0.06))
    assert sampler.choose(logits) == 3
    sampler.accept(3)
    assert sampler.choose(logits) == 3
    sampler.accept(3)
    assert sampler.choose(logits) == 4
    sampler = Sampler(weights, [0], [9], Sampling(temperature=1.0, repetition_penalty=2.0))
    adjusted = sampler.adjusted(logits, None)
    assert (adjusted[9], adjusted[10]) == (-4.0, -2.0)


def test_the_same_seed_draws_the_same():
    def some(seed):
        sampler = Sampler(Weights(numpy, VOCABULARY), [0], [1], Sampling(temperature=1.0, seed=seed))
        return [sampler.choose(LOGITS) for _ in range(20)]

    assert some(1) == some(1) != some(2)


def test_next_to_no_temperature_is_greedy():
    sampler = Sampler(Weights(numpy, VOCABULARY), [0], [1], Sampling(temperature=1e-300, seed=1))
    assert sampler.choose(LOGITS) == LOGITS.argmax()


def test_what_weighs_nothing_is_never_drawn():
    logits = numpy.full(VOCABULARY, -math.inf, dtype=numpy.float32)
    logits[[BLOCK - 1, VOCABULARY - 1]] = 0.0
    sampler = Sampler(Weights(numpy, VOCABULARY), [0], [1], Sampling(temperature=1.0))
    for roll in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53):
        sampler.dice = SimpleNamespace(random=lambda roll=roll: roll)
        assert sampler.choose(logits) in (BLOCK - 1, VOCABULARY - 1)


@pytest.mark.parametrize("fields", [{"min_p": 0.99999999}, {"top_k": 1, "top_p": 1e-17}], ids=str)
def test_rounding_leaves_the_best(fields):
    sampler = Sampler(Weights(numpy, VOCABULARY), [0], [1], Sampling(temperature=1.0, seed=1, **fields))
    assert sampler.choose(LOGITS) == LOGITS.argmax()
