"""Tools and reasoning over HTTP: what a request may say of them, and what comes back. The model is a script."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, serve_one, sse, until
from scripted_chat import TEMPLATE

import model_init
from engine import EngineSpec

F = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
G = {"name": "g"}
TOOLS = [{"type": "function", "function": function} for function in (F, G)]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TWO = CALL + '\n<tool_call>\n{"name": "g", "arguments": {"b": [true, "x"]}}\n</tool_call>'
THOUGHT = "<think>\nHm, hm.\n</think>\n\n"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    yield from serve(tmp_path_factory.mktemp("chat"), TEMPLATE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    yield from serve(tmp_path_factory.mktemp("plain"), PLAIN)


def serve(folder, template, profile=None, record=None, **spec):
    (folder / "script.json").write_text('{"says": ["hi"]}')
    model = model_init.Model("scripted", folder, "gguf", 1234)
    engine = EngineSpec("scripted_chat:ScriptedChat", str(folder), 4, chat_template=template, **spec)
    with serve_one(model, engine, profile=profile, record=record) as served:
        served.folder = folder
        yield served


def ask(served, *says, messages=None, special=(), size=1, **fields):
    folder = Path(served.folder)
    (folder / "script.json").write_text(json.dumps({"says": says, "special": special, "size": size}))
    (folder / "log").write_text("")
    messages = messages or [{"role": "user", "content": "Hi"}]
    status, reply, _ = served.request("POST", "/v1/chat/completions", {"messages": messages, **fields})
    return (status, reply) if status != 200 or fields.get("stream") else (status, reply["choices"][0], reply["usage"])


def starts(served):
    """[prompt, grammar, max_tokens] of each start of the last request."""
    return [json.loads(line) for line in (Path(served.folder) / "log").read_text().splitlines()]


def streamed(raw):
    """(message, finish reason, number of argument fragments), put together as clients do."""
    message, finish, fragments = {}, None, 0
    for event in sse(raw):
        for choice in event["choices"]:
            assert finish is None, "a chunk after the last"
            delta = choice["delta"]
            for name in ("content", "reasoning_content", "reasoning"):
                if delta.get(name):
                    message[name] = message.get(name, "") + delta[name]
            for call in delta.get("tool_calls", ()):
                calls = message.setdefault("tool_calls", [])
                if call["index"] == len(calls):
                    calls.append({"id": call["id"], "type": call["type"], "function": {"name": "", "arguments": ""}})
                for name, text in call["function"].items():
                    calls[call["index"]]["function"][name] += text
                    fragments += name == "arguments" and bool(text)
            finish = choice["finish_reason"]
    return message, finish, fragments


def calls_of(message):
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message["tool_calls"]]


# ── what comes back ──


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reply_and_stream_are_one(served, size):
    status, choice, usage = ask(served, f"{THOUGHT}Let me see.\n{TWO}", tools=TOOLS, size=size)
    message = choice["message"]
    assert status == 200 and choice["finish_reason"] == "tool_calls"
    assert calls_of(message) == [("f", {"a": 1}), ("g", {"b": [True, "x"]})]
    assert message["content"] == "Let me see." and message["reasoning"] == message["reasoning_content"] == "Hm, hm."
    ids = [call["id"] for call in message["tool_calls"]]
    assert len(set(ids)) == 2 and all(len(id) == 29 and id.startswith("call_") for id in ids)
    assert 7 <= usage["completion_tokens_details"]["reasoning_tokens"] <= len(THOUGHT)
    _, raw = ask(served, f"{THOUGHT}Let me see.\n{TWO}", tools=TOOLS, size=size, stream=True)
    whole, finish, fragments = streamed(raw)
    assert finish == "tool_calls" and (fragments > 10 or size > 1)
    for call in (*whole["tool_calls"], *message["tool_calls"]):
        call.pop("id")
    assert whole == {name: value for name, value in message.items() if name in whole} and "content" in whole


def test_content_is_null_beside_calls_alone(served):
    choice = ask(served, CALL, tools=TOOLS)[1]
    assert choice["message"]["content"] is None and choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    "said",
    [
        "The tag <tool_call> begins a call.",
        '<tool_call>\n{"name": "unheard", "arguments": {}}\n</tool_call>',
        '<tool_call>{"nam',
        "<tool_call>\nnothing\n</tool_call>",
    ],
)
def test_what_leaves_the_syntax_stays_content(served, said):
    for stream in (False, True):
        answer = ask(served, said, tools=TOOLS, stream=stream)
        message, finish = streamed(answer[1])[:2] if stream else (answer[1]["message"], answer[1]["finish_reason"])
        assert message["content"] == said and not message.get("tool_calls") and finish == "stop"


def test_a_call_that_is_cut_is_not_called_whole(served):
    choice = ask(served, CALL, tools=TOOLS, max_tokens=len(CALL) - 20)[1]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"][0]["function"]["name"] == "f"
    assert choice["message"]["content"] is None
    for cut in range(12, len(CALL)):  # half a mark is no content
        choice = ask(served, TWO, tools=TOOLS, max_tokens=len(CALL) + 1 + cut)[1]
        assert choice["message"]["content"] is None and len(choice["message"]["tool_calls"]) <= 2
    choice = ask(served, CALL[:-20], tools=TOOLS)[1]  # it ended by itself, in the middle
    assert choice["finish_reason"] == "length"
    choice = ask(served, CALL, tools=TOOLS, stop=['"a"'])[1]
    assert choice["finish_reason"] == "length"


def test_without_tools_calls_are_text(served):
    assert ask(served, CALL)[1]["message"]["content"] == CALL
    assert ask(served, CALL, tools=TOOLS, tool_choice="none")[1]["message"]["content"] == CALL
    assert "Tools:" not in starts(served)[0][0]


def test_special_tokens_reach_the_parser_and_never_the_client(served):
    special = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|other|>"]
    _, choice, _ = ask(served, f"{THOUGHT}So<|other|>: {CALL}", tools=TOOLS, special=special, logprobs=True)
    message = choice["message"]
    assert message["content"] == "So:" and message["reasoning"] == "Hm, hm." and calls_of(message) == [("f", {"a": 1})]


def test_several_choices_and_stop_strings(served):
    status, reply, _ = served.request(
        "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS, "n": 3}
    )
    assert status == 200 and len(reply["choices"]) == 3


def test_the_older_spelling(served):
    _, choice, _ = ask(served, CALL, functions=[F], function_call="auto")
    assert choice["message"]["function_call"]["name"] == "f" and choice["finish_reason"] == "function_call"
    _, raw = ask(served, CALL, functions=[F], stream=True)
    deltas = [c["delta"]["function_call"] for e in sse(raw) for c in e["choices"] if "function_call" in c["delta"]]
    assert deltas[0]["name"] == "f" and json.loads("".join(d["arguments"] for d in deltas)) == {"a": 1}
    ask(served, CALL, functions=[F], function_call={"name": "f"})
    assert starts(served)[0][1]


def test_a_record_runs_again(tmp_path):
    """With its calls and reasoning: examples/replay.py finds no difference, and one where there is one."""
    record = tmp_path / "requests.jsonl"
    for served in serve(tmp_path, TEMPLATE, record=str(record)):
        ask(served, THOUGHT + CALL, tools=TOOLS)
        ask(served, THOUGHT + CALL, functions=[F, G], stream=True)
        body = {"max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
        assert served.request("POST", "/v1/messages", body)[0] == 200  # which is passed over
        for says, status, told in ((THOUGHT + CALL, 0, "2 requests, 0 differ"), (CALL, 1, "2 requests, 2 differ")):
            (tmp_path / "script.json").write_text(json.dumps({"says": [says]}))
            until(lambda: not served.server.busy.count)  # noqa: B023 (a line comes after its answer)
            lines = record.read_text()
            done = subprocess.run(
                [sys.executable, ROOT / "examples/replay.py", record, served.url], capture_output=True, text=True
            )
            assert (done.returncode, done.stdout.splitlines()[-1]) == (status, told), done.stderr
            until(lambda: not served.server.busy.count)  # noqa: B023
            record.write_text(lines)


# ── what is forced ──


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"f", "g"}),
        ({"type": "function", "function": {"name": "g"}}, {"g"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
            },
            {"f"},
        ),
    ],
)
def test_a_forced_call_has_a_grammar(served, choice, names):
    assert ask(served, CALL, tools=TOOLS, tool_choice=choice)[0] == 200
    grammar = starts(served)[0][1]
    assert {name for name in "fg" if f'\\"name\\": \\"{name}\\"' in grammar} == names
    assert ask(served, CALL, tools=TOOLS)[0] == 200
    assert starts(served)[0][1] is None


def test_a_forced_call_that_leaves_its_schema_is_not_called_finished(served):
    wrong = CALL.replace('"a": 1', '"a": "one"')
    assert ask(served, wrong, tools=TOOLS, tool_choice="required")[1]["finish_reason"] == "length"
    assert ask(served, wrong, tools=TOOLS)[1]["finish_reason"] == "tool_calls"  # told as it is


def test_allowed_tools_are_the_only_ones_that_are_shown(served):
    allowed = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "g"}}]},
    }
    message = ask(served, TWO, tools=TOOLS, tool_choice=allowed)[1]["message"]
    assert '"name": "f"' not in starts(served)[0][0] and [name for name, _ in calls_of(message)] == ["g"]


# ── reasoning ──


def test_reasoning_that_the_prompt_has_begun(served):
    kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
    message = ask(served, "Hm.\n</think>\n\nHello", **kwargs)[1]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm.", "Hello")
    message = ask(served, "Hello", chat_template_kwargs={"enable_thinking": False})[1]["message"]
    assert message["content"] == "Hello" and "reasoning" not in message
    assert "reasoning" not in ask(served, f"{THOUGHT}Hello", include_reasoning=False)[1]["message"]


def test_reasoning_effort_is_the_templates_switch(served, plain):
    ask(served, "Hello", reasoning_effort="none")
    assert starts(served)[0][0].endswith("</think>\n\n")
    ask(served, "Hm</think>Hello", reasoning_effort="high")
    assert starts(served)[0][0].endswith("<think>\n")
    assert ask(plain, "Hello", reasoning_effort="none")[0] == 200
    status, reply = ask(plain, "Hello", reasoning_effort="high")
    assert (status, reply["error"]["param"]) == (400, "reasoning_effort")


def test_thinking_without_a_switch_is_refused_but_for_what_it_does_anyway(plain):
    assert ask(plain, "Hello", chat_template_kwargs={"enable_thinking": False})[0] == 200
    status, reply = ask(plain, "Hello", chat_template_kwargs={"enable_thinking": True})
    assert (status, reply["error"]["param"]) == (400, "chat_template_kwargs") and "enable_thinking" in reply["error"]["message"]


@pytest.mark.parametrize("name", ["thinking_budget", "reasoning_budget_tokens", "thinking_token_budget"])
def test_a_budget_of_reasoning(served, name):
    """The sequence starts again with what there is and the closing mark."""
    _, choice, usage = ask(served, "<think>\nOn and on and on", "Hello", **{name: 5})
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == ("On a", "Hello")
    first, second = starts(served)
    assert second[0].startswith(first[0] + "<think>") and second[0].endswith("</think>")
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 5
    ask(served, "Hello", chat_template_kwargs={"enable_thinking": True}, **{name: 0})
    assert starts(served)[0][0].endswith("<think>\n</think>\n\n")


def test_a_budget_of_reasoning_and_a_constraint(served):
    """What is started again follows the constraint alone: the reasoning in front of it has ended."""
    form = {"response_format": {"type": "json_object"}, "chat_template_kwargs": {"enable_thinking": True}, "thinking_budget": 5}
    message = ask(served, "On and on and on", '{"a": 1}', **form)[1]["message"]
    assert (message["reasoning"], message["content"]) == ("On an", '{"a": 1}')
    first, second = starts(served)
    assert "<" in first[1] and second[1] and "<" not in second[1]


def test_a_constraint_begins_after_reasoning(served):
    """In one grammar, or, where the marks are special tokens, at a new start."""
    form = {"response_format": {"type": "json_object"}, "chat_template_kwargs": {"enable_thinking": True}}
    message = ask(served, 'Hm</think>{"a": 1}', **form)[1]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm", '{"a": 1}')
    assert len(starts(served)) == 1 and "<" in starts(served)[0][1]
    message = ask(served, "Hm</think>", '{"a": 1}', special=["<think>", "</think>"], **form)[1]["message"]
    assert (message["reasoning"], message["content"]) == ("Hm", '{"a": 1}')
    first, second = starts(served)
    assert first[1] is None and second[1] and second[0] == first[0] + "Hm</think>"
    form.pop("chat_template_kwargs")  # it need not reason: then the grammar begins at once
    message = ask(served, "So what", '{"a": 1}', special=["<think>", "</think>"], **form)[1]["message"]
    assert message["content"] == '{"a": 1}' and len(starts(served)) == 2


@pytest.mark.parametrize("names", [{"f", "g"}, {"g"}])
def test_a_constraint_of_content_leaves_room_for_calls(served, names):
    allowed = {"mode": "auto", "tools": [{"type": "function", "function": {"name": name}} for name in names]}
    form = {
        "response_format": {"type": "json_object"},
        "tools": TOOLS,
        "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed},
    }
    called = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    assert calls_of(ask(served, called, **form)[1]["message"]) == [("g", {})]
    assert {name for name in "fg" if f'\\"name\\": \\"{name}\\"' in starts(served)[0][1]} == names
    choice = ask(served, '{"a": 1}', **form)[1]
    assert (choice["message"]["content"], choice["finish_reason"]) == ('{"a": 1}', "stop")


# ── the history ──


def test_the_history_goes_back_as_it_came(served):
    messages = [
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant", "content": None, "reasoning": "Hm.",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]  # fmt: skip
    assert ask(served, "Done", messages=messages, tools=TOOLS)[0] == 200
    prompt = starts(served)[0][0]
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in prompt and "<think>\nHm.\n</think>" in prompt
    for route in ("/apply-template", "/tokenize"):
        status, reply, _ = served.request("POST", route, {"messages": messages, "tools": TOOLS})
        assert status == 200
        assert reply.get("prompt", prompt) == prompt and reply.get("count", len(prompt)) == len(prompt)
    assert served.chat("Hi", tools=TOOLS, return_prompt=True)[1]["debug"]["prompts"][0]["prompt"].startswith("Tools:")


def test_results_come_back_in_every_profile(tmp_path):
    for name, profile in model_init.PROFILES.items():
        for served in serve(tmp_path, TEMPLATE, profile=profile):
            messages = [{"role": "user", "content": "Hi"}, past(), RESULT]
            asked = {"model": "scripted", "messages": messages, "tools": TOOLS, "stream": False}
            status, choice, _ = ask(served, CALL, **asked)
            assert (status, calls_of(choice["message"]), choice["finish_reason"]) == (200, [("f", {"a": 1})], "tool_calls"), (
                name
            )


def past(id="c1", arguments="{}"):
    return {
        "role": "assistant",
        "tool_calls": [{"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}
BAD_HISTORY = [
    ([RESULT], "messages[0].tool_call_id"),
    ([past(), RESULT, RESULT], "messages[2].tool_call_id"),
    ([past(), past()], "messages[1].tool_calls[0].id"),
    ([past(arguments="{a}")], "messages[0].tool_calls[0].function.arguments"),
    ([past(arguments="[1]")], "messages[0].tool_calls[0].function.arguments"),
    ([past(arguments=3)], "messages[0].tool_calls[0].function.arguments"),
    ([past(id="")], "messages[0].tool_calls[0].id"),
    ([{"role": "assistant", "tool_calls": [{"id": "c1"}]}], "messages[0].tool_calls[0]"),
    ([{"role": "tool", "content": "42"}], "messages[0].tool_call_id"),
]


@pytest.mark.parametrize(("messages", "param"), BAD_HISTORY)
def test_a_history_that_does_not_fit(served, messages, param):
    status, reply = ask(served, "Hi", messages=messages)
    assert (status, reply["error"]["param"]) == (400, param)


BAD = [
    ({"tools": "f"}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools[0].function.parameters"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools[2]"),
    ({"tools": TOOLS * 65}, "tools"),
    ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"thinking_budget": -1}, "thinking_budget"),
    ({"reasoning_effort": "huge"}, "reasoning_effort"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_refused_by_name(served, fields, param):
    status, reply = ask(served, "Hi", **fields)
    assert (status, reply["error"]["param"]) == (400, param)


# ── templates that show nothing ──


def test_a_template_without_calls(plain, tmp_path):
    status, reply = ask(plain, "Hi", tools=TOOLS)
    assert (status, reply["error"]["param"]) == (400, "tools") and "--tool-syntax" in reply["error"]["message"]
    assert ask(plain, "Hi", tools=TOOLS, tool_choice="none")[0] == 200
    for served in serve(tmp_path, PLAIN, tool_syntax="hermes"):
        message = ask(served, CALL, tools=TOOLS, messages=[past(), RESULT, {"role": "user", "content": "Hi"}])[1]["message"]
        assert calls_of(message) == [("f", {"a": 1})]
        prompt = starts(served)[0][0]
        assert '"name": "f"' in prompt.partition("assistant:")[0]  # the tools are told, and so is the past call
        assert '<tool_call>\n{"name": "f", "arguments": {}}' in prompt


def test_what_was_found_is_told(served, plain):
    found = served.request("GET", "/v1/capabilities")[1]["template"]
    assert found["tool_calls"] == "found: json" and found["reasoning"] == ["<think>", "</think>"]
    assert found["thinking_switch"] == "enable_thinking" and found["thinks_by_default"]
    assert plain.request("GET", "/v1/capabilities")[1]["template"]["tool_calls"] is None


def test_a_hint_that_nothing_heeds_is_named(served, plain):
    body = {"max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}], "output_config": {"effort": "low"}}
    for where, told in ((served, None), (plain, "output_config.effort")):
        where.request("GET", "/v1/capabilities")  # the template has been looked at
        status, _, headers = where.request("POST", "/v1/messages", body)
        assert (status, headers.get("X-Ignored-Fields")) == (200, told)
    headers = plain.request("POST", "/v1/messages", body | {"bogus": 1})[2]
    assert headers["X-Ignored-Fields"] == "bogus, output_config.effort"
