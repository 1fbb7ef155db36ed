"""What is done for a request before it costs the engine anything, text to text: its conversation becomes a prompt, its
constraint a grammar. Runs in the workshop, which bounds its time and memory; no socket, no engine, no library but Jinja.

  ("template", source, bos, eos, more, tool_syntax)  the template to render with             -> b"+" and JSON of what was found in it
  ("message", context, render, message)  a message to the engine                 -> b"+" and the message, prepared
  ("grammar", constraint)                for an engine that renders by itself    -> b"+" and the grammar's text
Refused is b"-" and JSON of its arguments; a bug is b"!" and what may be said of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from chat_syntax import ChatTemplate
from constraints import Unsupported, choice_grammar, own_grammar, regex_grammar, spaced, writing_grammar
from engine import CHARACTERS, Prompt, Refused, Sampling, too_long

log = logging.getLogger("openai_api_endpoint")

GRAMMARS: dict[str, Callable[[Any], str]] = {
    "json": writing_grammar,
    "spaced": lambda schema: spaced(writing_grammar(schema)),
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": own_grammar,
}
NONE = Sampling()
KNOWN = 64  # grammars that are kept: agents ask for the same one again and again


class Preparation:
    """The workshop's work."""

    def __init__(self) -> None:
        self.template: ChatTemplate | None = None
        self.context = 0
        self.tell: Callable[[str], None] = lambda stage: None

    def __call__(self, order: bytes, tell: Callable[[str], None]) -> bytes:
        if not order:
            return b""
        self.tell = tell
        kind, *arguments = pickle.loads(order)
        work: dict[str, Callable[..., bytes]] = {"template": self.set_up, "message": self.message, "grammar": self.grammar}
        try:
            return b"+" + work[kind](*arguments)
        except Refused as refusal:
            return b"-" + json.dumps(refusal.args).encode()
        except MemoryError:
            return b"-" + json.dumps(["The preparation of this request needs more memory than there is for it."]).encode()
        except RecursionError:
            return b"-" + json.dumps(["The request is nested too deeply."]).encode()
        except Exception as error:
            log.exception("bug")
            return b"!" + f"the request could not be prepared: {type(error).__name__}".encode()

    def set_up(self, source: str, bos: str, eos: str, more: dict[str, str] | None, tool_syntax: str = "") -> bytes:
        self.tell("template")
        self.template = ChatTemplate(source, bos, eos, more)
        if tool_syntax:
            self.template.choose(tool_syntax)
        with contextlib.suppress(Refused):  # who asks for it is told
            _ = self.template.template
            return json.dumps(self.template.about).encode()
        return b""

    def message(self, context: int, render: bool, message: tuple[Any, ...]) -> bytes:
        self.context = context
        kind, job, *arguments = message
        if kind == "submit":
            prompts, sampling, *rest = arguments
            sampling = self.sampling(sampling)
            arguments = [self.prompts(prompts, render, sampling), sampling, *rest]
        else:
            name, given, *rest = arguments
            arguments = [name, {key: self.prompts(value, render) for key, value in given.items()}, *rest]
        return pickle.dumps((kind, job, *arguments), pickle.HIGHEST_PROTOCOL)

    def prompts(self, value: Any, render: bool, sampling: Sampling = NONE) -> Any:
        """Every prompt in a value, prepared."""
        if isinstance(value, (list, tuple)):
            return tuple(self.prompts(one, render, sampling) for one in value)
        return self.prompt(value, sampling) if render and isinstance(value, Prompt) and value.messages is not None else value

    def prompt(self, prompt: Prompt, sampling: Sampling) -> Prompt:
        assert self.template
        self.tell("template")
        try:
            chat = self.template.prepare(prompt, sampling)
        except Unsupported as error:
            reason = f"'structured_outputs' cannot be honoured: {error}"
            raise Refused(reason, "structured_outputs", "unsupported_constraint") from None
        text = chat.text
        if len(text) // CHARACTERS > self.context:
            raise too_long("the prompt", "is far longer than", self.context)
        return replace(prompt, messages=None, template_kwargs={}, tools=(), text=text, rendered=True, chat=chat)

    def sampling(self, sampling: Sampling) -> Sampling:
        if sampling.constraint is None:
            return sampling
        return replace(sampling, constraint=None, grammar=self.grammar(sampling.constraint).decode())

    def grammar(self, constraint: tuple[str, Any, str]) -> bytes:
        self.tell("constraint")
        kind, source, where = constraint
        try:
            return grammar_of(kind, json.dumps(source)).encode()
        except Unsupported as error:
            raise Refused(f"'{where}' cannot be honoured: {error}", where, "unsupported_constraint") from None


@functools.lru_cache(KNOWN)
def grammar_of(kind: str, source: str) -> str:
    """`source` as JSON. Raises Unsupported."""
    return GRAMMARS[kind](json.loads(source))
