"""Agents: the official SDKs and the Agents SDK go through whole tool round trips, on both dialects. The model is a script."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path

import anthropic
import openai
import pytest
from conftest import serve_one
from scripted_chat import TEMPLATE
from test_messages import parse as parse_messages
from test_responses import kinds
from test_responses import parse as parse_responses

import model_init
from engine import EngineSpec

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
PATCH = '<tool_call>\n{"name": "patch", "arguments": {"input": "*** Begin\\n+é"}}\n</tool_call>'
THOUGHT = "<think>\nHm, hm.\n</think>\n\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    (folder / "script.json").write_text('{"says": ["hi"]}')
    model = model_init.Model("scripted", folder, "gguf", 1234)
    with serve_one(model, EngineSpec("scripted_chat:ScriptedChat", str(folder), 4, chat_template=TEMPLATE)) as served:
        served.folder = folder
        yield served


def script(served, *says, size=1):
    (Path(served.folder) / "script.json").write_text(json.dumps({"says": says, "special": (), "size": size}))
    (Path(served.folder) / "log").write_text("")


def prompts(served):
    return [json.loads(line)[0] for line in (Path(served.folder) / "log").read_text().splitlines()]


def responses(served, **body):
    return served.request("POST", "/v1/responses", {"input": "Hi", **body})


def messages(served, **body):
    return served.request("POST", "/v1/messages", {"max_tokens": 500, "messages": [{"role": "user", "content": "Hi"}], **body})


def function(name="f", **more):
    return {"type": "function", "name": name, "description": "d", "parameters": PARAMETERS, **more}


# ───────────────────────────────────────────────────── responses ──────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_call_with_reasoning_and_text(served, size):
    script(served, THOUGHT + "So: " + CALL, size=size)
    status, body, _ = responses(served, tools=[function()])
    assert status == 200, body
    assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call"]
    assert body["output"][0]["content"][0]["text"].strip() == "Hm, hm."
    assert json.loads(body["output"][2]["arguments"]) == {"a": 1}
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert body["tools"] == [function(strict=None)]
    events = parse_responses(responses(served, tools=[function()], stream=True)[1])
    last = events[-1]["response"]["output"]
    assert [(i["type"], i.get("arguments"), i.get("content")) for i in last] == [
        (i["type"], i.get("arguments"), i.get("content")) for i in body["output"]
    ]
    fragments = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(fragments) == body["output"][2]["arguments"]
    assert [e["item"]["type"] for e in events if e["type"] == "response.output_item.done"] == [i["type"] for i in last]


def test_a_round_trip_by_id_and_by_sending_again(served):
    script(served, THOUGHT + CALL, "It is 7.")
    first = responses(served, tools=[function()])[1]
    call = first["output"][-1]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "7"}
    second = responses(served, tools=[function()], input=[output], previous_response_id=first["id"])[1]
    assert second["output"][0]["content"][0]["text"] == "It is 7."
    third = responses(served, tools=[function()], input=[{"role": "user", "content": "Hi"}, *first["output"], output])
    assert third[0] == 200
    begun, by_id, again = prompts(served)
    assert by_id == again
    assert by_id.startswith(begun)
    assert THOUGHT.rstrip() in by_id
    assert '{"name": "f", "arguments": {"a": 1}}' in by_id
    assert "<|im_start|>tool\n7<|im_end|>" in by_id


def test_custom_tools_and_namespaces(served):
    spaced = '<tool_call>\n{"name": "git__log", "arguments": {"a": 2}}\n</tool_call>'
    tools = [{"type": "custom", "name": "patch"}, {"type": "namespace", "name": "git", "tools": [function("log")]}]
    script(served, PATCH + "\n" + spaced)
    events = parse_responses(responses(served, tools=tools, stream=True)[1])
    patch, log = events[-1]["response"]["output"]
    assert (patch["type"], patch["input"]) == ("custom_tool_call", "*** Begin\n+é")
    assert (log["name"], log["namespace"]) == ("log", "git")
    assert "custom_tool_call_input.delta" in kinds(events)
    outputs = [
        {"type": "custom_tool_call_output", "call_id": patch["call_id"], "output": "done"},
        {"type": "function_call_output", "call_id": log["call_id"], "output": "none"},
    ]
    status, body, _ = responses(served, tools=tools, input=[{"role": "user", "content": "Hi"}, patch, log, *outputs])
    assert status == 200, body
    assert '"name": "git__log"' in prompts(served)[-1]


def test_forced_and_allowed(served):
    script(served, CALL)
    for choice in (
        "required",
        {"type": "function", "name": "f"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
    ):
        status, body, _ = responses(served, tools=[function(), function("g")], tool_choice=choice)
        assert (status, body["output"][0]["type"]) == (200, "function_call"), body
        assert body["tool_choice"] == choice
    for tools, choice, param in (
        ([function()], {"type": "function", "name": "h"}, "tool_choice"),
        ([], "required", "tool_choice"),
        ([function(parameters={"type": "nothing"})], "required", "tools"),
        ([function(), function()], "auto", "tools[1]"),
        ([function("no spaces")], "auto", "tools[0].name"),
    ):
        status, body, _ = responses(served, tools=tools, tool_choice=choice)
        assert (status, body["error"]["param"]) == (400, param), body


def test_an_output_without_its_call_is_refused_by_this_routes_names(served):
    status, body, _ = responses(
        served, input=[{"role": "user", "content": "Hi"}, {"type": "function_call_output", "call_id": "c", "output": ""}]
    )
    assert (status, body["error"]["param"]) == (400, "input[1].tool_call_id")


def test_a_call_that_is_cut(served):
    script(served, CALL)
    body = responses(served, tools=[function()], max_output_tokens=45)[1]
    assert (body["status"], body["output"][-1]["status"]) == ("incomplete", "incomplete")


def test_effort(served):
    script(served, "hi")
    assert responses(served, reasoning={"effort": "none"})[0] == 200
    assert responses(served, reasoning={"effort": "high", "summary": "auto"})[1]["reasoning"] == {
        "effort": "high",
        "summary": "auto",
    }
    off, on = prompts(served)
    assert off.endswith("<think>\n\n</think>\n\n")
    assert on.endswith("<think>\n")


def test_openai_sdk(served):
    sdk = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    script(served, THOUGHT + CALL, "It is 7.")
    with sdk.responses.stream(model="m", input="Hi", tools=[function(strict=True)]) as stream:
        seen = [event.type for event in stream]
        first = stream.get_final_response()
    assert seen[0] == "response.created"
    assert seen[-1] == "response.completed"
    call = first.output[-1]
    assert call.parsed_arguments == {"a": 1}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "7"}
    assert (
        sdk.responses.create(model="m", input=[output], previous_response_id=first.id, tools=[function()]).output_text
        == "It is 7."
    )


def test_agents_sdk(served):
    agents = pytest.importorskip("agents", reason="openai-agents is not installed")
    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def f(a: int) -> str:
        """Looks it up."""
        asked.append(a)
        return "7"

    def agent():
        sdk = openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
        return agents.Agent("helper", instructions="Be brief.", tools=[f], model=agents.OpenAIResponsesModel("m", sdk))

    async def plain():
        return (await agents.Runner.run(agent(), "Hi")).final_output

    async def streamed():
        result = agents.Runner.run_streamed(agent(), "Hi")
        async for _ in result.stream_events():
            pass
        return result.final_output

    for run in (plain, streamed):
        script(served, THOUGHT + CALL, "It is 7.")
        assert asyncio.run(run()) == "It is 7."
    assert asked == [1, 1]


# ────────────────────────────────────────────────────── messages ──────────────────────────────────────────────────

TOOL = {"name": "f", "description": "d", "input_schema": PARAMETERS}


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_tool_use_with_thinking(served, size):
    script(served, THOUGHT + "So: " + CALL, size=size)
    status, body, _ = messages(served, tools=[TOOL])
    assert status == 200, body
    assert [block["type"] for block in body["content"]] == ["thinking", "text", "tool_use"]
    assert (body["content"][2]["input"], body["stop_reason"]) == ({"a": 1}, "tool_use")
    events = parse_messages(messages(served, tools=[TOOL], stream=True)[1])
    assert [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"] == [
        "thinking",
        "text",
        "tool_use",
    ]
    assert "".join(e["delta"].get("partial_json", "") for e in events if e["type"] == "content_block_delta") == '{"a": 1}'


def test_a_tool_use_and_nothing_after_it(served):
    """No empty text block, and not end_turn."""
    script(served, CALL)
    _, body, _ = messages(served, tools=[TOOL])
    assert ([block["type"] for block in body["content"]], body["stop_reason"]) == (["tool_use"], "tool_use")


def test_anthropic_sdk(served):
    sdk = anthropic.Anthropic(base_url=served.url, api_key="any", max_retries=0)
    script(served, THOUGHT + CALL, "It is 7.")
    conversation = [{"role": "user", "content": "Hi"}]
    with sdk.messages.stream(model="m", max_tokens=500, messages=conversation, tools=[TOOL]) as stream:
        for _ in stream:
            pass
        first = stream.get_final_message()
    assert [block.type for block in first.content] == ["thinking", "tool_use"]
    assert first.content[1].input == {"a": 1}
    result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "7"}
    conversation += [
        {"role": "assistant", "content": [block.to_dict() for block in first.content]},
        {"role": "user", "content": [result]},
    ]
    second = sdk.messages.create(model="m", max_tokens=500, messages=conversation, tools=[TOOL])
    assert second.content[0].text == "It is 7."
    begun, went_on = prompts(served)
    assert went_on.startswith(begun)
    assert THOUGHT.rstrip() in went_on
    count = sdk.messages.count_tokens(model="m", messages=conversation, tools=[TOOL]).input_tokens
    assert count == second.usage.input_tokens + second.usage.cache_read_input_tokens
    with pytest.raises(anthropic.BadRequestError, match="signature"):
        conversation[1]["content"][0]["thinking"] = "changed"
        sdk.messages.create(model="m", max_tokens=500, messages=conversation, tools=[TOOL])


def test_tool_runner_of_the_anthropic_sdk(served):
    sdk = anthropic.Anthropic(base_url=served.url, api_key="any", max_retries=0)
    asked = []

    @anthropic.beta_tool
    def f(a: int) -> str:
        """Looks it up.

        Args:
            a: what
        """
        asked.append(a)
        return "7"

    script(served, CALL, "It is 7.")
    runner = sdk.beta.messages.tool_runner(model="m", max_tokens=500, messages=[{"role": "user", "content": "Hi"}], tools=[f])
    assert runner.until_done().content[0].text == "It is 7."
    assert asked == [1]


def test_choices(served):
    script(served, CALL)
    for choice in ({"type": "any"}, {"type": "tool", "name": "f"}, {"type": "auto", "disable_parallel_tool_use": True}):
        status, body, _ = messages(served, tools=[TOOL], tool_choice=choice)
        assert (status, body["stop_reason"]) == (200, "tool_use"), body
    status, body, _ = messages(served, tools=[TOOL], tool_choice={"type": "tool", "name": "h"})
    assert (status, "'tool_choice'" in body["error"]["message"]) == (400, True)


def test_thinking_on_and_off(served):
    script(served, "hi")
    for thinking in ({"type": "disabled"}, {"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
        assert messages(served, thinking=thinking)[0] == 200
    off, on, free = prompts(served)
    assert off.endswith("</think>\n\n")
    assert on.endswith("<think>\n")
    assert free.endswith("assistant\n")


# ───────────────────────────────────────────────────── JavaScript ─────────────────────────────────────────────────

PACKAGES = (
    "ai@6.0.326", "@ai-sdk/openai@3.0.141", "@ai-sdk/open-responses@1.0.39", "@ai-sdk/anthropic@3.0.138", "openai@6.49.0",
    "@anthropic-ai/sdk@1.12.0",
)  # fmt: skip


def test_javascript(served, tmp_path):
    """Vercel's AI SDK with its three providers, and the official SDKs' stream helpers."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    install = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(tmp_path), *PACKAGES]
    try:
        done = subprocess.run(install, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not install the packages within two minutes")
    if done.returncode:
        pytest.skip(f"npm could not install the packages: {done.stderr.strip()[-200:]}")
    shutil.copy(Path(__file__).parent / "agents.mjs", tmp_path)
    command = ["node", "agents.mjs", f"{served.url}/v1", str(Path(served.folder) / "script.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = []
    for name in ("openai", "open-responses", "anthropic"):
        expected += [[name, "plain", "It is 7.", 2, "7"], [name, "streamed", "It is 7.", 2]]
    expected += [["openai", ["reasoning", "function_call"], '{"a": 1}']]
    expected += [["openai", "runTools", "It is 7.", ["user", "assistant", "tool", "assistant"]]]
    expected += [["anthropic", ["thinking", "tool_use"], {"a": 1}]]
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected
