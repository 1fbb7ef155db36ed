"""How models write reasoning and tool calls: the record of a syntax, and those that are known by name. Nothing but data.

What a template shows of it chat_syntax.py finds out; where nothing can be inferred a record stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    rethinks: bool = False  # reasoning may begin again within content
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
CHANNEL_NAMES = ("analysis", "commentary", "final")
CHANNEL_FRAMES = {  # what begins reasoning, what ends it, what begins content, and a call up to its name and from there on
    "harmony": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant",
        "<|channel|>final<|message|>",
        (" to=functions.", "<|channel|>commentary json<|message|>"),
    ),
    "muse": (" to=self<|message|>", "<|eom|><|start|>assistant", " to=user<|message|>", None),
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
            drops=("<|channel>", "<channel|>"),
            rethinks=True,
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
    ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
)
SILENT_THINKING = {
    "MiniMax-M1": ("<think>", "</think>")
}  # a word of the source → marks that its model writes, and it does not show
