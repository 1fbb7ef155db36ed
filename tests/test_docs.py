"""The docs say what the code does: tables, flags, links, and the three examples of design.md. `python tests/test_docs.py` writes the tables anew."""

import re
import subprocess
import sys
from argparse import SUPPRESS
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from api_request import COMBINED, INERT, NEVER, engines_with  # noqa: E402
from backends import LACKS  # noqa: E402
from model_init import PROFILES  # noqa: E402
from openai_api_endpoint import TABLES, make_parser  # noqa: E402

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
WITH_TABLES = [ROOT / "docs" / name for name in ("fields.md", "coming-from.md")]
TITLES = {
    "/chat/completions": "POST /v1/chat/completions",
    "/completions": "POST /v1/completions: what differs from chat",
    "/responses": "POST /v1/responses",
    "/messages": "POST /v1/messages",
    "/embeddings": "POST /v1/embeddings",
    "/rerank": "POST /v1/rerank",
    "/score": "POST /v1/score",
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
    chat = TABLES["/chat/completions"]
    for path, table in ((path, TABLES[path]) for path in TITLES):
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


def test_the_tables_are_the_codes():
    for page in WITH_TABLES:
        text = page.read_text()
        assert "<!-- /" in text
        assert text == with_tables(text), "run: python tests/test_docs.py"


def test_every_flag_is_named():
    parser, text = make_parser(), "".join(page.read_text() for page in [README, *DOCS])
    for action in parser._actions:
        if action.help != SUPPRESS and action.dest != "help":
            assert f"`{max(action.option_strings, key=len)}" in text or f"`{action.option_strings[0]}" in text, action


def anchors(text):
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere():
    seen = 0
    for page in [README, *DOCS, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"https?:", target):
                continue
            file, _, anchor = target.partition("#")
            found = page.parent / file if file else page
            assert found.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(found.read_text()), f"{page.name}: {target}"
            seen += 1
    assert seen > 15


def test_readme_is_a_page_and_names_every_other():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 160
    for page in DOCS:
        assert f"docs/{page.name}" in README.read_text(), page.name


def examples():
    """The three of design.md: a field, a route, an engine."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "design.md").read_text(), flags=re.S | re.M)


RUN = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}, {folder!r}]
from conftest import serve_one
from engine import EngineSpec
from model_init import Model
{field}
{route}
if __name__ == "__main__":
    model = Model("parrot", Path("parrot"), "gguf", 1)
    with serve_one(model, EngineSpec("parrot:Parrot", {folder!r}, 2)) as served:
        print(served.request("GET", "/v1/version")[1], served.request("POST", "/version")[0])
        print(served.chat("Hello, world")[1]["choices"][0]["message"]["content"])
        print(served.chat("x", top_a=200)[1]["error"]["param"], served.chat("x", top_a=3)[0])
"""


def test_the_examples_of_design_md(tmp_path):
    field, route, engine = examples()
    (tmp_path / "parrot.py").write_text(engine)
    names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "folder": str(tmp_path), "field": field, "route": route}
    (tmp_path / "run.py").write_text(RUN.format(**names))
    done = subprocess.run([sys.executable, tmp_path / "run.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["{'version': '1'} 405", "Hello, world", "top_a 200"], done.stderr


if __name__ == "__main__":
    for page in WITH_TABLES:
        page.write_text(with_tables(page.read_text()))
