"""StopGate and the end of a choice: the same result however the text is cut."""

import itertools

import pytest

from engine import Choice, Request, Sampling, Step, StopGate

CASES = [  # text, stops, what is shown
    ("hello world", (), "hello world"),
    ("hello world", ("wor",), "hello "),
    ("hello world", ("xyz",), "hello world"),
    ("hello", ("hello",), ""),
    ("aaab", ("aab",), "a"),
    ("abcd", ("abcd", "bc"), "a"),
    ("abcabd", ("abd",), "abc"),
    ("one\n\ntwo", ("\n\n",), "one"),
    ("ab", ("abc",), "ab"),
    ("xEN END", ("END",), "xEN "),
    ("héé 世界", ("世",), "héé "),
]


def cuts(text, most=4):
    """Every way to cut a text into up to `most` pieces, and into single characters."""
    for pieces in range(1, most + 1):
        for at in itertools.combinations(range(1, len(text)), pieces - 1):
            edges = [0, *at, len(text)]
            yield [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    yield list(text)


@pytest.mark.parametrize(("text", "stops", "shown"), CASES)
def test_stop_gate_at_every_split(text, stops, shown):
    for pieces in cuts(text):
        gate, out, hit = StopGate(stops), "", False
        for piece in pieces:
            safe, hit = gate.feed(piece)
            out += safe
            if hit:
                break
        assert (out if hit else out + gate.flush()) == shown, pieces
        assert hit == (shown != text or text in stops)


def test_stop_gate_lets_through_what_cannot_be_a_stop():
    assert StopGate(("END",)).feed("some text E") == ("some text ", False)


class Bytes:
    """A token is a byte."""

    def piece(self, token, special):
        return bytes([token])


def choice(stop=(), stop_ids=(), max_tokens=100, **fields):
    sampling = Sampling(max_tokens=max_tokens, stop=stop, stop_token_ids=stop_ids, **fields)
    return Choice(Request(0, "client", "prompt", [1], 0, sampling, frozenset([0])), 0)


def run(c, data, step=1):
    text, tokens = "", 0
    for at in range(0, len(data), step):
        (delta,) = c.take(Step(0, list(data[at : at + step])), Bytes())
        text, tokens = text + delta.text, tokens + delta.tokens
        if delta.finish:
            return text, tokens, delta.finish
    return text, tokens, None


@pytest.mark.parametrize("step", [1, 2, 3, 5, 100])
def test_choice_ends(step):
    snow = "a☃b".encode()
    assert run(choice(), snow + b"\0zzz", step) == ("a☃b", 6, "stop")  # EOS is counted, and not shown
    assert run(choice(stop=("☃",)), snow, step) == ("a", 4, "cut")
    assert run(choice(stop_ids=(ord("b"),)), snow, step) == ("a☃", 5, "cut")
    assert run(choice(max_tokens=3), snow, step) == ("a\ufffd", 3, "length")  # cut inside a character
    assert run(choice(stop=("bcd",), max_tokens=5), snow, step) == ("a☃b", 5, "length")  # what was held comes out
    assert run(choice(stop=("bcd",)), snow + b"\0", step) == ("a☃b", 6, "stop")


@pytest.mark.parametrize("step", [1, 3, 100])
def test_choice_options(step):
    assert run(choice(min_tokens=3, stop=("b",)), b"abcab\0", step) == ("abca", 5, "cut")
    assert run(choice(ignore_eos=True, max_tokens=4), b"a\0bc", step) == ("a\0bc", 4, "length")
    assert run(choice(echo=True), b"a\0", step) == ("prompta", 2, "stop")
    assert run(choice(echo=True, max_tokens=0), b"a\0", step) == ("prompt", 0, "length")
