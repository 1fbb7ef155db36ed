"""README's tables are the code's. `python tests/test_readme.py` writes them anew."""

import re
import sys
from argparse import SUPPRESS
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from api_request import BODIES, COMBINED, INERT, NEVER, engines_with  # noqa: E402
from backends import LACKS  # noqa: E402
from model_init import PROFILES  # noqa: E402
from openai_api_endpoint import make_parser  # noqa: E402

README = ROOT / "README.md"
TITLES = {
    "/chat/completions": "POST /v1/chat/completions",
    "/completions": "POST /v1/completions: what differs from chat",
    "/embeddings": "POST /v1/embeddings",
    "/tokenize": "POST /tokenize",
    "/detokenize": "POST /detokenize",
    "/apply-template": "POST /apply-template",
    "/models/load": "POST /v1/models/load, /v1/models/unload (with `--admin`)",
}


def marks(needs):
    able = engines_with(needs) if needs else list(LACKS)
    return " | ".join("✔" if name in able else "400" for name in LACKS)


def fields():
    lines = []
    chat = BODIES["/chat/completions"]
    for path, table in ((path, BODIES[path]) for path in TITLES):
        lines += [
            "",
            f"### {TITLES[path]}",
            "",
            f"| field | must be | | {' | '.join(LACKS)} |",
            "|" + "---|" * (3 + len(LACKS)),
        ]
        for name, row in table.items():
            if path == "/completions" and chat.get(name) == row:
                continue
            must = "" if row.needs == NEVER else row.kind.says.replace("|", "\\|")
            lines.append(f"| `{name}` | {must} | {row.help} | {marks(row.needs)} |")
        if path == "/completions":
            lines += [f"| {says} | | together | {marks(feature)} |" for says, _, _, feature in COMBINED]
    lines += [
        "",
        f"Everywhere: `repeat_penalty` is `repetition_penalty`; these change nothing and are let through: `{', '.join(INERT)}`.",
        "",
    ]
    return "\n".join(lines)


def profiles():
    def said(value, none):
        return none if value is None else str(value)

    def wait(profile):
        return "auto" if profile.load_wait is None else "waits" if profile.load_wait else "202"

    rows = {
        "`--host`, `--port`": lambda p: f"{p.host}:{p.port}",
        "stream when absent": lambda p: str(p.stream).lower(),
        "max_tokens when absent": lambda p: said(p.max_tokens, "free context"),
        "max_tokens at most": lambda p: said(p.max_tokens_limit, "context"),
        "temperature / top_p / top_k": lambda p: (
            "the model's own, else 0.7 / 1 / off"
            if p.temperature is None
            else f"{p.temperature:g} / {p.top_p:g} / {p.top_k or 'off'}"
        ),
        "model absent": lambda p: "default model" if p.no_model == "default" else "400",
        "model unknown": lambda p: {"auto": "an only model: served; else 404", "serve": "served"}.get(
            p.unknown_model, p.unknown_model
        ),
        "roles": lambda p: "all" if len(p.roles) == 5 else " ".join(p.roles),
        "model not in memory": wait,
    }
    lines = [f"| | {' | '.join(PROFILES)} |", "|" + "---|" * (1 + len(PROFILES))]
    lines += [f"| {name} | {' | '.join(say(profile) for profile in PROFILES.values())} |" for name, say in rows.items()]
    return "\n".join(["", *lines, ""])


def with_tables(text):
    for name, table in (("fields", fields), ("profiles", profiles)):
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, t=table: m[1] + t() + "\n" + m[2], text, flags=re.S
        )
    return text


def test_readme_has_the_tables_of_the_code():
    text = README.read_text()
    assert "<!-- fields -->" in text
    assert text == with_tables(text), "run: python tests/test_readme.py"


def test_readme_names_every_flag():
    parser, text = make_parser(), README.read_text()
    for action in parser._actions:
        if action.help != SUPPRESS and action.dest != "help":
            assert f"`{max(action.option_strings, key=len)}" in text, action


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
