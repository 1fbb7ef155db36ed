"""JSON Schema, regex and choice lists as one grammar text that llama.cpp (GBNF) and OpenVINO GenAI (xgrammar EBNF) both read.

Only what both parsers take alike is written: rule names of letters and digits, ``""`` for an empty alternative, the escapes
``\\"``, ``\\\\``, ``\\uXXXX`` and ``\\UXXXXXXXX`` (``\\x`` takes two digits in one and any number in the other), positive character
classes (xgrammar cuts negative ones at U+007F), and one repetition per plain atom.  A grammar with a dead end aborts the
process in llama.cpp and is no constraint at all in xgrammar, so every rule is proved to end before it is handed out.

Keywords mean what JSON Schema 2020-12 (json-schema.org/draft/2020-12) says; a sentence of the grammar always satisfies the
schema, while the grammar may be narrower than the schema (order of properties, no extra ones, bounded nesting and digits).
"""

from __future__ import annotations

import bisect
import importlib
import json
import math
import re
import sys
import urllib.parse
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn

MAX_REPEAT, MAX_RULES, MAX_TEXT, MAX_DEPTH, MAX_REGEX = 1_000, 2_000, 200_000, 64, 1_000
MAX_COPIES = 20_000  # all repetition bounds together: llama.cpp writes each out as rules
MAX_OPTIONAL, MAX_MEMBERS = 64, 100  # beyond, xgrammar takes seconds to compile and llama.cpp tenths of a second a token
MAX_PLACES = 1_000  # in an ambiguous text; at 8,000 xgrammar takes 3 s a token, at 40,000 llama.cpp takes 8 s
DIGITS, ANY_DEPTH, KEY_LENGTH, AROUND = 16, 4, 64, 64
_sre: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


class Unsupported(ValueError):
    """One sentence: which keyword or construct is not supported, and where."""


# ---- terms and their text


Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Term:
    """A piece of grammar: 'lit' text, 'set' ranges, 'ref' text, 'seq' parts, 'alt' parts, or 'rep' parts[0] low..high."""

    op: str
    text: str = ""
    parts: tuple[Term, ...] = ()
    ranges: Ranges = ()
    low: int = 0
    high: int | None = None


def _lit(text: str) -> Term:
    return Term("lit", text)


def _seq(*parts: Term) -> Term:
    kept: list[Term] = []
    for part in parts:
        if kept and kept[-1].op == part.op == "lit":
            kept[-1] = _lit(kept[-1].text + part.text)
        elif part.op != "lit" or part.text:
            kept.append(part)
    return kept[0] if len(kept) == 1 else Term("seq", parts=tuple(kept)) if kept else _EMPTY


def _alt(parts: Iterable[Term]) -> Term:
    kept = tuple(dict.fromkeys(parts))
    return kept[0] if len(kept) == 1 else Term("alt", parts=kept)


def _rep(part: Term, low: int, high: int | None) -> Term:
    """low..high of the part, counted in sixteens where there are many: xgrammar takes seconds a token for [..]{0,500}."""
    if part == _EMPTY or high == 0:
        return _EMPTY
    if low == high == 1:
        return part
    many = Term("rep", parts=(part,), low=_CHUNK, high=_CHUNK)
    if low > 2 * _CHUNK:
        rest = low % _CHUNK
        return _seq(
            _rep(many, low // _CHUNK, low // _CHUNK),
            _rep(part, rest, rest),
            _rep(part, 0, None if high is None else high - low),
        )
    if high is not None and high - low > 2 * _CHUNK:
        turns = (high - low - _CHUNK + 1) // _CHUNK  # the rest is at least fifteen, so that no count is left out
        return _seq(_rep(many, 0, turns), _rep(part, low, high - turns * _CHUNK))
    return Term("rep", parts=(part,), low=low, high=high)


def _set(*pieces: str) -> Term:
    return Term("set", ranges=tuple((ord(piece[0]), ord(piece[-1])) for piece in pieces))


_EMPTY, _CHUNK = _lit(""), 16
_DIGIT, _NONZERO = _set("09"), _set("19")
_PLAIN: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0xA0, 0xD7FF), (0xE000, 0x10FFFF))  # as it is in a JSON string
_TEXT: Ranges = ((9, 10), (13, 13), (0x20, 0x7E), (0xA0, 0xD7FF), (0xE000, 0x10FFFF))
_ALL: Ranges = ((1, 0xD7FF), (0xE000, 0x10FFFF))
_CHAR = _alt([Term("set", ranges=_PLAIN), _seq(_lit("\\"), Term("set", ranges=tuple((ord(c), ord(c)) for c in '"/\\bfnrt')))])
_ESCAPED = re.compile(r'["\\\x00-\x1f\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]')


def _quoted(text: str) -> str:
    return '"' + _ESCAPED.sub(lambda m: "\\" + m[0] if m[0] in '"\\' else f"\\u{ord(m[0]):04X}", text) + '"'


def _class_char(code: int) -> str:
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def _class(ranges: Ranges) -> str:
    return "[" + "".join(_class_char(a) + ("-" + _class_char(b) if b > a else "") for a, b in ranges) + "]"


def _suffix(low: int, high: int | None) -> str:
    marks = {(0, 1): "?", (0, None): "*", (1, None): "+"}
    return marks.get((low, high)) or (f"{{{low}}}" if low == high else f"{{{low},{'' if high is None else high}}}")


class Grammar:
    """Named rules, written out from the root on: what the root does not reach is left out."""

    def __init__(self) -> None:
        self.rules: dict[str, Term] = {}
        self.names: dict[Term, str] = {}
        self.origin: dict[str, str] = {}
        self.copies = 0

    def name(self, origin: str = "") -> str:
        if len(self.rules) + len(self.origin) >= 2 * MAX_RULES:
            raise Unsupported(f"a grammar of more than {MAX_RULES} rules is not supported")
        fresh = f"r{len(self.rules)}"
        self.rules[fresh] = _EMPTY
        if origin:
            self.origin[fresh] = origin
        return fresh

    def share(self, term: Term) -> Term:
        """The term itself when it is short, else a reference to a rule of it (the same rule for the same term)."""
        if term.op in ("lit", "ref") or (term.op == "set" and _inline(term)):
            return term
        if term not in self.names:
            self.names[term] = self.name()
            self.rules[self.names[term]] = term
        return Term("ref", self.names[term])

    def text(self, root: Term) -> str:
        """The grammar's text, once every rule in it is known to end and none calls itself before it has read something."""
        lines, todo, seen, size = [], deque([("root", root)]), {"root": root}, 0
        while todo:
            name, term = todo.popleft()
            lines.append(f"{name} ::= {_class(term.ranges) if term.op == 'set' else self._write(term)}\n")
            size += len(lines[-1])
            for found in re.findall(r"\br[0-9]+\b", _QUOTES.sub("", lines[-1])):
                if found not in seen:
                    seen[found] = self.rules[found]
                    todo.append((found, seen[found]))
            if size > MAX_TEXT or len(lines) > MAX_RULES:
                raise Unsupported(f"a grammar over {MAX_RULES} rules or {MAX_TEXT} characters is not supported")
        self._prove(seen)
        if Places(seen).most() > MAX_PLACES:
            raise Unsupported(
                "text that may be read in so many ways at once (repetitions of repetitions, say) is not supported"
            )
        return "".join(lines)

    def _write(self, term: Term, inside: str = "") -> str:
        if term.op == "lit":
            return _quoted(term.text)
        if term.op == "set" and _inline(term):
            return _class(term.ranges)
        if term.op == "set":
            return self.share(term).text
        if term.op == "ref":
            return term.text
        if term.op == "rep":
            self.copies += max(term.low, term.high or 0)
            if max(term.low, term.high or 0) > MAX_REPEAT or self.copies > MAX_COPIES:
                raise Unsupported(f"a repetition over {MAX_REPEAT}, or {MAX_COPIES} in all, is not supported")
            return self._write(self.share(term.parts[0])) + _suffix(term.low, term.high)
        text = (" " if term.op == "seq" else " | ").join(self._write(part, term.op) for part in term.parts)
        return f"({text})" if term.op == "alt" and inside else text

    def _prove(self, rules: dict[str, Term]) -> None:
        for test, fault in ((_ends, "can never end"), (_reads, "reads nothing before it repeats")):
            stuck = rules.keys() - _settle(rules, test)
            if stuck:
                where = next((self.origin[name] for name in sorted(stuck) if name in self.origin), "the schema")
                raise Unsupported(f"the recursion of {where} {fault}, which is not supported")


class Places:
    """How many places in a grammar a parser has to look at for one character, in a text that a greedy adversary writes.

    The engines walk all ways to read a text at once, for every token of the vocabulary: at thousands of places a token takes seconds,
    and everyone waits. A place is a term, how often it has been repeated, and what comes after it.
    """

    STEPS, TRIES, CODES, WORK = 48, 4, 64, 1_000_000

    def __init__(self, rules: dict[str, Term]) -> None:
        self.rules = rules
        self.places: list[tuple[Term, int, int]] = [(_EMPTY, 0, 0)]  # 0 is the end
        self.numbers: dict[tuple[int, int, int], int] = {}  # by the term's identity: to hash a deep term takes long
        self.tails: dict[int, Term] = {}  # a literal without its first character
        self.known: dict[int, tuple[list[tuple[Ranges, int]], int]] = {}
        self.starts: dict[Ranges, list[int]] = {}
        self.work = 0

    def place(self, term: Term, count: int, after: int) -> int:
        key = (id(term), count, after)
        if key not in self.numbers:
            self.numbers[key] = len(self.places)
            self.places.append((term, count, after))  # keeps the term, and so its identity
        return self.numbers[key]

    def heads(self, start: int) -> tuple[list[tuple[Ranges, int]], int]:
        """What may be read at a place, as (characters, the place behind them), and how many places it took to find that out."""
        if start in self.known:
            return self.known[start]
        found, todo, seen = [], [start], {start}
        while todo and len(seen) <= MAX_PLACES:
            number = todo.pop()
            term, count, after = self.places[number]
            self.work += 1 + len(term.parts)
            if term.op == "set":
                found.append((term.ranges, after))
                continue
            if term.op == "lit" and term.text:
                rest = after if len(term.text) == 1 else self.place(self.tail(term), 0, after)
                found.append((((ord(term.text[0]), ord(term.text[0])),), rest))
                continue
            following = [after] if number else []
            if term.op == "ref":
                following = [self.place(self.rules[term.text], 0, after)]
            elif term.op == "alt":
                following = [self.place(part, 0, after) for part in term.parts]
            elif term.op == "seq":
                for part in reversed(term.parts):
                    after = self.place(part, 0, after)
                following = [after]
            elif term.op == "rep":
                following = [after] if count >= term.low else []
                if term.high is None or count < term.high:
                    more = self.place(term, min(count + 1, term.low) if term.high is None else count + 1, after)
                    following.append(self.place(term.parts[0], 0, more))
            todo += [number for number in following if number not in seen]
            seen.update(following)
        self.known[start] = (found, len(seen))
        return self.known[start]

    def tail(self, term: Term) -> Term:
        return self.tails.setdefault(id(term), _lit(term.text[1:]))

    def most(self) -> int:
        """The largest sum of places that one character made the parser look at; beyond MAX_PLACES it is not looked further."""
        now, most = frozenset([self.place(Term("ref", "root"), 0, 0)]), 0
        been: set[frozenset[int]] = set()
        while now and now not in been and len(been) < self.STEPS:
            been.add(now)
            most = max(most, self.size(now))
            if most > MAX_PLACES or self.work > self.WORK:
                return MAX_PLACES + 1
            heads: dict[Ranges, list[int]] = {}
            for number in now:
                for ranges, place in self.heads(number)[0]:
                    heads.setdefault(ranges, []).append(place)
            now = max((self.after(heads, code) for code in self.likely(heads)), key=self.size, default=frozenset())
        return most

    def size(self, now: frozenset[int]) -> int:
        return sum(self.heads(number)[1] for number in now)

    def likely(self, heads: dict[Ranges, list[int]]) -> list[int]:
        """Characters that may be read in the most ways."""
        codes = sorted({ranges[0][0] for ranges in heads})[: self.CODES] + [ord(char) for char in "a 0A,"]
        ranked = sorted({*codes}, key=lambda code: (-len(self.after(heads, code)), code))
        return ranked[: self.TRIES]

    def after(self, heads: dict[Ranges, list[int]], code: int) -> frozenset[int]:
        self.work += len(heads)
        return frozenset(place for ranges, places in heads.items() if self.holds(ranges, code) for place in places)

    def holds(self, ranges: Ranges, code: int) -> bool:
        """The ranges are in order and apart."""
        if ranges not in self.starts:
            self.starts[ranges] = [first for first, _ in ranges]
        at = bisect.bisect_right(self.starts[ranges], code) - 1
        return at >= 0 and code <= ranges[at][1]


def _inline(term: Term) -> bool:
    """xgrammar lets wrong bytes through where two classes beyond ASCII stand side by side, but not where they are rules."""
    return term.ranges[-1][1] < 128


_QUOTES = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]')


def _settle(rules: dict[str, Term], test: Callable[[Term, set[str]], bool]) -> set[str]:
    """The rules that pass the test, given that those found before pass it."""
    done: set[str] = set()
    order, before = list(rules), -1
    while len(done) > before:
        before = len(done)
        order.reverse()
        for name in order:
            if name not in done and test(rules[name], done):
                done.add(name)
        order = [name for name in order if name not in done]
    return done


def _ends(term: Term, done: set[str]) -> bool:
    if term.op == "ref":
        return term.text in done
    if term.op == "rep":
        return term.low == 0 or _ends(term.parts[0], done)
    return (any if term.op == "alt" else all)(_ends(part, done) for part in term.parts) or not term.parts


def _reads(term: Term, done: set[str]) -> bool:
    if term.op == "ref":
        return term.text in done
    return all(_reads(part, done) for part in (term.parts if term.op == "alt" else term.parts[:1]))


def _nullable(term: Term) -> bool:
    if term.op == "rep":
        return term.low == 0 or _nullable(term.parts[0])
    if term.op in ("seq", "alt"):
        return (any if term.op == "alt" else all)(map(_nullable, term.parts))
    return term == _EMPTY


def _words(words: Iterable[str], depth: int = 0) -> Term:
    """One of the words, common beginnings written once: thousands of alternatives side by side are slow in llama.cpp."""
    groups: dict[str, list[str]] = {}
    for word in words:
        groups.setdefault(word[:1], []).append(word)
    parts = []
    for first, group in groups.items():
        if len(group) == 1 or not first or depth > 40:
            parts += [_lit(word) for word in group]
            continue
        shared = _common(min(group), max(group))
        parts.append(_seq(_lit(shared), _words((word[len(shared) :] for word in group), depth + 1)))
    return _alt(parts)


def _common(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


# ---- regular expressions


_CATEGORY: dict[str, Ranges] = {
    "DIGIT": ((48, 57),),
    "SPACE": ((9, 13), (32, 32)),
    "WORD": ((48, 57), (65, 90), (95, 95), (97, 122)),
}
_REFUSED = {
    "ASSERT": "lookaround",
    "ASSERT_NOT": "lookaround",
    "GROUPREF": "backreference",
    "GROUPREF_EXISTS": "conditional group",
    "AT_BOUNDARY": "word boundary",
    "AT_NON_BOUNDARY": "word boundary",
    "AT_BEGINNING": "anchor '^' inside the pattern",
    "AT_END": "anchor '$' inside the pattern",
}
_STARTS, _STOPS = ("AT_BEGINNING", "AT_BEGINNING_STRING"), ("AT_END", "AT_END_STRING")


def _ordered(ranges: Iterable[tuple[int, int]]) -> Ranges:
    merged: list[tuple[int, int]] = []
    for a, b in sorted(ranges):
        if merged and a <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
        else:
            merged.append((a, b))
    return tuple(merged)


def _without(ranges: Iterable[tuple[int, int]]) -> Ranges:
    out, start = [], 0
    for a, b in _ordered(ranges):
        out.append((start, a - 1))
        start = b + 1
    return tuple((a, b) for a, b in [*out, (start, 0x10FFFF)] if a <= b)


def _both(left: Ranges, right: Ranges) -> Ranges:
    return _ordered((max(a, c), min(b, d)) for a, b in left for c, d in right if max(a, c) <= min(b, d))


class Regex:
    """A pattern as the stdlib's own parser reads it, turned into a term; what it cannot say is refused by name."""

    def __init__(self, pattern: str, named: Ranges, wide: Ranges, where: str) -> None:
        """`named` are the characters a pattern may name, `wide` those that a dot or a negated class stands for."""
        self.named, self.wide, self.where, self.spread = named, wide, where, 0
        if len(pattern) > MAX_REGEX:
            self.refuse(f"a regex over {MAX_REGEX} characters")
        try:
            self.tree = _sre.parse(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise Unsupported(f"the regex{where} cannot be read: {str(error)[:100]}") from None
        if self.tree.state.flags & ~re.UNICODE:
            self.refuse("a regex flag")

    def refuse(self, what: str) -> NoReturn:
        raise Unsupported(f"{what}{self.where} is not supported")

    def term(self, around: Term) -> Term:
        """The whole pattern, with `around` at each end that has no anchor."""
        items = list(self.tree)
        branches = items[0][1][1] if len(items) == 1 and str(items[0][0]) == "BRANCH" else [items]
        return _alt(self._anchored(list(branch), around) for branch in branches)

    def _anchored(self, items: list[Any], around: Term) -> Term:
        first = last = around
        while items and str(items[0][1]) in _STARTS:
            first = _EMPTY
            items.pop(0)
        while items and str(items[-1][1]) in _STOPS:
            last = _EMPTY
            items.pop()
        return _seq(first, self._items(items), last)

    def _items(self, items: Iterable[Any]) -> Term:
        return _seq(*(self._item(str(op), value) for op, value in items))

    def _item(self, op: str, value: Any) -> Term:
        if op in self._OPS:
            return self._OPS[op](self, value)
        what = str(value) if op == "AT" else op
        self.refuse(f"regex {_REFUSED.get(what, what.lower().replace('_', ' '))}")

    def _ranges(self, ranges: Ranges, allowed: Ranges) -> Term:
        found = _both(ranges, allowed)
        return Term("set", ranges=found) if found else self.refuse("a character of the regex that cannot stand here")

    def _literal(self, code: int) -> Term:
        self._ranges(((code, code),), self.named)
        return _lit(chr(code))

    def _in(self, items: list[Any]) -> Term:
        negated = str(items[0][0]) == "NEGATE"
        found: list[tuple[int, int]] = []
        narrow = negated and any(str(op) == "CATEGORY" for op, _ in items)
        for op, value in items[negated:]:
            if str(op) == "CATEGORY":
                category = _CATEGORY[str(value).rpartition("_")[2]]
                narrow = narrow or "_NOT_" in str(value)
                found += _without(category) if "_NOT_" in str(value) else category
            else:
                found.append((value, value) if str(op) == "LITERAL" else value)
        # beyond ASCII, engines disagree on what \d, \w and \s are
        wide = _both(self.wide, ((0, 127),)) if narrow else self.wide
        if negated:
            return self._ranges(_without(found), wide)
        return self._ranges(_ordered(found), wide if narrow else self.named)

    def _group(self, value: tuple[Any, int, int, Any]) -> Term:
        if value[1] or value[2]:
            self.refuse("a regex flag")
        return self._items(value[3])

    def _repeat(self, value: tuple[int, Any, Any]) -> Term:
        low, high = value[0], None if value[1] == _sre.MAXREPEAT else int(value[1])
        if max(low, high or 0) > MAX_REPEAT:
            self.refuse(f"a repetition over {MAX_REPEAT} in the regex")
        part = self._items(value[2])
        return _rep(self._solid(part), 0, high) if _nullable(part) else _rep(part, low, high)

    def _solid(self, term: Term) -> Term:
        """The term without the empty text: llama.cpp refuses some repetitions of what may be empty, and hangs on others."""
        if not _nullable(term) or term == _EMPTY:
            return term
        if term.op == "rep":
            return _rep(self._solid(term.parts[0]), 1, term.high)
        if term.op == "alt":
            return _alt(self._solid(part) for part in term.parts if part != _EMPTY)
        self.spread += 1
        if self.spread > 4 or len(term.parts) > 20:  # each one writes its parts again
            self.refuse("a repetition of a sequence that may be empty, so often,")
        return _alt(_seq(self._solid(part), *term.parts[i + 1 :]) for i, part in enumerate(term.parts))

    _OPS: dict[str, Callable[..., Term]] = {
        "LITERAL": _literal,
        "NOT_LITERAL": lambda self, code: self._ranges(_without([(code, code)]), self.wide),
        "ANY": lambda self, _: self._ranges(_without([(10, 10), (13, 13), (0x2028, 0x2029)]), self.wide),
        "IN": _in,
        "BRANCH": lambda self, value: _alt(self._items(branch) for branch in value[1]),
        "SUBPATTERN": _group,
        "MAX_REPEAT": _repeat,
        "MIN_REPEAT": _repeat,
    }


_LETTER = "[A-Za-z0-9]"
_LEAP = "([1-9][0-9](0[48]|[2468][048]|[13579][26])|([2468][048]|[13579][26])00)"
_DATE = f"([1-9][0-9]{{3}}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
_HOUR = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_HOUR}:[0-5][0-9](\\.[0-9]{{1,6}})?(Z|[+-]{_HOUR})"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": rf"({_OCTET}\.){{3}}{_OCTET}",
    "email": rf"[A-Za-z0-9_+-]{{1,30}}(\.[A-Za-z0-9_+-]{{1,30}}){{0,1}}@({_LETTER}([A-Za-z0-9-]{{0,30}}{_LETTER})?\.){{1,3}}[A-Za-z]{{2,24}}",
}


@lru_cache(maxsize=64)
def _format_term(name: str) -> Term:
    return Regex(_FORMATS[name], _PLAIN, _PLAIN, "").term(_EMPTY)


# ---- numbers


def _same_length(a: str, b: str) -> Term:
    """Digit strings from a to b, which are equally long."""
    if a == b:
        return _lit(a)
    rest = len(a) - 1
    if a[1:] == "0" * rest and b[1:] == "9" * rest:
        return _seq(_set(a[0] + b[0]), _rep(_DIGIT, rest, rest))
    if a[0] == b[0]:
        return _seq(_lit(a[0]), _same_length(a[1:], b[1:]))
    low, high = int(a[0]), int(b[0])
    parts = []
    if a[1:] != "0" * rest:
        parts.append(_seq(_lit(a[0]), _same_length(a[1:], "9" * rest)))
        low += 1
    if b[1:] != "9" * rest:
        parts.append(_seq(_lit(b[0]), _same_length("0" * rest, b[1:])))
        high -= 1
    if low <= high:
        parts.append(_seq(_set(f"{low}{high}"), _rep(_DIGIT, rest, rest)))
    return _alt(parts)


@lru_cache(maxsize=256)
def _naturals(low: int, high: int) -> Term:
    parts = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first, last = (max(low, 10 ** (length - 1) if length > 1 else 0), min(high, 10**length - 1))
        parts.append(_same_length(str(first), str(last)))
    return _alt(parts)


def _integers(low: int, high: int) -> Term:
    parts = [_naturals(max(low, 0), high)] if high >= 0 else []
    if low < 0:
        parts.append(_seq(_lit("-"), _naturals(max(1, -high), -low)))
    return _alt(parts)


def _decimals(low: int, high: int, above: bool, below: bool, digits: int) -> list[Term]:
    """Unsigned decimals in low..high; `above` and `below` leave the bound itself out."""
    parts, first = [], low + above
    if first < high:
        parts.append(_seq(_naturals(first, high - 1), _rep(_seq(_lit("."), _rep(_DIGIT, 1, digits)), 0, 1)))
    if above and low < high:
        parts.append(_seq(_lit(f"{low}."), _rep(_DIGIT, 0, digits - 1), _NONZERO))
    if not below and first <= high:
        parts.append(_seq(_lit(str(high)), _rep(_seq(_lit("."), _rep(_lit("0"), 1, digits)), 0, 1)))
    return parts


_INTEGER = _integers(1 - 10**DIGITS, 10**DIGITS - 1)
_EXPONENT = _seq(_set("ee", "EE"), _rep(_set("++", "--"), 0, 1), _rep(_DIGIT, 1, 2))
_NUMBER = _seq(
    _rep(_lit("-"), 0, 1),
    _alt([_lit("0"), _seq(_NONZERO, _rep(_DIGIT, 0, DIGITS - 1))]),
    _rep(_seq(_lit("."), _rep(_DIGIT, 1, DIGITS)), 0, 1),
    _rep(_EXPONENT, 0, 1),
)


# ---- JSON Schema


_NOTES = {"title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "readOnly", "writeOnly"}
_NOTES |= {"$defs", "definitions"}
_COUNT, _BOUND, _LIST, _NODE = (int,), (int, float), (list,), (dict, bool)
_SHAPES: dict[str, Any] = {
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"), _COUNT),
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), _BOUND),
    **dict.fromkeys(("required", "enum", "anyOf", "oneOf", "allOf", "prefixItems"), _LIST),
    **dict.fromkeys(("items", "additionalProperties"), _NODE),
    **dict.fromkeys(("pattern", "format", "$ref"), (str,)),
    **dict.fromkeys(("properties", "$defs", "definitions"), (dict,)),
    "type": (str, list),
    "const": (object,),
}
_OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
_JOINS = ("$ref", "allOf", "anyOf", "oneOf")


def _key(value: Any) -> Any:
    """Equal for values that JSON Schema calls equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return "object", frozenset((name, _key(member)) for name, member in value.items())
    if isinstance(value, list):
        return "array", tuple(_key(member) for member in value)
    return isinstance(value, (bool, str)) and type(value), value


def _is(value: Any, kind: str) -> bool:
    if kind in _TYPES:
        return isinstance(value, _TYPES[kind])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return kind == "number" or isinstance(value, int) or value.is_integer()


def _nesting(value: Any, limit: int) -> bool:
    """Whether a value nests deeper than the limit (without recursion)."""
    layer = [value]
    while layer and limit >= 0:
        layer = [m for v in layer if isinstance(v, (dict, list)) for m in (v.values() if isinstance(v, dict) else v)]
        limit -= 1
    return bool(layer)


def _step(path: str, name: Any) -> str:
    return f"{path}[{name}]" if isinstance(name, int) else f"{path}.{name[:60]}"


def _refuse(what: str, path: str, reason: str = "is not supported") -> NoReturn:
    raise Unsupported(f"'{what[:80]}' at {path[:300]} {reason}")


def _checked(given: Any, path: str) -> dict[str, Any]:
    """A schema object with known keywords of the right shape; `true` is {}."""
    if given is True:
        return {}
    if not isinstance(given, dict):
        _refuse(json.dumps(given)[:40], path)
    node: dict[str, Any] = given
    for word, value in node.items():
        if word not in _NOTES and word not in _SHAPES:
            _refuse(word, path)
        allowed = _SHAPES.get(word, (object,))
        whole = word not in ("const", "items", "additionalProperties") and isinstance(value, bool)
        if not isinstance(value, allowed) or (allowed is not _SHAPES["const"] and word in _SHAPES and whole):
            _refuse(word, path, "has a value of the wrong type")
        if (allowed is _COUNT and value < 0) or (allowed is _BOUND and isinstance(value, float) and not math.isfinite(value)):
            _refuse(word, path, "has a value out of range")
        if allowed is _LIST and not value and word != "required":
            _refuse(word, path, "is empty, so nothing satisfies it")
    if "$id" in node and path != "$":
        _refuse("$id", path)
    if any(not isinstance(name, str) for name in node.get("required", ())):
        _refuse("required", path, "has a value of the wrong type")
    kinds = node.get("type", [])
    if kinds == [] and "type" in node:
        _refuse("type", path, "is empty, so nothing satisfies it")
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in (*_TYPES, "number", "integer"):
            _refuse("type", path, f"has an unknown value, {json.dumps(kind)[:60]}")
    return node


def _kinds(node: dict[str, Any]) -> list[str] | None:
    kinds = node.get("type")
    return [kinds] if isinstance(kinds, str) else kinds


def _resolve(root: Any, node: dict[str, Any], path: str) -> Any:
    """The schema that a $ref names: the root, or a member of $defs or definitions."""
    parts = urllib.parse.unquote(node["$ref"]).split("/")
    names = [part.replace("~1", "/").replace("~0", "~") for part in parts]
    if names == ["#"]:
        return root
    if len(names) != 3 or names[0] != "#" or names[1] not in ("$defs", "definitions"):
        _refuse("$ref", path, f"to {json.dumps(node['$ref'])[:80]} is not supported")
    home = root.get(names[1]) if isinstance(root, dict) else None
    if not isinstance(home, dict) or names[2] not in home:
        _refuse("$ref", path, f"names {json.dumps(node['$ref'])[:80]}, which is not in the schema")
    return home[names[2]]


def _lone(node: dict[str, Any], path: str) -> str | None:
    """The one keyword of $ref, allOf, anyOf, oneOf in a schema, when what stands beside it can be honoured."""
    joins = [word for word in _JOINS if word in node]
    if not joins:
        return None
    beside = [word for word in node if word not in _NOTES and word != joins[0]]
    if beside and (beside != ["type"] or joins[0] not in ("anyOf", "oneOf")):
        other = next(word for word in beside if word != "type" or joins[0] not in ("anyOf", "oneOf"))
        _refuse(other, path, f"beside '{joins[0]}' is not supported")
    if joins[0] == "allOf" and len(node["allOf"]) != 1:
        _refuse("allOf", path, "with more than one member is not supported")
    return joins[0]


class Schema:
    """One schema on its way to a grammar."""

    def __init__(self, root: Any) -> None:
        self.root, self.grammar = root, Grammar()
        self.refs: dict[str, Term] = {}
        self.todo: deque[tuple[str, Any]] = deque()

    def text(self) -> str:
        root = self.term(self.root, "$", 0)
        while self.todo:
            name, node = self.todo.popleft()
            self.grammar.rules[name] = self.term(node, self.grammar.origin[name], 0)
        return self.grammar.text(root)

    def term(self, node: Any, path: str, depth: int) -> Term:
        if depth > MAX_DEPTH:
            raise Unsupported(f"a schema nested deeper than {MAX_DEPTH} is not supported")
        node = _checked(node, path)
        if "enum" in node or "const" in node:
            return self._values(node, path)
        join = _lone(node, path)
        if join:
            return self._JOIN[join](self, node, path, depth)
        kinds = _kinds(node) or [kind for kind, words in _OF_TYPE.items() if any(word in node for word in words)]
        if not kinds:
            return self.any(ANY_DEPTH)
        if "number" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        return _alt(self._KIND[kind](self, node, path, depth) for kind in kinds)

    def _values(self, node: dict[str, Any], path: str) -> Term:
        word = "enum" if "enum" in node else "const"
        members = node["enum"] if word == "enum" else [node["const"]]
        rest = {name: value for name, value in node.items() if name != word}
        if any(join in rest for join in _JOINS):
            _refuse(word, path, "beside " + next(join for join in _JOINS if join in rest) + " is not supported")
        if set(rest) - _NOTES:
            members = [member for member in members if _fault(rest, member, Check(self.root), path) is None]
        if not members:
            _refuse(word, path, "has no member that satisfies the other keywords")
        try:
            texts = [json.dumps(member, ensure_ascii=False, allow_nan=False, separators=(",", ":")) for member in members]
            "".join(texts).encode()
        except ValueError:
            _refuse(word, path, "holds a value that JSON cannot carry")
        return self.grammar.share(_words(dict.fromkeys(texts)))

    def _ref(self, node: dict[str, Any], path: str, depth: int) -> Term:
        target = node["$ref"]
        if target not in self.refs:
            found = _resolve(self.root, node, path)
            self.refs[target] = Term("ref", self.grammar.name(f"$ref {json.dumps(target)[:80]}"))
            self.todo.append((self.refs[target].text, found))
        return self.refs[target]

    def _all(self, node: dict[str, Any], path: str, depth: int) -> Term:
        return self.term(node["allOf"][0], path + ".allOf[0]", depth + 1)

    def _any_of(self, node: dict[str, Any], path: str, depth: int) -> Term:
        word = "anyOf" if "anyOf" in node else "oneOf"
        if len(node[word]) > MAX_MEMBERS:
            _refuse(word, path, f"with more than {MAX_MEMBERS} members is not supported")
        members = [self._narrowed(m, node, f"{path}.{word}[{i}]") for i, m in enumerate(node[word])]
        if word == "oneOf":
            self._disjoint(members, path)
        return self.grammar.share(_alt([self.term(m, f"{path}.{word}[{i}]", depth + 1) for i, m in enumerate(members)]))

    def _narrowed(self, member: Any, node: dict[str, Any], path: str) -> Any:
        """The member with the type that stands beside anyOf or oneOf."""
        outer, member = _kinds(node), _checked(member, path)
        if outer is None:
            return member
        inner = _kinds(member)
        if any(join in member for join in _JOINS):
            _refuse("type", path, "beside a member with '$ref', 'allOf', 'anyOf' or 'oneOf' is not supported")
        kept = outer if inner is None else [k for k in inner if k in outer or (k == "integer" and "number" in outer)]
        if inner and len(kept) < len(inner):
            _refuse("type", path, "goes beyond the type beside it, which is not supported")
        return {**member, "type": kept}

    def _disjoint(self, members: list[Any], path: str) -> None:
        """oneOf means exactly one: refused unless no value can satisfy two members."""
        facts = [self._facts(member, path) for member in members]
        for i, (kinds, values, fixed) in enumerate(facts):
            for other_kinds, other_values, other_fixed in facts[:i]:
                apart = bool(kinds and other_kinds and not kinds & other_kinds)
                apart = apart or bool(values and other_values and not values & other_values)
                both = kinds == other_kinds == {"object"}
                if not apart and not (both and any(not fixed[k] & other_fixed[k] for k in fixed.keys() & other_fixed.keys())):
                    _refuse("oneOf", path, "is not supported where two members may hold for one value")

    def _facts(self, member: Any, path: str) -> tuple[set[str], frozenset[Any], dict[str, frozenset[Any]]]:
        """What is sure of a schema: its types, its values if it lists them, the values listed of its required properties."""
        member = self._target(member, path)
        values = _listed(member)
        kinds = set(_kinds(member) or ())
        if "number" in kinds:
            kinds.add("integer")
        if values is not None and not kinds:
            kinds = {kind for value in _members(member) for kind in (*_TYPES, "integer", "number") if _is(value, kind)}
        inner = {
            name: _listed(self._target(member.get("properties", {}).get(name, True), path))
            for name in member.get("required", ())
        }
        return (kinds, values or frozenset(), {name: found for name, found in inner.items() if found is not None})

    def _target(self, node: Any, path: str) -> dict[str, Any]:
        for _ in range(20):
            found = _checked(node, path) if node is not False else {}
            if "$ref" not in found and not (len(found.get("allOf", ())) == 1 and _lone(found, path)):
                return found
            node = _resolve(self.root, found, path) if "$ref" in found else found["allOf"][0]
        return {}

    # types

    def any(self, level: int) -> Term:
        """Any JSON value that nests at most `level` deep."""
        parts = [_quote(_rep(_CHAR, 0, None)), self.grammar.share(_NUMBER), _lit("true"), _lit("false"), _lit("null")]
        if level:
            inner = self.any(level - 1)
            parts += [self._list("{", self._pair(inner), "}", 0, None), self._list("[", inner, "]", 0, None)]
        return self.grammar.share(_alt(parts))

    def _pair(self, value: Term) -> Term:
        return self.grammar.share(_seq(_quote(_rep(_CHAR, 1, KEY_LENGTH)), _lit(":"), value))

    def _list(self, start: str, item: Term, stop: str, low: int, high: int | None) -> Term:
        if high == 0:
            return _lit(start + stop)
        item = self.grammar.share(item)
        more = _rep(_seq(_lit(","), item), max(low - 1, 0), None if high is None else high - 1)
        return self.grammar.share(_seq(_lit(start), _rep(_seq(item, more), min(low, 1), 1), _lit(stop)))

    def _range(self, node: dict[str, Any], low: str, high: str, path: str) -> tuple[int, int | None]:
        first, last = node.get(low, 0), node.get(high)
        for word, bound in ((low, first), (high, last or 0)):
            if bound > MAX_REPEAT:
                _refuse(word, path, f"over {MAX_REPEAT} is not supported")
        if last is not None and first > last:
            _refuse(low, path, f"is more than '{high}', so nothing satisfies it")
        return first, last

    def _object(self, node: dict[str, Any], path: str, depth: int) -> Term:
        extra, given = node.get("additionalProperties", True), node.get("properties")
        if len(given or ()) > MAX_RULES:
            _refuse("properties", path, f"with more than {MAX_RULES} members is not supported")
        value = self.term(extra, path + ".additionalProperties", depth + 1) if extra is not False else _EMPTY
        missing = [name for name in dict.fromkeys(node.get("required", ())) if name not in (given or {})]
        if missing and extra is False:
            _refuse("required", path, f"names {json.dumps(missing[0])[:80]}, which 'additionalProperties' rules out")
        if given is None and not missing:
            return self._map(node, path, value if extra is not False else None)
        for word in ("minProperties", "maxProperties"):
            if word in node:
                _refuse(word, path, "beside 'properties' or 'required' is not supported")
        members = {name: self.term(sub, _step(path + ".properties", name), depth + 1) for name, sub in (given or {}).items()}
        return self._members(members | dict.fromkeys(missing, value), set(node.get("required", ())), path)

    def _map(self, node: dict[str, Any], path: str, value: Term | None) -> Term:
        low, high = self._range(node, "minProperties", "maxProperties", path)
        if low > 1:  # a grammar cannot keep the keys apart, and two equal keys count once
            _refuse("minProperties", path, "over 1 is not supported")
        if value is None and low:
            _refuse("minProperties", path, "is more than 'additionalProperties' lets in")
        return _lit("{}") if value is None else self._list("{", self._pair(value), "}", low, high)

    def _members(self, members: dict[str, Term], required: set[str], path: str) -> Term:
        """Properties in order: `tail` after one has been written, `head` while none has."""
        head, tail = _EMPTY, _EMPTY
        if len(members) - len(required) > MAX_OPTIONAL:
            _refuse("properties", path, f"with more than {MAX_OPTIONAL} optional members is not supported")
        for name, value in reversed(members.items()):
            try:
                label = json.dumps(name, ensure_ascii=False)
                label.encode()
            except ValueError:
                _refuse("properties", path, "has a name that JSON cannot carry")
            pair = self.grammar.share(_seq(_lit(label + ":"), value))
            here, after = _seq(pair, tail), _seq(_lit(","), pair, tail)
            if name in required:
                head, tail = self.grammar.share(here), self.grammar.share(after)
            else:
                head = self.grammar.share(_alt([here, head]))
                tail = self.grammar.share(_seq(_rep(_seq(_lit(","), pair), 0, 1), tail))
        return _seq(_lit("{"), head, _lit("}"))

    def _array(self, node: dict[str, Any], path: str, depth: int) -> Term:
        low, high = self._range(node, "minItems", "maxItems", path)
        if "prefixItems" not in node:
            return self._list("[", self.term(node.get("items", True), path + ".items", depth + 1), "]", low, high)
        first = [self.term(item, f"{path}.prefixItems[{i}]", depth + 1) for i, item in enumerate(node["prefixItems"])]
        if node.get("items", True) not in (True, False, {}):
            _refuse("items", path, "beside 'prefixItems' is not supported")
        if low > len(first) or (high is not None and high < len(first)):
            _refuse("prefixItems", path, "with another number of items is not supported")
        parts = [part for item in first for part in (_lit(","), item)][1:]
        return _seq(_lit("["), *parts, _lit("]"))

    def _string(self, node: dict[str, Any], path: str, depth: int) -> Term:
        given: list[str] = [word for word in ("pattern", "format", "minLength") if word in node]
        given += ["maxLength"] if "maxLength" in node and "minLength" not in node else []
        if len(given) > 1:
            _refuse(given[1], path, f"beside '{given[0]}' is not supported")
        if "format" in node:
            if node["format"] not in _FORMATS:
                _refuse("format", path, f"{json.dumps(node['format'])[:60]} is not supported")
            return self.grammar.share(_quote(_format_term(node["format"])))
        if "pattern" in node:
            around = _rep(Term("set", ranges=_PLAIN), 0, AROUND)
            return self.grammar.share(
                _quote(Regex(node["pattern"], _PLAIN, _PLAIN, f" in 'pattern' at {path[:300]}").term(around))
            )
        return self.grammar.share(_quote(_rep(_CHAR, *self._range(node, "minLength", "maxLength", path))))

    def _bounds(self, node: dict[str, Any], path: str) -> tuple[int | None, int | None, bool, bool]:
        """The closest whole bounds, and whether they are left out; a fraction is refused."""
        lows = [(node[word], word[0] == "e") for word in ("minimum", "exclusiveMinimum") if word in node]
        highs = [(-node[word], word[0] == "e") for word in ("maximum", "exclusiveMaximum") if word in node]
        for word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if word in node and node[word] != int(node[word]):
                _refuse(word, path, "with a fraction is not supported for numbers")
        (low, above), (high, below) = (max(lows, default=(None, False)), max(highs, default=(None, False)))
        return (low if low is None else int(low), high if high is None else -int(high), above, below)

    def _integer(self, node: dict[str, Any], path: str, depth: int) -> Term:
        if node.get("multipleOf", 1) != 1:
            _refuse("multipleOf", path)
        cap = 10**DIGITS - 1
        lows = [math.ceil(node["minimum"])] if "minimum" in node else []
        lows += [math.floor(node["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in node else []
        highs = [math.floor(node["maximum"])] if "maximum" in node else []
        highs += [math.ceil(node["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in node else []
        low, high = max([-cap, *lows]), min([cap, *highs])
        if low > high:
            _refuse(
                "minimum" if "minimum" in node else next(w for w in _OF_TYPE["number"] if w in node), path, "leaves no integer"
            )
        return self.grammar.share(_integers(low, high))

    def _number(self, node: dict[str, Any], path: str, depth: int) -> Term:
        if "multipleOf" in node:
            _refuse("multipleOf", path)
        low, high, above, below = self._bounds(node, path)
        if low is None and high is None:
            return self.grammar.share(_NUMBER)
        if max(abs(low or 0), abs(high or 0)) >= 10**14:
            _refuse("minimum" if low is not None else "maximum", path, "over 14 digits is not supported for numbers")
        cap = 10**14
        low, high = -cap if low is None else low, cap if high is None else high
        # a double holds 15 digits: with more, 4.9999999999999999 would be read as 5, the very bound that is left out
        digits = 15 - max(len(str(abs(b))) for b, out in ((low, above), (high, below), (0, False)) if out or b == 0)
        digits = max(digits, 1)
        parts = _decimals(max(low, 0), high, above and low >= 0, below, digits) if high >= 0 else []
        if low < 0:
            over = below if high <= 0 else True
            minus = _decimals(max(-high, 0), -low, over or high > 0, above, digits)
            parts += [_seq(_lit("-"), part) for part in minus]
        if not parts:
            _refuse("minimum" if "minimum" in node else "exclusiveMinimum", path, "leaves no number")
        return self.grammar.share(_alt(parts))

    _JOIN: dict[str, Callable[[Schema, dict[str, Any], str, int], Term]] = {
        "$ref": _ref,
        "allOf": _all,
        "anyOf": _any_of,
        "oneOf": _any_of,
    }
    _KIND: dict[str, Callable[[Schema, dict[str, Any], str, int], Term]] = {
        "object": _object,
        "array": _array,
        "string": _string,
        "integer": _integer,
        "number": _number,
        "boolean": lambda self, node, path, depth: _words(["true", "false"]),
        "null": lambda self, node, path, depth: _lit("null"),
    }


def _quote(term: Term) -> Term:
    return _seq(_lit('"'), term, _lit('"'))


def _members(node: dict[str, Any]) -> list[Any]:
    return node["enum"] if "enum" in node else [node["const"]]


def _listed(node: dict[str, Any]) -> frozenset[Any] | None:
    return frozenset(map(_key, _members(node))) if "enum" in node or "const" in node else None


# ---- checking values


def _reach(term: Term, text: str, starts: set[int], budget: list[int]) -> set[int]:
    """Where a match that starts at one of the places may end: all ways at once, so no pattern can backtrack for ever."""
    budget[0] -= 1 + len(starts)
    if budget[0] < 0:
        raise Unsupported("a 'pattern' that takes this long to check is not supported")
    if term.op == "lit":
        return {i + len(term.text) for i in starts if text.startswith(term.text, i)}
    if term.op == "set":
        return {i + 1 for i in starts if i < len(text) and any(a <= ord(text[i]) <= b for a, b in term.ranges)}
    if term.op == "seq":
        for part in term.parts:
            starts = _reach(part, text, starts, budget) if starts else starts
        return starts
    if term.op == "alt":
        return set().union(*(_reach(part, text, starts, budget) for part in term.parts))
    found, turn = set(starts) if not term.low else set(), 0
    while starts and (term.high is None or turn < term.high):
        after, turn = _reach(term.parts[0], text, starts, budget), turn + 1
        if turn < term.low:
            starts = after
            continue
        starts = after - found
        found |= after
    return found


@lru_cache(maxsize=128)
def _pattern_term(pattern: str) -> Term:
    return Regex(pattern, _ALL, _ALL, " in 'pattern'").term(_rep(Term("set", ranges=_ALL), 0, None))


def _matches(term: Term, text: str) -> bool:
    return len(text) in _reach(term, text, {0}, [2_000_000])


def _formatted(name: str, text: str) -> bool:
    return name in _FORMATS and _matches(_format_term(name), text)


_TESTS: dict[str, tuple[str, Callable[[Any, Any], bool], str]] = {
    "minLength": ("string", lambda limit, v: len(v) >= limit, "is shorter than {} characters"),
    "maxLength": ("string", lambda limit, v: len(v) <= limit, "is longer than {} characters"),
    "pattern": ("string", lambda pattern, v: _matches(_pattern_term(pattern), v), "does not match the pattern {}"),
    "format": ("string", _formatted, "is not of the format {}"),
    "minimum": ("number", lambda limit, v: v >= limit, "is less than {}"),
    "maximum": ("number", lambda limit, v: v <= limit, "is more than {}"),
    "exclusiveMinimum": ("number", lambda limit, v: v > limit, "is not more than {}"),
    "exclusiveMaximum": ("number", lambda limit, v: v < limit, "is not less than {}"),
    "multipleOf": ("number", lambda step, v: step == 1 and _is(v, "integer"), "is not a multiple of {}"),
    "minItems": ("array", lambda limit, v: len(v) >= limit, "has fewer than {} items"),
    "maxItems": ("array", lambda limit, v: len(v) <= limit, "has more than {} items"),
    "minProperties": ("object", lambda limit, v: len(v) >= limit, "has fewer than {} properties"),
    "maxProperties": ("object", lambda limit, v: len(v) <= limit, "has more than {} properties"),
    "required": ("object", lambda names, v: all(name in v for name in names), "lacks one of the properties {}"),
    "enum": ("", lambda members, v: any(_key(v) == _key(member) for member in members), "is none of {}"),
    "const": ("", lambda member, v: bool(_key(v) == _key(member)), "is not {}"),
    "type": ("", lambda k, v: any(_is(v, kind) for kind in ([k] if isinstance(k, str) else k)), "is not of type {}"),
}


@dataclass
class Check:
    """One check of a value: the root for references, and the steps so far (references can double the work without end)."""

    root: Any
    steps: int = 0


def _fault(node: Any, value: Any, check: Check, path: str, hops: int = 0) -> str | None:
    """The first fault of a value; `hops` counts the references that were followed on the spot."""
    if node is False:
        return f"The value at {path[:300]} is not allowed."
    check.steps += 1
    if check.steps > 200_000:
        raise Unsupported("a schema that takes this long to check is not supported")
    node = _checked(node, "$")
    for word, (kind, test, words) in _TESTS.items():
        if word in node and (not kind or _is(value, kind)) and not test(node[word], value):
            return f"The value at {path[:300]} {words.format(json.dumps(node[word], ensure_ascii=False)[:100])}."
    if hops > 50:
        raise Unsupported("a '$ref' that leads to itself is not supported")
    if "$ref" in node:
        fault = _fault(_resolve(check.root, node, "$"), value, check, path, hops + 1)
        if fault:
            return fault
    for word, few, many in (("allOf", None, None), ("anyOf", 1, None), ("oneOf", 1, 1)):
        faults = [_fault(member, value, check, path, hops + 1) for member in node.get(word, ())]
        good = faults.count(None)
        if word in node and (good < (few or len(faults)) or (many and good > many)):
            bad = next((fault for fault in faults if fault), None)
            return (
                bad if bad and len(faults) == 1 else f"The value at {path[:300]} satisfies {good} of the schemas in '{word}'."
            )
    return next(
        (fault for step, sub, part in _inside(node, value) if (fault := _fault(sub, part, check, _step(path, step)))), None
    )


def _inside(node: dict[str, Any], value: Any) -> Iterable[tuple[Any, Any, Any]]:
    """(step, schema, value) for every part of an object or a list."""
    if isinstance(value, dict):
        known = node.get("properties", {})
        for name, part in value.items():
            yield name, known.get(name, node.get("additionalProperties", True)), part
    elif isinstance(value, list):
        first = node.get("prefixItems", [])
        for i, part in enumerate(value):
            yield i, first[i] if i < len(first) else node.get("items", True), part


# ---- what is called from outside


def _bounded(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except RecursionError:
        raise Unsupported("nesting this deep is not supported") from None


def schema_grammar(schema: Any) -> str:
    """Compact JSON that satisfies the schema (JSON Schema 2020-12, the keywords above); Unsupported for any other."""
    if _nesting(schema, 2 * MAX_DEPTH + 2):
        raise Unsupported(f"a schema nested deeper than {MAX_DEPTH} is not supported")
    return str(_bounded(Schema(schema).text))


def object_grammar() -> str:
    """Any JSON object, nested to a bounded depth."""
    return schema_grammar({"type": "object"})


def regex_grammar(pattern: str) -> str:
    """Text that the whole of the regex matches; ^ and $ may stand at its ends."""
    return str(_bounded(lambda: Grammar().text(Regex(pattern, _ALL, _TEXT, "").term(_EMPTY))))


def regex_matches(pattern: str, text: str) -> bool:
    """Does the whole regex match? In time that grows with the text, not exponentially: a client wrote the pattern."""
    return _matches(Regex(pattern, _ALL, _TEXT, "").term(_EMPTY), text)


def choice_grammar(choices: list[str]) -> str:
    """One of the choices, as it is."""
    if not choices or any(not isinstance(choice, str) or "\0" in choice for choice in choices):
        raise Unsupported("a choice that is not text, or an empty list of choices, is not supported")
    if any(0xD800 <= ord(char) < 0xE000 for choice in choices for char in choice):
        raise Unsupported("a choice with half a surrogate pair is not supported")
    return Grammar().text(_words(dict.fromkeys(choices)))


def violation(schema: Any, value: Any) -> str | None:
    """Where and how a value fails the schema, in a sentence; None when it satisfies it."""
    try:
        return _fault(schema, value, Check(schema), "$")
    except RecursionError:
        return "The value nests too deep to be checked."


# ---- grammars in the client's own words


_TOKEN = re.compile(
    r'''(?P<rule>[A-Za-z][A-Za-z0-9_-]*)(?=\s*::=)|(?P<is>::=)|(?P<ref>[A-Za-z][A-Za-z0-9_-]*)|"(?P<lit>(?:[^"\\\n]|\\.)*)"'''
    r"""|\[(?P<set>\^?(?:[^\]\\\n]|\\.)*)\]|(?P<dot>\.)|(?P<suffix>[?*+]|\{\s*\d{1,5}\s*(?:,\s*(?:\d{1,5})?\s*)?\})|(?P<mark>[()|])"""
)
_SKIP = re.compile(r"(?:\s|#[^\n]*)*")
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.S)
_NAMED_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", **{c: c for c in '"\\[]^-/'}}


class Gbnf:
    """A reader of llama.cpp's GBNF (grammars/README.md of that project), so that a client's grammar is proved and written anew.

    An engine must not see it as it came: a dead end ends llama.cpp's process, and a mistake OpenVINO's pipeline.
    """

    def __init__(self, text: str) -> None:
        self.tokens, at = [], _SKIP.match(text).end()  # type: ignore[union-attr]
        while at < len(text):
            found = _TOKEN.match(text, at)
            if not found:
                raise Unsupported(f"the grammar cannot be read at {text[at : at + 30]!r}")
            kind = found.lastgroup or ""
            self.tokens.append((kind, found[kind]))
            at = _SKIP.match(text, found.end()).end()  # type: ignore[union-attr]
        self.tokens.reverse()  # the next one is the last: pop() is cheap
        self.grammar = Grammar()
        self.names: dict[str, str] = {}
        self.defined: set[str] = set()

    def text(self) -> str:
        while self.tokens:
            kind, name = self.tokens.pop()
            if kind != "rule" or name in self.defined:
                raise Unsupported(
                    f"the grammar {'defines' if kind == 'rule' else 'has no rule around'} {name!r}{' twice' * (kind == 'rule')}"
                )
            self.tokens.pop()
            self.defined.add(name)
            self.grammar.rules[self.ref(name).text] = self.alternatives(0)
        missing = next((name for name in ("root", *self.names) if name not in self.defined), None)
        if missing:
            raise Unsupported(f"the grammar does not define the rule {missing!r}")
        self.check_repetitions()
        return self.grammar.text(self.grammar.rules[self.names["root"]])

    def ref(self, name: str) -> Term:
        if name not in self.names:
            self.names[name] = self.grammar.name(f"the rule {name!r}")
        return Term("ref", self.names[name])

    def next(self) -> str:
        return self.tokens[-1][0] if self.tokens else ""

    def alternatives(self, depth: int) -> Term:
        if depth > MAX_DEPTH:
            raise Unsupported(f"a grammar nested deeper than {MAX_DEPTH} is not supported")
        branches = [self.sequence(depth)]
        while self.tokens and self.tokens[-1] == ("mark", "|"):
            self.tokens.pop()
            branches.append(self.sequence(depth))
        return _alt(branches)

    def sequence(self, depth: int) -> Term:
        parts = []
        while self.next() in ("ref", "lit", "set", "dot") or self.tokens[-1:] == [("mark", "(")]:
            term = self.atom(depth)
            while self.next() == "suffix":
                low, high = self.bounds(self.tokens.pop()[1])
                if max(low, high or 0) > MAX_REPEAT:
                    raise Unsupported(f"a repetition over {MAX_REPEAT} in the grammar is not supported")
                term = _rep(self.grammar.share(term), low, high)
            parts.append(term)
        return _seq(*parts)

    def atom(self, depth: int) -> Term:
        kind, text = self.tokens.pop()
        if kind == "ref":
            return self.ref(text)
        if kind == "lit":
            return _lit("".join(chr(code) for code in self.codes(text)))
        if kind == "dot":
            return Term("set", ranges=_ALL)
        if kind == "set":
            return self.members(text)
        inner = self.alternatives(depth + 1)
        if self.tokens[-1:] != [("mark", ")")]:
            raise Unsupported("the grammar has a '(' without its ')'")
        self.tokens.pop()
        return inner

    @staticmethod
    def bounds(suffix: str) -> tuple[int, int | None]:
        if suffix in "?*+":
            return {"?": (0, 1), "*": (0, None), "+": (1, None)}[suffix]
        low, comma, high = suffix.strip("{}").replace(" ", "").partition(",")
        bounds = int(low), (int(high) if high else None) if comma else int(low)
        if bounds[1] is not None and bounds[1] < bounds[0]:
            raise Unsupported(f"the grammar's repetition {suffix} has no number in it")
        return bounds

    @staticmethod
    def codes(text: str) -> list[int]:
        def plain(found: re.Match[str]) -> str:
            digits = found[1] or found[2] or found[3]
            if digits:
                code = int(digits, 16)
                if code == 0 or code > 0x10FFFF or 0xD800 <= code < 0xE000:
                    raise Unsupported(f"the character {found[0]} of the grammar is not supported")
                return chr(code)
            if found[4] not in _NAMED_ESCAPES:
                raise Unsupported(f"the escape {found[0]} of the grammar is not supported")
            return _NAMED_ESCAPES[found[4]]

        return [ord(char) for char in _ESCAPE.sub(plain, text)]

    def members(self, text: str) -> Term:
        negated = text.startswith("^")
        pieces = _ESCAPE.split(text[negated:])  # text, then the four groups of an escape, and so on
        codes: list[tuple[int, bool]] = [(ord(char), char == "-") for char in pieces[0]]
        for i in range(1, len(pieces), 5):
            x, u, long, char = pieces[i : i + 4]
            escape = f"\\x{x}" if x else f"\\u{u}" if u else f"\\U{long}" if long else f"\\{char}"
            codes += [(self.codes(escape)[0], False), *((ord(char), char == "-") for char in pieces[i + 4])]
        ranges, at = [], 0
        while at < len(codes):
            if at + 2 < len(codes) and codes[at + 1][1]:
                ranges.append((codes[at][0], codes[at + 2][0]))
                at += 3
            else:
                ranges.append((codes[at][0], codes[at][0]))
                at += 1
        found = _both(_without(ranges) if negated else _ordered(r for r in ranges if r[0] <= r[1]), _ALL)
        if not found or any(a > b for a, b in ranges):
            raise Unsupported(f"the class [{text[:40]}] of the grammar holds no character")
        return Term("set", ranges=found)

    def check_repetitions(self) -> None:
        """llama.cpp hangs on some repetitions of what may be empty."""
        empty = _settle(self.grammar.rules, _may_be_empty)
        stack = list(self.grammar.rules.values())
        while stack:
            term = stack.pop()
            if term.op == "rep" and (term.high is None or term.high > 1) and _may_be_empty(term.parts[0], empty):
                raise Unsupported("the grammar repeats something that may be empty, which is not supported")
            stack += term.parts


def _may_be_empty(term: Term, empty: set[str]) -> bool:
    if term.op == "ref":
        return term.text in empty
    if term.op == "rep":
        return term.low == 0 or _may_be_empty(term.parts[0], empty)
    if term.op in ("seq", "alt"):
        return (any if term.op == "alt" else all)(_may_be_empty(part, empty) for part in term.parts)
    return term == _EMPTY


def own_grammar(text: str) -> str:
    """A client's GBNF, proved and written anew. Raises Unsupported with what is wrong with it."""
    return Gbnf(text).text()
