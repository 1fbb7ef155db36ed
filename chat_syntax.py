"""How a model writes a conversation: its chat template. Text to text; jinja2 is imported in the engine process alone."""

from __future__ import annotations

import functools
import json
import time
from typing import Any

from engine import Prompt, Refused, one_line


class ChatTemplate:
    """A model's Jinja chat template, rendered as Hugging Face's `apply_chat_template` does, in a sandbox."""

    def __init__(self, source: str | None, bos: str, eos: str, more: dict[str, str] | None = None):
        self.source = source
        self.tokens = {**(more or {}), "bos_token": bos, "eos_token": eos}
        self.recipe = (source, bos, eos, more) if source else ()  # what it is made again from, in another process
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
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        env.globals["strftime_now"] = time.strftime
        env.globals["raise_exception"] = self.refuse
        return env.from_string(source)

    @staticmethod
    def refuse(message: str) -> None:
        raise Refused(f"The model's chat template refuses these messages: {message}", "messages")

    def render(self, prompt: Prompt) -> str:
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
                "tools": None,
                "documents": None,
                **self.tokens,
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
