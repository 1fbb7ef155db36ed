"""What a model writes, taken apart while it is written: reasoning, content, tool calls. Text to text; imports nothing of ours.

Syntax says how one model's template writes them (chat_syntax.py finds it out); Parser is a push parser over it. Three laws:
nothing is emitted that later text can change, so the pieces do not depend on how the text is cut; nothing is held longer
than that needs; what leaves the syntax stays content, and nothing is lost.

The parser is a generator that runs as far as its text goes and yields for more: each rule reads like the syntax it reads.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Steps = Generator[None, None, Any]  # a rule: yields when it needs more text, returns what it has found


@dataclass(frozen=True, slots=True)
class Syntax:
    """How a template writes reasoning and calls. Literals are compared as they stand; whitespace between them is free.

    forms: json `{"name": …, "arguments": {…}}`; named: the name, then JSON; tagged: the name, then keys and values in fences;
    elements: one element per key; pythonic `[f(k=v)]`; functionary, channels: see Parser. A \\0 in a literal is any text.
    """

    name: str = "none"
    form: str = ""  # "": no calls
    think: tuple[str, str] = ("", "")  # around reasoning
    before: str = ""  # as the template writes them, for a grammar: before the first call's name or object,
    between: str = ""  # from one call to the name or object of the next; "": one call at most
    after: str = ""  # behind the last call
    middle: str = ""  # between a name and its arguments
    openers: tuple[str, ...] = ()  # any of these begins calls; the last one stands right before the name or the object
    closers: tuple[str, ...] = ()  # what may stand behind a call
    prefix: str = ""  # before a name, and no part of it
    bare: bool = False  # calls may begin without an opener where the text begins
    name_keys: tuple[str, ...] = ("name",)  # of form json; (): the name is the key of its arguments
    argument_keys: tuple[str, ...] = ("arguments", "parameters")
    key: tuple[str, str] = ("", "")  # of form tagged: around a key; the latter may have \0, which says the type of the value
    text_type: str = ""  # what that \0 is for a string; "": it is no type
    value_end: str = ""
    value_line: bool = False  # a value stands between newlines, which are not its own
    cdata: bool = False  # a value may be <![CDATA[…]]>
    quote: str = ""  # around strings, where it is not "
    drops: tuple[str, ...] = ()  # marks around content, which are no part of it
    signs: tuple[str, ...] = ()  # what all stands in the source of a template that has this syntax
    kinds: tuple[tuple[str, str], ...] = ()  # of form channels: a channel's name → "reasoning" | "content"
    text_arguments: bool = False  # the template wants arguments of past calls as JSON text, not as an object

    @property
    def marks(self) -> str:
        """All literals in one text: special tokens that stand in it must reach the parser."""
        fences = (*self.key, self.value_end, self.quote, self.middle, self.before, self.between, self.after)
        return "\n".join([*self.think, *self.openers, *self.closers, *self.drops, *fences, *CHANNEL_MARKS.get(self.name, ())])


CHANNEL_MARKS = {
    "harmony": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"),
    "muse": ("<|start|>", "<|message|>", "<|eom|>", "<|eot|>"),
}
PYTHON_TAG = "<|python_tag|>"


def hermes(name: str, opener: str, closer: str, **more: Any) -> Syntax:
    """JSON objects, each between two marks."""
    return Syntax(
        name,
        "json",
        before=f"{opener}\n",
        between=f"\n{closer}\n{opener}\n",
        after=f"\n{closer}",
        openers=(opener,),
        closers=(closer,),
        **more,
    )


KNOWN = {  # for --tool-syntax, and for templates whose source has all the signs; the first whose signs fit
    syntax.name: syntax
    for syntax in (
        Syntax("harmony", "channels", kinds=(("analysis", "reasoning"),), signs=("<|channel|>", "<|message|>", "<|start|>")),
        Syntax(
            "muse",
            "channels",
            openers=("<atem:function_calls>", '<atem:invoke name="'),
            closers=("</atem:invoke>", "</atem:function_calls>"),
            middle='">',
            key=('<atem:parameter name="', '">'),
            value_end="</atem:parameter>",
            kinds=(("self", "reasoning"),),
            signs=("<atem:", "<|message|>"),
        ),
        Syntax(
            "gemma",
            "named",
            think=("<|channel>thought", "<channel|>"),
            before="<|tool_call>call:",
            between="<tool_call|><|tool_call>call:",
            after="<tool_call|>",
            openers=("<|tool_call>",),
            closers=("<tool_call|>",),
            prefix="call:",
            quote='<|"|>',
            signs=("<|tool_call>call:", '<|"|>'),
        ),
        Syntax(
            "minimax-m3",
            "elements",
            think=("<mm:think>", "</mm:think>"),
            openers=("]<]minimax[>[<tool_call>", ']<]minimax[>[<invoke name="'),
            closers=("]<]minimax[>[</invoke>", "]<]minimax[>[</tool_call>"),
            middle='">',
            key=("]<]minimax[>[<", ">"),
            value_end="]<]minimax[>[</",
            signs=("]<]minimax[>[", "invoke"),
        ),
        Syntax(
            "kimi-k3",
            "tagged",
            think=("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
            before='<|open|>tools<|sep|><|open|>call tool="',
            between='<|close|>call<|sep|><|open|>call tool="',
            after="<|close|>call<|sep|><|close|>tools<|sep|>",
            openers=("<|open|>tools<|sep|>", '<|open|>call tool="'),
            closers=("<|close|>call<|sep|>", "<|close|>tools<|sep|>", "<|close|>message<|sep|>"),
            middle='"\0<|sep|>',
            key=('<|open|>argument key="', '" type="\0"<|sep|>'),
            text_type="string",
            value_end="<|close|>argument<|sep|>",
            drops=("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>"),
            signs=("<|open|>", "<|sep|>", "<|close|>"),
        ),
        Syntax(
            "solar",
            "named",
            think=("<|think|>", "<|end|>"),
            openers=("<|tool_calls|>", "<|tool_call:begin|>\0<|tool_call:name|>"),
            closers=("<|tool_call:end|>", "<|calls|>"),
            middle="<|tool_call:args|>",
            drops=("<|begin|>assistant", "<|content|>", "<|end|>"),
            signs=("<|tool_call:begin|>", "<|tool_call:name|>"),
        ),
        Syntax("functionary", "functionary", signs=(">>>all", "<|start_header_id|>"), text_arguments=True),
        Syntax(
            "lfm2",
            "pythonic",
            openers=("<|tool_call_start|>",),
            closers=("<|tool_call_end|>",),
            signs=("List of tools: ",),
        ),
        Syntax(
            "kimi",
            "named",
            before="<|tool_calls_section_begin|><|tool_call_begin|>functions.",
            between="<|tool_call_end|><|tool_call_begin|>functions.",
            after="<|tool_call_end|><|tool_calls_section_end|>",
            middle=":\0<|tool_call_argument_begin|>",
            openers=("<|tool_calls_section_begin|>", "<|tool_call_begin|>"),
            closers=("<|tool_call_end|>", "<|tool_calls_section_end|>"),
            prefix="functions.",
            signs=("<|tool_call_argument_begin|>",),
        ),
        Syntax(
            "deepseek-r1",
            "named",
            before="<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            between="\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
            after="\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            middle="\n```json\n",
            openers=("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>"),
            closers=("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
            signs=("<｜tool▁sep｜>",),
        ),
        Syntax(
            "command-r",
            "json",
            before="Action:\n```json\n[\n    ",
            between=",\n    ",
            after="\n]```",
            openers=("Action:\n```json",),
            closers=("```",),
            name_keys=("tool_name", "name"),
            argument_keys=("parameters",),
            signs=("Action:", "```json"),
        ),
        Syntax(
            "functools",
            "json",
            before=" functools[",
            between=", ",
            after="]",
            openers=("functools",),
            signs=("functools[",),
        ),
        Syntax(
            "granite-3",
            "json",
            before="<|tool_call|>[",
            between=", ",
            after="]",
            openers=("<|tool_call|>", "<tool_call>"),
            closers=("</tool_call>",),
            signs=("<|tool_call|>", "available_tools"),
        ),
        hermes("hermes", "<tool_call>", "</tool_call>", signs=("<tool_call>", "</tool_call>", '"arguments"')),
        Syntax(
            "mistral",
            "json",
            before="[TOOL_CALLS][",
            between=", ",
            after="]",
            openers=("[TOOL_CALLS]",),
            signs=("[TOOL_CALLS]", '"arguments"'),
        ),
        Syntax(
            "mistral-args",
            "named",
            before="[TOOL_CALLS]",
            between="[TOOL_CALLS]",
            middle="[ARGS]",
            openers=("[TOOL_CALLS]",),
            signs=("[TOOL_CALLS]", "[ARGS]"),
        ),
        Syntax(
            "llama3",
            "json",
            between="; ",
            openers=(PYTHON_TAG,),
            bare=True,
            argument_keys=("parameters", "arguments"),
            signs=('"parameters": dictionary of argument name',),
        ),
        Syntax("pythonic", "pythonic", openers=(PYTHON_TAG,), bare=True, signs=("<|python_start|>",)),
    )
}
THINKING = (  # marks around reasoning, for templates that render none; the first whose end stands in the source
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)


# ──────────────────────────────────────────────────── what is emitted ────────────────────────────────────────────


class Part(NamedTuple):
    """kind: "content" | "reasoning" | "call" (text is the whole name) | "arguments" (of the call before: JSON text)."""

    kind: str
    text: str
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chat:
    """All that a request's conversation comes to before a token is generated: what the engine needs of template and syntax."""

    text: str  # the prompt
    syntax: Syntax | None = None  # None: the text that is generated is content, all of it
    tools: Mapping[str, Any] = field(default_factory=dict)  # name → schema of the parameters (None: any), of what may be called
    inside: bool = False  # the prompt has left reasoning open
    neutral: bool = False  # calls may come as bare JSON objects
    grammar: str | None = None  # that the completion must follow, once its reasoning has ended
    whole_grammar: str | None = None  # the same with free reasoning in front; None: there is none
    optional: bool = False  # the grammar is dropped where the engine cannot see the marks as text
    later: bool = False  # the engine cannot see the marks as text: `grammar` begins where reasoning ends

    @property
    def think_end(self) -> str:
        return self.syntax.think[1] if self.syntax else ""

    @property
    def marks(self) -> str:
        return self.syntax.marks if self.syntax else ""

    def parser(self) -> Parser:
        assert self.syntax
        return Parser(self.syntax, self.tools, self.inside, self.neutral)


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
        machine = Parser(Syntax())
        read = machine.whole_value(text.strip())
        if read is None:
            return json.dumps(text, ensure_ascii=False)
        text, value = read, json.loads(read)
    kind = kind_of(value)
    if kinds is None or kind in kinds or (kind in ("integer", "number") and kinds & {"integer", "number"}):
        return text.strip()
    return json.dumps(text, ensure_ascii=False) if "string" in kinds else text.strip()


# ────────────────────────────────────────────────────── the parser ───────────────────────────────────────────────


class Parser:
    """feed(text) → pieces; finish(cut) → the last ones. `whole`: there were calls, and all of them came to their end.

    `inside`: the prompt has left reasoning open. `tools`: name → the schema of its parameters (None: none was given); only
    they are called. `neutral`: calls also begin as a bare JSON object, where a grammar forces them so.
    """

    def __init__(
        self,
        syntax: Syntax,
        tools: Mapping[str, Any] | None = None,
        inside: bool = False,
        neutral: bool = False,
        one: bool = False,
    ):
        self.syntax, self.tools, self.one = syntax, tools or {}, one
        self.reasoning = inside
        self.bare = bool(self.tools) and (syntax.bare or neutral)
        self.text, self.at = "", 0
        self.closed = self.was_cut = False
        self.mark: int | None = None  # text from here on may still be needed
        self.sink = self.pieces = []  # type: list[Part]
        self.calls, self.done = 0, 0  # begun, and come to their end
        self.listed = False  # a list of calls is open
        self.fresh = ""  # "start" | "after": content has not begun yet
        calls = bool(self.tools) and bool(syntax.form)
        self.openers = tuple(o.partition("\0")[0] for o in syntax.openers) if calls else ()
        self.put: Callable[[str], None] = self.argue
        self.machine = self.run()
        next(self.machine, None)

    @property
    def whole(self) -> bool:
        return 0 < self.calls == self.done

    def feed(self, text: str) -> list[Part]:
        self.text += text
        return self.advance()

    def finish(self, cut: bool = False) -> list[Part]:
        """No more text comes. `cut`: it ended because there were too many tokens."""
        self.closed, self.was_cut = True, cut
        return self.advance()

    def advance(self) -> list[Part]:
        next(self.machine, None)
        pieces = self.pieces[:]
        self.pieces.clear()
        return pieces

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
        while True:
            hit = self.text.find(literal, self.at)
            if hit >= 0:
                found, self.at = self.text[self.at : hit], hit + len(literal)
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

    # ── the text as a whole ──

    def run(self) -> Steps:
        form = self.syntax.form
        if self.bare and form in ("channels", "functionary"):
            yield from self.space()
            form = "json" if (yield from self.peek()) == "{" else form
        if form == "channels":
            yield from self.channels()
        elif form == "functionary":
            yield from self.functionary()
        self.fresh = "start"
        if self.reasoning:
            yield from self.think()
        yield from self.content()

    def think(self) -> Steps:
        """Reasoning, up to its end. Calls in it count only where nothing follows them: a model may think about calling."""
        self.reasoning = True
        end = self.syntax.think[1]
        yield from self.space()
        yield from self.take(self.syntax.think[:1])  # the prompt has begun it, and so does the model
        yield from self.space()
        while hit := (yield from self.flow("reasoning", (end, *self.openers))):
            if hit == end:
                break
            yield from self.calls_in_reasoning(hit)
        self.reasoning = False
        self.fresh = "after"

    def calls_in_reasoning(self, opener: str) -> Steps:
        """Read for a trial: others see a piece of them only once it is known that nothing follows."""
        start, held, before = self.at, self.held, (self.calls, self.done)
        self.at = self.mark = start - len(opener)
        self.sink = seen = []  # type: ignore[var-annotated]
        found = yield from self.some_calls()
        yield from self.space()
        last = found and not (yield from self.peek())
        self.sink = self.pieces
        if last:
            self.pieces += seen
        else:
            self.calls, self.done = before
            self.at = start
            self.emit("reasoning", held + opener)
        self.mark = None

    held = ""  # whitespace that stood before a mark

    def flow(self, kind: str, literals: tuple[str, ...]) -> Steps:
        """Emits text up to the first of the literals: returns it, "" at the end. Whitespace before one is held back."""
        found = stops(tuple(filter(None, literals)))
        while True:
            self.trim()
            hit = found.whole.search(self.text, self.at)
            if hit and not self.closed and self.longer(found, hit):
                hit = None
            end = hit.start() if hit else len(self.text) if self.closed else found.cut(self.text, self.at)
            chunk = self.text[self.at : end]
            shown = chunk.rstrip() if hit or not self.closed else chunk
            self.emit(kind, shown)
            if hit:
                self.held = chunk[len(shown) :]
                self.at = hit.end()
                return hit.group()
            self.at += len(shown)
            if self.closed:
                self.at = len(self.text)
                return ""
            yield

    def longer(self, found: Stops, hit: re.Match[str]) -> bool:
        """May what was met become a longer literal?"""
        return hit.end() == len(self.text) and hit.group() in found.begun

    def content(self) -> Steps:
        drops = self.syntax.drops
        while True:
            if self.fresh:
                again = yield from self.opening()
                if again:
                    continue
            hit = yield from self.flow("content", (*self.openers, *drops))
            if not hit:
                return
            if hit in self.openers:
                opened = self.at
                self.mark = self.at = opened - len(hit)
                held = self.held
                if not (yield from self.some_calls()):
                    self.at = self.at + len(hit)
                    self.emit("content", held + hit)
                else:
                    self.fresh = "after"
                self.mark = None

    def opening(self) -> Steps:
        """Where content would begin: reasoning or a bare call may. True: one did, and content would begin anew."""
        self.trim()
        self.mark = self.at
        yield from self.space()
        begin, end = self.syntax.think
        mark = (yield from self.take((begin, end, *self.syntax.drops))) if begin or end or self.syntax.drops else ""
        if mark and mark == begin:
            self.mark = None
            yield from self.think()
            return True
        if mark:
            self.mark, self.fresh = None, "after"
            return True
        if self.bare:
            start = self.at
            if (yield from self.peek()) in ("{", "[") and (yield from self.some_calls()):
                self.mark, self.fresh = None, "after"
                return True
            self.at = start
        elif (yield from self.take(self.openers)):  # the whitespace before it is no content
            self.at = self.at
            return (yield from self.opened())
        if self.fresh == "start":
            self.at = self.mark
        self.mark, self.fresh = None, ""
        return False

    def opened(self) -> Steps:
        assert self.mark is not None
        self.at = self.mark
        yield from self.space()
        start = self.at
        if (yield from self.some_calls()):
            self.mark, self.fresh = None, "after"
            return True
        self.at = start if self.fresh == "after" else self.mark
        self.mark, self.fresh = None, ""
        literal = yield from self.flow("content", self.openers)
        self.emit("content", self.held + literal)
        return False

    # ── calls ──

    def some_calls(self) -> Steps:
        """Calls, one after the other, and what closes them. True where there was one; else nothing has been read."""
        found = False
        while True:
            start, before, own = self.at, self.calls, self.mark is None
            if own:
                self.mark = start
            try:
                yield from self.call()
            except Leaves:
                self.mark = None if own else self.mark
                if self.calls == before:  # it has not begun: what stands here is something else
                    self.at = start
                    return found
                return True
            self.done += 1
            found = True
            self.mark = None if own else self.mark
            if not (yield from self.closing()):
                return True

    def closing(self) -> Steps:
        """What closes a call, and the calls. True where another may begin."""
        syntax = self.syntax
        while True:
            end = self.at
            yield from self.space()
            literal = yield from self.take(
                (*syntax.closers, *((",", ";", "]") if self.listed else (";",) if self.bare else ()))
            )
            if literal == "]":
                self.listed = False
            if not literal:
                break
            if literal in ",;":
                return True
        start = self.at
        again = syntax.form == "json" and (yield from self.peek()) == "{"
        if not again and (yield from self.take(self.openers)):
            again = True
        self.at = start if again else end
        return again

    def call(self) -> Steps:
        """One call, its openers first. Raises Leaves; before `begin` nothing has been emitted."""
        syntax, last = self.syntax, ""
        while True:
            yield from self.space()
            literal = yield from self.take(self.openers)
            if not literal:
                break
            last = literal
            _, wild, tail = syntax.openers[self.openers.index(literal)].partition("\0")
            if wild:
                yield from self.upto(tail)
        ahead = yield from self.peek()
        listed = self.listed
        if ahead == "[" and (syntax.form in ("json", "pythonic") or self.bare or last):
            listed = True
            self.at += 1
            yield from self.space()
            ahead = yield from self.peek()
        kept, self.listed = self.listed, listed
        try:
            yield from self.call_itself(ahead, last)
        except Leaves:
            self.listed = kept
            raise

    def call_itself(self, ahead: str, opener: str) -> Steps:
        form = self.syntax.form
        if ahead == "{":
            yield from self.json_call()
        elif form == "pythonic" or (self.bare and ahead):
            yield from self.python_call()
        elif form in ("named", "tagged", "elements", "channels") and opener and opener == self.openers[-1]:
            yield from self.named_call()
        else:
            raise Leaves

    def json_call(self) -> Steps:
        """{"name": …, "arguments": {…}}, in any order, with more keys; or {name: arguments}."""
        syntax = self.syntax
        name, arguments, begun = "", "", False
        self.at += 1
        while True:
            yield from self.space()
            if (yield from self.take(("}",))):
                break
            key = yield from self.string()
            yield from self.space()
            yield from self.expect(":")
            yield from self.space()
            if not syntax.name_keys and key in self.tools:
                name, begun = key, True
                yield from self.arguments(name)
            elif key in (syntax.name_keys or ("name",)) and not name:
                name = yield from self.string()
                if name not in self.tools:
                    raise Leaves
            elif key in syntax.argument_keys and not begun and not arguments:
                if name:
                    begun = True
                    yield from self.arguments(name)
                else:
                    arguments = yield from self.captured(self.value())
            elif key == "function" and (yield from self.peek()) == "{":
                yield from self.json_call()
                begun = True
            elif key in KEYS or name:
                yield from self.captured(self.value())
            else:
                raise Leaves
            yield from self.space()
            yield from self.take((",",))
        if not begun:
            if not name:
                raise Leaves
            self.begin(name)
            self.put(arguments if arguments.startswith("{") else "{}")

    def arguments(self, name: str) -> Steps:
        """JSON arguments; some models write them as a string with JSON in it, some write null."""
        yield from self.space()
        ahead = yield from self.peek()
        if ahead == "{":
            self.begin(name)
            self.release()
            yield from self.value()
            return
        text = yield from self.captured(self.value())
        value = json.loads(text)
        if isinstance(value, str):
            text = self.whole_value(value) or ""
            value = json.loads(text or "0")
        if value is not None and not isinstance(value, dict):
            raise Leaves
        self.begin(name)
        self.put(text if value else "{}")

    def release(self) -> None:
        """The call has begun: the text before it is not needed any more, unless it is read for a trial."""
        if self.mark is not None and not self.reasoning:
            self.mark = None

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

    def named_call(self) -> Steps:
        """The name, then its arguments: JSON, or keys and values in fences."""
        syntax = self.syntax
        yield from self.space()
        name = yield from self.match(NAME)
        if name not in self.tools and syntax.prefix:
            name = name.removeprefix(syntax.prefix)
            if name == syntax.prefix.rstrip(":"):  # the prefix is not made of a name's letters
                yield from self.expect(":")
                name = yield from self.match(NAME)
        if name not in self.tools:
            raise Leaves
        if syntax.middle.strip():
            yield from self.space()
            head, wild, tail = syntax.middle.strip().partition("\0")
            ahead = yield from self.peek()
            if ahead != "{" or head.startswith("{"):
                yield from self.expect(head + wild + tail)
        yield from self.space()
        if syntax.form == "named":
            yield from self.arguments(name)
        elif syntax.form == "elements":
            yield from self.element_arguments(name)
        else:
            yield from self.tagged_arguments(name)

    # ── values in fences ──

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
        self.begin(name)
        self.release()
        self.put("{")
        first, mark = True, self.mark
        while True:
            yield from self.space()
            if not (yield from self.take(syntax.key[:1])):
                break
            head, wild, tail = syntax.key[1].partition("\0")
            key = (yield from self.upto(head)).strip()
            kind = (yield from self.upto(tail)) if wild else ""
            self.put(("" if first else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
            first = False
            kinds = kinds_of(properties.get(key), root)
            if syntax.text_type and kind == syntax.text_type:
                kinds = frozenset(("string",))
            yield from self.fenced_value(kinds)
        if self.closed and self.at >= len(self.text) and self.was_cut:
            raise Leaves
        self.put("}")
        self.mark = mark

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

    # ── f(k=v) ──

    def python_call(self) -> Steps:
        name = yield from self.match(NAME)
        if name not in self.tools:
            raise Leaves
        yield from self.expect("(")
        self.begin(name)
        self.release()
        self.put("{")
        first = True
        while True:
            yield from self.space()
            if (yield from self.take((")",))):
                break
            key = yield from self.match(NAME)
            yield from self.space()
            yield from self.expect("=")
            self.put(("" if first else ", ") + json.dumps(key) + ": ")
            first = False
            yield from self.value()
            yield from self.space()
            yield from self.take((",",))
        self.put("}")

    # ── values: JSON, Python, Gemma; what is put out is always JSON ──

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

    # ── templates that name who is spoken to ──

    def functionary(self) -> Steps:
        """`all` or a name on a line of its own, then content or arguments; `>>>` begins the next."""
        yield from self.take((">>>",))
        while True:
            self.mark = self.at
            try:
                name = (yield from self.upto("\n")).strip()
            except Leaves:
                name = ""
            if name in self.tools:
                try:
                    yield from self.function_arguments(name)
                    self.done += 1
                except Leaves:
                    pass
                yield from self.space()
            elif name != "all":
                self.at = self.mark
            self.mark = None
            self.fresh = ""
            if not (yield from self.flow("content", (">>>",))):
                return

    def function_arguments(self, name: str) -> Steps:
        yield from self.space()
        if (yield from self.peek()) == "{":
            yield from self.arguments(name)
            return
        _, properties = self.properties(name)  # code, as it stands
        self.begin(name)
        self.mark = None
        self.put("{" + json.dumps(next(iter(properties), "code")) + ': "')
        put = self.put
        self.put = lambda text: put(escaped(text))
        try:
            yield from self.fence(">>>", False)
            self.at -= 3
        except Leaves:
            if self.was_cut:
                raise
        finally:
            self.put = put
        self.put('"}')

    def channels(self) -> Steps:
        """A header says who is spoken to and how; then comes what is said, up to a mark."""
        marks = CHANNEL_MARKS[self.syntax.name]
        heads = tuple(mark for mark in ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>") if mark in marks)
        ends = tuple(mark for mark in marks if mark not in heads)
        while True:
            self.mark = self.at
            yield from self.space()
            if not (yield from self.peek()):
                self.at = self.mark
            begins = yield from self.take((*heads, "to=", "assistant"))
            name = kind = ""
            if begins:
                self.at = self.mark
                try:
                    header = yield from self.upto("<|message|>")
                    name, kind = self.addressed(header)
                except Leaves:
                    self.at = self.mark
            else:
                self.at = self.mark
            self.mark = None
            self.reasoning = kind == "reasoning"
            if name:
                yield from self.channel_call(name)
            self.fresh = ""
            if not (yield from self.flow(kind or "content", (*ends, "<|start|>", *heads[1:2]))) and self.closed:
                return
            self.reasoning = False

    def addressed(self, header: str) -> tuple[str, str]:
        """(the tool that is called, or ""; the kind of text that follows)."""
        to = re.search(r"to=([^\s<]+)", header)
        name = to.group(1).removeprefix("functions.") if to else ""
        if name in self.tools:
            return name, "content"
        channel = re.search(r"<\|channel\|>\s*([a-z]+)", header)
        kinds = dict(self.syntax.kinds)
        return "", kinds.get(channel.group(1) if channel else name, "content")

    def channel_call(self, name: str) -> Steps:
        start, before = self.at, self.calls
        try:
            if self.openers:
                self.mark = self.at
                yield from self.some_calls()
                self.mark = None
                return
            yield from self.function_arguments(name)
            self.done += 1
        except Leaves:
            if self.calls == before:
                self.at = start
