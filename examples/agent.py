#!/usr/bin/env python3
"""An agent with two tools, in the standard library:  python examples/agent.py ["What is 17 * 23?"] [http://localhost:8000]"""

import ast
import json
import operator
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

QUESTION = sys.argv[1] if len(sys.argv) > 1 else "What is 17 * 23, and which files are here?"
URL = sys.argv[2] if len(sys.argv) > 2 else "http://localhost:8000"
ROUNDS = 8  # of calls, then it is ended: a small model may call for ever
OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> float:
    def value(node: ast.AST) -> float:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))
        raise ValueError("only numbers, + - * / and brackets")

    return value(ast.parse(expression[:200], mode="eval"))


def list_files() -> list[str]:
    return sorted(os.listdir())[:20]


def tool(run: Callable[..., Any], description: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": run.__name__, "description": description, "parameters": parameters}}


RUN = {run.__name__: run for run in (calculate, list_files)}
TOOLS = [
    tool(calculate, "The value of an arithmetic expression", expression={"type": "string", "maxLength": 60}),
    tool(list_files, "The names of the files in the current folder"),
]


def ask(messages: list[dict[str, Any]]) -> dict[str, Any]:
    body = json.dumps({"messages": messages, "tools": TOOLS, "max_tokens": 1000}).encode()
    try:
        request = urllib.request.Request(f"{URL}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            message: dict[str, Any] = json.load(reply)["choices"][0]["message"]
    except urllib.error.HTTPError as error:  # say, the conversation has become too long
        sys.exit(json.load(error)["error"]["message"])
    except (OSError, ValueError) as error:
        sys.exit(f"{URL}: {error}")
    return message


def answer(call: dict[str, Any]) -> str:
    """A tool's result, or what went wrong: the model is told either way."""
    function = call["function"]
    try:
        return json.dumps(RUN[function["name"]](**json.loads(function["arguments"])))[:2000]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}]
for _ in range(ROUNDS):
    message = ask(messages)
    messages.append(message)
    if not message.get("tool_calls"):
        print(message["content"] or "(it said nothing)")
        break
    for call in message["tool_calls"]:
        result = answer(call)
        print(f"  {call['function']['name']}({call['function']['arguments']}) -> {result}")
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})
else:
    sys.exit(f"no answer after {ROUNDS} rounds of calls")
