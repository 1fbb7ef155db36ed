"""A scripted backend with a chat template: it says what the folder's script tells it to, and notes what it was asked."""

import json
import re
from pathlib import Path

from chat_syntax import ChatTemplate
from engine import Step

TEMPLATE = """
{%- if tools %}Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% elif enable_thinking is defined %}<think>
{% endif %}{% endif %}"""
EOS = 0


class ScriptedChat:
    """script.json: {"says": [what it says at each start, over and over], "special": [tokens that are no text], "size": tokens a step}."""

    SPECIAL_IN_GRAMMAR = False
    LIBRARIES, INSTALL, LACKS, SPECULATES = (), "", frozenset(), frozenset()

    def __init__(self, spec, progress):
        self.folder = Path(spec.path)
        self.template = ChatTemplate(spec.chat_template or TEMPLATE, "", "<|im_end|>")
        self.slots, self.threads, self.context, self.cache_tokens = spec.slots, 1, 1 << 16, 1 << 16
        self.eos, self.bos, self.defaults, self.library, self.vocabulary = frozenset([EOS]), -1, {}, "scripted 1", 1 << 10
        self.live, self.next = {}, 0
        progress(1.0)

    @property
    def script(self):
        return {"special": [], "size": 1} | json.loads((self.folder / "script.json").read_text())

    def tokenize(self, text, add_special):
        special = self.script["special"]
        parts = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
        return [i for part in parts for i in ([256 + special.index(part)] if part in special else part.encode())]

    def piece(self, token, special):
        if token >= 256:
            return self.script["special"][token - 256].encode() if special else b""
        return bytes([token])

    def start(self, ids, sampling):
        says = self.script["says"]
        prompt = b"".join(self.piece(token, True) for token in ids).decode()
        with open(self.folder / "log", "a+") as log:
            log.seek(0)
            turn = len(log.readlines())
            log.write(json.dumps([prompt, sampling.grammar, sampling.max_tokens]) + "\n")
        self.live[self.next] = iter([*self.tokenize(says[turn % len(says)], False), EOS])
        self.next += 1
        return self.next - 1, 0

    def step(self):
        size = self.script["size"]
        return [Step(seq, [next(said, EOS) for _ in range(size)]) for seq, said in self.live.items()]

    def cancel(self, seq):
        self.live.pop(seq)

    def close(self):
        pass
