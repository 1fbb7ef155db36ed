"""JSON Schema as a grammar, and as a check of values. Text to text: no engine, no HTTP.

Keywords mean what the draft says that `$schema` names, and 2020-12's where it names none (json-schema.org/draft/2020-12), joined by the
older words that 2020-12 does not have. What is unknown is an annotation, told by json_schema.unknown_words; what constrains is honoured whole
or refused by name. A sentence of the grammar always satisfies the schema; the grammar may be narrower (digits; and `writing_grammar`, what a
model is held to: the schema's order of properties, and none that it does not name).

How: a schema is taken apart into shapes, each a set of values of one type: strings of a language, numbers in a range, objects with
these properties… A place in a document holds a state, the schemas that its value must all satisfy or fail; a state's shapes are met
(allOf), joined (anyOf) and turned round (not, and with it oneOf and if); each state that is reached becomes one rule.
"""

from __future__ import annotations

import gc
import json
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, NoReturn

from grammar import Grammar, ebnf_grammar, lark_grammar, own_grammar, prefixed, quoted, spaced
from json_schema import (
    CONSTRAINING,
    FORMATS,
    MAX_DEPTH,
    OF_TYPE,
    TYPES,
    Check,
    Document,
    bounds_of,
    dependencies_of,
    exact,
    format_term,
    is_a,
    key_of,
    kinds_of,
    nests,
    refuse,
    required_of,
    step_to,
    tuple_of,
    unknown_words,
    violation,
)
from regular import (
    ALL,
    ANY,
    DIGIT,
    DIGITS,
    EMPTY,
    MAX_REPEAT,
    NONE,
    NONZERO,
    NUMBER,
    TEXT,
    Bound,
    Regex,
    Term,
    Unsupported,
    alt,
    both,
    decimals,
    has,
    integers,
    lengths,
    lit,
    matches,
    multiples,
    nothing,
    other,
    pattern_term,
    plain_digits,
    rep,
    seq,
    words,
)

__all__ = ["Unsupported", "choice_grammar", "ebnf_grammar", "lark_grammar", "object_grammar", "own_grammar", "prefixed", "regex_grammar", "regex_matches", "schema_grammar", "spaced", "unknown_words", "violation"]  # fmt: skip

MAX_ALTERNATIVES, MAX_STATES, MAX_COUNTED, MAX_UNIQUE = 256, 4_000, 4_000, 5
MAX_WORK = 30_000  # meetings of two shapes
MAX_LISTED = 100  # multiples written out

# ---- shapes: sets of values of one type


@dataclass(frozen=True, eq=False)
class Item:
    """A schema that a value satisfies, or (positive False) does not. Two are equal when they say the same."""

    node: Any
    base: str
    positive: bool
    path: str
    number: int  # Document.number; of true and false 1 and 0
    key: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", (self.number, self.base, self.positive))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Item) and self.key == other.key

    def turned(self) -> Item:
        return Item(self.node, self.base, not self.positive, self.path, self.number)


State = tuple[Item, ...]  # all of them at once; none: any value
FALSE: State = (Item(False, "", True, "$", 0),)


@dataclass(frozen=True, eq=False)
class Fixed:
    """Values that are listed, of any type."""

    values: tuple[Any, ...]
    keys: frozenset[Any] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", frozenset(map(key_of, self.values)))


@dataclass(frozen=True)
class Number:
    whole: bool = False
    low: Bound | None = None
    high: Bound | None = None
    step: Fraction | None = None  # that divides it
    terms: tuple[Term, ...] = ()  # of its digits, without an exponent


@dataclass(frozen=True)
class Text:
    low: int = 0
    high: int | None = None
    terms: tuple[Term, ...] = ()  # of its characters


@dataclass(frozen=True)
class Array:
    low: int = 0
    high: int | None = None
    first: tuple[State, ...] = ()
    rest: State = ()
    contains: tuple[tuple[State, int, int | None], ...] = ()
    unique: bool = False
    blind: bool = False  # for unevaluatedItems: made of a schema that is failed


@dataclass(frozen=True, eq=False)
class Source:
    """What one schema says of an object's properties: by name, by pattern, and of those that neither names."""

    named: Mapping[str, State] = field(default_factory=dict)
    patterns: tuple[tuple[str, State], ...] = ()
    rest: State = ()
    sees: bool = False  # for unevaluatedProperties: a schema that holds, not one that is failed, has looked at these

    def of(self, name: str) -> list[State]:
        found = [self.named[name]] if name in self.named else []
        found += [state for pattern, state in self.patterns if matches(pattern_term(pattern), name)]
        return found or [self.rest]


@dataclass(frozen=True)
class Object:
    low: int = 0
    high: int | None = None
    required: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    keys: tuple[Term, ...] = ()  # that every name is in
    some: tuple[tuple[Term, State], ...] = ()  # there is a property with such a name and value


Shape = Fixed | Number | Text | Array | Object
NULL, BOOLEAN = Fixed((None,)), Fixed((False, True))
EVERY: tuple[Shape, ...] = (NULL, BOOLEAN, Number(), Text(), Array(), Object())
_SHAPE_OF: dict[str, Shape] = {"null": NULL, "boolean": BOOLEAN, "number": Number(), "integer": Number(whole=True), "string": Text(), "array": Array(), "object": Object()}  # fmt: skip
_FRACTIONAL = seq(
    rep(lit("-"), 0, 1), rep(DIGIT, 1, DIGITS), lit("."), rep(DIGIT, 0, DIGITS), NONZERO, rep(lit("0"), 0, DIGITS)
)


def join(*states: State) -> State:
    """All of the states at once."""
    found: dict[Any, Item] = {}
    for item in (item for state in states for item in state):
        if item.node is not item.positive:  # true says nothing, and neither does not false
            if isinstance(item.node, bool):
                return FALSE
            found.setdefault(item.key, item)
            if (*item.key[:2], not item.positive) in found:
                return FALSE
    return tuple(found.values())


@lru_cache(maxsize=2048)
def text_term(shape: Text) -> Term:
    """The characters of a string shape; NONE where there are none."""
    if shape.high is not None and shape.low > shape.high:
        return NONE
    plain = [term for term in dict.fromkeys(shape.terms) if term.op != "not"]
    rest = [term for term in dict.fromkeys(shape.terms) if term.op == "not"]
    found = _fitted(plain[0], shape.low, shape.high) if len(plain) == 1 and not rest else None
    if found is None:
        if shape.low or shape.high is not None or not plain:
            plain.append(rep(Term("set", ranges=ALL), shape.low, shape.high))
        found = both(*plain, *rest)
    return NONE if has(found, "and") and nothing(found) else found


def _fitted(term: Term, low: int, high: int | None) -> Term | None:
    """A term held to a length where that is a matter of its own bounds: all parts as long as they are but one repetition."""
    shortest, longest = lengths(term)
    if shortest >= low and (high is None or (longest is not None and longest <= high)):
        return term
    parts = list(term.parts) if term.op == "seq" else [term]
    loose = [i for i, part in enumerate(parts) if lengths(part)[0] != lengths(part)[1]]
    if len(loose) != 1 or parts[loose[0]].op != "rep" or parts[loose[0]].parts[0].op != "set":
        return None
    one = parts[loose[0]]
    others = sum(lengths(part)[0] for i, part in enumerate(parts) if i != loose[0])
    least, most = (
        max(one.low, low - others),
        one.high if high is None else min(high - others, high if one.high is None else one.high),
    )
    if most is not None and most < least:
        return NONE
    return seq(*parts[: loose[0]], rep(one.parts[0], least, most), *parts[loose[0] + 1 :])


@lru_cache(maxsize=1024)
def number_term(shape: Number) -> Term:
    """The digits of a number shape; NONE where there are none."""
    low, high, step = shape.low, shape.high, shape.step
    if shape.whole:
        step = Fraction(1) if step is None else _common_multiple(step, Fraction(1))
    if step is not None:  # bounds on the grid
        first = None if low is None else math.floor(low[0] / step) + 1 if low[1] else math.ceil(low[0] / step)
        last = None if high is None else math.ceil(high[0] / step) - 1 if high[1] else math.floor(high[0] / step)
        if first is not None and last is not None and (first > last or (last - first < MAX_LISTED and step != 1)):
            return words(plain_digits(i * step) for i in range(first, last + 1)) if first <= last else NONE
        endless = step != 1 or bool(shape.terms)  # a count of digits would be multiplied by the remainders
        if step.denominator == 1:
            whole = [None if n is None else int(n * step) for n in (first, last)]
            found = integers(whole[0], whole[1], endless)
        else:
            bounds = [None if n is None else (n * step, False) for n in (first, last)]
            found = decimals(bounds[0], bounds[1], plain=True)
        found = found if step == 1 else both(found, multiples(step))
    else:
        found = decimals(low, high, plain=bool(shape.terms))
    if found is NONE or not shape.terms:
        return found
    found = both(found, *shape.terms)
    return NONE if found.op == "and" and nothing(found) else found


def _common_multiple(a: Fraction, b: Fraction) -> Fraction:
    return Fraction(math.lcm(a.numerator * b.denominator, b.numerator * a.denominator), a.denominator * b.denominator)


def _touch(a: Text, b: Text) -> bool:
    return (b.high is None or a.low <= b.high + 1) and (a.high is None or b.low <= a.high + 1)


def _closer(a: Any, b: Any, better: Callable[..., Any]) -> Any:
    return a if b is None else b if a is None else better(a, b)


def _tighter(a: Bound, b: Bound) -> Bound:
    return min(a, b, key=lambda bound: (bound[0], not bound[1]))


class Meetings:
    """Shapes that are known, and what becomes of them where they meet: states are expanded, shapes intersected, the empty ones left out."""

    def __init__(self, document: Document) -> None:
        self.document, self.check = document, Check(document)
        self.known: dict[tuple[Any, ...], list[Shape]] = {}
        self.live: dict[tuple[Any, ...], bool] = {}
        self.reason, self.depth, self.work = "", 0, 0

    # states

    def item(self, node: Any, base: str, path: str, positive: bool = True) -> State:
        base = self.document.within(node, base)
        for _ in range(MAX_DEPTH):
            if not isinstance(node, dict) or node.keys() & CONSTRAINING != {"$ref"} or not isinstance(node["$ref"], str):
                break
            node, base = self.document.find(node["$ref"], base, path)  # which it says, and nothing more
            base = self.document.within(node, base)
        if isinstance(node, dict) and node.keys().isdisjoint(CONSTRAINING):
            node = True
        if isinstance(node, bool):
            return () if node is positive else FALSE
        if not isinstance(node, dict):
            refuse(json.dumps(node)[:40], path)
        return (Item(node, base, positive, path, self.document.number(node)),)

    def expand(self, state: State) -> list[Shape]:
        key = tuple(item.key for item in state)
        if key not in self.known:
            if len(self.known) > MAX_STATES:
                raise Unsupported("a schema of so many places and alternatives is not supported")
            found = _EVERY
            for item in state:
                found = self.meet(found, self.shapes(item, ()))
            self.known[key] = self.merged(found)
        return self.known[key]

    def satisfiable(self, state: State) -> bool:
        """Whether a value is known, or may be, for the state: too deep to say is yes."""
        if state == ():
            return True
        key = tuple(item.key for item in state)
        if key not in self.live:
            if self.depth > 12:
                return True
            self.live[key] = True  # while it is being found out: what only depends on itself is pruned in the end
            self.depth += 1
            self.live[key] = any(self.alive(shape) for shape in self.expand(state))
            self.depth -= 1
        return self.live[key]

    def alive(self, shape: Shape) -> bool:
        if isinstance(shape, Number):
            return number_term(shape) is not NONE
        if isinstance(shape, Text):
            return text_term(shape) is not NONE
        if isinstance(shape, Array):
            if shape.high is not None and shape.low > shape.high:
                return False
            places = range(min(shape.low, len(shape.first) + 1))
            return all(self.satisfiable(self.at(shape, i)) for i in places) and all(
                not low or self.satisfiable(state) for state, low, _ in shape.contains
            )
        if isinstance(shape, Object):
            if shape.high is not None and max(len(shape.required), shape.low) > shape.high:
                return False
            for name in shape.required:
                if not self.satisfiable(self.of(shape, name)):
                    return self.dead(f"the required property {json.dumps(name)[:80]} can have no value")
        return True

    def dead(self, reason: str) -> bool:
        """Keeps the first reason why something can have no value."""
        self.reason = self.reason or reason
        return False

    @staticmethod
    def at(shape: Array, i: int) -> State:
        return shape.first[i] if i < len(shape.first) else shape.rest

    @staticmethod
    def of(shape: Object, name: str) -> State:
        """What the value of a property must be."""
        if not all(matches(key, name) for key in shape.keys):
            return FALSE
        return join(*(state for source in shape.sources for state in source.of(name)))

    # meeting

    def meet(self, left: list[Shape], right: list[Shape]) -> list[Shape]:
        if right is _EVERY or left == right:
            return left
        if left is _EVERY:
            return right
        found = []
        for a in left:
            for b in right:
                met = self.meet_two(a, b)
                if met is not None and self.alive(met):
                    found.append(met)
        if len(found) > MAX_ALTERNATIVES:
            raise Unsupported("a schema of so many alternatives at one place is not supported")
        return found

    def overlap(self, a: Shape, b: Shape) -> bool:
        met = self.meet_two(a, b)
        return met is not None and self.alive(met)

    def meet_two(self, a: Shape, b: Shape) -> Shape | None:
        self.work += 1
        if self.work > MAX_WORK:
            raise Unsupported("a schema of so many alternatives is not supported")
        if isinstance(b, Fixed) and not isinstance(a, Fixed):
            a, b = b, a
        if isinstance(a, Fixed):
            if isinstance(b, Fixed) and a.keys.isdisjoint(b.keys):
                return None
            kept = tuple(v for v in a.values if (key_of(v) in b.keys if isinstance(b, Fixed) else self.admits(b, v)))
            return Fixed(kept) if kept else None
        if isinstance(a, Number) and isinstance(b, Number):
            return Number(
                a.whole or b.whole,
                _closer(a.low, b.low, max),
                _closer(a.high, b.high, _tighter),
                _closer(a.step, b.step, _common_multiple),
                a.terms + b.terms,
            )
        if isinstance(a, Text) and isinstance(b, Text):
            return Text(max(a.low, b.low), _closer(a.high, b.high, min), a.terms + b.terms)
        if isinstance(a, Array) and isinstance(b, Array):
            count = max(len(a.first), len(b.first))
            first = tuple(join(self.at(a, i), self.at(b, i)) for i in range(count))
            return Array(max(a.low, b.low), _closer(a.high, b.high, min), first, join(a.rest, b.rest), a.contains + b.contains, a.unique or b.unique, a.blind or b.blind)  # fmt: skip
        if isinstance(a, Object) and isinstance(b, Object):
            required = tuple(dict.fromkeys(a.required + b.required))
            sources = tuple(dict.fromkeys(a.sources + b.sources))
            return Object(max(a.low, b.low), _closer(a.high, b.high, min), required, sources, a.keys + b.keys, a.some + b.some)
        return None

    def admits(self, shape: Shape, value: Any) -> bool:
        if isinstance(shape, Text):
            return (
                isinstance(value, str)
                and (not shape.terms or matches(text_term(shape), value))
                and (shape.low <= len(value) <= (len(value) if shape.high is None else shape.high))
            )
        if isinstance(shape, Number):
            if not is_a(value, "integer" if shape.whole else "number", self.document.draft):
                return False
            number = exact(value)
            low, high = shape.low or (number, False), shape.high or (number, False)
            if not (low[0] <= number <= high[0]) or (low[1] and low[0] == number) or (high[1] and high[0] == number):
                return False
            if shape.step is not None and (number / shape.step).denominator != 1:
                return False
            plain = plain_digits(number)
            return all(not matches(t.parts[0], plain) if t.op == "not" else matches(t, plain) for t in shape.terms)
        if isinstance(shape, Array):
            return isinstance(value, list) and self._admits_items(shape, value)
        return isinstance(shape, Object) and isinstance(value, dict) and self._admits_members(shape, value)

    def holds(self, state: State, value: Any) -> bool:
        return all(self.check.holds(item.node, item.base, value) == item.positive for item in state)

    def _admits_items(self, shape: Array, value: list[Any]) -> bool:
        if not shape.low <= len(value) <= (len(value) if shape.high is None else shape.high):
            return False
        if shape.unique and len({key_of(item) for item in value}) < len(value):
            return False
        counts = [(sum(self.holds(state, item) for item in value), low, high) for state, low, high in shape.contains]
        if not all(low <= count and (high is None or count <= high) for count, low, high in counts):
            return False
        return all(self.holds(self.at(shape, i), item) for i, item in enumerate(value))

    def _admits_members(self, shape: Object, value: dict[str, Any]) -> bool:
        if not shape.low <= len(value) <= (len(value) if shape.high is None else shape.high):
            return False
        if not all(name in value for name in shape.required):
            return False
        if not all(any(matches(key, n) and self.holds(state, v) for n, v in value.items()) for key, state in shape.some):
            return False
        return all(self.holds(self.of(shape, name), part) for name, part in value.items())

    @staticmethod
    def merged(shapes: list[Shape]) -> list[Shape]:
        """Listed values together, and nothing twice."""
        fixed = [value for shape in shapes if isinstance(shape, Fixed) for value in shape.values]
        rest: list[Shape] = []
        for shape in dict.fromkeys(shape for shape in shapes if not isinstance(shape, Fixed)):
            last = rest[-1] if rest else None
            if isinstance(shape, Text) and isinstance(last, Text) and shape.terms == last.terms and _touch(shape, last):
                high = None if shape.high is None or last.high is None else max(shape.high, last.high)
                rest[-1] = Text(min(shape.low, last.low), high, shape.terms)
            else:
                rest.append(shape)
        kept: dict[Any, Any] = {}
        for value in fixed:
            kept.setdefault(key_of(value), value)
        return [*([Fixed(tuple(kept.values()))] if kept else []), *rest]

    def shapes(self, item: Item, seen: tuple[Any, ...]) -> list[Shape]:
        raise NotImplementedError


class Shapes(Meetings):
    """States taken apart into shapes: a value satisfies the state if it is in one of them."""

    # one schema

    def shapes(self, item: Item, seen: tuple[Any, ...]) -> list[Shape]:
        """The shapes of one schema, or of what does not satisfy it; `seen` are those that led here on the same value."""
        if isinstance(item.node, bool):
            return _EVERY if item.node is item.positive else []
        if item.key in seen or len(seen) > MAX_DEPTH:
            raise Unsupported(f"the recursion at {item.path[:300]} repeats before it has read anything, which is not supported")
        key = (item.key,)
        if key not in self.known:
            node = self.document.siblings(self.document.node(item.node, item.path))
            made = (
                self.satisfied(node, item, (*seen, item.key)) if item.positive else self.failed(node, item, (*seen, item.key))
            )
            self.known[key] = self.merged(made) if made is not _EVERY else made
        return self.known[key]

    def sub(self, item: Item, step: str, node: Any, positive: bool, seen: tuple[Any, ...]) -> list[Shape]:
        """The shapes of a schema that stands in another for the same value."""
        return self.entered(node, item.base, f"{item.path}.{step}", positive, seen)

    def entered(self, node: Any, base: str, path: str, positive: bool, seen: tuple[Any, ...]) -> list[Shape]:
        state = self.item(node, base, path, positive)
        return _EVERY if state == () else self.shapes(state[0], seen)

    def satisfied(self, node: dict[str, Any], item: Item, seen: tuple[Any, ...]) -> list[Shape]:
        found = self.typed(node, item)
        for made in self.applied(node, item, seen):
            found = self.meet(found, made)
        if "unevaluatedProperties" in node or "unevaluatedItems" in node:
            found = self.unevaluated(node, item, found)
        return found

    def typed(self, node: dict[str, Any], item: Item) -> list[Shape]:
        """What the keywords of each type leave of it."""
        kinds = kinds_of(node) or list(_SHAPE_OF)
        if "number" in kinds:
            kinds = [kind for kind in kinds if kind != "integer"]
        found: list[Shape] = []
        if node.keys().isdisjoint(_OF_A_TYPE):
            found, kinds = _EVERY, []
        for kind in dict.fromkeys(kinds):
            shape = _SHAPE_OF[kind]
            words_of = OF_TYPE.get("number" if kind == "integer" else kind, ())
            made = self._TYPED[kind](self, node, item) if any(word in node for word in words_of) else shape
            if made is shape or self.alive(made):
                found.append(made)
            else:
                said = ", ".join(f"'{word}'" for word in words_of if word in node)
                self.dead(f"{said} at {item.path[:300]} leave{'s' * (said.count(',') == 0)} no {kind}")
        for word in ("enum", "const"):
            if word in node:
                members: list[Shape] = [Fixed(tuple(node["enum"] if word == "enum" else [node["const"]]))]
                found = self.meet(members, found)
                if not found:
                    self.dead(f"'{word}' at {item.path[:300]} has no member that satisfies the other keywords")
        return found

    def _number(self, node: dict[str, Any], item: Item) -> Shape:
        low, high = self.bounds(node, item)
        step = exact(node["multipleOf"]) if "multipleOf" in node else None
        return Number(node.get("type") == "integer", low, high, step)

    def bounds(self, node: dict[str, Any], item: Item) -> tuple[Bound | None, Bound | None]:
        """Without those that no number which is written here comes up to: the most that NUMBER has is 20 digits and e99."""
        kept = dict(node)
        for word in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
            if isinstance(bound := node.get(word), bool) or not bound:
                continue
            if abs(bound) >= 10**120 and (bound > 0) == (word in ("maximum", "exclusiveMaximum")):
                del kept[word]
            elif abs(bound) >= 10**40:
                refuse(word, item.path, "over 40 digits is not supported")
            elif exact(bound).denominator > 10**25:
                refuse(word, item.path, "of more than 25 places is not supported")
        return bounds_of(kept)

    def _integer(self, node: dict[str, Any], item: Item) -> Shape:
        return self._number({**node, "type": "integer"}, item)

    def _text(self, node: dict[str, Any], item: Item) -> Shape:
        low, high = int(node.get("minLength", 0)), node.get("maxLength")
        if low > MAX_REPEAT:
            refuse("minLength", item.path, f"over {MAX_REPEAT} is not supported")
        terms = [self.pattern(node["pattern"], item)] if "pattern" in node else []
        terms += [format_term(node["format"])] if node.get("format") in FORMATS else []
        return Text(low, None if high is None else int(min(high, MAX_REPEAT)), tuple(terms))

    def pattern(self, pattern: str, item: Item, wide: bool = False) -> Term:
        try:
            return pattern_term(pattern, wide)
        except Unsupported as error:
            raise Unsupported(str(error).replace("in 'pattern'", f"in 'pattern' at {item.path[:300]}")) from None

    def _array(self, node: dict[str, Any], item: Item) -> Shape:
        low, high = int(node.get("minItems", 0)), node.get("maxItems")
        if low > MAX_REPEAT:
            refuse("minItems", item.path, f"over {MAX_REPEAT} is not supported")
        first, rest = tuple_of(node)
        word = "items" if isinstance(node.get("items"), list) else "prefixItems"
        places = tuple(self.item(sub, item.base, f"{item.path}.{word}[{i}]") for i, sub in enumerate(first))
        contains = ()
        if "contains" in node:
            state = self.item(node["contains"], item.base, f"{item.path}.contains")
            contains = ((state, int(node.get("minContains", 1)), node.get("maxContains")),)  # type: ignore[assignment]
        return Array(
            low,
            None if high is None else int(min(high, MAX_REPEAT)),
            places,
            self.item(rest, item.base, f"{item.path}.items"),
            contains,
            node.get("uniqueItems", False),
        )

    def _object(self, node: dict[str, Any], item: Item) -> Shape:
        low, high = int(node.get("minProperties", 0)), node.get("maxProperties")
        named = {
            name: self.item(sub, item.base, step_to(f"{item.path}.properties", name))
            for name, sub in node.get("properties", {}).items()
        }
        patterns = []
        for pattern, sub in node.get("patternProperties", {}).items():
            self.pattern(pattern, item)
            patterns.append((pattern, self.item(sub, item.base, f"{item.path}.patternProperties")))
        rest = self.item(node.get("additionalProperties", True), item.base, f"{item.path}.additionalProperties")
        keys = (
            ()
            if node.get("propertyNames", True) is True
            else (self.key_term(self.item(node["propertyNames"], item.base, f"{item.path}.propertyNames")),)
        )
        sources = (Source(named, tuple(patterns), rest, True),) if named or patterns or rest else ()
        return Object(low, None if high is None else int(high), tuple(dict.fromkeys(required_of(node))), sources, keys)

    def key_term(self, state: State) -> Term:
        """The names that satisfy a state."""
        parts = []
        for shape in self.expand(state):
            if isinstance(shape, Fixed):
                parts.append(words(value for value in shape.values if isinstance(value, str)))
            elif isinstance(shape, Text):
                parts.append(text_term(shape))
        return alt(parts)

    _TYPED: dict[str, Callable[[Shapes, dict[str, Any], Item], Shape]] = {
        "object": _object,
        "array": _array,
        "string": _text,
        "number": _number,
        "integer": _integer,
    }

    def applied(self, node: dict[str, Any], item: Item, seen: tuple[Any, ...]) -> Iterator[list[Shape]]:
        """What each keyword that applies other schemas to the same value leaves of all values."""
        target = self.document.target(node, item.base, item.path)
        if target:
            yield self.entered(*target, item.path, True, seen)
        for i, member in enumerate(node.get("allOf", ())):
            yield self.sub(item, f"allOf[{i}]", member, True, seen)
        if "anyOf" in node:
            yield self.union(self.sub(item, f"anyOf[{i}]", member, True, seen) for i, member in enumerate(node["anyOf"]))
        if "oneOf" in node:
            yield self.exactly_one(node["oneOf"], item, seen)
        if "not" in node:
            yield self.turned("not", item, lambda: self.sub(item, "not", node["not"], False, seen))
        if "if" in node and self.document.draft not in (4, 6) and ("then" in node or "else" in node):
            yield self.turned("if", item, lambda: self.union(self.branches(node, item, True, seen)))
        for name, asked in dependencies_of(node, item.path):
            present: list[Shape] = [Object(required=(name,))]
            if isinstance(asked, list):
                met: list[Shape] = [Object(required=(name, *asked))]
            else:
                met = self.meet(present, self.sub(item, "dependentSchemas", asked, True, seen))
            yield [*EVERY[:-1], Object(sources=(Source({name: FALSE}),)), *met]

    def turned(self, word: str, item: Item, work: Callable[[], list[Shape]]) -> list[Shape]:
        try:
            return work()
        except Unsupported as error:
            if str(error).startswith("'not of"):
                refuse(word, item.path, f"needs {str(error)[1:200]}")
            raise

    def union(self, parts: Iterable[list[Shape]]) -> list[Shape]:
        found: list[Shape] = []
        for part in parts:
            if part is _EVERY:
                return _EVERY
            found += part
            if len(found) > 4 * MAX_ALTERNATIVES:
                raise Unsupported("a schema of so many alternatives at one place is not supported")
        return self.merged(found)

    def branches(self, node: dict[str, Any], item: Item, positive: bool, seen: tuple[Any, ...]) -> Iterator[list[Shape]]:
        """if and then, not if and else; with `positive` False the then and else are not satisfied."""
        for holds, word in ((True, "then"), (False, "else")):
            then = self.sub(item, word, node.get(word, True), positive, seen)
            if then:
                yield self.meet(self.sub(item, "if", node["if"], holds, seen), then)

    def exactly_one(self, members: list[Any], item: Item, seen: tuple[Any, ...]) -> list[Shape]:
        made = [self.sub(item, f"oneOf[{i}]", member, True, seen) for i, member in enumerate(members)]
        found: list[list[Shape]] = []
        listed = [[shape for shape in shapes if isinstance(shape, Fixed)] for shapes in made]
        if sum(map(len, listed)) == sum(map(len, made)):
            times = Counter(key for shapes in listed for key in {key for shape in shapes for key in shape.keys})
            values = [v for shapes in listed for shape in shapes for v in shape.values if times[key_of(v)] == 1]
            return [Fixed(tuple(values))] if values else []
        for i, shapes in enumerate(made):
            mine = shapes
            for j, others in enumerate(made):
                if i != j and any(self.overlap(a, b) for a in mine for b in others):
                    against = self.turned("oneOf", item, lambda j=j: self.sub(item, f"oneOf[{j}]", members[j], False, seen))  # type: ignore[misc]
                    mine = self.meet(mine, against)
            found.append(mine)
        return self.union(found)

    def unevaluated(self, node: dict[str, Any], item: Item, shapes: list[Shape]) -> list[Shape]:
        """What no other keyword has looked at: with shapes, what their sources leave over."""
        found: list[Shape] = []
        for shape in shapes:
            if isinstance(shape, Fixed):
                shape = Fixed(tuple(value for value in shape.values if self.check.holds(item.node, item.base, value)))
                if not shape.values:
                    continue
            if isinstance(shape, Object) and "unevaluatedProperties" in node:
                state = self.item(node["unevaluatedProperties"], item.base, f"{item.path}.unevaluatedProperties")
                seen = [source for source in shape.sources if source.sees]
                if state and not any(source.rest for source in seen):
                    named: dict[str, State] = {name: () for source in seen for name in source.named}
                    patterns = tuple((pattern, ()) for source in seen for pattern, _ in source.patterns)
                    shape = replace(shape, sources=(*shape.sources, Source(named, patterns, state, True)))
            elif isinstance(shape, Array) and "unevaluatedItems" in node:
                state = self.item(node["unevaluatedItems"], item.base, f"{item.path}.unevaluatedItems")
                if state and not shape.rest:
                    if shape.contains or shape.blind:
                        refuse("unevaluatedItems", item.path, "beside 'contains' or 'not' is not supported")
                    shape = replace(shape, rest=state)
            if self.alive(shape):
                found.append(shape)
        return found

    def failed(self, node: dict[str, Any], item: Item, seen: tuple[Any, ...]) -> list[Shape]:
        raise NotImplementedError


class WithFailures(Shapes):
    """What does not satisfy a schema, word by word: for `not`, and for what `oneOf` and `if` leave out."""

    # what does not satisfy a schema

    def failed(self, node: dict[str, Any], item: Item, seen: tuple[Any, ...]) -> list[Shape]:
        """A value fails a schema when it fails one of its keywords."""
        found: list[Shape] = []
        for word in {self._WITH.get(word, word) for word in node if word in CONSTRAINING}:
            made = self._FAILED[word](self, node, item) if word in self._FAILED else self.failed_applied(word, node, item, seen)
            found += [self.unseen(shape) for shape in made if self.alive(shape)]
        return self.union([found])

    @staticmethod
    def unseen(shape: Shape) -> Shape:
        if isinstance(shape, Object):
            return replace(
                shape, sources=tuple(replace(source, sees=False) if source.sees else source for source in shape.sources)
            )
        return replace(shape, blind=True) if isinstance(shape, Array) else shape

    _WITH = dict.fromkeys(("maximum", "exclusiveMinimum", "exclusiveMaximum"), "minimum")  # turned round together
    _WITH |= {
        "const": "enum",
        "prefixItems": "items",
        "additionalItems": "items",
        "minContains": "contains",
        "maxContains": "contains",
    }
    _WITH |= {"then": "if", "else": "if"}

    def no_negation(self, word: str, item: Item) -> NoReturn:
        raise Unsupported(f"'not of '{word}' at {item.path[:300]}, which is not supported")

    def failed_applied(self, word: str, node: dict[str, Any], item: Item, seen: tuple[Any, ...]) -> list[Shape]:
        if word == "$ref":
            target = self.document.find(node["$ref"], item.base, item.path)
            return self.entered(*target, item.path, False, seen)
        if word == "not":
            return self.sub(item, "not", node["not"], True, seen)
        if word == "allOf":
            return self.union(self.sub(item, f"allOf[{i}]", member, False, seen) for i, member in enumerate(node["allOf"]))
        if word in ("anyOf", "oneOf"):
            none: list[Shape] = _EVERY
            for i, member in enumerate(node[word]):
                none = self.meet(none, self.sub(item, f"{word}[{i}]", member, False, seen))
            made = (
                [self.sub(item, f"{word}[{i}]", member, True, seen) for i, member in enumerate(node[word])]
                if word == "oneOf"
                else []
            )
            return self.union([none, *(self.meet(a, b) for i, a in enumerate(made) for b in made[:i])])
        if word == "if":
            return (
                self.union(self.branches(node, item, False, seen)) if "if" in node and self.document.draft not in (4, 6) else []
            )
        if word in ("dependentRequired", "dependentSchemas", "dependencies"):
            found: list[Shape] = []
            for name, asked in dependencies_of({word: node[word]}, item.path):
                present: list[Shape] = [Object(required=(name,))]
                if isinstance(asked, list):
                    found += [Object(required=(name,), sources=(Source({one: FALSE}),)) for one in asked if one != name]
                else:
                    found += self.meet(present, self.sub(item, word, asked, False, seen))
            return found
        self.no_negation(word, item)

    def _not_type(self, node: dict[str, Any], item: Item) -> list[Shape]:
        kinds = kinds_of(node) or []
        found = [_SHAPE_OF[kind] for kind in (*TYPES, "number") if kind not in kinds]
        if "integer" in kinds and "number" not in kinds:
            found = [shape for shape in found if not isinstance(shape, Number)] + [Number(terms=(_FRACTIONAL,))]
        return found

    def _not_values(self, node: dict[str, Any], item: Item) -> list[Shape]:
        """Neither in enum nor const, or not in both: a value fails when it is missing in one of them."""
        lists = [*([node["enum"]] if "enum" in node else []), *([[node["const"]]] if "const" in node else [])]
        return [shape for members in lists for shape in self._none_of(members, item)]

    def _none_of(self, members: list[Any], item: Item) -> list[Shape]:
        left = [value for value in (None, False, True) if all(key_of(value) != key_of(member) for member in members)]
        texts = dict.fromkeys(member for member in members if isinstance(member, str))
        numbers = [exact(member) for member in members if is_a(member, "number")]
        digits = [seq(lit(plain_digits(number)), rep(lit("0"), 0, None) if number.denominator > 1 else rep(seq(lit("."), rep(lit("0"), 1, None)), 0, 1)) for number in numbers]  # fmt: skip
        found: list[Shape] = [Fixed(tuple(left))] if left else []
        found += [Text(terms=(other(words(texts)),) if texts else ()), Number(terms=(other(alt(digits)),) if digits else ())]
        for shape, kind in ((Array(), list), (Object(), dict)):
            same = [member for member in members if isinstance(member, kind)]
            if any(same):
                self.no_negation("enum", item)
            found.append(replace(shape, low=1) if same else shape)
        return found

    def _not_required(self, node: dict[str, Any], item: Item) -> list[Shape]:
        return [Object(sources=(Source({name: FALSE}),)) for name in required_of(node)]

    def _not_properties(self, node: dict[str, Any], item: Item) -> list[Shape]:
        found: list[Shape] = []
        for name, sub in node["properties"].items():
            state = self.item(sub, item.base, step_to(f"{item.path}.properties", name), False)
            if state != FALSE and self.satisfiable(state):
                found.append(Object(required=(name,), sources=(Source({name: state}),)))
        return found

    def _not_additional(self, node: dict[str, Any], item: Item) -> list[Shape]:
        state = self.item(node["additionalProperties"], item.base, f"{item.path}.additionalProperties", False)
        known = [other(words(node["properties"]))] if node.get("properties") else []
        known += [other(self.pattern(pattern, item, True)) for pattern in node.get("patternProperties", {})]
        return [] if state == FALSE else [Object(some=((both(ANY, *known), state),))]

    def _not_patterns(self, node: dict[str, Any], item: Item) -> list[Shape]:
        states = [(pattern, self.item(sub, item.base, item.path, False)) for pattern, sub in node["patternProperties"].items()]
        return [Object(some=((self.pattern(pattern, item), state),)) for pattern, state in states if state != FALSE]

    def _not_names(self, node: dict[str, Any], item: Item) -> list[Shape]:
        found = self.key_term(self.item(node["propertyNames"], item.base, f"{item.path}.propertyNames", False))
        return [] if found is NONE else [Object(some=((found, ()),))]

    def _not_items(self, node: dict[str, Any], item: Item) -> list[Shape]:
        first, rest = tuple_of(node)
        found: list[Shape] = []
        for i, sub in enumerate(first):
            state = self.item(sub, item.base, f"{item.path}.prefixItems[{i}]", False)
            if state != FALSE:
                found.append(Array(low=i + 1, first=(*[()] * i, state)))
        state = self.item(rest, item.base, f"{item.path}.items", False)
        if state == ():
            found.append(Array(low=len(first) + 1))
        elif state != FALSE:
            if first:
                self.no_negation("items", item)
            found.append(Array(contains=((state, 1, None),)))
        return found

    def _not_contains(self, node: dict[str, Any], item: Item) -> list[Shape]:
        if "contains" not in node:
            return []
        low, high = int(node.get("minContains", 1)), node.get("maxContains")
        state = self.item(node["contains"], item.base, f"{item.path}.contains")
        opposite = self.item(node["contains"], item.base, f"{item.path}.contains", False)
        found: list[Shape] = [Array(rest=opposite) if low == 1 else Array(contains=((state, 0, low - 1),))] if low else []
        return found + ([Array(contains=((state, int(high) + 1, None),))] if high is not None else [])

    def _not_bounds(self, node: dict[str, Any], item: Item) -> list[Shape]:
        low, high = self.bounds(node, item)
        found: list[Shape] = [Number(high=(low[0], not low[1]))] if low else []
        return found + ([Number(low=(high[0], not high[1]))] if high else [])

    def _not_multiple(self, node: dict[str, Any], item: Item) -> list[Shape]:
        found = both(decimals(None, None, True), multiples(exact(node["multipleOf"])))
        zeros = seq(rep(lit("0"), 0, None), rep(seq(lit("."), rep(lit("0"), 1, None)), 0, 1))  # more of them change nothing
        return [Number(terms=(other(seq(found, zeros)),))]

    def _not_pattern(self, node: dict[str, Any], item: Item) -> list[Shape]:
        return [Text(terms=(other(self.pattern(node["pattern"], item, True)),))]

    def _not_format(self, node: dict[str, Any], item: Item) -> list[Shape]:
        return [Text(terms=(other(format_term(node["format"])),))] if node["format"] in FORMATS else []

    def _not_count(word: str, shape: Any, above: bool) -> Any:  # type: ignore[misc]  # noqa: N805
        def failed(self: WithFailures, node: dict[str, Any], item: Item) -> list[Shape]:
            limit = int(node[word])
            return [replace(shape, low=limit + 1)] if above else [replace(shape, high=limit - 1)] if limit else []

        return failed

    _FAILED: dict[str, Callable[[WithFailures, dict[str, Any], Item], list[Shape]]] = {
        "type": _not_type,
        "enum": _not_values,
        "required": _not_required,
        "properties": _not_properties,
        "additionalProperties": _not_additional,
        "patternProperties": _not_patterns,
        "propertyNames": _not_names,
        "items": _not_items,
        "contains": _not_contains,
        "minimum": _not_bounds,
        "multipleOf": _not_multiple,
        "pattern": _not_pattern,
        "format": _not_format,
        "minLength": _not_count("minLength", Text(), False),
        "maxLength": _not_count("maxLength", Text(), True),
        "minItems": _not_count("minItems", Array(), False),
        "maxItems": _not_count("maxItems", Array(), True),
        "minProperties": _not_count("minProperties", Object(), False),
        "maxProperties": _not_count("maxProperties", Object(), True),
    }


_EVERY: list[Shape] = list(EVERY)
_OF_A_TYPE = {"type", *(word for words_of in OF_TYPE.values() for word in words_of)}


# ---- shapes as a grammar


@lru_cache(maxsize=512)
def names_term(names: tuple[str, ...]) -> Term:
    return words(names)


@lru_cache(maxsize=1024)
def _meet(one: str, two: str) -> bool:
    return not nothing(both(pattern_term(one), pattern_term(two)))


def _together(patterns: Sequence[str]) -> Iterator[set[str]]:
    """The sets of patterns that one name may be found by, as far as each two of them meet."""
    todo: list[tuple[set[str], int]] = [(set(), 0)]
    while todo:
        found, at = todo.pop()
        if at == len(patterns):
            yield found
            continue
        todo.append((found, at + 1))
        if all(_meet(patterns[at], one) for one in found):
            todo.append((found | {patterns[at]}, at + 1))


def _compact(value: Any) -> str:
    """As JSON, in UTF-8. Raises ValueError."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text.encode()
    return text


class Schema:
    """One schema on its way to a grammar: a rule for each state."""

    def __init__(self, root: Any, draft: int = 0, strict: bool = False) -> None:
        self.document, self.strict = Document(root, draft), strict
        self.shapes, self.grammar = WithFailures(self.document), Grammar()
        self.refs: dict[tuple[Any, ...], Term] = {}
        self.todo: deque[tuple[str, State]] = deque()
        self.pairs: dict[Any, Term] = {}

    def text(self) -> str:
        root = self.state(self.shapes.item(self.document.root, "", "$"))
        while self.todo:
            name, state = self.todo.popleft()
            self.grammar.rules[name] = self.term(state)
        try:
            return self.grammar.text(root)
        except Unsupported as error:
            if "can never end" in str(error):
                raise Unsupported(
                    f"a schema that no value satisfies is not supported: {self.shapes.reason or ('it is false' if self.document.root is False else 'it can never end')}"
                ) from None
            raise

    def state(self, state: State) -> Term:
        key = tuple(item.key for item in state)
        if key not in self.refs:
            self.refs[key] = Term("ref", self.grammar.name())
            self.todo.append((self.refs[key].text, state))
        return self.refs[key]

    def term(self, state: State) -> Term:
        if state == ():
            return self.anything()
        return alt([self._KIND[type(shape)](self, shape, state) for shape in self.shapes.expand(state)])

    def anything(self) -> Term:
        free = self.state(())
        free_text = self.string(ANY)
        members = self.repeated("{", seq(self.string(ANY, ":"), free), "}", 0, None)
        return alt(
            [
                free_text,
                self.grammar.share(NUMBER),
                *map(lit, ("true", "false", "null")),
                members,
                self.repeated("[", free, "]", 0, None),
            ]
        )

    def string(self, term: Term, after: str = "") -> Term:
        """A string, or with its colon a name: one token, as a name that is known is one."""
        return NONE if term is NONE else self.grammar.rule(quoted(term, after))

    def fixed(self, shape: Fixed, state: State) -> Term:
        try:
            texts = [_compact(value) for value in shape.values if not isinstance(value, (dict, list))]
            return self.grammar.share(
                alt([words(dict.fromkeys(texts)), *(self.listed(v) for v in shape.values if isinstance(v, (dict, list)))])
            )
        except ValueError:
            refuse("enum", state[0].path, "holds a value that JSON cannot carry")

    def listed(self, value: Any) -> Term:
        """A listed value: an array or object in as many tokens as anywhere else, so that it is told from what begins alike."""
        if not isinstance(value, (dict, list)):
            return self.grammar.rule(lit(_compact(value)))
        parts = (
            [self.listed(one) for one in value]
            if isinstance(value, list)
            else [seq(self.string(lit(name), ":"), self.listed(one)) for name, one in value.items()]
        )
        inside = seq(*[piece for part in parts for piece in (lit(","), part)][1:])
        found = Term("ref", self.grammar.name())
        self.grammar.rules[found.text] = (
            self.framed("[", inside, "]") if isinstance(value, list) else self.framed("{", inside, "}")
        )
        return found

    def framed(self, start: str, inside: Term, stop: str) -> Term:
        """In brackets, which are tokens of their own even where nothing is in them."""
        return (
            seq(lit(start), inside, lit(stop)) if inside.op != "lit" else seq(lit(start), self.grammar.rule(inside), lit(stop))
        )

    def repeated(self, start: str, item: Term, stop: str, low: int, high: int | None) -> Term:
        """Any number of an item, with commas."""
        item = self.grammar.share(item)
        if high == 0 or item is NONE:
            return self.framed(start, EMPTY if not low else NONE, stop)
        more = rep(self.grammar.share(seq(lit(","), item)), max(low - 1, 0), None if high is None else high - 1)
        return self.framed(start, rep(self.grammar.share(seq(item, more)), min(low, 1), 1), stop)

    # arrays

    def array(self, shape: Array, state: State) -> Term:
        low, high = shape.low, shape.high
        if shape.unique and (high is None or high > 1):
            return self.distinct(shape, state)
        if shape.contains:
            return self.containing(shape, state)
        if not shape.first:
            return self.repeated("[", self.state(shape.rest), "]", low, high)
        count = len(shape.first) if high is None else min(len(shape.first), high)
        tail = EMPTY
        if high is None or high > count:
            more = self.grammar.share(seq(lit(","), self.state(shape.rest)))
            tail = rep(more, max(low - count, 0), None if high is None else high - count)
        for i in reversed(range(count)):
            here = seq(lit("," if i else ""), self.state(shape.first[i]), tail)
            tail = self.grammar.share(here if i < low else alt([here, EMPTY]))
        return self.framed("[", tail, "]")

    def counted(
        self,
        shape: Array,
        start: Any,
        step: Callable[[Any, int], Iterable[tuple[State | Term, Any]]],
        done: Callable[[Any, int], bool],
        state: State,
    ) -> Term:
        """Items one by one, with something remembered of those that came before: a rule for each memory and place."""
        last = max(len(shape.first), shape.low, shape.high or 0)  # beyond it all places are alike
        rules: dict[tuple[Any, int], Term] = {}
        todo = [(start, 0)]

        def rule(memory: Any, place: int) -> Term:
            key = memory, min(place, last + 1) if shape.high is None else place
            if key not in rules:
                if len(rules) > MAX_COUNTED:
                    refuse(
                        "contains" if shape.contains else "uniqueItems", state[0].path, "over so many items is not supported"
                    )
                rules[key] = Term("ref", self.grammar.name())
                todo.append(key)
            return rules[key]

        first = rule(start, 0)
        while todo:
            memory, place = todo.pop()
            ways = [EMPTY] if place >= shape.low and done(memory, place) else []
            if shape.high is None or place < shape.high:
                for item, after in step(memory, place):
                    value = self.grammar.rule(item) if isinstance(item, Term) else self.state(item)
                    ways.append(seq(lit("," if place else ""), value, rule(after, place + 1)))
            self.grammar.rules[rule(memory, place).text] = alt(ways)
        return seq(lit("["), first, lit("]"))

    def containing(self, shape: Array, state: State) -> Term:
        """contains: each item is, or is not, one of those that count."""
        wanted, low, high = shape.contains[0]
        opposite = tuple(item.turned() for item in wanted)
        plain = len(shape.contains) == 1 and high is None  # then an item that is not counted may satisfy it too
        if not plain and (len(opposite) > 1 or len(shape.contains) > 3):
            refuse("contains", state[0].path, "so often is not supported")

        def step(memory: tuple[int, ...], place: int) -> Iterator[tuple[State | Term, Any]]:
            base = self.shapes.at(shape, place)
            if plain:
                yield join(base, wanted), (min(memory[0] + 1, low),)
                yield base if memory[0] >= low or len(opposite) != 1 else join(base, opposite), memory
                return
            for chosen in range(2 ** len(shape.contains)):
                states, after = [base], list(memory)
                for i, (inner, least, most) in enumerate(shape.contains):
                    if chosen >> i & 1:
                        states.append(inner)
                        after[i] = min(after[i] + 1, least if most is None else most + 1)
                    else:
                        states.append(tuple(item.turned() for item in inner) if len(inner) == 1 else FALSE)
                if all(most is None or after[i] <= most for i, (_, _, most) in enumerate(shape.contains)):
                    yield join(*states), tuple(after)

        def done(memory: tuple[int, ...], place: int) -> bool:
            return all(count >= least for count, (_, least, _) in zip(memory, shape.contains, strict=True))

        return self.counted(shape, (0,) * len(shape.contains), step, done, state)

    def distinct(self, shape: Array, state: State) -> Term:
        """uniqueItems of what is listed."""
        values: dict[Any, Any] = {}
        places = range(len(shape.first) if shape.rest == FALSE else len(shape.first) + 1)
        for place in places:
            for one in self.shapes.expand(self.shapes.at(shape, place)):
                if not isinstance(one, Fixed):
                    refuse("uniqueItems", state[0].path, "is not supported where the items are not listed")
                values |= {key_of(value): value for value in one.values}
        members = list(values.values())
        if not members:
            return self.repeated("[", NONE, "]", shape.low, shape.high)
        if shape.contains:
            refuse("uniqueItems", state[0].path, "beside 'contains' is not supported")
        if not shape.first:
            parts = (rep(self.fixed(Fixed((member,)), state), 0, 1) for member in members)
            high = len(members) if shape.high is None else min(shape.high, len(members))
            pick = Term("pick", parts=tuple(parts), low=shape.low, high=high)
            return self.framed("[", self.grammar.pick(pick), "]")
        if len(members) > MAX_UNIQUE:
            refuse("uniqueItems", state[0].path, "of so many, beside 'prefixItems', is not supported")

        def step(memory: Any, place: int) -> Iterator[tuple[State | Term, Any]]:
            for i, member in enumerate(members):
                if i not in memory and self.shapes.holds(self.shapes.at(shape, place), member):
                    yield self.fixed(Fixed((member,)), state), memory | {i}

        return self.counted(shape, frozenset(), step, lambda memory, place: True, state)

    # objects

    def object(self, shape: Object, state: State) -> Term:
        if shape.some:
            return self.with_some(shape, state)
        names = dict.fromkeys(name for source in shape.sources for name in source.named) | dict.fromkeys(shape.required)
        values = {name: self.shapes.of(shape, name) for name in names}
        parts = self.parts(values, shape, state)
        extra = alt(seq(key, self.state(value)) for key, value in self.extras(shape, names, state))
        return self.members(parts, extra, shape, state)

    def parts(self, values: dict[str, State], shape: Object, state: State) -> list[Term]:
        """The properties that have a name of their own, as members for Grammar.pick."""
        pairs = {name: self.pair(name, value, state) for name, value in values.items() if self.shapes.satisfiable(value)}
        return [pair if name in shape.required else rep(pair, 0, 1) for name, pair in pairs.items()]

    def pair(self, name: str, value: State, state: State) -> Term:
        key = name, tuple(item.key for item in value)
        if key not in self.pairs:
            try:
                label = _compact(name)
            except ValueError:
                refuse("properties", state[0].path, "has a name that JSON cannot carry")
            self.pairs[key] = self.grammar.share(seq(lit(label + ":"), self.state(value)))
        return self.pairs[key]

    def extras(self, shape: Object, names: Iterable[str], state: State) -> Iterator[tuple[Term, State]]:
        """(key, value) of the properties without a name of their own, split by the patterns that the key is found by."""
        patterns = tuple(dict.fromkeys(pattern for source in shape.sources for pattern, _ in source.patterns))
        known = [other(names_term(tuple(names)))] if names else []
        classes: list[tuple[list[Term], set[str]]] = []
        for found in _together(patterns):
            hit, missed = (
                [pattern_term(p) for p in patterns if p in found],
                [pattern_term(p, True) for p in patterns if p not in found],
            )
            classes.append(([*hit, *shape.keys, *known, *map(other, missed)], found))
            if len(classes) > 64:
                refuse("patternProperties", state[0].path, "of so many patterns that meet is not supported")
        for terms, found in classes:
            if self.strict and names and not found and all(source.rest == () for source in shape.sources):
                continue
            value = join(*(s for source in shape.sources for s in self.of_patterns(source, found)))
            if value == FALSE or not self.shapes.satisfiable(value):
                continue
            key = text_term(Text(terms=tuple(terms))) if patterns or shape.keys else both(ANY, *known)
            if key is not NONE:
                yield self.string(key, ":"), value

    @staticmethod
    def of_patterns(source: Source, found: set[str]) -> list[State]:
        hit = [state for pattern, state in source.patterns if pattern in found]
        return hit or [source.rest]

    def members(self, parts: list[Term], extra: Term, shape: Object, state: State) -> Term:
        """All properties of an object: in the schema's order where that is strict, else in any."""
        if shape.low > len(parts) + (extra is not NONE):
            self.shapes.dead(f"'minProperties' at {state[0].path[:300]} over the number of known names needs names kept apart")
        parts = parts if extra is NONE else [*parts, rep(self.grammar.share(extra), 0, None)]
        ordered = self.strict or len(parts) <= 1
        high = None if extra is NONE and len(parts) <= (shape.high or 0) else shape.high
        pick = Term("pick", parts=tuple(parts), low=shape.low, high=high)
        try:
            return self.framed("{", self.grammar.in_turn(pick) if ordered else self.grammar.pick(pick), "}")
        except Unsupported as error:
            if "a count of so many" in str(error):
                refuse(
                    "minProperties" if shape.low else "maxProperties",
                    state[0].path,
                    "beside so many properties is not supported",
                )
            raise

    def with_some(self, shape: Object, state: State) -> Term:
        """There is a property of this name and value: one that has a name of its own, or one of the others."""
        if len(shape.some) > 1 or shape.low > 1 or shape.high is not None:
            refuse("not", state[0].path, "of what properties may be is not supported beside other counts")
        ((key, value),) = shape.some
        plain = replace(shape, some=())
        names = dict.fromkeys(name for source in shape.sources for name in source.named) | dict.fromkeys(shape.required)
        ways = []
        for name in names:
            if matches(key, name):
                held = replace(plain, required=(*shape.required, name), sources=(*shape.sources, Source({name: value})))
                ways.append(self.object(held, state) if self.shapes.alive(held) else NONE)
        narrow = [(k, join(v, value)) for k, v in self.extras(replace(plain, keys=(*shape.keys, key)), names, state)]
        one = alt(seq(k, self.state(v)) for k, v in narrow if self.shapes.satisfiable(v))
        if one is not NONE:
            whole = alt(seq(k, self.state(v)) for k, v in self.extras(plain, names, state))
            parts = self.parts({name: self.shapes.of(shape, name) for name in names}, shape, state)
            ways.append(self.ending_with(self.grammar.share(one), parts, whole))
        return alt(ways)

    def ending_with(self, one: Term, parts: list[Term], whole: Term) -> Term:
        """An object whose last property is this one: of a name that is there twice readers take the last."""
        before = parts if whole is NONE else [*parts, rep(self.grammar.share(whole), 0, None)]
        ways = [] if any(part.op != "rep" for part in parts) else [one]
        if before:
            pick = Term("pick", parts=tuple(before), low=1, high=None)
            ways.append(seq(self.grammar.in_turn(pick) if self.strict else self.grammar.pick(pick), lit(","), one))
        return self.framed("{", alt(ways), "}")

    _KIND: dict[Any, Callable[[Schema, Any, State], Term]] = {
        Fixed: fixed,
        Number: lambda self, shape, state: self.grammar.share(number_term(shape)),
        Text: lambda self, shape, state: self.string(text_term(shape)),
        Array: array,
        Object: object,
    }


# ---- what is called from outside


def _bounded(work: Callable[[], Any]) -> Any:
    """Raises Unsupported where the work recurses too deep. It leaves no garbage: to look for some amid it takes longer than the work."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return work()
    except RecursionError:
        raise Unsupported("nesting this deep is not supported") from None
    finally:
        if collects:
            gc.enable()


def schema_grammar(schema: Any, draft: int = 0, strict: bool = False) -> str:
    """Compact JSON that satisfies the schema; Unsupported where that cannot be made.

    `draft` (4, 6, 7, 2019, 2020) is meant where `$schema` names none. `strict` keeps properties in the schema's order, and to those
    that it names where it does not ask for others: what a model is to write, rather than all that a reader may take.
    """
    if nests(schema, 2 * MAX_DEPTH + 2):
        raise Unsupported(f"a schema nested deeper than {MAX_DEPTH} is not supported")
    return str(_bounded(lambda: Schema(schema, draft, strict).text()))


def writing_grammar(schema: Any) -> str:
    """What a model is to write: where the schema leaves it open, its order of properties, and none that it does not name.

    A small model that may add properties adds them for ever. Raises Unsupported.
    """
    try:
        return schema_grammar(schema, strict=True)
    except Unsupported:  # it requires what it does not name, say
        return schema_grammar(schema)


def object_grammar() -> str:
    """Any JSON object."""
    return schema_grammar({"type": "object"})


def regex_grammar(pattern: str) -> str:
    """Text that the whole of the regex matches; ^ and $ may stand at its ends."""
    return str(_bounded(lambda: _whole(Regex(pattern, TEXT).term(EMPTY))))


def _whole(term: Term) -> str:
    if term is NONE or (has(term, "and") and nothing(term)):
        raise Unsupported("a regex that no text matches is not supported")
    return Grammar().text(term)


def regex_matches(pattern: str, text: str) -> bool:
    """Does the whole regex match? In time that grows with the text, not exponentially: a client wrote the pattern."""
    return matches(Regex(pattern, TEXT).term(EMPTY), text)


def choice_grammar(choices: list[str]) -> str:
    """One of the choices, as it is."""
    if not choices or any(not isinstance(choice, str) or "\0" in choice for choice in choices):
        raise Unsupported("a choice that is not text, or an empty list of choices, is not supported")
    if any(0xD800 <= ord(char) < 0xE000 for choice in choices for char in choice):
        raise Unsupported("a choice with half a surrogate pair is not supported")
    return Grammar().text(words(dict.fromkeys(choices)))
