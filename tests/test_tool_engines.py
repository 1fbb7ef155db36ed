"""Tool calls on the real engines, with the demo model: what is forced is called, parses, and satisfies its schema."""

import json
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pydantic
import pytest
from conftest import serve_one, sse

from backends import missing_library
from engine import EngineSpec

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 40}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}
ADD = {
    "name": "add",
    "description": "Adds two integers",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, ADD)]
SCHEMAS = {function["name"]: function["parameters"] for function in (WEATHER, ADD)}
CASES = {
    "required": {"tool_choice": "required"},
    "named": {"tool_choice": {"type": "function", "function": {"name": "add"}}},
    "single": {"tool_choice": "required", "parallel_tool_calls": False},
    "strict": {
        "tools": [{"type": "function", "function": f | {"strict": True}} for f in (WEATHER, ADD)],
        "tool_choice": "required",
    },
}
RUNS = 20


@pytest.fixture(scope="module", params=["openvino", "llamacpp", "transformers"])
def engine(request, demo):
    if lack := missing_library(request.param):
        pytest.skip(lack)
    path = request.getfixturevalue("hf_folder") if request.param == "transformers" else demo.path
    with serve_one(demo, EngineSpec(request.param, str(path), 8, 0, 16384, tool_syntax="hermes"), max_jobs=400) as served:
        yield served


def assembled(events):
    """(calls, finish reason) of a stream, as a client puts them together."""
    calls, finish = {}, None
    for event in events:
        for choice in event["choices"]:
            for call in choice["delta"].get("tool_calls", ()):
                into = calls.setdefault(call["index"], {"id": call.get("id"), "function": {"name": "", "arguments": ""}})
                for name, text in call["function"].items():
                    into["function"][name] += text
            finish = choice["finish_reason"] or finish
    return [calls[i] for i in sorted(calls)], finish


def called(engine, name, seed):
    """(calls, finish reason), of a reply or, for every other seed, of a stream."""
    body = {
        "messages": [{"role": "user", "content": "What is the weather in Paris, and what is 2 plus 3?"}],
        "tools": TOOLS, "max_tokens": 100, "temperature": 1.0, "seed": seed, **CASES[name],
    }  # fmt: skip
    if seed % 2:
        status, raw, _ = engine.request("POST", "/v1/chat/completions", body | {"stream": True}, timeout=500)
        assert status == 200, raw
        return assembled(sse(raw))
    status, reply, _ = engine.request("POST", "/v1/chat/completions", body, timeout=500)
    assert status == 200, reply
    message = reply["choices"][0]["message"]
    assert message["content"] is None
    return message["tool_calls"], reply["choices"][0]["finish_reason"]


@pytest.mark.parametrize("name", CASES)
def test_forced(engine, name):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: called(engine, name, seed), range(RUNS)))
    whole = 0
    for calls, finish in answers:
        assert finish in ("tool_calls", "length") and calls and len({call["id"] for call in calls}) == len(calls)
        assert len(calls) == 1 or name not in ("single", "named")
        for call in calls if finish == "tool_calls" else calls[:-1]:
            assert name != "named" or call["function"]["name"] == "add"
            jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
        whole += finish == "tool_calls"
    assert whole >= RUNS * (0.7 if name in ("single", "named") else 0.2)  # so small a model often calls on and on


def test_auto_is_told_as_it_is(engine):
    """A model this small answers in words or calls; whatever it does, the reply has its shape."""
    body = {"messages": [{"role": "user", "content": "Add 2 and 3."}], "tools": TOOLS, "max_tokens": 60, "temperature": 0}
    engine.request("POST", "/v1/chat/completions", body)  # from now on the prompt is in the KV cache: the same arithmetic
    _, reply, _ = engine.request("POST", "/v1/chat/completions", body)
    choice = reply["choices"][0]
    assert (choice["finish_reason"] == "tool_calls") <= bool(choice["message"].get("tool_calls"))
    _, raw, _ = engine.request("POST", "/v1/chat/completions", body | {"stream": True})
    text = "".join(c["delta"].get("content") or "" for e in sse(raw) for c in e["choices"])
    assert text == (choice["message"]["content"] or "")


def test_a_loop(engine):
    """The call, its result, and the answer: the history goes back as it came."""
    messages = [{"role": "user", "content": "What is 2 plus 3?"}]
    body = {"messages": messages, "tools": TOOLS, "max_tokens": 100, "temperature": 0}
    _, reply, _ = engine.request("POST", "/v1/chat/completions", body | {"tool_choice": CASES["named"]["tool_choice"]})
    message = reply["choices"][0]["message"]
    messages += [message, {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "5"}]
    status, reply, _ = engine.request("POST", "/v1/chat/completions", body | {"tool_choice": "none"})
    assert status == 200 and reply["choices"][0]["message"]["content"]
    _, prompt, _ = engine.request("POST", "/apply-template", {"messages": messages, "tools": TOOLS})
    assert '"name": "add"' in prompt["prompt"] and "get_weather" in prompt["prompt"]


class Add(pydantic.BaseModel):
    """Adds two integers"""

    a: int
    b: int


def test_the_sdks_tool_helpers(engine):
    """A model class becomes a tool, and its call an object of it; plain and streamed."""
    sdk = openai.OpenAI(base_url=f"{engine.url}/v1", api_key="any", max_retries=0)
    tool = openai.pydantic_function_tool(Add)
    asked = {
        "model": "m", "messages": [{"role": "user", "content": "What is 2 plus 3?"}], "tools": [tool], "max_tokens": 100,
        "temperature": 0, "tool_choice": {"type": "function", "function": {"name": "Add"}},
    }  # fmt: skip
    reply = sdk.chat.completions.parse(**asked)
    with sdk.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    for completion in (reply, streamed):
        (call,) = completion.choices[0].message.tool_calls
        assert isinstance(call.function.parsed_arguments, Add)


THINKS = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content %}BEGIN
{{ m.reasoning_content }}
END

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is not defined or enable_thinking %}BEGIN
{% else %}BEGIN

END

{% endif %}{% endif %}"""
MARKS = {"text": ("<think>", "</think>"), "special tokens": ("<jupyter_start>", "<jupyter_text>")}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 10}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", params=MARKS)
def thinker(request, engine, demo):
    """The demo model with a template that has it reason: its marks are text, or special tokens, which no grammar may see."""
    begin, end = MARKS[request.param]
    spec = engine.models.engine.spec
    template = THINKS.replace("BEGIN", begin).replace("END", end)
    with serve_one(
        demo, EngineSpec(spec.backend, spec.path, 4, 0, 8192, chat_template=template, tool_syntax="hermes")
    ) as served:
        served.think = [begin, end]
        yield served


def test_reasoning_that_is_ended(thinker):
    """After its budget; what follows keeps what was promised of it, in a reply and in a stream."""
    assert thinker.request("GET", "/v1/capabilities")[1]["template"]["reasoning"] == thinker.think
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    for promised in ({}, {"response_format": form}, {"tools": TOOLS, "tool_choice": CASES["named"]["tool_choice"]}):
        more = promised or {"min_tokens": 30}  # so small a model may end at once
        body = {"max_tokens": 120, "seed": 3, "temperature": 0.8, "thinking_budget": 12, **more}
        status, reply, _ = thinker.chat("Who is Ann, and what is 2 + 3?", **body)
        assert status == 200, reply
        choice, usage = reply["choices"][0], reply["usage"]
        message, reasoned = choice["message"], usage["completion_tokens_details"]["reasoning_tokens"]
        assert message["reasoning_content"] and 0 < reasoned <= 12
        assert "tools" in promised or message["content"]
        assert not any(mark in (message["content"] or "") + message["reasoning_content"] for mark in thinker.think)
        if "response_format" in promised:
            jsonschema.validate(json.loads(message["content"]), PERSON)
        if "tools" in promised:
            jsonschema.validate(json.loads(message["tool_calls"][0]["function"]["arguments"]), SCHEMAS["add"])
        assert choice["finish_reason"] in ("stop", "tool_calls") or not promised
        deltas = [c["delta"] for e in thinker.stream("Who is Ann, and what is 2 + 3?", **body) for c in e["choices"]]
        assert "".join(d.get("reasoning_content", "") for d in deltas)
        assert bool([d for d in deltas if d.get("tool_calls")]) == ("tools" in promised)
    off = thinker.chat("Hi", chat_template_kwargs={"enable_thinking": False}, max_tokens=5, min_tokens=5)[1]["choices"][0][
        "message"
    ]
    assert "reasoning_content" not in off and off["content"]
