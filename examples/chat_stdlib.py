#!/usr/bin/env python3
"""Chat in the terminal, with the standard library alone:  python examples/chat_stdlib.py [http://localhost:8000]"""

import json
import sys
import urllib.error
import urllib.request


def answer(url: str, messages: list[dict[str, str]]) -> str:
    """Print the answer as it comes, and return it."""
    body = json.dumps({"messages": messages, "stream": True, "max_tokens": 512}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    text = ""
    with urllib.request.urlopen(request) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise SystemExit(event["error"]["message"])
                piece = event["choices"][0]["delta"].get("content", "")
                print(piece, end="", flush=True)
                text += piece
    print()
    return text


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
    messages: list[dict[str, str]] = []
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
            messages.append({"role": "assistant", "content": answer(url, messages)})
        except urllib.error.HTTPError as error:
            print(json.load(error)["error"]["message"])
            messages.pop()
        except (EOFError, KeyboardInterrupt):
            return


if __name__ == "__main__":
    main()
