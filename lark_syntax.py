"""Grammars in lark's syntax as one regex: what a custom tool's input must look like. Text to text, no state.

A grammar of the kind that tools have (lines, fields, choices) is regular: its rules are put into each other's place. One that refers
to itself is not, and is refused, as is what would need lark's own machinery: %ignore, templates, lookaround between rules.
"""

from __future__ import annotations

import re

from constraints import Unsupported

COMMON = {  # what %import common.NAME brings; lark's grammars/common.lark
    "LF": r"\n", "CR": r"\r", "NEWLINE": r"(?:\r?\n)+", "WS": r"[ \t\f\r\n]+", "WS_INLINE": r"[ \t]+", "DIGIT": "[0-9]",
    "HEXDIGIT": "[0-9a-fA-F]", "INT": "[0-9]+", "SIGNED_INT": "[+-]?[0-9]+", "DECIMAL": r"(?:[0-9]+\.[0-9]*|\.[0-9]+)",
    "NUMBER": r"(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][+-]?[0-9]+)?", "LETTER": "[a-zA-Z]", "LCASE_LETTER": "[a-z]",
    "UCASE_LETTER": "[A-Z]", "WORD": "[a-zA-Z]+", "CNAME": "[_a-zA-Z][_a-zA-Z0-9]*", "ESCAPED_STRING": r'"(?:[^"\\\n]|\\[^\n])*"',
}  # fmt: skip
COMMON["SIGNED_NUMBER"] = "[+-]?" + f"(?:{COMMON['NUMBER']})"
LONGEST = 100_000  # characters of the regex
TOKEN = re.compile(
    r"""\s+ | (?P<string>"(?:[^"\\\n]|\\.)*"i?) | (?P<regex>/(?![/*])(?:[^/\\\n]|\\.)+/[a-z]*) | (?P<alias>->\s*\w+)
      | (?P<name>[a-zA-Z_]\w*) | (?P<count>~\s*\d+(?:\s*\.\.\s*\d+)?) | (?P<mark>\.\.|[()\[\]|?*+])""",
    re.X,
)
RULE = re.compile(r"^[?!]*(?P<name>[a-zA-Z_]\w*)(?:\.-?\d+)?\s*:(?P<body>.*)$", re.S)


def lark_regex(text: str, start: str = "start") -> str:
    """The regex of everything that the grammar accepts, to be matched as a whole. Raises Unsupported."""
    rules: dict[str, list[tuple[str, str]]] = {}
    for statement in statements(text):
        if imported := re.fullmatch(r"%import\s+common\s*\.\s*(\w+)\s*(?:->\s*(\w+))?", statement):
            if imported[1] not in COMMON:
                raise Unsupported(f"%import common.{imported[1]} is not known here.")
            rules[imported[2] or imported[1]] = [("regex", f"/{COMMON[imported[1]]}/")]
        elif rule := RULE.match(statement):
            if rule["name"] in rules:
                raise Unsupported(f"the rule {rule['name']} stands there twice.")
            rules[rule["name"]] = tokens(rule["body"])
        else:
            raise Unsupported(f"a grammar of rules and %import common.NAME alone can be honoured, not {statement[:60]!r}.")
    return Reader(rules).rule(start)


def statements(text: str) -> list[str]:
    """Rules and directives; a line that begins with | goes on with the one before."""
    found: list[str] = []
    for line in text.splitlines():
        line = without_comment(line)
        if not line.strip():
            continue
        if re.match(r"\s*\||\s+\S", line) and found:
            found[-1] += "\n" + line
        else:
            found.append(line.strip())
    return found


def without_comment(line: str) -> str:
    """What stands before // outside of strings and regexes."""
    at = 0
    while at < len(line):
        if line.startswith("//", at):
            return line[:at]
        hit = TOKEN.match(line, at)
        at = hit.end() if hit and (hit["string"] or hit["regex"]) else at + 1
    return line


def tokens(body: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(body):
        hit = TOKEN.match(body, at)
        if not hit:
            raise Unsupported(f"this is not understood: {body[at : at + 40]!r}.")
        if hit.lastgroup and hit.lastgroup != "alias":
            found.append((hit.lastgroup, hit[hit.lastgroup]))
        at = hit.end()
    return found


class Reader:
    """Recursive descent over one rule's tokens; a name is the regex of its rule."""

    def __init__(self, rules: dict[str, list[tuple[str, str]]]):
        self.rules = rules
        self.done: dict[str, str] = {}  # regexes of the rules that have been read
        self.open: set[str] = set()  # those that are being read
        self.tokens: list[tuple[str, str]] = []

    def rule(self, name: str) -> str:
        """The regex of a rule, in brackets."""
        if name in self.open:
            raise Unsupported(f"the rule {name} refers to itself: only grammars that do not can be honoured.")
        if name not in self.rules:
            raise Unsupported(f"there is no rule {name}.")
        if name not in self.done:
            self.open.add(name)
            outer, self.tokens = self.tokens, list(self.rules[name])
            self.done[name] = f"(?:{self.choice()})"
            if self.tokens:
                raise Unsupported(f"in the rule {name}, {self.tokens[0][1]!r} is not understood.")
            self.tokens = outer
            self.open.remove(name)
            if len(self.done[name]) > LONGEST:
                raise Unsupported("the grammar is too large.")
        return self.done[name]

    def ahead(self, *marks: str) -> bool:
        return bool(self.tokens) and self.tokens[0][0] == "mark" and self.tokens[0][1] in marks

    def choice(self) -> str:
        options = [self.sequence()]
        while self.ahead("|"):
            self.tokens.pop(0)
            options.append(self.sequence())
        return "|".join(options)

    def sequence(self) -> str:
        parts = []
        while self.tokens and not self.ahead("|", ")", "]"):
            parts.append(self.repeated())
        return "".join(parts)

    def repeated(self) -> str:
        part = self.atom()
        while self.tokens and (self.ahead("?", "*", "+") or self.tokens[0][0] == "count"):
            kind, mark = self.tokens.pop(0)
            if kind == "count":
                low, _, high = mark[1:].replace(" ", "").partition("..")
                mark = f"{{{low},{high or low}}}"
            part = f"(?:{part}){mark}"
        return part

    def atom(self) -> str:
        kind, text = self.tokens.pop(0)
        if kind == "string":
            return self.string(text)
        if kind == "regex":
            body, _, flags = text[1:].rpartition("/")
            if flags:
                raise Unsupported(f"flags of a regex are not built: {text[:60]}")
            return f"(?:{body})".replace(r"\/", "/")
        if kind == "name":
            return self.rule(text)
        if text in "([":
            inside = self.choice()
            if not self.ahead(")" if text == "(" else "]"):
                raise Unsupported(f"a {text!r} is not closed.")
            self.tokens.pop(0)
            return f"(?:{inside})" + ("?" if text == "[" else "")
        raise Unsupported(f"{text!r} is not understood.")

    def string(self, text: str) -> str:
        """A literal, or with `..` after it a range of characters."""
        if text.endswith("i"):
            raise Unsupported(f"strings whatever their case are not built: {text[:60]}")
        literal = unescaped(text)
        if not self.ahead(".."):
            return re.escape(literal)
        self.tokens.pop(0)
        kind, other = self.tokens.pop(0) if self.tokens else ("", "")
        if kind != "string" or len(literal) != 1 or len(unescaped(other)) != 1:
            raise Unsupported(f"a range needs a character on both sides: {text}..{other}")
        return f"[{re.escape(literal)}-{re.escape(unescaped(other))}]"


def unescaped(text: str) -> str:
    """What a string in quotes stands for."""
    escapes = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}
    return re.sub(r"\\(.)", lambda m: escapes.get(m[1], m[1]), text[1:-1])
