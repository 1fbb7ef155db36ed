"""One contract for every engine, on the real demo model. Greedy text depends on the batch, so what is compared is structure."""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from conftest import serve_one, until

import backends
import model_init
from backends import missing_library
from engine import EngineSpec

QUESTION = "What is the capital of France?"
STORY = "Write a long story about a lighthouse."
LONG = "The quick brown fox jumps over the lazy dog near the river bank. " * 70


def text(reply, i=0):
    return reply["choices"][i]["message"]["content"]


def ask(served, content, **fields):
    status, reply, _ = served.chat(content, **{"max_tokens": 24, **fields})
    assert status == 200, reply
    return reply


def together(calls):
    results = [None] * len(calls)

    def run(i, call):
        results[i] = call()

    threads = [threading.Thread(target=run, args=(i, call)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_answer(served):
    reply = ask(served, QUESTION, temperature=0)
    assert text(reply)
    assert reply["usage"]["prompt_tokens"] == 37
    if served.models.engine.spec.backend == "openvino":  # llama.cpp's arithmetic leads this small model elsewhere
        assert "Paris" in text(reply)


def test_greedy_is_repeatable(served):
    assert len({text(ask(served, "Tell me about the moon.", temperature=0)) for _ in range(3)}) == 1


def test_seed(served):
    def once(seed):
        return text(ask(served, STORY, seed=seed, temperature=1))

    once(1)  # the prompt is in the cache from here on: the same arithmetic each time
    assert once(1) == once(1)
    assert once(1) != once(2)
    assert len({text(ask(served, STORY, temperature=1)) for _ in range(4)}) > 1  # no seed: another one each time


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.00001}, {"min_p": 1}])
def test_narrow_sampling_leaves_one_token(served, narrow):
    assert len({text(ask(served, QUESTION, temperature=1, seed=seed, max_tokens=1, **narrow)) for seed in range(6)}) == 1
    assert len({text(ask(served, STORY, temperature=2, seed=seed, max_tokens=1)) for seed in range(6)}) > 1


def test_max_tokens_and_usage(served):
    reply = ask(served, STORY, max_tokens=7, temperature=0)
    assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (7, "length")
    reply = ask(served, QUESTION, max_tokens=1)
    assert reply["usage"]["completion_tokens"] == 1


def test_eos_is_counted_and_not_shown(served):
    for seed in range(10):
        reply = ask(served, "Say hi.", seed=seed, max_tokens=100)
        if reply["choices"][0]["finish_reason"] == "stop":
            assert "<|im_end|>" not in text(reply)
            return
    raise AssertionError("no answer ended by itself")


def test_stop_string(served):
    ask(served, STORY, temperature=0)
    whole = text(ask(served, STORY, temperature=0, max_tokens=40))
    stop = whole[20:30]
    reply = ask(served, STORY, temperature=0, max_tokens=40, stop=["never this", stop])
    assert text(reply) == whole[: whole.index(stop)]
    assert reply["choices"][0]["finish_reason"] == "stop"


def test_stop_token_id(served):
    ask(served, STORY, temperature=0)
    whole = ask(served, STORY, temperature=0, max_tokens=30)
    reply = ask(served, STORY, temperature=0, max_tokens=30, stop=list(range(260, 276)))
    assert len(text(reply)) <= len(text(whole))
    every = ask(served, STORY, max_tokens=30, temperature=0.01, stop=[])
    assert text(every)


def test_penalties_change_the_text(served):
    ask(served, STORY, temperature=0, max_tokens=60)
    plain = text(ask(served, STORY, temperature=0, max_tokens=60))
    for penalty in ({"repetition_penalty": 2.0}, {"presence_penalty": 2.0, "frequency_penalty": 2.0}):
        words = text(ask(served, STORY, temperature=0, max_tokens=60, **penalty))
        assert words != plain


def test_n(served):
    reply = ask(served, STORY, n=4, seed=3, temperature=1)
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
    assert len({c["message"]["content"] for c in reply["choices"]}) == 4
    assert reply["usage"]["completion_tokens"] <= 4 * 24


def test_stream_is_the_same_answer(served):
    ask(served, STORY, temperature=0)
    whole = text(ask(served, STORY, temperature=0))
    chunks = served.stream(STORY, temperature=0, max_tokens=24, stream_options={"include_usage": True})
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == whole
    assert chunks[-1]["usage"]["completion_tokens"] == 24


def test_characters_that_span_tokens(served):
    content = "Repeat exactly: 世界 🎉 世界 🎉 世界 🎉 世界 🎉"
    fields = {"temperature": 0.3, "max_tokens": 40}
    ask(served, content, **fields)
    for fields["seed"] in range(4, 20):
        whole = text(ask(served, content, **fields))
        if not whole.isascii():
            break
    assert not whole.isascii()
    streamed = "".join(c["choices"][0]["delta"].get("content", "") for c in served.stream(content, **fields))
    assert streamed == whole


def test_context_length(served):
    context = served.behind.models.engine.info.context
    status, error, _ = served.chat(LONG * 20)
    assert (status, error["error"]["code"], error["error"]["param"]) == (400, "context_length_exceeded", "messages")
    status, error, _ = served.chat("hi", max_tokens=context)
    assert (status, error["error"]["code"]) == (400, "context_length_exceeded")
    assert served.chat("hi", max_tokens=context - 100, stop=["e", "a", "o", " "])[0] == 200


def test_prefix_is_reused(served):
    talk = [{"role": "user", "content": LONG}]
    first = served.request("POST", "/v1/chat/completions", {"messages": talk, "max_tokens": 4})[1]
    answer = text(first)
    talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]
    second = served.request("POST", "/v1/chat/completions", {"messages": talk, "max_tokens": 4})[1]
    assert first["usage"]["prompt_tokens"] > 1000
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 0.9 * first["usage"]["prompt_tokens"]


def test_a_prefix_is_copied_from_a_busy_slot(served):
    """n choices share one prefill, also where the first still runs."""
    reply = ask(served, LONG, n=3, max_tokens=8)
    assert len(reply["choices"]) == 3
    if served.models.engine.spec.backend in ("llamacpp", "openvino"):
        a, b = together([lambda: ask(served, LONG + "A?", max_tokens=60), lambda: ask(served, LONG + "B?", max_tokens=60)])
        assert all(r["usage"]["prompt_tokens_details"]["cached_tokens"] > 500 for r in (a, b))


def test_many_at_once_each_get_their_own(served):
    """More than there are slots, with the same seeds alone and together."""
    names = [
        "Zorblax",
        "Quimby",
        "Vexley",
        "Thorne",
        "Wystan",
        "Jorund",
        "Xanthe",
        "Gwydion",
        "Oswin",
        "Kestrel",
        "Ulrica",
        "Fenwick",
    ]
    ask_one = lambda name: ask(served, f"My name is {name}. What is my name?", max_tokens=30, temperature=0)  # noqa: E731
    replies = together([lambda name=name: ask_one(name) for name in names])
    assert all(r["usage"]["completion_tokens"] > 0 for r in replies)
    assert sum(name in text(r) for name, r in zip(names, replies, strict=True)) >= 1
    for i, name in enumerate(names):
        others = [o for o in names if o != name and o in text(replies[i])]
        assert not others, (name, text(replies[i]))


def test_a_long_prompt_does_not_stop_the_others(served):
    """While a long prompt is prefilled in pieces, a running stream goes on getting tokens."""
    fresh = LONG[::-1][:2500]
    seen, started = [], threading.Event()

    def follow():
        chunks = served.stream(STORY, max_tokens=200, temperature=1, seed=1)
        seen.append(len(chunks))
        started.set()

    results = together([follow, lambda: ask(served, fresh, max_tokens=1)])
    assert results[1]["usage"]["completion_tokens"] == 1
    assert seen[0] > 20


def test_roles(served):
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "Hi", "name": "Ann"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "c"},
        {"role": "user", "content": "Go on."},
    ]
    status, reply, _ = served.request("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 4})
    assert status == 200
    assert reply["usage"]["prompt_tokens"] > 30


@pytest.mark.parametrize("stream", [True, False])
def test_engine_killed(served, stream):
    """-9 in mid-answer: an error for it, 503 on /health until the new engine is ready, and the next request works."""
    if served.behind is not served:
        return  # test_upstream.py breaks upstreams
    pid = served.models.engine.process.pid

    def answer():
        return served.chat(STORY, max_tokens=2000, temperature=1, stream=stream)

    def kill():
        while served.models.engine.queue_depth() or not served.models.engine.jobs:
            pass
        served.models.engine.process.kill()

    (status, reply, _), _ = together([answer, kill])
    if stream and status == 200:
        assert b'data: {"error":{"message"' in reply
        assert reply.endswith(b"data: [DONE]\n\n")
    else:
        assert (status, reply["error"]["type"]) == (500, "server_error")
    assert served.request("GET", "/health")[0] == 503
    assert text(ask(served, QUESTION))
    assert served.request("GET", "/health")[0] == 200
    assert served.models.engine.process.pid != pid


@pytest.fixture(scope="module")
def ir_folder(tmp_path_factory, demo):
    """An IR folder, made from the demo GGUF as the library itself saves it."""
    if lack := missing_library("openvino"):
        pytest.skip(lack)
    folder = tmp_path_factory.mktemp("ir")
    shutil.copy(demo.path, folder / "model.gguf")
    code = "import sys, openvino_genai as g; g.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
    subprocess.run([sys.executable, "-c", code, str(folder / "model.gguf")], check=True)
    (folder / "model.gguf").unlink()
    (folder / "config.json").write_text('{"max_position_embeddings": 2048}')
    return folder


def test_openvino_ir_folder(tmp_path, ir_folder):
    """Without a file of it, it is no model."""
    model = model_init.find_model(ir_folder)
    assert (model.kind, model_init.choose_backend(model, "auto")) == ("openvino", "openvino")
    with serve_one(model, EngineSpec("openvino", str(ir_folder))) as served:
        assert "Paris" in text(ask(served, QUESTION, temperature=0))
        assert served.models.engine.info.context == 2048
    broken = shutil.copytree(ir_folder, tmp_path / "broken")
    (broken / "openvino_detokenizer.bin").unlink()
    with pytest.raises(model_init.UsageError, match=r"without openvino_detokenizer\.bin"):
        model_init.find_model(broken)


def test_openvino_keeps_what_it_has_converted(tmp_path, demo, monkeypatch):
    if lack := missing_library("openvino"):
        pytest.skip(lack)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = EngineSpec("openvino", str(demo.path), 2, 0, 2048)
    with serve_one(demo, replace(spec, flags=(("no_model_cache", True),))) as served:
        first = ask(served, QUESTION, temperature=0)
    assert not list(tmp_path.rglob("*.xml"))
    for _ in range(2):
        with serve_one(demo, spec) as served:
            assert text(ask(served, QUESTION, temperature=0)) == text(first)
        (kept,) = (tmp_path / "openai_api_endpoint" / "openvino").iterdir()
        assert {path.suffix for path in kept.iterdir()} == {".xml", ".bin"}
    (kept / "openvino_model.xml").write_text("broken")  # so it is this that is read
    with serve_one(demo, spec, ready=False) as served:
        until(lambda: served.models.last_error)


def test_what_a_killed_conversion_left_goes(tmp_path):
    ages = {"unfinished-new": 3600, "unfinished-old": 2 * 86400, "kept": 2 * 86400, "forgotten": 91 * 86400}
    for name, age in ages.items():
        (tmp_path / name / "whole").mkdir(parents=True)
        os.utime(tmp_path / name, (0, time.time() - age))
    (tmp_path / "gone").symlink_to("nowhere")
    backends.tidy(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"unfinished-new", "kept", "gone"}


@pytest.mark.parametrize(
    ("spec", "kv_bytes", "layout"),
    [
        (EngineSpec("llamacpp", "x", 8), 20_000, (8 * 8192, False)),  # small: each slot all that the model was trained for
        (EngineSpec("llamacpp", "x", 8), 2_000_000, (32_768, True)),  # too much for that: one may use what eight share
        (EngineSpec("llamacpp", "x", 32), 30_000, (32 * 8192, False)),  # many slots: a quarter of the memory may go to it …
        (EngineSpec("llamacpp", "x", 8), 34_000, (32_768, True)),  # … of which eight get a sixteenth
        (EngineSpec("llamacpp", "x", 8, cache_tokens=16_384), 20_000, (16_384, False)),  # said so: equal shares
        (EngineSpec("llamacpp", "x", 8, cache_tokens=16_384, length=8000), 20_000, (16_384, True)),
        (EngineSpec("llamacpp", "x", 2, cache_tokens=16_384, length=8000), 20_000, (16_384, False)),
    ],
)
def test_llamacpp_shares_one_cache_where_memory_asks_for_it(spec, kv_bytes, layout, monkeypatch):
    monkeypatch.setattr(backends, "machine_memory", lambda: 300 << 30 if kv_bytes > 1e6 else 32 << 30)
    assert backends.cache_layout(spec, 8192, kv_bytes) == layout


@pytest.mark.parametrize("backend", ["llamacpp", "openvino"])
def test_long_prompts_wait_for_room(backend, demo):
    """Three requests that together need more than a shared cache has, and a prompt of nearly all of it: each is answered, whole."""
    if lack := missing_library(backend):
        pytest.skip(lack)
    with serve_one(demo, EngineSpec(backend, str(demo.path), 3, 0, 256, length=250)) as served:
        assert served.models.engine.info.context == 250

        def work(i):
            content, most = ("word " * 170, 20) if i == 2 else (f"{i}. {STORY}", 60)
            replies[i] = ask(served, content, temperature=0, max_tokens=most, ignore_eos=True)

        replies = {}
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [replies[i]["usage"]["completion_tokens"] for i in range(4)] == [60, 60, 20, 60]
        assert "light" in text(replies[0]).lower()


@pytest.mark.parametrize("backend", ["llamacpp", "openvino"])
def test_speculative_decoding(backend, demo):
    """The same greedy text in fewer steps, and everything else as without."""
    if lack := missing_library(backend):
        pytest.skip(lack)
    prompts = ["Count from 1 to 40.", "Say this three times: the quick brown fox jumps over the lazy dog.", QUESTION]
    greedy = {"temperature": 0, "max_tokens": 100, "stream_options": {"include_usage": True}}
    answers, steps, seeded = [], [], []
    for ngram in (0, 2):
        dtype = "float32" if backend == "openvino" else "auto"  # its bf16 depends on how many tokens a step takes
        with serve_one(demo, EngineSpec(backend, str(demo.path), 4, 0, 8192, dtype=dtype, ngram=ngram)) as served:
            streams = [served.stream(prompt, **greedy) for prompt in prompts]
            answers.append(
                [("".join(c["choices"][0]["delta"].get("content", "") for c in s[:-1]), s[-1]["usage"]) for s in streams]
            )
            steps.append(sum(map(len, streams)))
            seeded.append(text(ask(served, STORY, temperature=1, seed=3, max_tokens=40)))
            whole = text(ask(served, prompts[0], temperature=0, max_tokens=60))
            cut = ask(served, prompts[0], temperature=0, max_tokens=60, stop=whole[30:36], logprobs=True)
            assert text(cut) == whole[: whole.index(whole[30:36])]
            assert len(together([lambda: ask(served, STORY, n=3, max_tokens=50)] * 3)) == 3
            shaped = ask(served, "A number.", max_tokens=60, structured_outputs={"regex": "([0-9]{3}-){5}end"})
            assert (text(shaped)[-3:], shaped["choices"][0]["finish_reason"]) == ("end", "stop")
            assert ask(served, STORY, max_tokens=7)["usage"]["completion_tokens"] == 7
            assert ask(served, "Say hi.", max_tokens=90, min_tokens=60)["usage"]["completion_tokens"] >= 60
    assert answers[0] == answers[1]
    assert steps[1] < 0.9 * steps[0]
    assert seeded[0] == seeded[1]
