"""The official openai SDK: its types check every reply and every chunk."""

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="session", params=["/v1", ""])
def client(request, served):
    return openai.OpenAI(base_url=served.url + request.param, api_key="any", max_retries=0)


def strict(kind, value):
    """The SDK builds its objects without checks: check them."""
    return kind.model_validate(value.model_dump(), strict=True)


def test_chat(client):
    reply = client.chat.completions.create(model="whatever", messages=MESSAGES, max_tokens=16, n=2, seed=1, temperature=0.5)
    strict(ChatCompletion, reply)
    assert reply.model == "whatever"
    assert [c.index for c in reply.choices] == [0, 1]
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_stream(client):
    with client.chat.completions.create(
        model="m", messages=MESSAGES, max_tokens=16, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = [strict(ChatCompletionChunk, chunk) for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 0


def test_stream_helper(client):
    with client.chat.completions.stream(model="m", messages=MESSAGES, stop=[" ", "\n"]) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content


def test_models(client):
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none")


def test_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=MESSAGES, temperature=9)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=MESSAGES, tool_choice="required")
    assert caught.value.param == "tool_choice"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"


def test_leaving_a_stream(client, served):
    stream = client.chat.completions.create(model="m", messages=MESSAGES, max_tokens=2000, stream=True, temperature=1.5)
    next(iter(stream))
    stream.close()
    from conftest import until

    until(lambda: not served.models.engine.jobs)
