"""What a model writes, taken apart while it is written: reasoning, content, tool calls. Text to text.

Parser is a push parser over a Syntax. Three laws: nothing is emitted that later text can change, so the parts do not depend
on how the text is cut; nothing is held longer than that needs; what leaves the syntax stays content, and nothing is lost.

It is a generator that runs as far as its text goes and yields for more: each rule reads like the syntax it reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tool_syntax import CHANNEL_FRAMES, CHANNEL_MARKS, CHANNEL_NAMES, Syntax
from tool_values import KEYS, NAME, Fences, Leaves, Part, Steps, Stops, escaped, stops

SPECIAL = re.compile(r"<\|.*\|>")  # so a special token looks


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
    later: bool = False  # the engine's grammars cannot see the marks as text: `grammar` begins where reasoning ends

    @property
    def think_end(self) -> str:
        """What is written to end reasoning. A grammar that follows has what begins content in it."""
        if self.syntax and self.syntax.form == "channels":
            _, end, opening, _ = CHANNEL_FRAMES[self.syntax.name]
            return end if self.grammar else end + opening
        return self.syntax.think[1] if self.syntax else ""

    @property
    def marks(self) -> str:
        return self.syntax.marks if self.syntax else ""

    def parser(self) -> Parser:
        assert self.syntax
        return Parser(self.syntax, self.tools, self.inside, self.neutral)


class Calls(Fences):
    """Calls, in any of the forms that a Syntax has."""

    bare = False  # they also begin without an opener
    listed = False  # a list of them is open

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
                if self.calls == before and self.was_cut and self.at >= len(self.text):
                    return True  # it was cut before its name was known: half a mark is no content
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
                rest = self.text[self.at :]
                if self.was_cut and any(one.startswith(rest) for one in (*syntax.closers, *self.openers)):
                    self.at = end = len(self.text)  # half a mark
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
        elif form in ("named", "tagged", "elements", "channels") and opener and opener == self.openers[-1]:
            yield from self.named_call()
        elif form == "pythonic" or (self.bare and ahead):
            yield from self.python_call()
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
            elif not name and (yield from self.names(key)):
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

    def names(self, key: str) -> Steps:
        """Is the value of this key the name? Some models write {"type": "function", "function": NAME, …}."""
        return key in (self.syntax.name_keys or ("name",)) or (key == "function" and (yield from self.peek()) in ('"', "'"))

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
            short = ahead == "{" or (wild and (yield from self.take((tail,))))  # some leave out the id, some all of it
            if not short:
                yield from self.expect(head + wild + tail)
        yield from self.space()
        if syntax.form == "named":
            yield from self.arguments(name)
        elif syntax.form == "elements":
            yield from self.element_arguments(name)
        else:
            yield from self.tagged_arguments(name)

    # ── f(k=v) ──

    def python_call(self) -> Steps:
        name = yield from self.match(NAME)
        if name not in self.tools:
            name = name.removesuffix(".call")  # Llama's word for tools of its own
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


class Parser(Calls):
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
        super().__init__(syntax, tools)
        self.reasoning = inside
        self.bare = bool(self.tools) and (syntax.bare or neutral)
        self.fresh = ""  # "start" | "after": content has not begun yet
        if self.tools and syntax.form:
            self.openers = tuple(opener.partition("\0")[0] for opener in syntax.openers)
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
        parts = self.parts[:]
        self.parts.clear()
        return parts

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
        """Reasoning, up to its end. Calls in it count where it begins with them, there being none, and where nothing follows
        them: else the model thinks about calling."""
        self.reasoning = True
        ends = (self.syntax.think[1], *(mark for mark in self.syntax.drops if SPECIAL.fullmatch(mark)))
        yield from self.space()
        yield from self.take(self.syntax.think[:1])  # the prompt has begun it, and so does the model
        yield from self.space()
        if not (yield from self.calls_at_once()):
            while hit := (yield from self.flow("reasoning", (*ends, *self.openers))):
                if hit in ends:
                    break
                yield from self.calls_in_reasoning(hit)
        self.reasoning = False
        self.fresh = "after"

    def calls_at_once(self) -> Steps:
        """Calls in the place of reasoning. True where there were some; else nothing has been read."""
        start = self.mark = self.at
        found = False
        if (yield from self.take(self.openers)):
            self.at, self.reasoning = start, False
            found = yield from self.some_calls()
            self.at = self.at if found else start
        self.mark, self.reasoning = None, not found
        return found

    def calls_in_reasoning(self, opener: str) -> Steps:
        """Read for a trial: others see a piece of them only once it is known that nothing follows."""
        start, held, before = self.at, self.held, (self.calls, self.done)
        self.at = self.mark = start - len(opener)
        self.sink = seen = []  # type: ignore[var-annotated]
        found = yield from self.some_calls()
        yield from self.space()
        last = found and not (yield from self.peek())
        self.sink = self.parts
        if last:
            self.parts += seen
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
            torn = self.was_cut and self.calls > 0  # what may be the beginning of one more call is no content
            end = hit.start() if hit else len(self.text) if self.closed and not torn else found.cut(self.text, self.at)
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
        return hit.group() in found.begun and self.text[hit.start() :] in found.begun

    def content(self) -> Steps:
        drops, begin = self.syntax.drops, self.syntax.think[0] if self.syntax.rethinks else ""
        while True:
            if self.fresh:
                again = yield from self.opening()
                if again:
                    continue
            hit = yield from self.flow("content", (*self.openers, *drops, begin))
            if not hit:
                return
            if hit == begin:
                yield from self.think()
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
        elif (yield from self.take(self.openers)):  # then the whitespace before it is no content
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

    # ── templates that name who is spoken to ──

    def functionary(self) -> Steps:
        """`all` or a name on a line of its own, then content or arguments; `>>>` begins the next."""
        yield from self.take((">>>",))
        turn = ""
        while True:
            self.mark = self.at
            name = yield from self.match(NAME)
            if not (yield from self.take(("\n",))):
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
                self.emit("content", turn)
            self.mark = None
            self.fresh = ""
            if not (yield from self.flow("content", (">>>",))):
                return
            turn = f"{self.held}>>>"

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
            begins = (yield from self.take((*heads, "to=", "assistant"))) or (yield from self.bare_channel())
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

    def bare_channel(self) -> Steps:
        """A header whose first mark is left out: the prompt may end in it, and some models forget it."""
        word = yield from self.take(CHANNEL_NAMES)
        return bool(word) and bool(
            (yield from self.take(("<|message|>", "<|constrain|>", " <|constrain|>", " to=", "<|channel|>")))
        )

    def addressed(self, header: str) -> tuple[str, str]:
        """(the tool that is called, or ""; the kind of text that follows)."""
        to = re.search(r"to=([^\s<]+)", header)
        name = to.group(1).removeprefix("functions.") if to else ""
        if name in self.tools:
            return name, "content"
        channels = re.findall(rf"(?<![\w.=])(?:{'|'.join(CHANNEL_NAMES)})(?!\w)", header)
        return "", dict(self.syntax.kinds).get(channels[-1] if channels else name, "content")

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
