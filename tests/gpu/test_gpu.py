"""exllamav3 itself, on a CUDA GPU: pytest tests/gpu. CI has no GPU and has never run this; what it can do is test_exllamav3.py.

A Llama with random weights answers, so what is compared is its own answers, and structure. The first run compiles exllamav3's
CUDA code where no compiled extension is installed, which takes minutes.
"""

import json
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny_llama
from conftest import serve_one, sse, until

from catalog import choose_backend, find_model
from engine import EngineSpec

LONG = "All work and no play makes Jack a dull boy. " * 25
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.make(tmp_path_factory.mktemp("gpu") / "tiny-llama")


def serve_folder(folder, **spec):
    model = find_model(folder)
    return serve_one(model, EngineSpec("exllamav3", str(folder), 8, 0, 16384, **spec), admin="")


@pytest.fixture(scope="module")
def served(folder):
    with serve_folder(folder) as served:
        yield served


def ask(served, content, **fields):
    status, reply, _ = served.chat(content, **{"max_tokens": 40, "temperature": 0, **fields})
    assert status == 200, reply
    return reply


def text(reply):
    return reply["choices"][0]["message"]["content"]


def ended(reply):
    return reply["choices"][0]["finish_reason"], reply["usage"]["completion_tokens"]


def test_it_is_chosen_by_itself(folder):
    assert choose_backend(find_model(folder), "auto") == "exllamav3"


def test_greedy_is_repeatable(served):
    ask(served, "Tell me about the moon.")
    assert len({text(ask(served, "Tell me about the moon.")) for _ in range(3)}) == 1


def test_a_seed_is_repeatable(served):
    ask(served, "a story", seed=1, temperature=1)  # from here on its prompt is in the cache: the same arithmetic each time
    texts = [text(ask(served, "a story", seed=seed, temperature=1)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_eight_at_once(served):
    """Each gets an answer to its own prompt. The arithmetic may differ in a batch, so most must be what they are alone."""
    prompts = [f"Count from {i} to {i * 7}." for i in range(8)]
    alone = [text(ask(served, prompt)) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda prompt: ask(served, prompt), prompts))
    assert all(ended(reply)[1] == 40 or ended(reply)[0] == "stop" for reply in replies)
    assert len(set(alone)) > 4
    assert sum(text(reply) == other for reply, other in zip(replies, alone, strict=True)) >= 5


def test_a_stream_is_the_same_answer(served):
    ask(served, "Say it.")
    whole = text(ask(served, "Say it."))
    events = served.stream("Say it.", max_tokens=40, temperature=0)
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == whole


def test_a_client_leaves(served):
    fields = {
        "messages": [{"role": "user", "content": "Go on."}],
        "stream": True,
        "max_tokens": 3900,
        "logit_bias": {"257": -100},
    }
    body = json.dumps(fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((served.host, served.port)) as client:
        client.sendall(head + body)
        while b'"content":"' not in client.recv(4096):
            pass
    until(lambda: not served.models.engine.jobs)
    with ThreadPoolExecutor(8) as pool:  # every slot is free again
        assert all(text(reply) for reply in pool.map(lambda i: ask(served, f"{i}?", logit_bias={"257": -100}), range(8)))


def test_a_long_prompt_is_cached(served):
    usages = [ask(served, LONG, max_tokens=4)["usage"] for _ in range(2)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached[0] < 256 <= 1024 <= cached[1] < usages[1]["prompt_tokens"]


def test_a_completion_longer_than_what_is_reserved(served):
    """It is queued again on its way; greedy with a ban on EOS, so that it gets there."""
    reply = ask(served, "On and on.", max_tokens=3000, logit_bias={"257": -100})
    assert ended(reply) == ("length", 3000)


def test_logit_bias(served):
    assert ended(ask(served, "Anything.", logit_bias={"257": 100})) == ("stop", 1)
    banned = ask(served, "Anything.", logit_bias={str(i): -100 for i in range(256)} | {"257": -100})
    assert text(banned) == ""  # special tokens alone are left


def test_penalties_count_the_completion_alone(served):
    plain = text(ask(served, "aaaaaaaa"))
    assert text(ask(served, "aaaaaaaa", max_tokens=1, frequency_penalty=2)) == plain[:1]
    words = text(ask(served, "aaaaaaaa", presence_penalty=2, frequency_penalty=2))
    assert len(set(words)) >= len(set(plain))


def test_logprobs(served):
    reply = ask(served, "Which?", logprobs=True, top_logprobs=5, max_tokens=8)
    tokens = reply["choices"][0]["logprobs"]["content"]
    assert tokens and all(one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0 for one in tokens)  # greedy takes the best
    json.dumps(reply, allow_nan=False)


@pytest.mark.parametrize("seed", range(5))
def test_json_schema(served, seed):
    schema = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
    reply = ask(served, "An object.", response_format=schema, max_tokens=60, temperature=1, seed=seed)
    found = json.loads(text(reply))
    assert 0 <= found["a"] <= 99 and found["b"] in ("x", "y") and ended(reply)[0] == "stop"


def test_stop_string(served):
    ask(served, "A string.", max_tokens=30)
    whole = text(ask(served, "A string.", max_tokens=30))
    stop = whole[10:13]
    reply = ask(served, "A string.", max_tokens=30, stop=["never this", stop])
    assert (text(reply), ended(reply)[0]) == (whole[: whole.index(stop)], "stop")


def test_too_long(served):
    status, reply, _ = served.chat("long " * 1000)
    assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
    assert served.chat("short", max_tokens=4096)[0] == 400
    assert ask(served, "short")


def test_unload_and_reload(served):
    ask(served, "Before.")
    before = text(ask(served, "Before."))
    name = {"model": served.models.default().id}
    engine = served.models.engine
    assert served.request("POST", "/v1/models/unload", name)[0] == 200
    assert not engine.process.is_alive()
    assert served.request("POST", "/v1/models/load", name)[0] == 200
    served.wait_ready()
    assert text(ask(served, "Before.")) == before and served.models.engine.process.pid != engine.process.pid


def test_drafts(folder):
    """Guesses change the speed alone."""
    with serve_folder(folder, ngram=2, draft_tokens=4) as served:
        assert ended(ask(served, "abcabcabcabc", logit_bias={"257": -100})) == ("length", 40)
        schema = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}
        json.loads(text(ask(served, "abcabc", response_format=schema, max_tokens=60)))


def test_exl3(folder, tmp_path):
    """Quantised by exllamav3 itself, and served."""
    out, work = tmp_path / "tiny-exl3", tmp_path / "work"
    command = [sys.executable, "-m", "exllamav3.conversion.convert_model", "-i", folder, "-o", out, "-w", work, "-b", "4.0"]
    subprocess.run(command, check=True)
    model = find_model(out)
    assert (model.kind, choose_backend(model, "auto")) == ("exl3", "exllamav3")
    with serve_folder(out) as served:
        ask(served, "Are you smaller?")
        assert text(ask(served, "Are you smaller?")) == text(ask(served, "Are you smaller?"))
        events = sse(served.chat("Are you smaller?", stream=True, max_tokens=5)[1])
        assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
