"""Arguments of tool calls, read while they are written, and put out as JSON text. Text to text.

Reader holds the text; on it stand the rules for values that have a syntax of their own, and for those that stand in fences.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, NamedTuple

from tool_syntax import Syntax

Steps = Generator[None, None, Any]  # a rule: yields when it needs more text, returns what it has found


class Part(NamedTuple):
    """kind: "content" | "reasoning" | "call" (text is the whole name) | "arguments" (of the call before: JSON text)."""

    kind: str
    text: str
    tokens: int = 0


class Stops(NamedTuple):
    """Literals to stop at: where one is whole, and where the text ends in what may become one."""

    whole: re.Pattern[str]
    heads: frozenset[str]
    begun: frozenset[str]
    reach: int

    def cut(self, text: str, start: int) -> int:
        """Up to where no literal can have begun."""
        for at in range(max(start, len(text) - self.reach), len(text)):
            if text[at] in self.heads and text[at:] in self.begun:
                return at
        return len(text)


@functools.lru_cache(256)
def stops(literals: tuple[str, ...]) -> Stops:
    ordered = sorted(literals, key=len, reverse=True)
    begun = frozenset(one[:i] for one in literals for i in range(1, len(one)))
    pattern = "|".join(re.escape(one) for one in ordered) or "(?!)"
    return Stops(re.compile(pattern), frozenset(one[0] for one in literals), begun, max(map(len, literals), default=1) - 1)


@functools.lru_cache(256)
def apart(literal: str) -> re.Pattern[str]:
    """The literal, with any whitespace or none where two marks meet in it."""
    return re.compile(r"\s*".join(map(re.escape, re.split(r"(?<=>)\s*(?=<)", literal))))


SPACE = re.compile(r"\s*")
NAME = re.compile(r"[A-Za-z0-9_.\-]*")
SCALAR = re.compile(r"[^\s,:;\[\]{}()<>\"']*")
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
PLAIN = re.compile(r"[^\\\"'\x00-\x1f]+")
WORDS = {"true": "true", "True": "true", "false": "false", "False": "false", "null": "null", "None": "null"}
ESCAPES = {**{c: f"\\{c}" for c in '"\\/bfnrt'}, "'": "'", "a": "\\u0007", "v": "\\u000b", "0": "\\u0000", "\n": ""}
KEYS = frozenset(("name", "arguments", "parameters", "type", "function", "id", "tool_name", "tool_call_id", "thought"))
MOST = 100  # levels of nesting in arguments


def escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


class Leaves(Exception):
    """The text leaves the syntax here."""


# ─────────────────────────────────────────────────── the types of values ─────────────────────────────────────────


def kinds_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str] | None:
    """The JSON types that a schema allows, as far as it says; None: any."""
    if not isinstance(schema, Mapping) or depth > 20:
        return None
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#/"):
        node = root
        for part in ref[2:].split("/"):
            node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
        return kinds_of(node, root, depth + 1)
    if isinstance(kind := schema.get("type"), str):
        return frozenset((kind,))
    if isinstance(kind, (list, tuple)):
        return frozenset(kind)
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if values:
        return frozenset(map(kind_of, values))
    for name in ("anyOf", "oneOf"):
        if isinstance(members := schema.get(name), (list, tuple)) and members:
            found = [kinds_of(member, root, depth + 1) for member in members]
            return None if None in found else frozenset().union(*filter(None, found))
    return None


def kind_of(value: Any) -> str:
    for kind, types in (
        ("boolean", bool),
        ("string", str),
        ("integer", int),
        ("number", float),
        ("array", list),
        ("null", type(None)),
    ):
        if isinstance(value, types):
            return kind
    return "object"


def typed(text: str, kinds: frozenset[str] | None) -> str:
    """The JSON text of a value that stands between fences: of the type that the schema names, else what it looks like."""
    if kinds == frozenset(("string",)):
        return json.dumps(text, ensure_ascii=False)
    try:
        value = json.loads(text)
    except ValueError:
        machine = Values(Syntax())
        read = machine.whole_value(text.strip())
        if read is None:
            return json.dumps(text, ensure_ascii=False)
        text, value = read, json.loads(read)
    kind = kind_of(value)
    if kinds is None or kind in kinds or (kind in ("integer", "number") and kinds & {"integer", "number"}):
        return text.strip()
    return json.dumps(text, ensure_ascii=False) if "string" in kinds else text.strip()


# ───────────────────────────────────────────────────── reading ───────────────────────────────────────────────────


class Reader:
    """Text that comes in pieces, and what is read of it: rules are generators that yield when they need more of it."""

    def __init__(self, syntax: Syntax, tools: Mapping[str, Any] | None = None):
        self.syntax, self.tools = syntax, tools or {}
        self.text, self.at = "", 0
        self.closed = self.was_cut = False  # no more text comes; there were too many tokens
        self.mark: int | None = None  # text from here on may still be needed
        self.reasoning = False
        self.sink = self.parts = []  # type: list[Part]
        self.calls, self.done = 0, 0  # begun, and come to their end
        self.openers: tuple[str, ...] = ()
        self.put: Callable[[str], None] = self.argue

    # ── what is emitted ──

    def emit(self, kind: str, text: str) -> None:
        if text:
            self.sink.append(Part(kind, text))

    def argue(self, text: str) -> None:
        self.emit("arguments", text)

    def begin(self, name: str) -> None:
        """From here on it is a call."""
        self.calls += 1
        self.emit("call", name)

    def trim(self) -> None:
        """Forget the text that has been read."""
        if self.mark is None and self.at:
            self.text, self.at = self.text[self.at :], 0

    def release(self) -> None:
        """The call has begun: the text before it is not needed any more, unless it is read for a trial."""
        if self.mark is not None and not self.reasoning:
            self.mark = None

    # ── reading ──

    def peek(self) -> Steps:
        """The next character; "" where there is none."""
        while self.at >= len(self.text):
            if self.closed:
                return ""
            yield
        return self.text[self.at]

    def space(self) -> Steps:
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or self.closed:
                return
            yield

    def take(self, literals: Iterable[str]) -> Steps:
        """The longest of the literals that stands here, past it; "" where none does."""
        ordered = sorted(filter(None, literals), key=len, reverse=True)
        while ordered:
            rest = len(self.text) - self.at
            for literal in ordered:
                if self.text.startswith(literal, self.at):
                    self.at += len(literal)
                    return literal
                if rest < len(literal) and not self.closed and literal.startswith(self.text[self.at :]):
                    yield
                    break  # it may become this one
            else:
                return ""
        return ""

    def expect(self, pattern: str) -> Steps:
        """A literal, maybe with a \\0 for any text up to what follows it: returns that text. Raises Leaves."""
        head, wild, tail = pattern.partition("\0")
        if head and not (yield from self.take((head,))):
            raise Leaves
        return (yield from self.upto(tail)) if wild else ""

    def upto(self, literal: str) -> Steps:
        """The text before a literal, past that. Raises Leaves where it does not come soon."""
        while True:
            hit = apart(literal).search(self.text, self.at)
            if hit:
                found, self.at = self.text[self.at : hit.start()], hit.end()
                return found
            if self.closed or len(self.text) - self.at > 300:
                raise Leaves
            yield

    def match(self, pattern: re.Pattern[str]) -> Steps:
        """What the pattern takes, once no more text can make it longer."""
        while True:
            hit = pattern.match(self.text, self.at)
            if hit and (hit.end() < len(self.text) or self.closed):
                self.at = hit.end()
                return hit.group()
            if self.closed:
                return ""
            yield


class Values(Reader):
    """Values as JSON, as Python and as Gemma write them. What is put out is always JSON."""

    def captured(self, rule: Steps) -> Steps:
        """The text that a rule would have put out."""
        put, parts = self.put, []  # type: ignore[var-annotated]
        self.put = parts.append
        try:
            yield from rule
        finally:
            self.put = put
        return "".join(parts)

    def string(self) -> Steps:
        if (yield from self.peek()) not in ('"', "'"):
            raise Leaves
        return json.loads((yield from self.captured(self.quoted(self.text[self.at]))))

    def whole_value(self, text: str) -> str | None:
        """The JSON text of one value that stands alone; None where it is none."""
        kept = self.text, self.at, self.closed, self.mark
        self.text, self.at, self.closed, self.mark = text, 0, True, 0
        rule = self.captured(self.value())
        try:
            while True:
                next(rule)
        except StopIteration as stop:
            found = stop.value
            return found if not self.text[self.at :].strip() else None
        except Leaves:
            return None
        finally:
            self.text, self.at, self.closed, self.mark = kept

    def value(self, depth: int = 0) -> Steps:
        yield from self.space()
        ahead = yield from self.peek()
        quote = self.syntax.quote
        if quote and (yield from self.take((quote,))):
            self.put('"')
            put = self.put
            self.put = lambda text: put(escaped(text))
            try:
                yield from self.fence(quote, False)
            finally:
                self.put = put
            self.put('"')
        elif ahead in ('"', "'"):
            yield from self.quoted(ahead)
        elif ahead in ("{", "[", "("):
            yield from self.several(ahead, depth + 1)
        else:
            self.put(self.scalar((yield from self.match(SCALAR))))

    def scalar(self, word: str) -> str:
        if word in WORDS:
            return WORDS[word]
        if NUMBER.fullmatch(word):
            return word
        try:
            number = json.dumps(float(word) if re.search(r"[.eE]", word) else int(word, 0))
            if NUMBER.fullmatch(number):
                return number
        except (ValueError, OverflowError):
            pass
        if self.syntax.quote and word:
            return json.dumps(word, ensure_ascii=False)
        raise Leaves

    def several(self, opener: str, depth: int) -> Steps:
        if depth > MOST:
            raise Leaves
        end = {"{": "}", "[": "]", "(": ")"}[opener]
        self.at += 1
        self.put("{" if opener == "{" else "[")
        first = True
        while True:
            self.trim()
            yield from self.space()
            if (yield from self.take((end,))):
                break
            if not first:
                yield from self.expect(",")
                yield from self.space()
                if (yield from self.take((end,))):  # Python lets a comma stand there
                    break
                self.put(", ")
            first = False
            if opener == "{":
                yield from self.key()
                yield from self.space()
                yield from self.expect(":")
                self.put(": ")
            yield from self.value(depth)
        self.put("}" if opener == "{" else "]")

    def key(self) -> Steps:
        ahead = yield from self.peek()
        if ahead in ('"', "'"):
            yield from self.quoted(ahead)
        elif self.syntax.quote and (yield from self.take((self.syntax.quote,))):
            self.put(json.dumps((yield from self.upto(self.syntax.quote)), ensure_ascii=False))
        elif self.syntax.quote:
            self.put(json.dumps((yield from self.match(SCALAR)), ensure_ascii=False))
        else:
            raise Leaves

    def quoted(self, quote: str) -> Steps:
        """A string in quotes, put out as JSON while it comes."""
        self.at += 1
        self.put('"')
        while True:
            self.trim()
            if hit := PLAIN.match(self.text, self.at):
                self.put(hit.group())
                self.at = hit.end()
            ahead = yield from self.peek()
            if not ahead:
                raise Leaves
            if ahead == "\\":
                yield from self.escape()
                continue
            self.at += ahead == quote or ahead in "\"'" or ahead < " "
            if ahead == quote:
                break
            if ahead in "\"'" or ahead < " ":
                self.put(escaped(ahead))
        self.put('"')

    def escape(self) -> Steps:
        while len(self.text) - self.at < 2 and not self.closed:
            yield
        letter = self.text[self.at + 1 : self.at + 2]
        length = {"u": 4, "x": 2, "U": 8}.get(letter, 0)
        while len(self.text) - self.at < 2 + length and not self.closed:
            yield
        digits = self.text[self.at + 2 : self.at + 2 + length]
        self.at += 2 + length
        if length:
            if len(digits) < length or not re.fullmatch("[0-9a-fA-F]+", digits) or int(digits, 16) > 0x10FFFF:
                raise Leaves
            self.put(f"\\u{digits}" if letter == "u" else json.dumps(chr(int(digits, 16)))[1:-1])
        elif letter:
            self.put(ESCAPES.get(letter, "\\\\" + escaped(letter)))
        else:
            raise Leaves

    def fence(self, end: str, checked: bool) -> Steps:
        """Puts text up to its fence, which counts only where the call goes on behind it. Raises Leaves where it never comes."""
        found = stops((end,))
        line = self.syntax.value_line
        while True:
            self.trim()
            hit = self.text.find(end, self.at)
            if hit >= 0:
                own = not checked or (yield from self.goes_on(hit + len(end)))
                chunk = self.text[self.at : hit]
                self.at = hit + len(end)
                if own:
                    self.put(chunk.removesuffix("\n") if line else chunk)
                    return
                self.put(chunk + end)
                continue
            if self.closed:
                self.put(self.text[self.at :])
                self.at = len(self.text)
                raise Leaves
            cut = found.cut(self.text, self.at)
            if line and cut > self.at and self.text[cut - 1] == "\n":
                cut -= 1
            self.put(self.text[self.at : cut])
            self.at = cut
            yield

    def goes_on(self, at: int) -> Steps:
        """Does a key, or the end of the call, stand at `at`?"""
        follow = [self.syntax.key[0], *self.syntax.closers, *self.openers]
        while True:
            rest = self.text[SPACE.match(self.text, at).end() :]  # type: ignore[union-attr]
            if any(literal and rest.startswith(literal) for literal in follow):
                return True
            if self.closed:
                return not rest
            if not any(literal.startswith(rest) for literal in follow):
                return False
            yield


class Fences(Values):
    """Arguments between fences: a key and a value each, or an element for each key."""

    def properties(self, name: str) -> tuple[Any, Mapping[str, Any]]:
        schema = self.tools[name]
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        return schema, properties if isinstance(properties, Mapping) else {}

    def tagged_arguments(self, name: str) -> Steps:
        syntax = self.syntax
        root, properties = self.properties(name)
        start, closers = self.at, (*syntax.closers, *self.openers)
        if not (yield from self.take((syntax.key[0], *closers))) and not self.closed:
            raise Leaves
        self.at = start
        first, mark, head = True, self.mark, "{"
        while True:
            yield from self.space()
            if not (yield from self.take(syntax.key[:1])):
                break
            try:
                key, kind = yield from self.fenced_key()
            except Leaves:
                if first and self.was_cut:
                    self.begin(name)
                    self.put(head)
                raise
            if first:
                self.begin(name)
                self.release()
                mark = self.mark
            self.put(f"{head}{json.dumps(key, ensure_ascii=False)}: ")
            first, head = False, ", "
            kinds = kinds_of(properties.get(key), root)
            if syntax.text_type and kind == syntax.text_type:
                kinds = frozenset(("string",))
            yield from self.fenced_value(kinds)
        if first:
            self.begin(name)
            self.put(head)
        if self.closed and self.at >= len(self.text) and self.was_cut:
            raise Leaves
        self.put("}")
        self.mark = mark

    def fenced_key(self) -> Steps:
        """(the key, what is said of its value's type)."""
        head, wild, tail = self.syntax.key[1].partition("\0")
        key = (yield from self.upto(head)).strip()
        return key, (yield from self.upto(tail)) if wild else ""

    def fenced_value(self, kinds: frozenset[str] | None) -> Steps:
        syntax = self.syntax
        if syntax.value_line:
            yield from self.take(("\n",))
        if syntax.cdata and (yield from self.take(("<![CDATA[",))):
            text = yield from self.captured(self.fence("]]>", False))
            yield from self.expect(syntax.value_end)
            self.put(typed(text, kinds))
        elif kinds == frozenset(("string",)):
            self.put('"')
            put = self.put
            self.put = lambda text: put(escaped(text))
            try:
                yield from self.fence(syntax.value_end, True)
            finally:
                self.put = put
            self.put('"')
        else:
            text = yield from self.captured(self.fence(syntax.value_end, True))
            self.put(typed(text, kinds))

    # ── an element per key ──

    def element_arguments(self, name: str) -> Steps:
        root, _ = self.properties(name)
        self.begin(name)
        self.release()
        self.put((yield from self.element_members(root, root, 0)))

    def element_members(self, schema: Any, root: Any, depth: int) -> Steps:
        """Elements up to what is none: the JSON text of their object or, where all are named item, their list."""
        if depth > MOST:
            raise Leaves
        opener, end = self.syntax.key[0], self.syntax.value_end
        members: list[tuple[str, str]] = []
        while True:
            yield from self.space()
            start = self.at
            if (yield from self.take((opener, *self.syntax.closers, end))) != opener:
                self.at = start
                break
            key = yield from self.upto(self.syntax.key[1])
            members.append((key, (yield from self.element(key, self.member(schema, key, root), root, depth + 1))))
        if members and all(key == "item" for key, _ in members) and "item" not in (self.member(schema, None, root) or {}):
            return f"[{', '.join(value for _, value in members)}]"
        return "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in members) + "}"

    def element(self, key: str, schema: Any, root: Any, depth: int) -> Steps:
        kinds = kinds_of(schema, root)
        end = f"{self.syntax.value_end}{key}>"
        start = self.at
        yield from self.space()
        nested = (yield from self.take((end, self.syntax.key[0]))) == self.syntax.key[0] and "string" not in (kinds or ())
        self.at = start
        if nested:
            text = yield from self.element_members(schema, root, depth)
            yield from self.space()
            yield from self.expect(end)
            return text
        text = yield from self.captured(self.fence(end, False))
        if not text.strip() and kinds and "string" not in kinds:
            return "[]" if "array" in kinds else "{}" if "object" in kinds else "null"
        return typed(text, kinds)

    def member(self, schema: Any, key: str | None, root: Any) -> Any:
        """The schema of a member, or of a list's items, through the unions; of None: all properties."""
        for one in (schema, *(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())) if isinstance(schema, Mapping) else ():
            properties = one.get("properties") if isinstance(one, Mapping) else None
            if key is None and isinstance(properties, Mapping):
                return properties
            if isinstance(properties, Mapping) and key in properties:
                return properties[key]
            if key == "item" and isinstance(one, Mapping) and "items" in one:
                return one["items"]
        return None
