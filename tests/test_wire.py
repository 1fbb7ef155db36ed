"""Replies, chunks and errors, to the byte."""

from backends import Delta, EngineFailed, QueueFull, Refused, Started
from openai_api_endpoint import ApiError, Choice, Chunks, Completion, as_api_error, compact, error_event, merge


def completion(n=1):
    done = Completion("chatcmpl-1", "m", "fp_1", [Choice() for _ in range(n)], created=7, prompt_tokens=3, cached_tokens=2)
    for delta in (Delta(0, "Hé", 1), Delta(0, '"\n', 1), Delta(0, "", 1, "stop")):
        done.add(delta)
    return done


USAGE = '"usage":{"prompt_tokens":3,"completion_tokens":3,"total_tokens":6,"prompt_tokens_details":{"cached_tokens":2}}'


def test_reply():
    assert compact(completion().reply()).decode() == (
        '{"id":"chatcmpl-1","object":"chat.completion","created":7,"model":"m","system_fingerprint":"fp_1","choices":[{"index":0,'
        '"message":{"role":"assistant","content":"Hé\\"\\n","refusal":null},"logprobs":null,"finish_reason":"stop"}],'
        + USAGE
        + "}"
    )


HEAD = (
    'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":7,"model":"m","system_fingerprint":"fp_1","choices":['
)


def test_chunks():
    chunks = Chunks(completion(), include_usage=False)
    assert chunks.role(1).decode() == HEAD + (
        '{"index":1,"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert chunks.delta(Delta(0, 'a"é', 1)).decode() == HEAD + (
        '{"index":0,"delta":{"content":"a\\"é"},"logprobs":null,"finish_reason":null}]}\n\n'
    )
    assert chunks.delta(Delta(0, "", 1)) == b""
    last = HEAD + '{"index":0,"delta":{},"logprobs":null,"finish_reason":"length"}]}\n\n'
    assert chunks.delta(Delta(0, "", 1, "length")).decode() == last
    assert chunks.delta(Delta(0, "z", 1, "length")).decode().endswith(last)
    assert chunks.delta(Delta(0, "z", 1, "length")).decode().count("data: ") == 2


def test_usage_chunk():
    chunks = Chunks(completion(), include_usage=True)
    assert chunks.delta(Delta(0, "a", 1)).endswith(b'"finish_reason":null}],"usage":null}\n\n')
    assert chunks.usage(completion().usage()).decode() == HEAD + "]," + USAGE + "}\n\n"


def test_errors():
    error = ApiError(400, "no", "n")
    assert error_event(error) == b'data: {"error":{"message":"no","type":"invalid_request_error","param":"n","code":null}}\n\n'
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
    events = [Started(1, 0), Delta(0, "a", 1), Delta(1, "x", 1), Delta(0, "b", 2), Delta(1, "", 1, "stop")]
    assert list(merge(events)) == [Started(1, 0), Delta(0, "ab", 3), Delta(1, "x", 2, "stop")]
