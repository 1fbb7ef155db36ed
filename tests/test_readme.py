"""README's tables are the code's. `python tests/test_readme.py` writes them anew."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from backends import BACKENDS  # noqa: E402
from openai_api_endpoint import BODIES, COMBINED, INERT, NEVER, engines_with  # noqa: E402

README = ROOT / "README.md"
TITLES = {
    "/chat/completions": "POST /v1/chat/completions",
    "/completions": "POST /v1/completions: what differs from chat",
    "/embeddings": "POST /v1/embeddings",
    "/tokenize": "POST /tokenize",
    "/detokenize": "POST /detokenize",
    "/apply-template": "POST /apply-template",
}


def marks(needs):
    able = engines_with(needs) if needs else list(BACKENDS)
    return " | ".join("✔" if name in able else "400" for name in BACKENDS)


def fields():
    lines = []
    chat = BODIES["/chat/completions"]
    for path, table in BODIES.items():
        lines += [
            "",
            f"### {TITLES[path]}",
            "",
            f"| field | must be | | {' | '.join(BACKENDS)} |",
            "|" + "---|" * (3 + len(BACKENDS)),
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


def with_tables(text):
    return re.sub(r"(<!-- fields -->\n).*?(<!-- /fields -->)", lambda m: m[1] + fields() + "\n" + m[2], text, flags=re.S)


def test_readme_has_the_tables_of_the_code():
    text = README.read_text()
    assert "<!-- fields -->" in text
    assert text == with_tables(text), "run: python tests/test_readme.py"


def test_readme_names_every_flag():
    from argparse import ArgumentParser

    import model_init

    parser = ArgumentParser()
    model_init.add_args(parser)
    for action in parser._actions:
        assert max(action.option_strings, key=len) in README.read_text() or action.dest == "help", action


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
