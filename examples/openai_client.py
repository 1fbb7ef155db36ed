#!/usr/bin/env python3
"""The official SDK:  pip install openai && python examples/openai_client.py [http://localhost:8000]"""

import sys

from openai import BadRequestError, OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="any")
model = client.models.list().data[0].id

reply = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0, max_tokens=32
)
print(model, "says:", reply.choices[0].message.content)
print(reply.usage)

stream = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Write a haiku about coding."}], max_tokens=48, seed=1, stream=True
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

try:
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": "Hi"}], temperature=2, top_p=7)
except BadRequestError as error:
    print("refused:", error.param, "-", error.body["message"] if isinstance(error.body, dict) else error)
