"""Every row of the field tables, on every engine: an honoured field changes the answer as it promises, a refused one is a 400.

`SHOWN_ELSEWHERE` says where the rows are shown that have no test of their own here; a new row without either fails.
"""

import base64
import math
import re
import struct

import pytest

from api_request import BODIES, CHAT, COMPLETIONS, NEVER, engines_with
from backends import LACKS

STORY = "Write a long story about a lighthouse."


def post(served, path, body, status=200):
    got, reply, headers = served.request("POST", path, body)
    assert got == status, reply
    return reply


def chat(served, content=STORY, **fields):
    return post(
        served,
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0} | fields,
    )


def complete(served, prompt="Once upon a time", **fields):
    return post(served, "/v1/completions", {"prompt": prompt, "max_tokens": 8, "temperature": 0} | fields)


def text(reply, i=0):
    choice = reply["choices"][i]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def engine(served):
    return served.models.engine.spec.backend


def ids(served, words, special=False):
    return post(served.behind, "/tokenize", {"content": words, "add_special": special})["tokens"]


def honours(served, feature):
    return engine(served) in engines_with(feature)


def refused(served, path, body, param):
    reply = post(served, path, body, 400)
    assert reply["error"]["param"] == param
    return reply


MESSAGES = {"messages": [{"role": "user", "content": "hi"}]}
REFUSED = [(path, name) for path in ("/chat/completions", "/completions") for name, f in BODIES[path].items() if f.needs]


@pytest.mark.parametrize(("path", "name"), REFUSED)
def test_refused_rows(served, path, name):
    """What an engine lacks is refused by name; the values that change nothing pass."""
    row = BODIES[path][name]
    if honours(served, row.needs):
        return
    body = (MESSAGES if path == "/chat/completions" else {"prompt": "hi"}) | {"max_tokens": 1}
    value = {"logit_bias": {"5": 1}, "top_logprobs": 2, "logprobs": 2, "best_of": 3}.get(name, "something")
    extra = {"logprobs": True} if name == "top_logprobs" else {}
    refused(served, "/v1" + path, body | extra | {name: value}, name)
    for free in row.free:
        post(served, "/v1" + path, body | {name: free})


def test_logit_bias(served):
    if not honours(served, "logit_bias"):
        return  # test_refused_rows has shown it
    (the,) = ids(served, " zebra")[-1:]
    piece = post(served.behind, "/detokenize", {"tokens": [the]})["content"]
    assert text(chat(served, logit_bias={str(the): 100}, max_tokens=3)) == piece * 3
    first = text(chat(served, max_tokens=1))
    (banned,) = ids(served, first)
    assert text(chat(served, max_tokens=1, logit_bias={str(banned): -100})) != first
    assert complete(served, logit_bias={str(the): 100}, max_tokens=2)["choices"][0]["text"] == piece * 2
    body = {"prompt": "a", "logit_bias": {"99999999": 1}}
    assert "the ids end at" in refused(served, "/v1/completions", body, "logit_bias")["error"]["message"]


def test_stop_token_ids(served):
    whole = text(complete(served, max_tokens=20))
    tokens = ids(served, whole)
    stop = tokens[5]
    at = tokens.index(stop)
    reply = complete(served, max_tokens=20, stop_token_ids=[stop])
    assert text(reply) == post(served.behind, "/detokenize", {"tokens": tokens[:at]})["content"]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == at + 1
    assert text(complete(served, max_tokens=20, stop=stop)) == text(reply)


def ends_early(served):
    """A prompt whose greedy answer ends by itself."""
    for question in ("Say hi.", "What is 2+2?", "Say the word yes.", "Reply with OK."):
        reply = chat(served, question, max_tokens=200)
        if reply["choices"][0]["finish_reason"] == "stop":
            return question, reply["usage"]["completion_tokens"]
    raise AssertionError("no answer ends")


def test_min_tokens_and_ignore_eos(served):
    question, count = ends_early(served)
    wanted = min(count + 20, 400)
    reply = chat(served, question, max_tokens=wanted + 100, min_tokens=wanted)
    assert reply["usage"]["completion_tokens"] >= wanted
    reply = chat(served, question, max_tokens=wanted, ignore_eos=True)
    assert (reply["usage"]["completion_tokens"], reply["choices"][0]["finish_reason"]) == (wanted, "length")
    whole = text(complete(served, max_tokens=20))
    assert text(complete(served, max_tokens=20, stop=whole[5:8], min_tokens=20)) == whole


def test_chat_logprobs(served):
    fields = {"logprobs": True} | ({"top_logprobs": 3} if honours(served, "top_logprobs") else {})
    reply = chat(served, **fields)
    content = reply["choices"][0]["logprobs"]["content"]
    assert bytes(b for c in content for b in c["bytes"]).decode() == text(reply)
    assert len(content) == reply["usage"]["completion_tokens"]
    for c in content:
        assert -20 < c["logprob"] <= 0
        if "top_logprobs" in fields:
            assert len(c["top_logprobs"]) == 3
            assert c["top_logprobs"][0]["logprob"] == c["logprob"]  # greedy takes the best
            assert c["top_logprobs"][0]["logprob"] >= c["top_logprobs"][1]["logprob"] >= c["top_logprobs"][2]["logprob"]
        else:
            assert c["top_logprobs"] == []
    assert chat(served)["choices"][0]["logprobs"] is None
    cold, hot = (chat(served, temperature=t, top_k=1, logprobs=True)["choices"][0]["logprobs"]["content"][0] for t in (0.1, 2))
    assert cold == hot  # of the raw logits, whatever the sampling


def test_chat_logprobs_stream(served):
    chunks = served.stream(STORY, max_tokens=8, temperature=0, logprobs=True)
    entries = [c for chunk in chunks for c in ((chunk["choices"][0]["logprobs"] or {}).get("content") or [])]
    said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert bytes(b for c in entries for b in c["bytes"]).decode() == said


def test_text_logprobs_and_echo(served):
    prompt = "The ☃ 世界 sat"
    if not honours(served, "scores"):
        refused(served, "/v1/completions", {"prompt": prompt, "echo": True, "logprobs": 0}, "echo")
        reply = complete(served, prompt, logprobs=0)
        assert len(reply["choices"][0]["logprobs"]["tokens"]) == 8
        assert reply["choices"][0]["logprobs"]["text_offset"][0] == 0
        return
    reply = complete(served, prompt, echo=True, logprobs=2, max_tokens=4)
    scores = reply["choices"][0]["logprobs"]
    tokens = ids(served, prompt)
    assert text(reply).startswith(prompt)
    assert len(scores["tokens"]) == len(tokens) + 4
    assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
    assert all(lp <= 0 for lp in scores["token_logprobs"][1:])
    for i, offset in enumerate(scores["text_offset"]):
        name = scores["tokens"][i]
        if not name.startswith("bytes:"):
            assert text(reply)[offset : offset + len(name)] == name
    only = complete(served, prompt, echo=True, logprobs=2, max_tokens=0)
    assert only["choices"][0]["logprobs"]["token_logprobs"] == scores["token_logprobs"][: len(tokens)]
    assert (text(only), only["choices"][0]["finish_reason"], only["usage"]["completion_tokens"]) == (prompt, "length", 0)


def test_echo_without_logprobs(served):
    reply = complete(served, ["One two", "Three"], echo=True, max_tokens=3)
    assert text(reply, 0).startswith("One two")
    assert text(reply, 1).startswith("Three")
    reply = complete(served, ids(served, "One two"), echo=True, max_tokens=0)
    assert text(reply) == "One two"


def test_prompt_kinds_agree(served):
    words = "The capital of France is"
    tokens = ids(served, words)
    answers = [complete(served, p) for p in (words, tokens, [words, words], [tokens, tokens])]
    assert {text(a) for a in answers[:2]} == {text(answers[0])}
    assert [len(a["choices"]) for a in answers] == [1, 1, 2, 2]
    assert answers[2]["usage"]["prompt_tokens"] == 2 * len(tokens)


def test_text_stream(served):
    body = {
        "prompt": "Once upon a time",
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    status, raw, _ = served.request("POST", "/v1/completions", body)
    assert status == 200
    from conftest import sse

    chunks = sse(raw)
    assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == text(complete(served))
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    assert chunks[-1]["timings"]["predicted_n"] == 8


def test_timings(served):
    reply = chat(served, max_tokens=16)
    timings = reply["timings"]
    assert timings["predicted_n"] == reply["usage"]["completion_tokens"]
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": timings["cache_n"]}
    assert timings["prompt_n"] + timings["cache_n"] == reply["usage"]["prompt_tokens"]
    assert timings["prompt_ms"] > 0 and timings["predicted_ms"] > 0 and timings["predicted_per_second"] > 0


def test_template_options(served):
    if not honours(served, "inside"):
        refused(served, "/apply-template", MESSAGES, "messages")
        return
    base = {"messages": [{"role": "user", "content": "Hi"}]}

    def render(**fields):
        return post(served, "/apply-template", base | fields)["prompt"]

    assert render().endswith("<|im_start|>assistant\n")
    assert not render(add_generation_prompt=False).endswith("<|im_start|>assistant\n")
    talk = [*base["messages"], {"role": "assistant", "content": "Hello, my name "}]
    assert render(messages=talk, continue_final_message=True).endswith("<|im_start|>assistant\nHello, my name ")
    assert render(chat_template_kwargs={"x": 1}) == render()
    prompt = chat(served, return_prompt=True, add_generation_prompt=False)["debug"]["prompts"][0]
    assert prompt["prompt"].endswith("lighthouse.<|im_end|>\n")
    assert prompt["prompt_token_ids"] == ids(served, prompt["prompt"])
    go_on = {"messages": [*base["messages"], {"role": "assistant", "content": "One two three"}], "continue_final_message": True}
    assert text(post(served, "/v1/chat/completions", go_on | {"max_tokens": 6, "temperature": 0}))
    refused(served, "/v1/chat/completions", base | {"continue_final_message": True}, "continue_final_message")


def test_tokenize(served):
    if not honours(served, "inside"):  # an upstream, which tells no token's bytes
        refused(served, "/tokenize", {"content": "x", "with_pieces": True}, "with_pieces")
        words = "Hello ☃ world"
        assert post(served, "/v1/tokenize", {"content": words}) == post(served.behind, "/v1/tokenize", {"content": words})
        found = post(served, "/tokenize", {**MESSAGES, "return_token_strs": True})
        assert found == post(served.behind, "/tokenize", {**MESSAGES, "return_token_strs": True}) and found["count"] > 5
        assert post(served, "/detokenize", {"tokens": ids(served, words)})["content"] == words
        return
    words = "Hello ☃ world"
    reply = post(served, "/v1/tokenize", {"content": words, "with_pieces": True})
    assert reply["count"] == len(reply["tokens"])
    pieces = [t["piece"].encode() if isinstance(t["piece"], str) else bytes(t["piece"]) for t in reply["tokens"]]
    assert b"".join(pieces).decode() == words
    assert post(served.behind, "/detokenize", {"tokens": [t["id"] for t in reply["tokens"]]})["content"] == words
    assert ids(served, "<|im_start|>") == [1]
    talk = post(served, "/tokenize", MESSAGES)
    assert talk["tokens"] == ids(served, post(served, "/apply-template", MESSAGES)["prompt"])


def test_seed_that_was_used_gives_the_same_again(served):
    if not honours(served, "inside"):
        refused(served, "/v1/chat/completions", MESSAGES | {"return_prompt": True}, "return_prompt")
        return
    fields = {"temperature": 1, "return_prompt": True}
    chat(served, **fields)
    first = chat(served, **fields)
    seed = first["debug"]["prompts"][0]["sampling"]["seed"]
    assert text(chat(served, **fields, seed=seed)) == text(first)


def test_fingerprint_tells_settings_apart(served):
    if not honours(served, "inside"):
        assert chat(served)["system_fingerprint"] == served.models.engine.info.fingerprint
        return
    from dataclasses import replace

    from engine import fingerprint

    spec, info = served.models.engine.spec, served.models.engine.info
    assert chat(served)["system_fingerprint"] == info.fingerprint
    assert fingerprint(spec, info.library, info.slots, info.threads) == info.fingerprint
    assert fingerprint(spec, info.library, info.slots + 1, info.threads) != info.fingerprint
    assert fingerprint(replace(spec, options=("-cq", "4")), info.library, info.slots, info.threads) != info.fingerprint
    assert fingerprint(replace(spec, chat_template="x"), info.library, info.slots, info.threads) != info.fingerprint


def test_embeddings(served):
    if engine(served) == "openvino":  # of a model that generates
        refused(served, "/v1/embeddings", {"input": "x"}, "input")
        return
    words = ["The cat sat on the mat.", "A cat was sitting on a rug.", "Quarterly tax law revisions."]
    reply = post(served, "/v1/embeddings", {"input": words})
    a, b, c = (row["embedding"] for row in reply["data"])
    assert [row["index"] for row in reply["data"]] == [0, 1, 2]
    assert reply["usage"]["prompt_tokens"] == sum(len(ids(served, w, True)) for w in words)

    def dot(x, y):
        return sum(p * q for p, q in zip(x, y, strict=True))

    assert math.isclose(dot(a, a), 1, abs_tol=1e-4)
    assert dot(a, b) > dot(a, c)
    packed = post(served, "/v1/embeddings", {"input": words[0], "encoding_format": "base64"})["data"][0]["embedding"]
    assert struct.unpack(f"<{len(a)}f", base64.b64decode(packed)) == pytest.approx(a, abs=1e-5)
    short = post(served, "/embeddings", {"input": ids(served, words[0], True), "dimensions": 32})["data"][0]["embedding"]
    assert len(short) == 32
    assert math.isclose(dot(short, short), 1, abs_tol=1e-4)
    assert dot(short, a[:32]) > 0
    refused(served, "/v1/embeddings", {"input": "x", "dimensions": 60000}, "dimensions")
    refused(served, "/v1/embeddings", {"input": [""]}, "input")


def test_capabilities(served):
    told = served.request("GET", "/v1/capabilities")[1]
    assert told["engine"] == engine(served)
    for path, table in BODIES.items():
        for name, row in table.items():
            able = engines_with(row.needs) if row.needs else list(LACKS)
            assert told["routes"]["/v1" + path][name]["engines"] == able
            assert told["routes"]["/v1" + path][name]["honoured"] == (engine(served) in able)


SHOWN_ELSEWHERE = {
    "test_backends.py": "temperature top_p top_k min_p presence_penalty frequency_penalty repetition_penalty n seed stop max_tokens",
    "test_endpoint.py": "model stream stream_options max_completion_tokens",
    "test_constrained.py": "response_format structured_outputs",
    "test_tools.py": "tools tool_choice parallel_tool_calls functions function_call reasoning_effort thinking_budget include_reasoning",
    "test_fields.py": "best_of json_schema grammar guided_json guided_regex guided_choice guided_grammar",
}


def test_every_honoured_row_is_shown():
    with open(__file__) as f:
        here = f.read()
    elsewhere = " ".join(SHOWN_ELSEWHERE.values()).split()
    for table in (CHAT, COMPLETIONS):
        for name, row in table.items():
            if row.needs != NEVER:
                assert name in elsewhere or re.search(rf"\b{name}\b", here), name


def test_min_tokens_beyond_max_tokens(served):
    assert chat(served, max_tokens=4, min_tokens=50)["usage"]["completion_tokens"] == 4


def test_a_prompt_of_one_token_keeps_it(served):
    """Clients index the tokens of an echo by the length of their context."""
    if not honours(served, "scores"):
        return
    (the,) = ids(served, "The")
    for prompt in ([the], "The"):
        scores = complete(served, prompt, echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
        assert (scores["tokens"], scores["token_logprobs"], scores["text_offset"]) == (["The"], [None], [0])
        choice = complete(served, prompt, echo=True, logprobs=1, max_tokens=2)["choices"][0]
        assert choice["logprobs"]["text_offset"][:2] == [0, 3] and "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_special_tokens_in_an_answer_are_no_text(served):
    reply = chat(served, "Say hello.", ignore_eos=True, logprobs=True, max_tokens=60)["choices"][0]
    listed = b"".join(bytes(entry["bytes"]) for entry in reply["logprobs"]["content"])
    assert listed.decode() == reply["message"]["content"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "word " * 20000}, "prompt"),
        ("/v1/completions", {"prompt": [1] * 20000}, "prompt"),
        ("/v1/completions", {"prompt": [10**6]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 20000}]}, "messages"),
        ("/v1/embeddings", {"input": "word " * 20000}, "input"),
        ("/v1/embeddings", {"input": [10**6]}, "input"),
        ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/v1/completions", {"prompt": "x", "structured_outputs": {"json": "{bad"}}, "structured_outputs"),
        ("/v1/completions", {"prompt": "x", "echo": True, "structured_outputs": {"choice": ["a"]}}, "echo"),
        ("/v1/completions", {"prompt": "x", "response_format": {"type": "json_object", "scheme": {}}}, "response_format"),
    ],
)
def test_param_names_the_field(served, path, body, param):
    refused(served, path, body, param)


def test_no_text_is_cut_by_the_tokenizer(served):
    """All of it is counted, or it is refused."""
    if not honours(served, "inside"):
        return
    status, reply, _ = served.request("POST", "/tokenize", {"content": "word " * 9000})
    assert (status, reply.get("count")) == (200, 9001) or reply["error"]["code"] == "context_length_exceeded"


def test_an_embedding_in_pieces_is_the_mean_of_all(served):
    if engine(served) == "openvino":
        return
    long = post(served, "/v1/embeddings", {"input": "river " * 700})["data"][0]["embedding"]
    cut = post(served, "/v1/embeddings", {"input": "river " * 200})["data"][0]["embedding"]
    assert sum(x * x for x in long) == pytest.approx(1, abs=1e-4)
    assert sum(x * y for x, y in zip(long, cut, strict=True)) > 0.9


def test_many_prompts_in_one_request(served):
    """More than are read at once: each is answered, in its place, and one bad one refuses the whole."""
    prompts = [f"The number {i} is" for i in range(20)]
    reply = complete(served, prompts, max_tokens=2, echo=True)
    assert [choice["text"].startswith(prompt) for choice, prompt in zip(reply["choices"], prompts, strict=True)] == [True] * 20
    refused(served, "/v1/completions", {"prompt": [*prompts, ""]}, "prompt")


def test_why_a_prompt_was_not_in_the_cache(served):
    """Told by every engine that shows its prompts: where it parts from the one before, token by token."""
    if not honours(served, "inside"):
        return  # test_seed_that_was_used_gives_the_same_again has seen it refused

    def ask(time):
        system = f"You keep a lighthouse. {'The sea is calm, the lamp is lit. ' * 8}It is {time} now. Be brief."
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "Is all well?"}]
        reply = chat(served, messages=messages, temperature=0, max_tokens=4, return_prompt=True)
        (prompt,) = reply["debug"]["prompts"]
        told = reply["usage"]["prompt_tokens_details"].get("cached_tokens")
        assert prompt["cache"]["cached_tokens"] == told is not None
        return prompt["prompt_token_ids"], prompt["cache"]

    before, _ = ask("12:00")
    after, cache = ask("12:34")
    at = next(i for i in range(len(after)) if before[i] != after[i])
    difference = cache["first_difference"]
    assert cache["best_match_tokens"] == difference["token"] == at
    assert "12:3" in difference["prompt"] and "12:0" in difference["cached"]
    if cache["cached_tokens"] is not None:
        assert at - 32 < cache["cached_tokens"] <= at  # whole pages
    _, cache = ask("12:34")
    assert (cache["best_match_tokens"], cache["first_difference"]) == (len(after), None)
