"""What is remembered of prompts: the longest common beginning, and no more than so many."""

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from prefixes import Prefixes, common

IDS = st.lists(st.integers(0, 3), max_size=40)


def ids(*values):
    return array("i", values)


@settings(deadline=None)
@given(IDS, IDS)
def test_common_is_the_longest_common_beginning(a, b):
    longest = max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n])
    assert common(ids(*a), ids(*b)) == longest


def test_the_oldest_is_forgotten_first():
    prefixes = Prefixes()
    for i in range(100):
        prefixes.remember("a", ids(i, 5), ids())
    assert len(prefixes.known) == Prefixes.PROMPTS
    assert [prefixes.best("a", ids(i, 5))[0] for i in (0, 35, 36, 99)] == [0, 0, 2, 2]
    made = ids()
    prefixes.remember("a", ids(7), made)
    made.extend([0] * Prefixes.TOKENS)  # it goes on after it has been remembered
    prefixes.remember("b", ids(8), ids())
    assert [one.ids for one in prefixes.known] == [ids(8)]


def test_the_latest_of_those_that_match_as_well():
    """What was sent before is shown to whom it belongs: an address of elsewhere may be many people's."""
    for client, cached in (("key a", "1 2 4 9"), ("127.0.0.1", "1 2 4 9"), ("10.0.0.7", None)):
        prefixes = Prefixes()
        prefixes.remember(client, ids(1, 2, 3), ids())
        prefixes.remember(client, ids(1, 2, 4), ids(9))
        prefixes.remember(client, ids(1), ids())
        told = prefixes.explain(client, ids(1, 2, 5), 1, lambda tokens: " ".join(map(str, tokens)))
        difference = {"token": 2, "prompt": "1 2 5", "cached": cached}
        assert told == {"cached_tokens": 1, "best_match_tokens": 2, "first_difference": difference}
