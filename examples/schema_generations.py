"""Real schemas on a real engine: every answer that comes to its end is held against its schema, and memory is watched.

    pip install jsonschema
    python examples/schema_generations.py DATA [--count 300] [--tokens 160] [flags of the server, such as --backend llamacpp]

DATA is what schema_bench.py takes. Each schema is asked for once, at temperature 1, eight at a time. Exit status 1 where an answer
that ended with "stop" is not valid, or a request got neither an answer nor a 400. Memory is that of the server and its processes.
"""

import argparse
import collections
import itertools
import json
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jsonschema
from schema_bench import cases
from soak import Soak, children, resident_mb

AT_ONCE = 8


class Run:
    """The server, the schemas that are still to be asked for, and what came of the others."""

    def __init__(self, schemas: Iterator[Any], tokens: int, flags: list[str]):
        self.soak = Soak(flags)
        self.schemas, self.tokens = schemas, tokens
        self.lock = threading.Lock()  # guards schemas, seen
        self.seen: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []

    def work(self) -> None:
        while case := self.next():
            found = self.ask(case["name"], case["schema"])
            with self.lock:
                self.seen[found] += 1
                asked = self.seen.total()
                if asked % 50 == 0:
                    print(f"{asked} schemas, {self}", flush=True)

    def next(self) -> Any:
        with self.lock:
            return next(self.schemas, None)

    def __str__(self) -> str:
        server = self.soak.process.pid
        memory = " + ".join(f"{resident_mb(pid):.0f}" for pid in [server, *children(server)])
        return "; ".join([f"{memory} MB", *(f"{what}: {count}" for what, count in sorted(self.seen.items()))])

    def ask(self, name: str, schema: Any) -> str:
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        body = {"messages": [{"role": "user", "content": "Write a short JSON document."}], "temperature": 1, "seed": 1}
        status, data = self.soak.ask("/v1/chat/completions", body | {"max_tokens": self.tokens, "response_format": form})
        if status != 200:
            if status != 400:
                self.wrong.append(f"{name}: {status} {data[:200]!r}")
            return f"{status}"
        choice = json.loads(data)["choices"][0]
        if choice["finish_reason"] != "stop":
            return str(choice["finish_reason"])
        return self.judge(name, schema, choice["message"]["content"])

    def judge(self, name: str, schema: Any, text: str) -> str:
        try:
            kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
            error = next(kind(schema).iter_errors(json.loads(text)), None)
        except Exception as broken:  # of the schema: a pattern that Python does not know, a reference that leads nowhere
            if isinstance(broken, json.JSONDecodeError):
                self.wrong.append(f"{name}: no JSON: {text[:200]!r}")
                return "stop, not valid"
            return "stop, jsonschema cannot tell"
        if error:
            self.wrong.append(f"{name}: {error.message[:200]} in {text[:200]!r}")
        return "stop, not valid" if error else "stop, valid"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=160, help="at most so many in an answer")
    args, flags = parser.parse_known_args()
    every = list(cases(args.data))
    chosen = every[:: max(1, len(every) // args.count)][: args.count]
    run = Run(iter(chosen), args.tokens, flags)
    try:
        run.soak.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8})  # waits for it
        print(f"before: {run}", flush=True)
        threads = [threading.Thread(target=run.work) for _ in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(f"after: {run}")
    finally:
        run.soak.process.kill()
    for line in itertools.islice(run.wrong, 20):
        print(line)
    return bool(run.wrong)


if __name__ == "__main__":
    sys.exit(main())
