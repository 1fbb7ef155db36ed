"""How a model writes a conversation: its chat template, and what that shows of tool calls and reasoning. Text to text.

The template is probed once: conversations that differ in one thing are rendered, and the marks read off the differences. jinja2
is imported in the workshop's process, and where an engine renders by itself; never in the server's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from constraints import Unsupported
from engine import Prompt, Refused, Sampling, log, one_line
from tool_grammar import after_reasoning, behind, calls_grammar, either, written
from tool_parser import Chat, Parser
from tool_syntax import CHANNEL_FRAMES, KNOWN, SILENT_THINKING, THINKING, Syntax


class ChatTemplate:
    """A model's Jinja chat template, rendered as Hugging Face's `apply_chat_template` does, in a sandbox."""

    def __init__(self, source: str | None, bos: str, eos: str, more: dict[str, str] | None = None):
        self.source = source
        self.tokens = {**(more or {}), "bos_token": bos, "eos_token": eos}
        self.recipe: tuple[Any, ...] = (
            (source, bos, eos, more) if source else ()
        )  # what it is made again from, in another process
        self.has_developer = source is not None and "developer" in source

    @functools.cached_property
    def template(self) -> Any:
        """Compiled when first asked for: already that may take for ever, and is no business of a load. Raises Refused."""
        if not self.source:
            raise Refused("This model has no chat template: start the server with --chat-template FILE.", "messages")
        try:
            return self.compile(self.source)
        except Exception as error:  # completions need no template
            raise Refused(f"This model's chat template cannot be read: {one_line(error)}", "messages") from None

    def compile(self, source: str) -> Any:
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):  # type: ignore[misc]
            """{% generation %} marks what the assistant says, for training: here it is what stands in it."""

            tags = {"generation"}

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
        env.filters["tojson"] = lambda value, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=listed
        )
        env.globals["strftime_now"] = time.strftime
        env.globals["raise_exception"] = self.refuse
        return env.from_string(source)

    @staticmethod
    def refuse(message: str) -> None:
        raise Refused(f"The model's chat template refuses these messages: {message}", "messages")

    @property
    def short_ids(self) -> bool:
        """One family refuses ids of calls that are not nine letters and digits."""
        return re.search(r"!=\s*9\b", self.source or "") is not None

    tool_syntax = ""  # --tool-syntax: takes the place of what is found

    def choose(self, tool_syntax: str) -> None:
        self.tool_syntax = tool_syntax
        self.recipe = (*self.recipe, tool_syntax) if self.recipe else ()

    @functools.cached_property
    def syntax(self) -> Syntax:
        """How this template writes calls and reasoning. Found at the first look: some thirty short renderings."""
        if not self.source:
            return Syntax()
        try:
            found = Probe(self).syntax()
        except Exception:  # a template that nobody has thought of: its model still serves
            log.exception("the chat template's syntax cannot be found out")
            found = Syntax()
        if not self.tool_syntax:
            return found
        known = KNOWN[self.tool_syntax]
        return replace(known, think=known.think if known.think[1] else found.think, text_arguments=found.text_arguments)

    @functools.cached_property
    def switch(self) -> Switch:
        return Probe(self).switch() if self.source else Switch()

    @functools.cached_property
    def shows_tools(self) -> bool:
        """Does a prompt tell the model of its tools?"""
        return not self.source or NAME_A in Probe(self).prompt

    @functools.cached_property
    def shows_calls(self) -> tuple[bool, bool, bool]:
        """Does a prompt show past calls: where content stands beside them, where it is empty, where it is null?"""
        probe = Probe(self)
        probe.text_arguments = self.syntax.text_arguments
        call = [(NAME_A, {KEYS[0]: WORD})]
        beside, empty, null = (NAME_A in probe.said(content, call) for content in (ANSWER, "", None))
        return beside, empty, null

    def with_tools(self, prompt: Prompt) -> Prompt:
        """For a template that knows no tools: they are told in the system message."""
        functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in prompt.tools)
        example = written(self.syntax, [("NAME", '{"PARAMETER": VALUE}')])
        told = f"You may call these functions, described in JSON:\n{functions}\nTo call one, write:\n{example}"
        first, *rest = prompt.messages or ({"role": "user", "content": ""},)
        if first["role"] in ("system", "developer"):
            messages = ({**first, "content": f"{first['content']}\n\n{told}".lstrip()}, *rest)
        else:
            messages = ({"role": "system", "content": told}, first, *rest)
        return replace(prompt, messages=messages)

    @property
    def about(self) -> dict[str, Any]:
        """For GET /v1/capabilities and the banner."""
        syntax, switch = self.syntax, self.switch
        return {
            "tool_calls": (syntax.name if syntax.name != "found" else f"found: {syntax.form}") if syntax.form else None,
            "reasoning": list(syntax.think) if syntax.think[1] else dict(syntax.kinds) and syntax.name or None,
            "thinking_switch": switch.name or None,
            "thinks_by_default": switch.default if switch.name else bool(syntax.think[1] or syntax.kinds),
            "reasoning_efforts": list(switch.efforts),
        }

    def prepare(self, prompt: Prompt, sampling: Sampling) -> Chat:
        """All that is done for a request before its first token, text to text: it may run anywhere. Raises Refused."""
        tools = prompt.tools if prompt.tool_choice != "none" else ()
        if prompt.callable is not None and prompt.tool_choice == "auto":
            tools = tuple(tool for tool in tools if tool["function"]["name"] in prompt.callable)
        syntax = self.syntax
        if tools and not syntax.form:
            names = ", ".join(KNOWN)
            raise Refused(
                f"This model's chat template shows no tool calls: start the server with --tool-syntax NAME, one of {names}.",
                "tools",
            )
        prompt = replace(prompt, tools=tools, template_kwargs=self.switched(prompt))
        text = self.render_tools(prompt)
        parameters = {t["function"]["name"]: t["function"].get("parameters") for t in tools}
        forced = bool(tools) and prompt.tool_choice == "required"
        grammar, neutral, content = sampling.grammar, False, sampling.grammar is not None
        if tools and grammar is not None:
            grammar, content = self.or_calls(grammar, tools, prompt)
        elif tools:
            try:
                grammar, neutral = calls_grammar(syntax, tools, prompt.callable if forced else None, forced, prompt.parallel)
            except Unsupported as error:
                raise Refused(
                    f"'tools' cannot be honoured where calls are forced: {error}", "tools", "unsupported_constraint"
                ) from None
        inside = self.inside(prompt, text)
        if inside and (sampling.thinking_budget == 0 or prompt.lenient and prompt.effort == "none"):
            text, inside = f"{text}{syntax.think[1]}\n\n", False
        whole, grammar = self.with_reasoning(grammar, content, neutral, inside, self.may_think(prompt, text))
        parsed = bool(tools or syntax.think[1] or syntax.form in ("channels", "functionary"))
        return Chat(
            text,
            syntax if parsed else None,
            parameters,
            inside,
            neutral,
            grammar,
            whole,
            optional=sampling.grammar is None and not forced,
        )

    def or_calls(self, grammar: str, tools: Sequence[dict[str, Any]], prompt: Prompt) -> tuple[str, bool]:
        """(the grammar of content or of calls in its place, where this syntax can write them; whether it is of content alone)."""
        try:
            calls, neutral = calls_grammar(self.syntax, tools, prompt.callable, True, prompt.parallel)
        except Unsupported:  # they are not promised anything here
            return grammar, True
        if calls is None or neutral:
            return grammar, True
        channels = self.syntax.form == "channels"
        return either(behind(CHANNEL_FRAMES[self.syntax.name][2], grammar) if channels else grammar, calls), not channels

    def with_reasoning(
        self, grammar: str | None, content: bool, neutral: bool, inside: bool, may_think: bool
    ) -> tuple[str | None, str | None]:
        """(the grammar with free reasoning in front, where there may be some; the grammar alone). `content`: it is not of calls."""
        syntax = self.syntax
        if grammar is None:
            return None, None
        if syntax.form == "channels":
            begin, end, opening, _ = CHANNEL_FRAMES[syntax.name]
            if neutral or not may_think:
                return None, grammar
            grammar = behind(opening, grammar) if content else grammar
            return after_reasoning(grammar, begin, end, False), grammar
        if syntax.think[1] and (inside or may_think):
            return after_reasoning(grammar, *syntax.think, inside), grammar
        return None, grammar

    def render_tools(self, prompt: Prompt) -> str:
        """The prompt's text, its tools in it. Some templates fail where a schema leaves out what schemas may leave out."""
        if not prompt.tools or not self.shows_tools:
            return self.render(self.with_tools(prompt) if prompt.tools else prompt)
        try:
            return self.render(prompt)
        except Refused as refusal:
            tools = [
                {**t, "function": t["function"] | {"parameters": completed(t["function"].get("parameters"))}}
                for t in prompt.tools
            ]
            with contextlib.suppress(Refused):
                return self.render(replace(prompt, tools=tuple(tools)))
            raise refusal

    def inside(self, prompt: Prompt, text: str) -> bool:
        """Does the prompt end within reasoning?"""
        begin, end = self.syntax.think
        if not begin or not prompt.messages:
            return False
        if prompt.continue_final:
            said = prompt.messages[-1]["content"]
            return begin in said and said.rfind(begin) > said.rfind(end)
        return prompt.generation_prompt and text.rstrip().endswith(begin)

    def may_think(self, prompt: Prompt, text: str) -> bool:
        """May the model begin to reason, though the prompt does not?"""
        end = self.syntax.think[1]
        return prompt.generation_prompt and not prompt.continue_final and not (end and text.rstrip().endswith(end))

    def switched(self, prompt: Prompt) -> dict[str, Any]:
        """The template's variables, with reasoning on or off as the request wants it. Raises Refused."""
        kwargs, switch, syntax = dict(prompt.template_kwargs), self.switch, self.syntax
        thinks = bool(syntax.think[1] or syntax.kinds)
        wanted = kwargs.get("enable_thinking")
        if wanted is not None and switch.name != "enable_thinking":
            if switch.name:
                kwargs[switch.name] = kwargs.pop("enable_thinking")
            elif wanted is False and "none" in switch.efforts:
                kwargs.setdefault("reasoning_effort", "none")
            elif wanted is not thinks and "enable_thinking" not in (self.source or ""):
                able = "always reasons, and has no switch for that" if thinks else "does not reason"
                raise Refused(f"'enable_thinking' cannot be {json.dumps(wanted)}: this model {able}.", "chat_template_kwargs")
        if prompt.effort is None:
            return kwargs
        if switch.efforts and (prompt.effort != "none" or "none" in switch.efforts):
            kwargs["reasoning_effort"] = switch.effort(prompt.effort)
        elif not switch.name and not prompt.lenient and prompt.effort != ("medium" if thinks else "none"):
            able = "always reasons, and has no switch for how much" if thinks else "does not reason"
            raise Refused(f"'reasoning_effort' cannot be honoured: this model {able}.", "reasoning_effort")
        if switch.name:
            kwargs.setdefault(switch.name, prompt.effort != "none")
        return kwargs

    def render(self, prompt: Prompt) -> str:
        """The prompt's text; past calls are handed to the template as it wants them."""
        if any(m.get("tool_calls") or m.get("reasoning_content") or m.get("tool_call_id") for m in prompt.messages or ()):
            messages = tuple(self.past(m) for m in prompt.messages or ())
            prompt = replace(prompt, messages=messages)
        return self.render_plain(prompt)

    def past(self, message: dict[str, Any]) -> dict[str, Any]:
        """An assistant's message with the arguments of its calls as an object, or as text where the template wants that."""
        message = dict(message)
        calls = message.get("tool_calls")
        if self.short_ids:
            message |= {"tool_call_id": short_id(message["tool_call_id"])} if "tool_call_id" in message else {}
            calls = [{**call, "id": short_id(call["id"])} for call in calls or ()]
        beside, empty, null = self.shows_calls if calls else (True, True, True)
        if calls and not message["content"] and null and not empty:
            message["content"] = None
        if calls and not (beside if message["content"] else empty or null):
            said = written(self.syntax, [(c["function"]["name"], handed(c["function"], True)) for c in calls])
            message["content"] = f"{message['content']}\n{said}".lstrip()
            del message["tool_calls"]
        elif calls:
            text = self.syntax.text_arguments
            message["tool_calls"] = [
                {**c, "function": {**c["function"], "arguments": handed(c["function"], text)}} for c in calls
            ]
        if reasoning := message.get("reasoning_content"):
            message["reasoning"] = reasoning
            if "thinking" in (self.source or ""):
                message["thinking"] = reasoning
                if calls and "Cannot pass both content and thinking" in (self.source or "") and message["content"]:
                    message["thinking"], message["content"] = f"{reasoning}\n{message['content']}", ""
        return message

    def render_plain(self, prompt: Prompt) -> str:
        """As Hugging Face's `apply_chat_template` does. Raises Refused."""
        template = self.template
        messages = [dict(m) for m in prompt.messages or ()]
        mark = ""
        if prompt.continue_final:  # where the last message ends only the template knows: mark the place and cut there
            mark = "\ue000cut\ue000"
            messages[-1]["content"] += mark
        if not self.has_developer:  # OpenAI's newer name for the system role; few templates know it
            for message in messages:
                if message["role"] == "developer":
                    message["role"] = "system"
        try:
            variables = {
                "tools": list(prompt.tools) or self.without_tools,
                "documents": None,
                **self.tokens,
                **(self.functions(prompt.tools) if "functools[" in (self.source or "") else {}),
                **prompt.template_kwargs,
                "add_generation_prompt": prompt.generation_prompt and not mark,
            }
            text = str(template.render(messages=messages, **variables))
            if mark and mark not in text:
                raise Refused("The model's chat template cannot continue the final message.", "continue_final_message")
            return text.rpartition(mark)[0] if mark else text
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"The model's chat template cannot render these messages: {one_line(error)}", "messages") from None

    @functools.cached_property
    def without_tools(self) -> list[Any] | None:
        """What `tools` is where there are none: some templates go through the list without asking whether it is one."""
        nothing: list[Any] | None
        for nothing in (None, []):
            with contextlib.suppress(Exception):
                self.template.render(messages=[USER], tools=nothing, documents=None, **self.tokens, add_generation_prompt=True)
                return nothing
        return None

    @staticmethod
    def functions(tools: Sequence[dict[str, Any]]) -> dict[str, str]:
        """What one family's template has in place of `tools`."""
        return {
            "functions": json.dumps([tool["function"] for tool in tools], indent=4),
            "datetime": time.strftime("%B %d %Y %H:%M:%S GMT", time.gmtime()),
        }


def completed(schema: Any) -> Any:
    """The schema with what templates are wont to read in it, empty where it has none."""
    if not isinstance(schema, dict):
        return schema
    properties = {
        name: {"description": "", **completed(s)} for name, s in schema.get("properties", {}).items() if isinstance(s, dict)
    }
    more: dict[str, Any] = {"properties": properties, "required": [], "additionalProperties": {"type": "string"}}
    if schema.get("type") == "array":
        more = {"items": {"type": "string"}}
    elif schema.get("type") != "object":
        return schema
    return {**more, **schema} | ({"properties": properties} if properties else {})


def short_id(id: str) -> str:
    return id if re.fullmatch("[A-Za-z0-9]{9}", id) else hashlib.sha256(id.encode()).hexdigest()[:9]


def listed(value: Any) -> list[Any]:
    """For JSON: what `map` and `select` make in a template is no list."""
    if isinstance(value, Iterator):
        return list(value)
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def handed(function: dict[str, Any], text: bool) -> Any:
    """The arguments of a past call, which are an object or the JSON text of one, as an object or as text."""
    arguments = function["arguments"]
    if isinstance(arguments, str):
        return arguments if text else json.loads(arguments)
    return json.dumps(arguments, ensure_ascii=False) if text else arguments


LEVELS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
OWN_WORDS = {"no_think": "none"}  # a template's word for a level


@dataclass(frozen=True, slots=True)
class Switch:
    """How a template is told to reason, or not to."""

    name: str = ""  # the variable that turns it on and off
    default: bool = False
    efforts: tuple[str, ...] = ()  # the values of `reasoning_effort` that make a difference

    def effort(self, wanted: str) -> str:
        """The known value that is nearest to the wanted one; of two, the higher."""
        known = {OWN_WORDS.get(word, word): word for word in self.efforts}
        able = [level for level in LEVELS if level in known and (level == "none") == (wanted == "none")] or list(known)
        at = LEVELS.index(wanted)
        return known[min(able, key=lambda level: (abs(LEVELS.index(level) - at), -LEVELS.index(level)))]


# ───────────────────────────────────────── the syntax, found in the template ─────────────────────────────────────

NAME_A, NAME_B = "probe_alpha", "probe_omega"
IDS = ("Qx7Kp2Lm9", "Zt4Wv8Rn3")  # nine letters and digits: one family takes no others
WORD, ANSWER, THOUGHT = "Vwords", "Canswer", "Rthought"
KEYS = ("kfirst", "ksecond")
TOOLS = tuple(
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "d",
            "parameters": {
                "type": "object",
                "properties": {
                    KEYS[0]: {"type": "string", "description": "d"},
                    KEYS[1]: {"type": "integer", "description": "d"},
                },
                "required": [],
                "additionalProperties": {"type": "string"},
            },
        },
    }
    for name in (NAME_A, NAME_B)
)
NOTHING: Mapping[str, str] = {}
USER = {"role": "user", "content": "Uquestion"}


class Probe:
    """Renders conversations that differ in one thing, and reads off the difference how calls and reasoning are written."""

    def __init__(self, template: ChatTemplate):
        self.template = template
        self.text_arguments = False
        self.base = self.render(())
        self.prompt = self.render((), True)

    def render(self, messages: tuple[dict[str, Any], ...], generation: bool = False, tools: Any = TOOLS, **kwargs: Any) -> str:
        """ "" where the template does not render them."""
        prompt = Prompt(messages=(USER, *messages), generation_prompt=generation, tools=tools, template_kwargs=kwargs)
        try:
            return self.template.render_plain(prompt)
        except Refused:
            return ""

    def said(
        self, content: str | None = "", calls: Sequence[tuple[str, dict[str, Any]]] = (), more: Mapping[str, str] = NOTHING
    ) -> str:
        """What an assistant's message adds to the question."""
        message: dict[str, Any] = {"role": "assistant", "content": content, **more}
        if calls:
            message["tool_calls"] = [
                {
                    "id": id,
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(a) if self.text_arguments else a},
                }
                for id, (name, a) in zip(IDS, calls, strict=False)
            ]
        text = self.render((message,))
        same = os.path.commonprefix([text, self.base])
        return text[len(same) :] if len(same) > len(self.base) // 2 else text

    def syntax(self) -> Syntax:
        source = self.template.source or ""
        known = next((s for s in KNOWN.values() if s.signs and all(sign in source for sign in s.signs)), Syntax())
        if known.form == "channels":
            return replace(known, text_arguments=self.wants_text(known))
        think = known.think if known.think[1] else self.think()
        drops = known.drops or self.drops(think)
        if known.name in HAND_WRITTEN:
            return replace(known, think=think, drops=drops, text_arguments=self.wants_text(known))
        for self.text_arguments in (False, True):
            found = self.calls(think)
            if found and self.comes_back(found):
                return replace(found, drops=drops, text_arguments=self.text_arguments)
        return replace(known, think=think, drops=drops)

    def switch(self) -> Switch:
        """Found by rendering with and without."""
        plain, name, default = self.prompt, "", False
        for name in ("enable_thinking", "thinking"):
            on, off = (self.render((), True, **{name: value}) for value in (True, False))
            if on and off and on != off:
                default = plain != off
                break
        else:
            name = ""
        more = {name: True} if name else {}
        plain = self.render((), True, **more)
        texts = {word: self.render((), True, reasoning_effort=word, **more) for word in (*LEVELS, *OWN_WORDS, "unheard-of")}
        usual = [text for text in texts.values() if text]
        if len({plain, *usual}) == 1:
            return Switch(name, default)
        if texts["unheard-of"] not in ("", plain) and len(set(usual)) > 3:  # any word is told to the model: these it has learnt
            return Switch(name, default, ("low", "medium", "high"))
        other = texts.pop("unheard-of") or plain
        known = tuple(word for word, text in texts.items() if text and (text != other or not texts["medium"]))
        return Switch(name, default, known)

    def wants_text(self, known: Syntax) -> bool:
        for self.text_arguments in (False, True):
            if NAME_A in self.said("", [(NAME_A, {KEYS[0]: WORD})]):
                return self.text_arguments
        return known.text_arguments

    def think(self) -> tuple[str, str]:
        """The marks around reasoning: as a message with some renders them, else the well-known ones that the source has."""
        source = self.template.source or ""
        for name in ("reasoning_content", "reasoning", "thinking"):
            head, found, tail = self.said(ANSWER, more={name: THOUGHT}).partition(THOUGHT)
            between, answered, _ = tail.partition(ANSWER)
            if not (found and answered and between.strip()):
                continue
            end, head = marks(between)[0], head.rstrip()
            begin = head[max(head.rfind("<"), head.rfind("["), 0) :]
            plain = self.said(ANSWER).partition(ANSWER)[0]
            if (
                begin in plain and end not in plain
            ):  # it only says whose turn it is: then the prompt may end in words of its own
                begin = self.prompt.rstrip().rpartition("\n")[2]
                begin = begin if begin not in plain else ""
            if begin:
                return begin, end
        shown = next((pair for pair in THINKING if pair[1] in source), ("", ""))
        return next((pair for sign, pair in SILENT_THINKING.items() if sign in source), shown)

    def header(self, text: str, think: tuple[str, str]) -> str:
        """What stands before an assistant's words, as far as `text` begins with it."""
        plain = self.said(ANSWER).partition(ANSWER)[0]
        same = os.path.commonprefix([plain, text])
        for left, right in ("<>", "[]"):
            if same.rfind(left) > same.rfind(right):  # cut inside a mark
                same = same[: same.rfind(left)]
        end = text.rfind(think[1]) if think[1] else -1
        return text[: max(len(same), end + len(think[1]) if end >= 0 else 0)]

    def calls(self, think: tuple[str, str]) -> Syntax | None:
        arguments = {KEYS[0]: WORD, KEYS[1]: 7}
        for content in ("", None):
            one = self.said(content, [(NAME_A, arguments)])
            if NAME_A in one and WORD in one:
                break
        else:
            return None
        two = self.said(content, [(NAME_A, arguments), (NAME_B, arguments)])
        two = two if NAME_B in two and two.count(WORD) == 2 else ""
        for id in IDS:
            one, two = one.replace(id, "\0"), two.replace(id, "\0")
        for find in (self.json_form, self.named_form, self.tagged_form):
            found: Syntax | None = find(one, two, think)
            if found:
                return found
        return None

    def around(
        self, one: str, span: tuple[int, int], two: str, pair: list[tuple[int, int]], think: tuple[str, str]
    ) -> dict[str, Any]:
        """before, between and after, from where one call stands in a text, and where two do."""
        before = one[len(self.header(one[: span[0]], think)) : span[0]].lstrip()
        between = two[pair[0][1] : pair[1][0]] if len(pair) == 2 else ""
        after, turn = one[span[1] :], {*marks(self.said(ANSWER).replace(ANSWER, "<>")), self.template.tokens["eos_token"]}
        for mark in marks(after):  # what also ends and begins turns is not the calls' own
            if mark in turn:
                after = after[: after.find(mark)]
                break
        return {"before": before, "between": between, "after": after.rstrip() if between or after.strip() else ""}

    def drops(self, think: tuple[str, str]) -> tuple[str, ...]:
        """Marks that stand around content."""
        source = self.template.source or ""
        found = [mark for mark in CONTENT_MARKS if mark in source and mark not in think]
        found += ["<response>", "</response>"] if "response between <response>" in source else []
        plain, _, footer = self.said(ANSWER).partition(ANSWER)
        own = plain[len(self.header(self.prompt[len(os.path.commonprefix([self.prompt, self.base])) :], think)) :]
        own = own[own.rfind(think[1]) + len(think[1]) :] if think[1] in own else own
        if opening := [mark for mark in marks(own) if re.fullmatch(r"<\|.*\|>", mark)]:
            found += opening + marks(footer)[:1]
        return tuple(found)

    def json_form(self, one: str, two: str, think: tuple[str, str]) -> Syntax | None:
        first = json_around(one, NAME_A)
        if not first:
            return None
        value, span = first
        name_keys = tuple(key for key, entry in value.items() if entry == NAME_A)
        wanted = {KEYS[0]: WORD, KEYS[1]: 7}
        argument_keys = tuple(
            k for k, entry in value.items() if entry == wanted or (isinstance(entry, str) and as_json(entry) == wanted)
        )
        if not argument_keys or (not name_keys and argument_keys != (NAME_A,)):
            return None
        if not name_keys:
            argument_keys = ()
        pair = [found[1] for name in (NAME_A, NAME_B) if two and (found := json_around(two, name))]
        around = self.around(one, span, two, pair, think)
        opening = marks(re.sub(r"\[\s*$", "", around["before"]))
        closing = marks(re.sub(r"^\s*\]", "", around["after"]))
        more = tuple(m for m in marks(around["between"].strip(" \n,;")) if m not in opening)
        return Syntax(
            "found",
            "json",
            think,
            openers=tuple(opening),
            closers=tuple(dict.fromkeys((*more, *closing))),
            bare=not opening,
            name_keys=name_keys,
            argument_keys=tuple(dict.fromkeys((*argument_keys, "arguments", "parameters"))) if name_keys else (),
            **around,
        )

    def named_form(self, one: str, two: str, think: tuple[str, str]) -> Syntax | None:
        spans = named_spans(one, (NAME_A,))
        if not spans:
            return None
        pair = named_spans(two, (NAME_A, NAME_B)) if two else []
        around = self.around(one, (spans[0][0], spans[0][2]), two, [(a, c) for a, _, c in pair], think)
        middle = one[spans[0][0] + len(NAME_A) : spans[0][1]]
        if len(pair) == 2:
            other = two[pair[1][0] + len(NAME_B) : pair[1][1]]
            middle = wild(middle, other)
        return self.with_marks(Syntax("found", "named", think, middle=middle, **around))

    def with_marks(self, syntax: Syntax) -> Syntax | None:
        opening = marks(syntax.before)
        if not opening:
            return None
        prefix = re.search(r"[\w.]*$", opening[-1]).group()  # type: ignore[union-attr]
        if prefix and opening[-1] != prefix:
            opening[-1] = opening[-1].removesuffix(prefix)
        again = [m.removesuffix(prefix) for m in marks(syntax.between)]
        closing = [m for m in again if m not in opening] + [m for m in marks(syntax.after) if m not in opening]
        return replace(syntax, openers=tuple(opening), closers=tuple(dict.fromkeys(closing)), prefix=prefix)

    def tagged_form(self, one: str, two: str, think: tuple[str, str]) -> Syntax | None:
        at = one.rfind(NAME_A, 0, one.find(WORD))
        spots = [at, one.find(KEYS[0], at), one.find(WORD, at), one.find(KEYS[1], at)]
        seven = one.find("7", spots[3]) if spots[3] >= 0 else -1
        if min(*spots, seven) < 0 or sorted(spots) != spots:
            return None
        texts = (one[spots[0] + len(NAME_A) : spots[1]], one[spots[1] + len(KEYS[0]) : spots[2]])
        between, second = one[spots[2] + len(WORD) : spots[3]], one[spots[3] + len(KEYS[1]) : seven]
        opening, middle = suffix(texts[0], between), texts[1]
        opening = opening[
            min((at for at in (opening.find("<"), opening.find("[")) if at >= 0), default=0) :
        ]  # from a mark's begin
        value_end = between[: len(between) - len(opening)]
        name_end = texts[0][: len(texts[0]) - len(opening)]
        key_end, text_type = middle, ""
        if middle != second:
            head, tail = os.path.commonprefix([middle, second]), suffix(middle, second)
            head, tail = re.sub(r"\w+$", "", head), re.sub(r"^\w+", "", tail)
            text_type = middle[len(head) : len(middle) - len(tail)]
            key_end = f"{head}\0{tail}"
        line = key_end.endswith("\n") and value_end.startswith("\n")
        rest = one[seven + 1 :]
        ending = len(value_end.rstrip()) if rest.startswith(value_end.rstrip()) else 0
        end = seven + 1 + ending
        last = two.rfind(NAME_B)
        pair = []
        if two and last > 0:
            close = two.rfind("7", 0, last) + 1 + ending
            pair = [(0, close), (last, last)]
        around = self.around(one, (at, end), two, pair, think)
        if len(pair) == 2:
            name_end = wild(name_end, two[last + len(NAME_B) : two.find(opening, last)])
        return self.with_marks(
            Syntax(
                "found",
                "tagged",
                think,
                middle=name_end,
                key=(opening.strip(), key_end.strip() if not line else key_end.removesuffix("\n")),
                text_type=text_type,
                value_end=value_end.strip(),
                value_line=line,
                cdata="CDATA" in (self.template.source or ""),
                **around,
            )
        )

    def comes_back(self, syntax: Syntax) -> bool:
        """A call that the template renders is read as that call."""
        arguments = {KEYS[0]: WORD, KEYS[1]: 7}
        schema = TOOLS[0]["function"]["parameters"]  # type: ignore[index]
        for content in ("", None):
            text = self.said(content, [(NAME_A, arguments)])
            if NAME_A in text:
                break
        text = text[len(self.header(text[: text.find(NAME_A)], syntax.think)) :] if syntax.before else text
        parser = Parser(syntax, {NAME_A: schema})
        pieces = (
            parser.feed(text[text.find(syntax.before.strip()[:8]) :] if syntax.before.strip() else text.lstrip())
            + parser.finish()
        )
        read = "".join(p.text for p in pieces if p.kind == "arguments")
        return [p.text for p in pieces if p.kind == "call"] == [NAME_A] and as_json(read) == arguments


CONTENT_MARKS = ("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]", "<|START_RESPONSE|>", "<|END_RESPONSE|>")
HAND_WRITTEN = frozenset(("functionary", "gemma", "kimi-k3", "lfm2", "minimax-m3", "pythonic", "solar"))


def marks(text: str) -> list[str]:
    """The literals in what stands before or behind a call: cut where one mark ends and the next begins."""
    found = re.split(r"(?<=[>\]\"])\s*(?=[<\[])|(?<=```)\s*(?=[<\[])", text.strip())
    return [one.strip() for one in found if one.strip()]


def suffix(a: str, b: str) -> str:
    return os.path.commonprefix([a[::-1], b[::-1]])[::-1]


def wild(a: str, b: str) -> str:
    """One literal out of two, with \\0 for where they differ."""
    if a == b:
        return a
    head, tail = os.path.commonprefix([a, b]), suffix(a, b)
    return f"{head}\0{tail}" if len(head) + len(tail) <= min(len(a), len(b)) else a


def as_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def json_around(text: str, name: str) -> tuple[dict[str, Any], tuple[int, int]] | None:
    """The innermost JSON object that has the name in it as a value or a key, and where it stands."""
    at = text.find(name)
    start = text.rfind("{", 0, at)
    while start >= 0:
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(text, start)
            if end > at and isinstance(value, dict) and (name in value or name in value.values()):
                return value, (start, end)
        except (ValueError, TypeError):
            pass
        start = text.rfind("{", 0, start)
    return None


def named_spans(text: str, names: Sequence[str]) -> list[tuple[int, int, int]]:
    """(where the name begins, where its JSON arguments begin and end) of each name that is followed by some."""
    found = []
    for name in names:
        at = text.rfind(name)
        start = text.find("{", at)
        quoted = text.find('"{', at)
        try:
            if 0 <= quoted < start:
                _, end = json.JSONDecoder().raw_decode(text, quoted)
                start = quoted
            else:
                _, end = json.JSONDecoder().raw_decode(text, start)
        except ValueError:
            continue
        if at >= 0 and len(text[at + len(name) : start]) < 80:
            found.append((at, start, end))
    return found if len(found) == len(names) else []
