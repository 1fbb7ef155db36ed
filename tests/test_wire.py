"""Replies, chunks and errors, to the byte."""

from api_errors import ApiError, as_api_error
from api_reply import CHAT_SHAPE, TEXT_SHAPE, Choice, Chunks, Completion, compact, merge, sse
from api_request import Constraint
from engine import Delta, EngineFailed, QueueFull, Refused, Started, TokenLogprob


def completion(n=1, shape=CHAT_SHAPE, **fields):
    done = Completion("id-1", "m", "fp_1", [Choice() for _ in range(n)], shape, created=7, **fields)
    done.start(Started(3, 2, 1.0))
    return done


def say(done, *deltas):
    for delta in deltas:
        done.choices[delta.choice].logprobs += delta.logprobs
        done.add(delta)
    return done


HÉ = (Delta(0, "Hé", 1, at=1.5), Delta(0, '"\n', 1, at=2.0), Delta(0, "", 1, "stop", at=2.5))
USAGE = '"usage":{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6,"prompt_tokens_details":{"cached_tokens":2}}'
TIMINGS = (
    '"timings":{"cache_n":2,"prompt_n":1,"prompt_ms":500.0,"prompt_per_second":2.0,"predicted_n":3,"predicted_ms":1000.0,'
    '"predicted_per_second":2.0}'
)


def test_reply():
    assert compact(say(completion(), *HÉ).reply()).decode() == (
        '{"id":"id-1","object":"chat.completion","created":7,"model":"m","system_fingerprint":"fp_1","choices":[{"index":0,'
        '"message":{"role":"assistant","content":"Hé\\"\\n","refusal":null},"logprobs":null,"finish_reason":"stop"}],'
        + USAGE + "," + TIMINGS + "}"
    )  # fmt: skip


def test_text_reply():
    assert compact(say(completion(shape=TEXT_SHAPE), *HÉ).reply()).decode() == (
        '{"id":"id-1","object":"text_completion","created":7,"model":"m","system_fingerprint":"fp_1","choices":[{"index":0,'
        '"text":"Hé\\"\\n","logprobs":null,"finish_reason":"stop"}],' + USAGE + "," + TIMINGS + "}"
    )


HEAD = 'data: {"id":"id-1","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_1","choices":['


def test_chunks():
    chunks = Chunks(completion(2), include_usage=False)
    opening = '{"index":%d,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}]}\n\n'
    assert chunks.opening().decode() == HEAD + opening % 0 + HEAD + opening % 1
    assert chunks.delta(Delta(0, 'a"é', 1)).decode() == HEAD + (
        '{"index":0,"delta":{"content":"a\\"é"},"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert chunks.delta(Delta(0, "", 1)) == b""
    last = HEAD + '{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}\n\n'
    assert chunks.delta(Delta(0, "", 1, "length")).decode() == last
    assert chunks.delta(Delta(0, "z", 1, "length")).decode().endswith(last)
    assert chunks.delta(Delta(0, "z", 1, "length")).decode().count("data: ") == 2


def test_text_chunks():
    chunks = Chunks(completion(shape=TEXT_SHAPE), include_usage=False)
    assert chunks.opening() == b""
    assert b'"object":"text_completion"' in chunks.delta(Delta(0, "a", 1))
    assert b'{"index":0,"text":"a","logprobs":null,"finish_reason":null}' in chunks.delta(Delta(0, "a", 1))
    assert b'{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}' in chunks.delta(Delta(0, "", 1, "stop"))


def test_usage_chunk():
    done = completion()
    chunks = Chunks(done, include_usage=True)
    assert chunks.delta(Delta(0, "a", 1)).endswith(b'"finish_reason":null}],"usage":null}\n\n')
    say(done, *HÉ)
    assert chunks.last(usage=done.usage(), timings=done.timings()).decode() == HEAD + "]," + USAGE + "," + TIMINGS + "}\n\n"


SNOW = "☃".encode()
SCORED = (
    TokenLogprob(b"a", -0.5, ((b"a", -0.5), (b"b", -1.5))),
    TokenLogprob(SNOW[:2], -1.0, ((b"x", -0.25),)),
    TokenLogprob(SNOW[2:], -2.0),
    TokenLogprob(b"<end>", -3.0, shown=False),
)


def test_chat_logprobs():
    done = say(completion(logprobs=True), Delta(0, "a☃", 4, "stop", SCORED))
    content = done.reply()["choices"][0]["logprobs"]["content"]
    assert content[0] == {
        "token": "a",
        "bytes": [97],
        "logprob": -0.5,
        "top_logprobs": [{"token": "a", "bytes": [97], "logprob": -0.5}, {"token": "b", "bytes": [98], "logprob": -1.5}],
    }
    assert [c["bytes"] for c in content] == [[97], list(SNOW[:2]), list(SNOW[2:])]  # the end is not part of the text
    assert bytes(b for c in content for b in c["bytes"]).decode() == "a☃"


def test_text_logprobs():
    first = TokenLogprob(b"P", None)
    done = say(completion(shape=TEXT_SHAPE, logprobs=True), Delta(0, "Pa☃", 4, "stop", (first, *SCORED)))
    assert done.reply()["choices"][0]["logprobs"] == {
        "tokens": ["P", "a", "bytes:\\xe2\\x98", "bytes:\\x83", "<end>"],
        "token_logprobs": [None, -0.5, -1.0, -2.0, -3.0],
        "top_logprobs": [
            None,
            {"a": -0.5, "b": -1.5},
            {"bytes:\\xe2\\x98": -1.0, "x": -0.25},
            {"bytes:\\x83": -2.0},
            {"<end>": -3.0},
        ],
        "text_offset": [0, 1, 2, 2, 3],
    }


def test_text_offset_in_a_stream_goes_on():
    done = completion(shape=TEXT_SHAPE, logprobs=True)
    chunks = Chunks(done, False)
    out = b"".join(
        chunks.delta(done.add(Delta(0, text, 1, None, (entry,)))) for text, entry in zip("a☃", SCORED[:2], strict=True)
    )
    assert b'"text_offset":[0]' in out
    assert b'"text_offset":[1]' in out


def test_a_cut_constraint_is_never_a_stop():
    done = completion(constraint=Constraint("choice", ["ok"], "structured_outputs"))
    assert done.add(Delta(0, "o", 1, "stop")).finish == "length"
    done = completion(constraint=Constraint("choice", ["ok"], "structured_outputs"))
    done.add(Delta(0, "o", 1))
    assert done.add(Delta(0, "k", 1, "stop")).finish == "stop"


def test_errors():
    error = ApiError(400, "no", "n")
    assert sse(error.body()) == b'data: {"error":{"message":"no","type":"invalid_request_error","param":"n","code":null}}\n\n'
    for raised, status, kind in (
        (QueueFull(), 429, "rate_limit_error"),
        (EngineFailed("x"), 500, "server_error"),
        (Refused("x", "messages", "context_length_exceeded"), 400, "invalid_request_error"),
        (KeyError("bug"), 500, "server_error"),
    ):
        shown = as_api_error(raised)
        assert (shown.status, shown.body()["error"]["type"]) == (status, kind)
    assert dict(as_api_error(QueueFull()).headers)["Retry-After"] == "1"
    assert "bug" not in as_api_error(KeyError("bug")).message


def test_merge():
    one, two = SCORED[:2]
    events = [
        Started(1, 0),
        Delta(0, "a", 1, None, (one,)),
        Delta(1, "x", 1),
        Delta(0, "b", 2, None, (two,), 5.0),
        Delta(1, "", 1, "stop"),
    ]
    assert list(merge(events)) == [Started(1, 0), Delta(0, "ab", 3, None, (one, two), 5.0), Delta(1, "x", 2, "stop")]


def test_what_came_before_an_error_is_told_before_it():
    error = EngineFailed("x")
    events = [Started(1, 0), Delta(0, "a", 1), Delta(0, "b", 1), error]
    for after in ([], [Delta(0, "c", 1, "stop")]):  # which has a hole before it
        assert list(merge(events + after)) == [Started(1, 0), Delta(0, "ab", 2), error]
