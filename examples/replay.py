#!/usr/bin/env python3
"""Run recorded requests again and print what differs:

    python openai_api_endpoint.py --record requests.jsonl
    python examples/replay.py requests.jsonl [http://localhost:8000]

Chats and completions; a server that wants a key gets $OPENAI_API_KEY.
Each is sent with the sampling and the seed that were really used, without streaming. The same engine with the same
settings gives the same text, up to its arithmetic: what else runs in the batch may round a logit differently.
"""

import difflib
import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty")


def ask(url: str, record: dict[str, Any]) -> dict[str, Any]:
    used = record["debug"]["prompts"][0]["sampling"]
    body = {name: value for name, value in record["body"].items() if name not in ("stream", "stream_options", *SAMPLING)}
    body |= {name: used[name] for name in SAMPLING} | {"return_prompt": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    request = urllib.request.Request(url + record["path"], json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request) as reply:
            answer: dict[str, Any] = json.load(reply)
            return answer
    except urllib.error.HTTPError as error:
        return {"error": json.load(error)["error"]["message"]}


def texts(reply: dict[str, Any]) -> list[str]:
    if "error" in reply:
        return [reply["error"]]
    return [choice["text"] if "text" in choice else said(choice["message"]) for choice in reply["choices"]]


def said(answer: dict[str, Any]) -> str:
    """All of an answer as text: of a record, or of a reply's message. A call's id is another one each time."""
    calls = [call.get("function", call) for call in answer.get("tool_calls") or [answer.get("function_call")] if call]
    told = [f"{call['name']}({call['arguments']})" for call in calls]
    return "\n".join(filter(None, [answer.get("reasoning"), answer.get("text") or answer.get("content"), *told]))


def compare(record: dict[str, Any], reply: dict[str, Any]) -> list[str]:
    """Lines that tell the difference; none when there is none."""
    out = []
    debug = reply.get("debug", {})
    if debug and debug["fingerprint"] != record["debug"]["fingerprint"]:
        out.append(f"  engine: {record['debug']['engine']} -> {debug['engine']}")
    if debug and debug["prompts"][0]["prompt_token_ids"] != record["debug"]["prompts"][0]["prompt_token_ids"]:
        out.append("  the prompt's tokens differ")
    before = [said(choice) for choice in record["choices"]]
    for i, (old, new) in enumerate(zip(before, texts(reply), strict=False)):
        if old != new:
            same = next((k for k, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
            out.append(f"  choice {i} differs from character {same} on:")
            out += [
                f"    {line}"
                for line in difflib.unified_diff(old.splitlines(), new.splitlines(), "recorded", "now", lineterm="", n=0)
            ]
    return out


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    url = sys.argv[2].rstrip("/") if len(sys.argv) > 2 else "http://localhost:8000"
    differing = count = 0
    with open(sys.argv[1], encoding="utf-8") as f:
        lines = f.readlines()  # the server may be recording into this very file
    for line in lines:
        record = json.loads(line)
        if not record["path"].endswith("/completions"):
            print(f"{record['id']}: not run again, since it came to {record['path']}")
            continue
        difference = compare(record, ask(url, record))
        count += 1
        differing += bool(difference)
        print(f"{record['id']}: {'differs' if difference else 'the same'}")
        print("\n".join(difference), end="\n" if difference else "")
    print(f"{count} requests, {differing} differ")
    raise SystemExit(differing > 0)


if __name__ == "__main__":
    main()
