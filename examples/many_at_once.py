#!/usr/bin/env python3
"""Many questions at once, batched by the engine:  python examples/many_at_once.py [http://localhost:8000] [16]"""

import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
count = int(sys.argv[2]) if len(sys.argv) > 2 else 16


def ask(i: int) -> tuple[str, int]:
    fields = {"messages": [{"role": "user", "content": f"Tell me one fact about the number {i}."}], "max_tokens": 48, "seed": i}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(fields).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        answer = json.load(reply)
    return answer["choices"][0]["message"]["content"], answer["usage"]["completion_tokens"]


def timed(questions: int) -> float:
    start = time.monotonic()
    with ThreadPoolExecutor(questions) as pool:
        answers = list(pool.map(ask, range(questions)))
    seconds = time.monotonic() - start
    print(f"{questions:3} at once: {seconds:5.1f} s, {sum(tokens for _, tokens in answers) / seconds:6.1f} tokens/s")
    print("   ", answers[0][0][:100].replace("\n", " "))
    return seconds


timed(1)
timed(count)
