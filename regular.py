"""Regular languages as terms: the algebra, patterns read into it, numbers in a range, and an automaton over any of it.

Text to text, of the standard library, and knows nothing of JSON Schema. A term is a value: equal terms are one language written one way.
Two things keep it safe to run on a client's words: the automaton is made as far as it is asked for, all ways at once (no pattern can
backtrack for ever), and every loop that a client can lengthen draws on a budget.
"""

from __future__ import annotations

import importlib
import re
import sys
import unicodedata
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any, NoReturn

MAX_REPEAT, MAX_REGEX, MAX_PATHS = 100_000, 4_000, 64
DIGITS = 20  # of a whole number, and after the point: 64 bits, and what a double prints
_sre: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


class Unsupported(ValueError):
    """One sentence: which keyword or construct is not supported, and where."""


# ---- terms


Ranges = tuple[tuple[int, int], ...]


_BITS = {"and": 1, "mod": 2, "rep": 4, "pick": 8, "ref": 16}


class Term:
    """A piece of grammar: 'lit' text, 'set' ranges, 'ref' text, 'seq' parts, 'alt' parts, 'rep' parts[0] low..high,
    'pick' parts low..high (grammar.py), 'and' parts (in all of them), 'not' parts[0] (any text but these; only as a part of 'and', never its first),
    'mod' low (decimals of at most `high` places of which low / 10**high is a divisor)."""

    __slots__ = ("_hash", "high", "low", "op", "ops", "parts", "ranges", "text")

    def __init__(
        self, op: str, text: str = "", parts: tuple[Term, ...] = (), ranges: Ranges = (), low: int = 0, high: int | None = None
    ) -> None:
        self.op, self.text, self.parts, self.ranges, self.low, self.high = op, text, parts, ranges, low, high
        self._hash = hash((op, text, parts, ranges, low, high))  # deep terms are keys of many tables: from their parts' hashes
        self.ops = _BITS.get(op, 0) if op != "ref" or text[0] == "r" else 0
        for part in parts:
            self.ops |= part.ops

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Term) and hash(self) == hash(other) and self._same(other)

    def _same(self, other: Term) -> bool:
        mine = (self.op, self.text, self.ranges, self.low, self.high, self.parts)
        return mine == (other.op, other.text, other.ranges, other.low, other.high, other.parts)


def lit(text: str) -> Term:
    return Term("lit", text)


EMPTY = lit("")
NONE = Term("alt")  # no text at all


def seq(*parts: Term) -> Term:
    kept: list[Term] = []
    for part in parts:
        if part is NONE:
            return NONE
        if kept and kept[-1].op == part.op == "lit":
            kept[-1] = lit(kept[-1].text + part.text)
        elif part.op == "seq":
            kept += part.parts
        elif part.op != "lit" or part.text:
            kept.append(part)
    return kept[0] if len(kept) == 1 else Term("seq", parts=tuple(kept)) if kept else EMPTY


def alt(parts: Iterable[Term]) -> Term:
    kept = tuple(dict.fromkeys(inner for part in parts for inner in (part.parts if part.op == "alt" else (part,))))
    if len(kept) > 1 and all(part.op == "set" for part in kept):
        return Term("set", ranges=ordered(r for part in kept for r in part.ranges))
    return kept[0] if len(kept) == 1 else Term("alt", parts=kept) if kept else NONE


def rep(part: Term, low: int, high: int | None) -> Term:
    if part == EMPTY or high == 0 or (part is NONE and not low):
        return EMPTY
    if low == high == 1 or part is NONE:
        return part
    return Term("rep", parts=(part,), low=low, high=high)


def both(*parts: Term) -> Term:
    """The texts that are in all of the terms; a complement may not come first."""
    kept = tuple(dict.fromkeys(inner for part in parts for inner in (part.parts if part.op == "and" else (part,))))
    return NONE if NONE in kept else kept[0] if len(kept) == 1 else Term("and", parts=kept)


def other(part: Term) -> Term:
    return Term("not", parts=(part,))


def chars(*pieces: str) -> Term:
    return Term("set", ranges=tuple((ord(piece[0]), ord(piece[-1])) for piece in pieces))


def ordered(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for a, b in sorted(ranges):
        if merged and a <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return tuple(merged)


def without(ranges: Iterable[tuple[int, int]]) -> Ranges:
    out, start = [], 0
    for a, b in ordered(ranges):
        out.append((start, a - 1))
        start = b + 1
    return tuple((a, b) for a, b in [*out, (start, 0x10FFFF)] if a <= b)


def common_ranges(left: Ranges, right: Ranges) -> Ranges:
    return ordered((max(a, c), min(b, d)) for a, b in left for c, d in right if max(a, c) <= min(b, d))


ALL: Ranges = ((1, 0xD7FF), (0xE000, 0x10FFFF))
TEXT: Ranges = ((9, 10), (13, 13), (0x20, 0x7E), (0xA0, 0xD7FF), (0xE000, 0x10FFFF))  # what a reader sees
DIGIT, NONZERO = chars("09"), chars("19")
ANY = rep(Term("set", ranges=ALL), 0, None)


def nullable(term: Term) -> bool:
    if term.op == "rep":
        return term.low == 0 or nullable(term.parts[0])
    if term.op == "not":
        return not nullable(term.parts[0])
    if term.op in ("seq", "alt", "and"):
        return (any if term.op == "alt" else all)(map(nullable, term.parts))
    return term == EMPTY


def words(found: Iterable[str], depth: int = 0) -> Term:
    """One of the words, common beginnings written once: thousands of alternatives side by side are slow in every engine."""
    groups: dict[str, list[str]] = {}
    for word in found:
        groups.setdefault(word[:1], []).append(word)
    parts = []
    for first, group in groups.items():
        if len(group) == 1 or not first or depth > 40:
            parts += [lit(word) for word in group]
            continue
        shared = _common(min(group), max(group))
        parts.append(seq(lit(shared), words((word[len(shared) :] for word in group), depth + 1)))
    return alt(parts)


def _common(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def lengths(term: Term) -> tuple[int, int | None]:
    """The shortest and longest text of a term, at most and at least: what is between may be missing."""
    if term.op == "lit":
        return len(term.text), len(term.text)
    if term is NONE:
        return 0, 0
    if term.op in ("seq", "alt"):
        lows, highs = zip(*map(lengths, term.parts), strict=True)
        if term.op == "seq":
            return sum(lows), None if None in highs else sum(highs)
        return min(lows), None if None in highs else max(highs)
    if term.op == "rep":
        low, high = lengths(term.parts[0])
        return low * term.low, None if high is None or term.high is None else high * term.high
    if term.op == "and":
        return lengths(term.parts[0])
    return (1, 1) if term.op == "set" else (1, None)


# ---- the automaton


Move = tuple[int, int, frozenset[int]]


class Automaton:
    """All ways to read a text at once. A state is a set of places; a place is a term, how far it has been read, and what follows.

    Made as far as it is asked for; each state it looks at draws on `budget`.
    """

    def __init__(self, budget: int = 200_000, rules: dict[str, Term] | None = None) -> None:
        self.rules, self.budget = rules or {}, budget
        self.places: list[tuple[Term, Any, int]] = [(EMPTY, 0, 0)]  # 0 is the end
        self.numbers: dict[tuple[int, Any, int], int] = {}  # by the term's identity: to compare deep terms takes long
        self.tails: dict[int, Term] = {}  # a literal without its first character
        self.known: dict[frozenset[int], list[Move]] = {}
        self.closures: dict[int, frozenset[int]] = {}
        self.inner: dict[tuple[frozenset[int], ...], Any] = {}

    def spend(self, work: int) -> None:
        self.budget -= work
        if self.budget < 0:
            raise Unsupported("a pattern, or several together, that takes this long to work out is not supported")

    def place(self, term: Term, extra: Any, after: int) -> int:
        key = (id(term), extra, after)
        if key not in self.numbers:
            self.numbers[key] = len(self.places)
            self.places.append((term, extra, after))  # keeps the term, and so its identity
        return self.numbers[key]

    def start(self, term: Term) -> frozenset[int]:
        return self.closure(self.place(term, 0, 0))

    def closure(self, first: int) -> frozenset[int]:
        """The places that read a character, and 0, that are reached from a place without reading one."""
        if first in self.closures:
            return self.closures[first]
        todo, seen, found = [first], {first}, set()
        while todo:
            number = todo.pop()
            following = self.following(number) if number else None
            if following is None:
                found.add(number)
                continue
            todo += [place for place in following if place not in seen]
            seen.update(following)
        self.spend(len(seen))
        self.closures[first] = frozenset(found)
        return self.closures[first]

    def following(self, number: int) -> list[int] | None:
        """Where a place leads without reading; None where it reads a character."""
        term, extra, after = self.places[number]
        if term.op == "set" or (term.op == "lit" and term.text):
            return None
        if term.op == "mod":
            return [after, self.place(term, (*extra, "on"), after)] if self._divided(term, extra) else None
        if term.op == "lit":
            return [after]
        if term.op == "ref":
            return [self.place(self.rules[term.text], 0, after)]
        if term.op == "alt":
            return [self.place(part, 0, after) for part in term.parts]
        if term.op == "seq":
            for part in reversed(term.parts):
                after = self.place(part, 0, after)
            return [after]
        if term.op == "rep":
            out = [after] if extra >= term.low else []
            if term.high is None or extra < term.high:
                more = self.place(term, min(extra + 1, term.low) if term.high is None else extra + 1, after)
                out.append(self.place(term.parts[0], 0, more))
            return out
        if not extra:  # 'and', not yet begun
            return [
                self.place(term, tuple(self.start(part.parts[0] if part.op == "not" else part) for part in term.parts), after)
            ]
        return None if not self.accepts(term, extra) else [after, self.place(term, (*extra, "on"), after)]

    @staticmethod
    def _divided(term: Term, extra: Any) -> bool:
        """Whether a 'mod' may end here: (remainder, digits behind the point or -1), and not ended already."""
        return bool(extra) and len(extra) == 2 and extra[0] * 10 ** ((term.high or 0) - max(extra[1], 0)) % term.low == 0

    @staticmethod
    def accepts(term: Term, states: tuple[Any, ...]) -> bool:
        """Whether an 'and' may end with its parts at these states; a state marked "on" has been ended already."""
        return states[-1] != "on" and all(
            (0 in state) != (part.op == "not") for part, state in zip(term.parts, states, strict=True)
        )

    def heads(self, number: int) -> Iterator[tuple[Ranges, int]]:
        term, extra, after = self.places[number]
        if term.op == "set":
            yield term.ranges, after
        elif term.op == "lit":
            code = ord(term.text[0])
            rest = self.tails.setdefault(id(term), lit(term.text[1:])) if len(term.text) > 1 else None
            yield ((code, code),), self.place(rest, 0, after) if rest else after
        elif term.op == "mod":
            remainder, digits = extra[:2] if extra else (0, -1)
            if not extra:
                yield ((45, 45),), self.place(term, (0, -2), after)
            if extra and digits == -1 and term.high:
                yield ((46, 46),), self.place(term, (remainder, 0, "dot"), after)
            if digits < (term.high or 0):
                for digit in range(10):
                    fresh = (10 * remainder + digit) % term.low, digits + 1 if digits >= 0 else -1
                    yield ((48 + digit, 48 + digit),), self.place(term, fresh, after)
        elif term.op == "and":
            for a, b, states in self.together(term, extra[: len(term.parts)]):
                yield ((a, b),), self.place(term, states, after)

    def together(self, term: Term, states: tuple[frozenset[int], ...]) -> list[tuple[int, int, tuple[frozenset[int], ...]]]:
        """The moves of an 'and': those of all its parts at once; a complement's part may be lost, and then never comes back."""
        found: list[tuple[int, int, tuple[frozenset[int], ...]]] = [(a, b, (after,)) for a, b, after in self.moves(states[0])]
        for part, state in zip(term.parts[1:], states[1:], strict=True):
            if found:  # where nothing is left, the others need not be made
                found = list(_met(found, self.moves(state), part.op == "not"))
        return found

    def moves(self, state: frozenset[int]) -> list[Move]:
        """(first, last, next state), in order and apart."""
        if state in self.known:
            return self.known[state]
        edges: list[tuple[int, int, int]] = []
        for number in state:
            if number:
                edges += [(a, b, place) for ranges, place in self.heads(number) for a, b in ranges]
        self.spend(1 + len(edges))
        points: dict[int, list[tuple[bool, int]]] = {}
        for i, (a, b, _) in enumerate(edges):
            points.setdefault(a, []).append((True, i))
            points.setdefault(b + 1, []).append((False, i))
        cuts = sorted(points)
        live: set[int] = set()
        out: list[Move] = []
        targets: dict[frozenset[int], frozenset[int]] = {}
        for at, cut in enumerate(cuts):
            for begins, i in points[cut]:
                (live.add if begins else live.discard)(i)
            if live:
                key = frozenset(edges[i][2] for i in live)
                if key not in targets:
                    targets[key] = frozenset().union(*map(self.closure, key))
                if out and out[-1][1] == cut - 1 and out[-1][2] == targets[key]:
                    out[-1] = (out[-1][0], cuts[at + 1] - 1, targets[key])
                else:
                    out.append((cut, cuts[at + 1] - 1, targets[key]))
        self.known[state] = out
        return out

    def step(self, state: frozenset[int], code: int) -> frozenset[int]:
        self.spend(1)
        moves = self.moves(state)
        low, high = 0, len(moves)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if moves[middle][1] < code else (low, middle)
        return moves[low][2] if low < len(moves) and moves[low][0] <= code else frozenset()

    def nothing(self, term: Term) -> bool:
        """Whether the term holds no text at all."""
        first = self.start(term)
        seen, todo = {first}, deque([first])
        while todo:
            state = todo.popleft()
            if 0 in state:
                return False
            fresh = {after for _, _, after in self.moves(state)} - seen
            if any(0 in after for after in fresh):
                return False
            seen |= fresh
            todo += fresh
        return True

    def widest(self, term: Term, steps: int = 48) -> int:
        """The most places at once in a text that goes, character by character, where there are most."""
        state, most = self.start(term), 0
        for _ in range(steps):
            most = max(most, len(state))
            state = max((after for _, _, after in self.moves(state)), key=len, default=frozenset())
            if not state or most > 1_000:
                break
        return most


_LOST: frozenset[int] = frozenset()


def _met(found: list[Any], moves: list[Move], negated: bool) -> Iterator[tuple[int, int, tuple[frozenset[int], ...]]]:
    """The stretches of characters of both, with the state that each part is led to; a complement's part may be lost."""
    at = 0
    for a, b, states in found:
        while at < len(moves) and moves[at][1] < a:
            at += 1
        i = at
        while i < len(moves) and moves[i][0] <= b:
            low, high, after = moves[i]
            if negated and a < low:
                yield a, low - 1, (*states, _LOST)
            yield max(a, low), min(b, high), (*states, after)
            a, i = high + 1, i + 1
        if negated and a <= b:
            yield a, b, (*states, _LOST)


def nothing(term: Term) -> bool:
    return term is NONE or Automaton().nothing(term)


class Matcher:
    """One term, asked about many texts: the automaton stays, each question has a budget of its own."""

    def __init__(self, term: Term) -> None:
        self.automaton = Automaton()
        self.first = self.automaton.start(term)

    def __call__(self, text: str) -> bool:
        state, self.automaton.budget = self.first, 1_000_000
        for char in text:
            state = self.automaton.step(state, ord(char))
            if not state:
                return False
        return 0 in state


@lru_cache(maxsize=256)
def matcher(term: Term) -> Matcher:
    return Matcher(term)


def matches(term: Term, text: str) -> bool:
    return matcher(term)(text)


class States:
    """A term's smallest deterministic automaton: for each state its moves as (ranges, state), and whether a text may end there.

    State 0 is the first one; every state leads to an end.
    """

    def __init__(self, term: Term, rules: dict[str, Term] | None = None, most: int = 5_000) -> None:
        automaton = Automaton(rules=rules)
        first = automaton.start(term)
        index, todo = {first: 0}, [first]
        moves: list[list[tuple[int, int, int]]] = []
        for state in todo:  # grows as it goes
            row = []
            for a, b, after in automaton.moves(state):
                if after not in index:
                    if len(index) >= most:
                        raise Unsupported(f"a pattern, or several together, of more than {most} states is not supported")
                    index[after] = len(index)
                    todo.append(after)
                row.append((a, b, index[after]))
            moves.append(row)
        ends = [0 in state for state in todo]
        self.ends, self.moves = self._smallest(ends, moves)

    @staticmethod
    def _smallest(ends: list[bool], moves: list[list[tuple[int, int, int]]]) -> tuple[list[bool], list[dict[int, Ranges]]]:
        """Moore's refinement, after the states from which no text ends are gone."""
        back: list[list[int]] = [[] for _ in ends]
        for state, row in enumerate(moves):
            for _, _, after in row:
                back[after].append(state)
        todo = [state for state, end in enumerate(ends) if end]
        live = set(todo)
        while todo:
            fresh = set(back[todo.pop()]) - live
            live |= fresh
            todo += fresh
        rows = [[move for move in row if move[2] in live] for row in moves]
        group, count = [int(end) for end in ends], 0
        while True:
            names: dict[Any, int] = {}
            fresh_groups = [0] * len(ends)
            for state in sorted(live):
                joined: list[tuple[int, int, int]] = []
                for a, b, after in rows[state]:
                    if joined and joined[-1][1] == a - 1 and joined[-1][2] == group[after]:
                        joined[-1] = (joined[-1][0], b, group[after])
                    else:
                        joined.append((a, b, group[after]))
                fresh_groups[state] = names.setdefault((group[state], tuple(joined)), len(names))
            group = fresh_groups
            if len(names) == count:
                break
            count = len(names)
        out_ends, out_moves = [False] * count, [dict[int, Ranges]() for _ in range(count)]
        for state in live:
            out_ends[group[state]] = ends[state]
            targets: dict[int, list[tuple[int, int]]] = {}
            for a, b, after in rows[state]:
                targets.setdefault(group[after], []).append((a, b))
            out_moves[group[state]] = {after: ordered(found) for after, found in targets.items()}
        return out_ends, out_moves  # the first state is the lowest live one, so its group is 0


# ---- regular expressions


_BASIC: Ranges = ((1, 0xD7FF), (0xE000, 0xFFFF))
_ENDS_OF_LINES: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))  # the first is one for every reader
_SPACES: Ranges = ((9, 13), (0x1C, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000), (0xFEFF, 0xFEFF))  # fmt: skip
_PUNCTUATION: Ranges = ((0xA1, 0xA9), (0xAB, 0xB1), (0xB4, 0xB4), (0xB6, 0xB8), (0xBB, 0xBB), (0xBF, 0xBF), (0xD7, 0xD7), (0xF7, 0xF7), (0x2010, 0x2027), (0x2030, 0x205E))  # fmt: skip
_CATEGORY: dict[str, Ranges] = {
    # what every reader of regexes takes: beyond ASCII they disagree on what \d, \w and \s are, and so on what is none of them
    "DIGIT": ((48, 57),),
    "SPACE": ((9, 13), (32, 32)),
    "WORD": ((48, 57), (65, 90), (95, 95), (97, 122)),
    "NOT_SPACE": without(_SPACES),
    "NOT_WORD": ((0, 47), (58, 64), (91, 94), (96, 96), (123, 127), *_PUNCTUATION),
}
_CLASSES = ("\\d", "\\D", "\\s", "\\S", "\\w", "\\W")
_REFUSED = {
    "GROUPREF": "backreference",
    "GROUPREF_EXISTS": "conditional group",
    "AT_BOUNDARY": "word boundary",
    "AT_NON_BOUNDARY": "word boundary",
    "ATOMIC_GROUP": "atomic group",
    "POSSESSIVE_REPEAT": "possessive quantifier",
}
_STARTS, _STOPS = ("AT_BEGINNING", "AT_BEGINNING_STRING"), ("AT_END", "AT_END_STRING")
_SPELLING = re.compile(
    r"\[\^?\]?|\(\?<(?![=!])|\\(?:(?P<kind>[pP])(?:\{(?:(?:General_Category|gc)=)?(?P<name>\w+)\}|(?P<letter>\w))"
    r"|u\{(?P<code>[0-9A-Fa-f]{1,5}|10[0-9A-Fa-f]{4})\}|.)",
    re.S,
)
_LONG_NAMES = {"Letter": "L", "Lowercase_Letter": "Ll", "Uppercase_Letter": "Lu", "Number": "N", "Decimal_Number": "Nd", "Punctuation": "P", "Symbol": "S", "Separator": "Z", "Mark": "M", "Alphabetic": "L", "Uppercase": "Lu", "Lowercase": "Ll"}  # fmt: skip


@lru_cache(maxsize=32)
def _unicode_class(name: str) -> Ranges:
    """The characters of a general category in the Basic Multilingual Plane; beyond it, versions of Unicode differ most."""
    found: list[tuple[int, int]] = []
    for code in range(0x10000):
        if unicodedata.category(chr(code)).startswith(name) and not 0xD800 <= code < 0xE000:
            if found and found[-1][1] == code - 1:
                found[-1] = (found[-1][0], code)
            else:
                found.append((code, code))
    return tuple(found)


@lru_cache(maxsize=1)
def _not_digit() -> Ranges:
    return without([*_unicode_class("Nd"), (0x10000, 0x10FFFF)]) + tuple(
        (0x10000 + 0x100 * i, 0x100FF + 0x100 * i)
        for i in range(0x1000)
        if not any(chr(0x10000 + 0x100 * i + j).isdecimal() for j in range(0x100))
    )


def _negated(name: str) -> str:
    return name.removeprefix("NOT_") if name.startswith("NOT_") else "NOT_" + name


def _category(name: str, wide: bool) -> Ranges:
    """What every reader takes for it; `wide`: what any reader may, for what is not to match."""
    if wide:
        return without(_category(_negated(name), False))
    found = _CATEGORY.get(name)
    return _not_digit() if found is None else found


class Regex:
    """A pattern as the stdlib's own parser reads it, turned into a term; what it cannot say is refused by name.

    Lookarounds and anchors are compiled away: what follows one is also held to it, which only a repetition around it can prevent.
    Where readers of regexes differ, a class has the characters that all of them take; under a negation those that any may take.
    """

    def __init__(self, pattern: str, dot: Ranges = ALL, where: str = "", wide: bool = False) -> None:
        """`dot` holds the characters that a dot or a negated class may stand for; `wide`: the term is for a negation."""
        self.dot, self.where, self.spread, self.fold, self.wide = dot, where, 0, False, wide
        self.unicode = False  # it has \p{…}, of which the Basic Multilingual Plane is known
        if len(pattern) > MAX_REGEX:
            self.refuse(f"a regex over {MAX_REGEX} characters")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.tree = _sre.parse(self._spelled(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise Unsupported(f"the regex{where} cannot be read: {str(error)[:100]}") from None
        flags = self.tree.state.flags
        if flags & ~(re.UNICODE | re.IGNORECASE):
            self.refuse("a regex flag")
        self.fold = bool(flags & re.IGNORECASE)

    def refuse(self, what: str) -> NoReturn:
        raise Unsupported(f"{what}{self.where} is not supported")

    def _spelled(self, pattern: str) -> str:
        """JavaScript's spellings in Python's: named groups, \\p{…} as the characters themselves, \\u{…}, $ as the very end."""
        out, at, inside = [], 0, False
        while at < len(pattern):
            found = _SPELLING.match(pattern, at)
            if not found:
                out.append(pattern[at])
                inside = inside and pattern[at] != "]"
                at += 1
                continue
            whole, at = found[0], found.end()
            if whole[0] == "[":
                out.append("\\[" if inside else whole)
                at = at - len(whole) + 1 if inside else at
                inside = True
            elif whole == "(?<":
                out.append("(?<" if inside else "(?P<")
            elif found["kind"]:
                out.append(self._class(found["kind"], found["name"] or found["letter"], inside))
            elif found["code"]:
                out.append(f"\\U{int(found['code'], 16):08x}")
            else:
                out.append({"\\/": "/", "\\z": "\\Z"}.get(whole, whole))
                if inside and whole in _CLASSES and pattern[at : at + 1] == "-" and pattern[at + 1 : at + 2] != "]":
                    out.append("\\-")  # a class begins no range: JavaScript takes the hyphen for itself
                    at += 1
        return "".join(out)

    def _class(self, kind: str, name: str, inside: bool) -> str:
        """The characters of \\p{…}, written out."""
        short = _LONG_NAMES.get(name, name)
        ranges = _unicode_class(short) if len(short) <= 2 else ()
        if not ranges:
            self.refuse(f"the class \\{kind}{{{name[:30]}}} of the regex")
        if kind == "P":
            ranges = common_ranges(without(ranges), _BASIC)
        self.unicode = True
        text = "".join(f"\\u{a:04x}-\\u{b:04x}" for a, b in ranges)
        return text if inside else f"[{text}]"

    def term(self, around: Term) -> Term:
        """The whole pattern, with `around` at each end that has no anchor."""
        return alt(self._path(path, around, around, around == EMPTY) for path in self._paths(list(self.tree)))

    # paths: the pattern's alternatives as far as anchors and lookarounds stand in them

    def _asserts(self, items: Iterable[Any]) -> bool:
        for op, value in items:
            name = str(op)
            if name in ("AT", "ASSERT", "ASSERT_NOT"):
                return True
            inner = (
                [value[3]] if name == "SUBPATTERN" else value[1] if name == "BRANCH" else [value[2]] if "REPEAT" in name else []
            )
            if any(self._asserts(items) for items in inner):
                return True
        return False

    def _paths(self, items: list[Any]) -> list[list[Any]]:
        """Each a list of terms, anchors (their names) and lookarounds (direction, negated, items)."""
        paths: list[list[Any]] = [[]]
        for op, value in items:
            if not self._asserts([(op, value)]):
                more: list[list[Any]] = [[self._item(str(op), value)]]
            elif str(op) == "SUBPATTERN":
                self._flags(value)
                more = self._paths(list(value[3]))
            elif str(op) == "BRANCH":
                more = [path for branch in value[1] for path in self._paths(list(branch))]
            elif str(op) == "AT" and str(value) in (*_STARTS, *_STOPS):
                more = [["^" if str(value) in _STARTS else "$"]]
            elif str(op) in ("ASSERT", "ASSERT_NOT"):
                more = [[(value[0], str(op) == "ASSERT_NOT", list(value[1]))]]
            elif "REPEAT" in str(op) and value[1] == 1:
                more = [*([[]] if value[0] == 0 else []), *self._paths(list(value[2]))]
            elif "REPEAT" in str(op):
                self.refuse("an anchor or lookaround inside a repetition of the regex")
            else:
                self._item(str(op), value)
            paths = [path + rest for path in paths for rest in more]
            if len(paths) > MAX_PATHS:
                self.refuse("a regex with anchors or lookarounds in so many alternatives")
        return paths

    def _seen(self, items: list[Any], negated: bool) -> list[list[Any]]:
        """The paths of a lookaround."""
        self.wide ^= negated
        try:
            return self._paths(items)
        finally:
            self.wide ^= negated

    @staticmethod
    def _begins(part: Any) -> bool:
        """Is it a lookahead for the beginning of the text and something behind it?"""
        return isinstance(part, tuple) and part[:2] == (1, False) and any(str(value) in _STARTS for _, value in part[2][:1])

    def _path(self, path: list[Any], before: Term, after: Term, first: bool) -> Term:
        """`first`: an empty `before` is the beginning of the text; else something that is not known stands before it."""
        path = [one for part in path for one in (["^", part] if self._begins(part) else [part])]
        starts = [i for i, part in enumerate(path) if part == "^"]
        stops = [i for i, part in enumerate(path) if part == "$"]
        if before == EMPTY and not first and (starts or any(isinstance(part, tuple) and part[0] < 0 for part in path)):
            self.refuse("a regex lookahead in the middle that looks back")
        if starts:
            path, before, first = self._emptied(path[: starts[-1]], -1) + path[starts[-1] + 1 :], EMPTY, True
            stops = [i for i, part in enumerate(path) if part == "$"]
        if stops:
            path, after = path[: stops[0]] + self._emptied(path[stops[0] + 1 :], 1), EMPTY
        if None in path:
            return NONE
        behind = [i for i, part in enumerate(path) if isinstance(part, tuple) and part[0] < 0]
        if behind:
            left, tail = self._path(path[: behind[-1]], before, EMPTY, first), path[behind[-1] + 1 :]
            if (tail or after != EMPTY) and any(isinstance(part, tuple) and part[0] > 0 for part in path[: behind[-1]]):
                self.refuse("a regex lookahead before a lookbehind that is not at the end")  # it sees what follows that
            _, negated, items = path[behind[-1]]
            inside = self._seen(items, negated)
            if any(part == "$" or (isinstance(part, tuple) and part[0] > 0) for inner in inside for part in inner):
                self.refuse("a regex lookbehind that looks ahead")
            seen = alt(self._path(inner, ANY, EMPTY, False) for inner in inside)
            return seq(both(left, other(seen) if negated else seen), self._path(tail, EMPTY, after, False))
        rest = after
        for i, part in reversed([*enumerate(path)]):
            if isinstance(part, Term):
                rest = seq(part, rest)
                continue
            _, negated, items = part
            begins = first and before == EMPTY and not any(isinstance(one, Term) for one in path[:i])
            seen = alt(self._path(inner, EMPTY, ANY, begins) for inner in self._seen(items, negated))
            rest = (
                NONE
                if seen is NONE and not negated
                else both(rest, other(seen) if negated else seen)
                if seen is not NONE
                else rest
            )
        return seq(before, rest)

    def _emptied(self, parts: list[Any], side: int) -> list[Any]:
        """What stands outside an anchor must match nothing: lookarounds stay, terms go where they may be empty, else no text fits."""
        out: list[Any] = []
        for part in parts:
            if part is None or (isinstance(part, Term) and not nullable(part)):
                out.append(None)
            elif (isinstance(part, tuple) and part[0] != side) or (part == "$" and side < 0):
                out.append(part)  # an end before a beginning: all that follows matches nothing, too
            elif isinstance(part, tuple):
                self.refuse("a regex lookaround outside an anchor")
        return out

    # items without anchors

    def _items(self, items: Iterable[Any]) -> Term:
        return seq(*(self._item(str(op), value) for op, value in items))

    def _item(self, op: str, value: Any) -> Term:
        if op in self._OPS:
            return self._OPS[op](self, value)
        what = str(value) if op == "AT" else op
        self.refuse(f"regex {_REFUSED.get(what, what.lower().replace('_', ' '))}")

    def _ranges(self, ranges: Ranges, allowed: Ranges) -> Term:
        found = common_ranges(ranges, allowed)
        return Term("set", ranges=found) if found else self.refuse("a character of the regex that cannot stand here")

    @staticmethod
    def _folded(ranges: Ranges) -> Ranges:
        letters = [(max(a, c), min(b, d), shift) for a, b in ranges for c, d, shift in ((65, 90, 32), (97, 122, -32))]
        return ordered([*ranges, *((a + shift, b + shift) for a, b, shift in letters if a <= b)])

    def _literal(self, code: int) -> Term:
        found = self._ranges(self._folded(((code, code),)) if self.fold else ((code, code),), ALL)
        return found if len(found.ranges) > 1 else lit(chr(code))

    def _in(self, items: list[Any]) -> Term:
        negated = str(items[0][0]) == "NEGATE"
        found: list[tuple[int, int]] = []
        keep: Ranges = ALL
        for op, value in items[negated:]:
            if str(op) == "CATEGORY":
                name = str(value).removeprefix("CATEGORY_")
                if negated:
                    keep = common_ranges(keep, _category(_negated(name), self.wide))
                else:
                    found += _category(name, self.wide)
            else:
                found.append((value, value) if str(op) == "LITERAL" else value)
        astral = ((0x10000, 0x10FFFF),) if self.unicode and self.wide else ()
        if not negated:
            found += astral
            return self._ranges(self._folded(ordered(found)) if self.fold else ordered(found), ALL)
        if self.unicode and not self.wide:
            keep = common_ranges(keep, _BASIC)
        return self._ranges(common_ranges(ordered([*self._opposite(ordered(found)), *astral]), keep), self.dot)

    def _opposite(self, ranges: Ranges) -> Ranges:
        return without(self._folded(ranges) if self.fold else ranges)

    def _flags(self, value: tuple[Any, int, int, Any]) -> None:
        if value[1] or value[2]:
            self.refuse("a regex flag")

    def _group(self, value: tuple[Any, int, int, Any]) -> Term:
        self._flags(value)
        return self._items(value[3])

    def _repeat(self, value: tuple[int, Any, Any]) -> Term:
        low, high = value[0], None if value[1] == _sre.MAXREPEAT else int(value[1])
        if max(low, high or 0) > MAX_REPEAT:
            self.refuse(f"a repetition over {MAX_REPEAT} in the regex")
        part = self._items(value[2])
        return rep(self._solid(part), 0, high) if nullable(part) else rep(part, low, high)

    def _solid(self, term: Term) -> Term:
        """The term without the empty text: engines refuse some repetitions of what may be empty, and hang on others."""
        if not nullable(term) or term == EMPTY:
            return term
        if term.op == "rep":
            return rep(self._solid(term.parts[0]), 1, term.high)
        if term.op == "alt":
            return alt(self._solid(part) for part in term.parts if part != EMPTY)
        if term.op == "and":
            return both(*term.parts, other(EMPTY))
        self.spread += 1
        if self.spread > 4 or len(term.parts) > 20:  # each one writes its parts again
            self.refuse("a repetition of a sequence that may be empty, so often,")
        return alt(seq(self._solid(part), *term.parts[i + 1 :]) for i, part in enumerate(term.parts))

    _OPS: dict[str, Callable[..., Term]] = {
        "LITERAL": _literal,
        "NOT_LITERAL": lambda self, code: self._in([("NEGATE", None), ("LITERAL", code)]),
        "ANY": lambda self, _: Term("set", ranges=common_ranges(without(_ENDS_OF_LINES[: 1 if self.wide else None]), self.dot)),
        "IN": _in,
        "BRANCH": lambda self, value: alt(self._items(branch) for branch in value[1]),
        "SUBPATTERN": _group,
        "MAX_REPEAT": _repeat,
        "MIN_REPEAT": _repeat,
    }


@lru_cache(maxsize=512)
def pattern_term(pattern: str, wide: bool = False) -> Term:
    """The texts in which the pattern is found (JSON Schema's `pattern`); `wide`: in which some reader may find it."""
    return Regex(pattern, ALL, " in 'pattern'", wide).term(ANY)


# ---- numbers in JSON


def _same_length(a: str, b: str) -> Term:
    """Digit strings from a to b, which are equally long."""
    if a == b:
        return lit(a)
    rest = len(a) - 1
    if a[1:] == "0" * rest and b[1:] == "9" * rest:
        return seq(chars(a[0] + b[0]), rep(DIGIT, rest, rest))
    if a[0] == b[0]:
        return seq(lit(a[0]), _same_length(a[1:], b[1:]))
    low, high = int(a[0]), int(b[0])
    parts = []
    if a[1:] != "0" * rest:
        parts.append(seq(lit(a[0]), _same_length(a[1:], "9" * rest)))
        low += 1
    if b[1:] != "9" * rest:
        parts.append(seq(lit(b[0]), _same_length("0" * rest, b[1:])))
        high -= 1
    if low <= high:
        parts.append(seq(chars(f"{low}{high}"), rep(DIGIT, rest, rest)))
    return alt(parts)


@lru_cache(maxsize=256)
def naturals(low: int, high: int | None) -> Term:
    """From low to high; without an end, of any number of digits."""
    if high is None:
        nines = 10 ** len(str(low)) - 1
        return alt([naturals(low, nines), seq(NONZERO, rep(DIGIT, len(str(low)), None))])
    if low > high:
        return NONE
    if low <= 1 and high >= 9 and str(high + 1).strip("0") == "1":
        some = seq(NONZERO, rep(DIGIT, 0, len(str(high)) - 1))
        return some if low else alt([lit("0"), some])
    parts = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first, last = max(low, 10 ** (length - 1) if length > 1 else 0), min(high, 10**length - 1)
        parts.append(_same_length(str(first), str(last)))
    return alt(parts)


def integers(low: int | None, high: int | None, endless: bool = False) -> Term:
    """Whole numbers without point and exponent, of at most DIGITS digits where a bound does not ask for more, or `endless`."""
    if endless:
        parts = [naturals(max(low or 0, 0), high)] if high is None or high >= 0 else []
        parts += (
            [seq(lit("-"), naturals(max(1, -(high or 0)), None if low is None else -low))] if low is None or low < 0 else []
        )
        return alt(parts)
    cap = 10**DIGITS - 1
    low = (-cap if high is None else min(-cap, high - cap)) if low is None else low
    high = max(cap, low + cap) if high is None else high
    parts = [naturals(max(low, 0), high)] if high >= 0 else []
    if low < 0:
        parts.append(seq(lit("-"), naturals(max(1, -high), -low)))
    return alt(parts)


_EXPONENT = seq(chars("ee", "EE"), rep(chars("++", "--"), 0, 1), rep(DIGIT, 1, 2))
_FRACTION = seq(lit("."), rep(DIGIT, 1, DIGITS))
_WHOLE = alt([lit("0"), seq(NONZERO, rep(DIGIT, 0, DIGITS - 1))])
_UNSIGNED = seq(_WHOLE, rep(_FRACTION, 0, 1), rep(_EXPONENT, 0, 1))
NUMBER = seq(rep(lit("-"), 0, 1), _UNSIGNED)


def _small(fraction: Term, exponent: Term) -> Term:
    return seq(NONZERO, rep(fraction, 0, 1), chars("ee", "EE"), lit("-"), rep(lit("0"), 0, 1), exponent)


# Over 0, under 1. 9.99…e-1 of more digits would be read as 1.
_SMALL = alt([_small(seq(lit("."), rep(DIGIT, 1, 14)), lit("1")), _small(_FRACTION, chars("29"))])

Bound = tuple[Fraction, bool]  # and whether it is left out


def _fraction(low: str | None, high: str | None, above: bool, below: bool, left: int) -> tuple[bool, Term]:
    """Digits behind the point: 0.low to 0.high. Whether none at all will do, and the term of one and more."""
    if low is not None and not low.strip("0") and not above:
        low = None
    if low is None and high is None:
        return True, rep(DIGIT, 1, left) if left else NONE
    stop = (low is None or (not low.strip("0") and not above)) and (high is None or bool(high.strip("0")) or not below)
    if not left:
        return stop, NONE
    if high is None and low is not None and not low.strip("0"):
        return stop, seq(rep(lit("0"), 0, left - 1), NONZERO, rep(DIGIT, 0, left - 1))
    if high is not None and not high.strip("0"):
        zero_fits = low is None and not below
        return stop, rep(lit("0"), 1, left) if zero_fits else NONE
    first, last = int((low or "0")[:1] or "0"), 9 if high is None else int(high[:1])
    parts, start = [], first
    for digit in range(first, last + 1):
        edges = (
            low[1:] if low is not None and digit == first else None,
            high[1:] if high is not None and digit == last else None,
        )
        if edges == (None, None):
            continue
        if start < digit:
            parts.append(seq(chars(f"{start}{digit - 1}"), rep(DIGIT, 0, left - 1)))
        start = digit + 1
        done, more = _fraction(*edges, above, below, left - 1)
        parts.append(seq(lit(str(digit)), alt([*([EMPTY] if done else []), more])))
    if start <= last:
        parts.append(seq(chars(f"{start}{last}"), rep(DIGIT, 0, left - 1)))
    return stop, alt(parts)


def _decimals(low: Bound, high: Bound | None, digits: int, plain: bool) -> Term:
    """Decimals from low (at least nought) to high, without an exponent; `plain`: of any number of digits before the point."""
    (bottom, above), (top, below) = low, high or (Fraction(0), False)
    first, last = int(bottom), int(top)
    tails = [_digits(bottom - first), _digits(top - last)]

    def tail(lower: str | None, upper: str | None) -> Term:
        none, some = _fraction(lower, upper, above, below, digits)
        return alt([*([EMPTY] if none else []), seq(lit("."), some)])

    if high is not None and first == last:
        return seq(lit(str(first)), tail(tails[0], tails[1]))
    parts = [seq(lit(str(first)), tail(tails[0], None))]
    cap = None if plain else max(10**DIGITS, first * 10) - 1
    parts.append(seq(naturals(first + 1, cap if high is None else last - 1), tail(None, None)))
    if high is not None:
        parts.append(seq(lit(str(last)), tail(None, tails[1])))
    return alt(parts)


def _digits(part: Fraction) -> str:
    """A fraction under 1 as its digits, which the caller has seen to be finitely many."""
    text = ""
    while part and len(text) < 400:
        part *= 10
        text += str(int(part))
        part -= int(part)
    return text


def plain_digits(number: Fraction) -> str:
    """A decimal without an exponent, and without a point where it is whole."""
    whole = int(abs(number))
    return "-" * (number < 0) + str(whole) + (f".{_digits(abs(number) - whole)}" if number.denominator > 1 else "")


def decimals(low: Bound | None, high: Bound | None, plain: bool = False) -> Term:
    """Numbers between two bounds; `plain`: without an exponent, so that the value can be read off the digits."""
    if low is None and high is None and not plain:
        return NUMBER
    strict = bool((low and low[1]) or (high and high[1]))
    longest = max((len(_digits(abs(b[0]) % 1)) for b in (low, high) if b), default=0)
    digits = max(DIGITS if not strict else 15 - max(len(str(int(abs(b[0])))) for b in (low, high) if b), longest + 1, 1)
    zero: Bound = (Fraction(0), False)
    parts = []
    if high is None or high[0] > 0 or high == zero:
        start = low if low is not None and low[0] >= 0 else zero
        if high is None and start == zero and not plain:
            parts.append(_UNSIGNED)
        elif high is None or start[0] < high[0] or (start[0] == high[0] and not start[1] and not high[1]):
            parts.append(_decimals(start, high, digits, plain))
            if start[0] == 0 and (high is None or high[0] >= 1) and not plain:
                parts.append(_SMALL)
    if low is None or low[0] < 0:
        start = (-high[0], high[1]) if high is not None and high[0] <= 0 else (Fraction(0), True)
        end = None if low is None else (-low[0], low[1])
        if end is None and start == (zero[0], True) and not plain:
            parts.append(
                seq(lit("-"), _UNSIGNED)
                if high is None or high == zero
                else seq(lit("-"), alt([_decimals(start, None, digits, plain), _SMALL]))
            )
        elif end is None or start[0] < end[0] or (start[0] == end[0] and not start[1] and not end[1]):
            parts.append(seq(lit("-"), _decimals(start, end, digits, plain)))
    return alt(parts)


def multiples(step: Fraction, most: int = 2_000) -> Term:
    """Decimals that the step divides: read digit by digit as a remainder. To be taken together with `decimals(plain=True)`.

    A whole power of ten is a term of its own, which needs no remainders.
    """
    places = 0
    while (step * 10**places).denominator > 1:
        places += 1
    whole = int(step * 10**places)
    if whole == 1:
        return seq(rep(lit("-"), 0, 1), _WHOLE, rep(seq(lit("."), rep(DIGIT, 1, places)), 0, 1) if places else EMPTY)
    if whole * (places + 1) > most:
        raise Unsupported(f"a 'multipleOf' of more than {most} remainders is not supported")
    return Term("mod", low=whole, high=places)


def has(term: Term, *ops: str) -> bool:
    """Whether one of these kinds is anywhere in the term; of references, those to rules that are no tokens."""
    return bool(term.ops & sum(map(_BITS.__getitem__, ops)))
