#!/usr/bin/env python3
"""Answers that are data:  pip install openai && python examples/structured.py [http://localhost:8000]"""

import sys
from enum import Enum

from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000"
client = OpenAI(base_url=f"{url}/v1", api_key="any")


class Colour(str, Enum):
    red = "red"
    green = "green"
    blue = "blue"


class Pet(BaseModel):
    name: str = Field(max_length=20)  # what has an end, a small model too comes to
    colour: Colour
    legs: int = Field(ge=0, le=8)


parsed = client.chat.completions.parse(
    model="any", messages=[{"role": "user", "content": "Invent a pet."}], response_format=Pet, max_tokens=200, seed=1
)
print(repr(parsed.choices[0].message.parsed))

for outputs in ({"choice": ["yes", "no", "maybe"]}, {"regex": r"\d{4}-\d{2}-\d{2}"}):
    reply = client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "Answer."}],
        max_tokens=32,
        seed=2,
        extra_body={"structured_outputs": outputs},
    )
    print(outputs, "->", reply.choices[0].message.content)

try:
    schema = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    client.chat.completions.create(
        model="any",
        messages=[{"role": "user", "content": "List."}],
        response_format={"type": "json_schema", "json_schema": {"name": "list", "schema": schema}},
    )
except BadRequestError as error:
    print("refused:", error.body["message"] if isinstance(error.body, dict) else error)
