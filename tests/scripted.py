"""A scripted backend: a token is a byte, and the prompt says what is to happen. For scheduling and faults."""

import gc
import os
import pickle
import struct
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from chat_syntax import ChatTemplate
from engine import Step

CONTEXT, EOS = 2000, 0


class Scripted:
    """`echo TEXT` says TEXT and ends; `forever` says x; `die`, `raise`, `hang` do so in the third step; `badstart`, `badencode`.

    In the folder spec.path: while a file `hold` exists no step is made, while `spin` exists neither, and it computes; every call
    is appended to `log`.
    """

    def __init__(self, spec, progress):
        self.folder, self.slots, self.threads, self.context, self.cache_tokens = spec.path, spec.slots, 1, CONTEXT, 4096
        self.eos, self.defaults, self.library = frozenset([EOS]), {}, "scripted 1"
        self.live, self.next, self.vocabulary, self.bos, self.template = {}, 0, 256, -1, self
        progress(0.5)
        while os.path.exists(f"{self.folder}/slow"):
            time.sleep(0.005)
        if os.path.exists(f"{self.folder}/fail"):
            raise RuntimeError("the script says: no")
        self.note("load")

    def note(self, text):
        with open(f"{self.folder}/log", "a") as f:
            f.write(text + "\n")

    def render(self, prompt):
        return prompt.messages[-1]["content"]

    def tokenize(self, text, add_special):
        if text == "badencode":
            raise RuntimeError("cannot encode")
        return list(text.encode())

    def piece(self, token, special):
        return bytes([token])

    def start(self, ids, sampling):
        text = bytes(ids).decode()
        if text == "badstart":
            raise RuntimeError("cannot start")
        self.next += 1
        verb, _, words = text.partition(" ")
        script = iter([*words.encode(), EOS]) if verb == "echo" else iter(lambda: ord("x"), None)
        self.live[self.next] = (verb, script, iter(range(10**9)))
        self.note(f"start {self.next} {text} seed={sampling.seed}")
        return self.next, len(text) % 7

    def step(self):
        while os.path.exists(f"{self.folder}/hold"):
            time.sleep(0.002)
        while os.path.exists(f"{self.folder}/spin"):
            pass
        time.sleep(0.001)
        for verb, _, count in self.live.values():
            if next(count) == 2 and verb in ("die", "raise", "hang"):
                self.note(verb)
                if verb == "die":
                    os.kill(os.getpid(), 9)
                if verb == "hang":
                    time.sleep(1000)
                raise RuntimeError("the script raises")
        return [Step(seq, [next(script)]) for seq, (_, script, _) in self.live.items()]

    def cancel(self, seq):
        _, _, count = self.live.pop(seq)
        self.note(f"cancel {seq} at {next(count)}")

    def close(self):
        self.note("close")


class Reader(Scripted):
    """Its prompt is the whole conversation, a line a message; what it does, the last message says."""

    def render(self, prompt):
        lines = []
        for message in prompt.messages:
            calls = "".join(
                f" {c['id']}={c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls", ())
            )
            thought = f" [{message['reasoning_content']}]" if message.get("reasoning_content") else ""
            lines.append(f"{message['role']}:{thought}{calls} {message['content']}")
        return "\n".join(lines)

    def start(self, ids, sampling):
        last = bytes(ids).decode().rpartition("\n")[2]
        return super().start(last.partition(" ")[2].encode(), sampling)


class Embedding(Scripted):
    """The same, and it embeds: four inputs at once, a vector of the input's length; steps and batches are in the log."""

    pool_tokens, pool_rows = 10**6, 4

    def step(self):
        self.note("step")
        return super().step()

    def embed(self, inputs):
        self.note("embed")
        yield [struct.pack("<f", len(given.ids)) for given in inputs]


class Templated(Scripted):
    """With the chat template that stands in the file `template` of its folder."""

    def __init__(self, spec, progress):
        super().__init__(spec, progress)
        self.template = ChatTemplate(Path(spec.path, "template").read_text(), "", "")


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


class TakenOver(Scripted):
    """It has got hold of the pipe, and sends what runs where it is unpickled."""

    def __init__(self, spec, progress):
        super().__init__(spec, progress)
        for pipe in [one for one in gc.get_objects() if isinstance(one, Connection) and one.writable and not one.closed]:
            pipe.send_bytes(pickle.dumps(("events", [Touch(f"{spec.path}/touched")])))


def tell_program(conn):
    """Has this process imported the program that started it?"""
    conn.send(hasattr(sys.modules["__main__"], "__file__"))
