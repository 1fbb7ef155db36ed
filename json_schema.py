"""JSON Schema as a document and as a check: which words there are, what references name, and whether a value satisfies a schema.

Keywords mean what the draft says that `$schema` names, and 2020-12's where it names none (json-schema.org/draft/2020-12), joined by the
older words that 2020-12 does not have. What is unknown is an annotation, told by `unknown_words`. Formats are asserted where they are known.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any, NoReturn
from urllib.parse import unquote, urldefrag, urljoin

from regular import EMPTY, Bound, Regex, Term, Unsupported, matches, pattern_term

MAX_DEPTH, MAX_MEMBERS = 64, 2_000


# ---- formats: those that are asserted; any other is an annotation


_LETTER = "[A-Za-z0-9]"
_LEAP = "([0-9][0-9](0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)"
_DATE = f"([0-9]{{4}}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
_HOUR = "([01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = f"{_HOUR}:[0-5][0-9](\\.[0-9]{{1,9}})?([Zz]|[+-]{_HOUR})"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = rf"({_OCTET}\.){{3}}{_OCTET}"
_LABEL = f"{_LETTER}([A-Za-z0-9-]{{0,61}}{_LETTER})?"
_HEX = "[0-9A-Fa-f]{1,4}"
_TAIL6 = f"({_HEX}:{_HEX}|{_IPV4})"
_IPV6 = "|".join(
    [f"({_HEX}:){{6}}{_TAIL6}", f"::({_HEX}:){{5}}{_TAIL6}"]
    + [f"(({_HEX}:){{0,{n}}}{_HEX})?::({_HEX}:){{{4 - n}}}{_TAIL6}" for n in range(5)]
    + [f"(({_HEX}:){{0,5}}{_HEX})?::{_HEX}", f"(({_HEX}:){{0,6}}{_HEX})?::"]
)
_PCT = "%[0-9A-Fa-f]{2}"
_PCHAR = f"([A-Za-z0-9._~!$&'()*+,;=:@-]|{_PCT})"
_HOST = rf"(\[[0-9A-Fa-f:.]+\]|([A-Za-z0-9._~!$&'()*+,;=-]|{_PCT})*)"
_AUTHORITY = f"(([A-Za-z0-9._~!$&'()*+,;=:-]|{_PCT})*@)?{_HOST}(:[0-9]*)?"
_ENDING = rf"(\?({_PCHAR}|[/?])*)?(#({_PCHAR}|[/?])*)?"
_URI = f"[A-Za-z][A-Za-z0-9+.-]*:(//{_AUTHORITY}(/{_PCHAR}*)*|/({_PCHAR}+(/{_PCHAR}*)*)?|{_PCHAR}+(/{_PCHAR}*)*)?{_ENDING}"
_REFERENCE = f"({_URI}|(//{_AUTHORITY}(/{_PCHAR}*)*|/({_PCHAR}+(/{_PCHAR}*)*)?|([A-Za-z0-9._~!$&'()*+,;=@-]|{_PCT})+(/{_PCHAR}*)*)?{_ENDING})"
_POINTER = "(/([^~/]|~[01])*)*"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}[Tt]{_TIME}",
    "duration": r"P(\d+W|\d+Y(\d+M(\d+D)?)?(T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S))?|\d+M(\d+D)?(T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S))?|\d+D(T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S))?|T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S))",
    "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "email": rf"[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{{|}}~-]+)*@{_LABEL}(\.{_LABEL})*",
    "hostname": rf"{_LABEL}(\.{_LABEL})*",
    "uri": _URI,
    "uri-reference": _REFERENCE,
    "json-pointer": _POINTER,
    "relative-json-pointer": f"(0|[1-9][0-9]*)(#|{_POINTER})",
}


@lru_cache(maxsize=64)
def format_term(name: str) -> Term:
    return Regex(FORMATS[name]).term(EMPTY)


# ---- words


_NOTES = {
    "title", "description", "default", "examples", "$schema", "$id", "id", "$comment", "deprecated", "readOnly", "writeOnly", "$anchor",
    "$dynamicAnchor", "$recursiveAnchor", "$vocabulary", "contentEncoding", "contentMediaType", "contentSchema", "$defs", "definitions",
}  # fmt: skip
_COUNT, _BOUND, _LIST, _NODE, _MAP = (int,), (int, float), (list,), (dict, bool), (dict,)
_KINDS: dict[Any, str] = {
    _COUNT: "minLength maxLength minItems maxItems minProperties maxProperties minContains maxContains",
    _BOUND: "minimum maximum multipleOf",
    (int, float, bool): "exclusiveMinimum exclusiveMaximum",
    _LIST: "enum anyOf oneOf allOf prefixItems",
    _NODE: "additionalProperties additionalItems contains propertyNames not if then else unevaluatedProperties unevaluatedItems",
    (str,): "pattern format $ref $dynamicRef $recursiveRef",
    _MAP: "properties patternProperties dependentSchemas dependencies dependentRequired $defs definitions",
    (dict, bool, list): "items",
    (list, bool): "required",  # true inside a property is draft 3's: an annotation, told with a hint
    (bool,): "uniqueItems",
    (str, list): "type",
    (object,): "const",
}
_SHAPES: dict[str, Any] = {word: kind for kind, said in _KINDS.items() for word in said.split()}
_ONE = (*_KINDS[_NODE].split(), "items")
_MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = tuple(word for word in _KINDS[_MAP].split() if word != "dependentRequired")
OF_TYPE = {
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties", "patternProperties", "propertyNames", "dependentRequired", "dependencies", "dependentSchemas", "unevaluatedProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains", "maxContains", "unevaluatedItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}  # fmt: skip
CONSTRAINING = {*_SHAPES} - _NOTES
_SAYING = CONSTRAINING | {"$id", "id"}
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def key_of(value: Any) -> Any:
    """Equal for values that JSON Schema calls equal: 1 and 1.0 are, 1 and true are not."""
    if isinstance(value, dict):
        return "object", frozenset((name, key_of(member)) for name, member in value.items())
    if isinstance(value, list):
        return "array", tuple(key_of(member) for member in value)
    return isinstance(value, (bool, str)) and type(value), value


def is_a(value: Any, kind: str, draft: int = 0) -> bool:
    """Whether a value is of a type; in draft 4 alone, 1.0 is no integer."""
    if kind in TYPES:
        return isinstance(value, TYPES[kind])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return kind == "number" or isinstance(value, int) or (draft != 4 and value.is_integer())


def exact(number: float) -> Fraction:
    """The number as it was written: 0.1 is a tenth."""
    if isinstance(number, int):
        return Fraction(number)
    if not math.isfinite(number):
        raise Unsupported("a number that JSON cannot carry is not supported")
    return Fraction(repr(number))


def nests(value: Any, limit: int) -> bool:
    """Whether a value nests deeper than the limit (without recursion)."""
    layer = [value]
    while layer and limit >= 0:
        layer = [m for v in layer if isinstance(v, (dict, list)) for m in (v.values() if isinstance(v, dict) else v)]
        limit -= 1
    return bool(layer)


def step_to(path: str, name: Any) -> str:
    return f"{path}[{name}]" if isinstance(name, int) else f"{path}.{name[:60]}"


def refuse(what: str, path: str, reason: str = "is not supported") -> NoReturn:
    raise Unsupported(f"'{what[:80]}' at {path[:300]} {reason}")


def _checked(given: Any, path: str) -> dict[str, Any]:
    """A schema object whose known keywords have values of the right shape; `true` is {}."""
    if given is True:
        return {}
    if not isinstance(given, dict):
        refuse(json.dumps(given)[:40], path)
    node: dict[str, Any] = given
    for word, value in node.items():
        allowed = _SHAPES.get(word)
        if not allowed or word == "const":
            continue
        if allowed is _COUNT and isinstance(value, float) and value.is_integer():
            continue
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            refuse(word, path, "has a value of the wrong type")
        if (allowed is _COUNT and value < 0) or (isinstance(value, float) and not math.isfinite(value)):
            refuse(word, path, "has a value out of range")
        if word in ("anyOf", "oneOf", "allOf", "enum") and not value:
            refuse(word, path, "is empty, so nothing satisfies it")
        if len(value) > MAX_MEMBERS if allowed in (_LIST, _MAP) and word != "enum" else False:
            refuse(word, path, f"of more than {MAX_MEMBERS} members is not supported")
    if not all(isinstance(name, str) for name in required_of(node)):
        refuse("required", path, "has a value of the wrong type")
    if node.get("multipleOf", 1) <= 0:
        refuse("multipleOf", path, "has a value out of range")
    kinds = node.get("type", [])
    if kinds == [] and "type" in node:
        refuse("type", path, "is empty, so nothing satisfies it")
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in (*TYPES, "number", "integer"):
            refuse("type", path, f"has an unknown value, {json.dumps(kind)[:60]}")
    return node


def kinds_of(node: dict[str, Any]) -> list[str] | None:
    kinds = node.get("type")
    return [kinds] if isinstance(kinds, str) else kinds


def required_of(node: dict[str, Any]) -> list[str]:
    found = node.get("required", ())
    return found if isinstance(found, list) else []


def _inside(node: Any) -> Iterator[tuple[str, Any]]:
    """(step, subschema) for every place of a schema where another may stand."""
    if not isinstance(node, dict):
        return
    for word in _ONE:
        if isinstance(node.get(word), (dict, bool)):
            yield word, node[word]
    for word in _MANY:
        if isinstance(node.get(word), list):
            yield from ((f"{word}[{i}]", member) for i, member in enumerate(node[word]))
    for word in _NAMED:
        if isinstance(node.get(word), dict):
            yield from ((f"{word}.{name[:60]}", sub) for name, sub in node[word].items() if isinstance(sub, (dict, bool)))


# ---- the document: drafts, identifiers, references


_DRAFTS = {"draft-04": 4, "draft-06": 6, "draft-07": 7, "2019-09": 2019, "2020-12": 2020}


class Document:
    """One schema with what its references can name. `base` below is the identifier of the resource that a schema is part of."""

    def __init__(self, root: Any, draft: int = 0) -> None:
        said = root.get("$schema") if isinstance(root, dict) else None
        self.root = root
        self.draft = next((year for name, year in _DRAFTS.items() if isinstance(said, str) and name in said), draft)
        self.old = self.draft in (4, 6, 7)
        self.resources: dict[str, Any] = {"": root}
        self.anchors: dict[tuple[str, str], Any] = {}
        self.dynamic: dict[str, dict[str, Any]] = {}  # name of a $dynamicAnchor -> base -> schema
        self.base = self.within(root, "")
        self.resources.setdefault(self.base, root)
        self.indexed = False
        self.nodes: dict[int, dict[str, Any]] = {}  # by identity, once their keywords have been looked at
        self.numbers: dict[int, int] = {}  # by identity: what `number` gave
        self.said: dict[Any, int] = {}

    def node(self, given: Any, path: str) -> dict[str, Any]:
        found = self.nodes.get(id(given)) if given is not True else {}
        if found is None:
            found = self.nodes[id(given)] = _checked(given, path)
        return found

    def number(self, node: dict[str, Any]) -> int:
        """From 2 on, the same for schemas that say the same: real ones say `{"type": "string"}` hundreds of times, each with a description."""
        if id(node) not in self.numbers:
            said = tuple((word, self._says(word, value)) for word, value in node.items() if word in _SAYING)
            self.numbers[id(node)] = self.said.setdefault(said, len(self.said) + 2)
        return self.numbers[id(node)]

    def _says(self, word: str, value: Any) -> Any:
        if isinstance(value, dict) and word in _NAMED:
            return tuple((name, self._says("items", sub)) for name, sub in value.items())
        if isinstance(value, list) and word in _MANY:
            return tuple(self._says("not", sub) for sub in value)
        return self.number(value) if isinstance(value, dict) and word in _ONE else json.dumps(value)

    def within(self, node: Any, base: str) -> str:
        """The base inside a schema: its own identifier's, if it has one."""
        if not isinstance(node, dict):
            return base
        word = "id" if self.draft == 4 or (not self.draft and "$id" not in node) else "$id"
        given = node.get(word)
        if not isinstance(given, str) or given.startswith("#") or (self.old and "$ref" in node):
            return base
        try:
            return urldefrag(urljoin(base, given))[0]
        except ValueError:
            return base

    def index(self) -> None:
        self.indexed = True
        todo: list[tuple[Any, str]] = [(self.root, "")]
        while todo:
            node, base = todo.pop()
            if not isinstance(node, dict):
                continue
            base = self.within(node, base)
            self.resources.setdefault(base, node)
            for word in ("$anchor", "$dynamicAnchor", "$id", "id"):
                name = node.get(word)
                if isinstance(name, str) and (word[-2:] != "id" or name.startswith("#")):
                    self.anchors.setdefault((base, name.removeprefix("#") if word[-2:] == "id" else name), node)
                    if word == "$dynamicAnchor":
                        self.dynamic.setdefault(name, {})[base] = node
            todo += [(sub, base) for _, sub in _inside(node)]

    def find(self, ref: str, base: str, path: str, word: str = "$ref") -> tuple[Any, str]:
        """The schema that a reference names, and its base."""
        if not self.indexed and not (ref == "#" or ref.startswith("#/")):
            self.index()
        try:
            url, fragment = urldefrag(urljoin(base, ref) if not ref.startswith("#") else base + ref)
        except ValueError:
            url, fragment = ref, ""
        if url not in self.resources and not self.indexed:
            self.index()
        if url not in self.resources:
            refuse(word, path, f"to {json.dumps(ref)[:80]} is not supported: only what is in the schema itself can be named")
        node = self.resources[url]
        if not fragment.startswith("/") and fragment:
            node = self.anchors.get((url, unquote(fragment)))
        base = url
        for part in unquote(fragment).split("/")[1:] if fragment.startswith("/") else ():
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, list) and name.isascii() and name.isdigit() and int(name) < len(node):
                node = node[int(name)]
            else:
                node = node.get(name) if isinstance(node, dict) else None
            base = self.within(node, base)
        if not isinstance(node, (dict, bool)):
            refuse(word, path, f"names {json.dumps(ref)[:80]}, which is not in the schema")
        return node, base

    def target(self, node: dict[str, Any], base: str, path: str) -> tuple[Any, str] | None:
        """What $ref, or a $dynamicRef or $recursiveRef that can only mean one thing, names."""
        if "$ref" in node:
            return self.find(node["$ref"], base, path)
        if "$dynamicRef" in node:
            found = self.find(node["$dynamicRef"], base, path, "$dynamicRef")
            name = node["$dynamicRef"].rpartition("#")[2]
            if self.dynamic_name(found[0], name) and len(self.dynamic.get(name, ())) > 1:
                refuse("$dynamicRef", path, "that may name several schemas is not supported")
            return found
        if "$recursiveRef" in node:
            self.index()
            found = self.find("#", base, path, "$recursiveRef")
            if found[0].get("$recursiveAnchor") is True and len(set(map(id, self.resources.values()))) > 1:
                refuse("$recursiveRef", path, "that may name several schemas is not supported")
            return found
        return None

    def dynamic_name(self, node: Any, name: str) -> bool:
        if not self.indexed:
            self.index()
        return isinstance(node, dict) and node.get("$dynamicAnchor") == name

    def siblings(self, node: dict[str, Any]) -> dict[str, Any]:
        """The schema as its draft reads it: beside $ref, drafts 4 to 7 see nothing."""
        return {"$ref": node["$ref"]} if self.old and "$ref" in node else node


def bounds_of(node: dict[str, Any]) -> tuple[Bound | None, Bound | None]:
    """Lowest and highest number; draft 4's exclusiveMinimum is a boolean beside minimum."""
    lows = [(exact(node["minimum"]), node.get("exclusiveMinimum") is True)] if "minimum" in node else []
    highs = [(exact(node["maximum"]), node.get("exclusiveMaximum") is True)] if "maximum" in node else []
    if not isinstance(node.get("exclusiveMinimum", True), bool):
        lows.append((exact(node["exclusiveMinimum"]), True))
    if not isinstance(node.get("exclusiveMaximum", True), bool):
        highs.append((exact(node["exclusiveMaximum"]), True))
    return max(lows, default=None), min(highs, key=lambda bound: (bound[0], not bound[1]), default=None)


def tuple_of(node: dict[str, Any]) -> tuple[list[Any], Any]:
    """The schemas of the first items, and that of the rest (True: any)."""
    if isinstance(node.get("items"), list):  # until 2019-09
        return node["items"], node.get("additionalItems", True)
    return node.get("prefixItems", []), node.get("items", True)


def dependencies_of(node: dict[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """(property, what it asks for: a list of names, or a schema)."""
    for word in ("dependentRequired", "dependentSchemas", "dependencies"):
        for name, asked in node.get(word, {}).items():
            names = isinstance(asked, list) and all(isinstance(one, str) for one in asked)
            if not (names and word != "dependentSchemas") and not (
                isinstance(asked, (dict, bool)) and word != "dependentRequired"
            ):
                refuse(word, path, "has a value of the wrong type")
            yield name, asked


# ---- checking values


_TESTS: dict[str, tuple[str, Callable[[Any, Any], bool], str]] = {
    "minLength": ("string", lambda limit, v: len(v) >= limit, "is shorter than {} characters"),
    "maxLength": ("string", lambda limit, v: len(v) <= limit, "is longer than {} characters"),
    "pattern": ("string", lambda pattern, v: matches(pattern_term(pattern), v), "does not match the pattern {}"),
    "format": ("string", lambda name, v: name not in FORMATS or matches(format_term(name), v), "is not of the format {}"),
    "multipleOf": ("number", lambda step, v: (exact(v) / exact(step)).denominator == 1, "is not a multiple of {}"),
    "minItems": ("array", lambda limit, v: len(v) >= limit, "has fewer than {} items"),
    "maxItems": ("array", lambda limit, v: len(v) <= limit, "has more than {} items"),
    "uniqueItems": ("array", lambda on, v: not on or len({key_of(item) for item in v}) == len(v), "has equal items"),
    "minProperties": ("object", lambda limit, v: len(v) >= limit, "has fewer than {} properties"),
    "maxProperties": ("object", lambda limit, v: len(v) <= limit, "has more than {} properties"),
    "required": ("object", lambda names, v: names in (True, False) or all(name in v for name in names), "lacks one of the properties {}"),
    "enum": ("", lambda members, v: any(key_of(v) == key_of(member) for member in members), "is none of {}"),
    "const": ("", lambda member, v: bool(key_of(v) == key_of(member)), "is not {}"),
}  # fmt: skip


class Check:
    """Whether values satisfy schemas of a document. `scope` are the bases that led here, outermost first."""

    def __init__(self, document: Document, steps: int = 200_000) -> None:
        self.document, self.steps = document, steps

    def holds(self, node: Any, base: str, value: Any) -> bool:
        return self.fault(node, base, value, "$", (), 0) is None

    def fault(self, given: Any, base: str, value: Any, path: str, scope: tuple[str, ...], hops: int) -> str | None:
        """The first fault of a value; `hops` counts the schemas that were entered on the spot."""
        if given is False:
            return f"The value at {path[:300]} is not allowed."
        self.steps -= 1
        if self.steps < 0:
            raise Unsupported("a schema that takes this long to check is not supported")
        if hops > 60:
            raise Unsupported("a '$ref' that leads to itself is not supported")
        base = self.document.within(given, base)
        scope = scope if scope[-1:] == (base,) else (*scope, base)
        node = self.document.siblings(self.document.node(given, "$"))
        kinds = kinds_of(node)
        if kinds is not None and not any(is_a(value, kind, self.document.draft) for kind in kinds):
            return f"The value at {path[:300]} is not of type {json.dumps(node['type'])[:100]}."
        for word in node.keys() & _TESTS.keys():
            kind, test, said = _TESTS[word]
            if (not kind or is_a(value, kind)) and not test(node[word], value):
                return f"The value at {path[:300]} {said.format(json.dumps(node[word], ensure_ascii=False)[:100])}."
        if is_a(value, "number") and (fault := self._bounds(node, value, path)):
            return fault
        for fault in self._in_place(node, base, value, path, scope, hops + 1):
            if fault:
                return fault
        for step, sub, part in self._parts(node, value):
            if fault := self.fault(sub, base, part, step_to(path, step), scope, 0):
                return fault
        return self._counted(node, base, value, path, scope) or self._unevaluated(node, base, value, path, scope, hops)

    @staticmethod
    def _bounds(node: dict[str, Any], value: float, path: str) -> str | None:
        low, high = bounds_of(node)
        if low and (exact(value) < low[0] or (low[1] and exact(value) == low[0])):
            return f"The value at {path[:300]} is not {'more' if low[1] else 'at least'} {'than ' * low[1]}{float(low[0]):g}."
        if high and (exact(value) > high[0] or (high[1] and exact(value) == high[0])):
            return f"The value at {path[:300]} is not {'less' if high[1] else 'at most'} {'than ' * high[1]}{float(high[0]):g}."
        return None

    def _refs(self, node: dict[str, Any], base: str, scope: tuple[str, ...]) -> Iterator[tuple[Any, str]]:
        if "$ref" in node:
            yield self.document.find(node["$ref"], base, "$")
        if "$dynamicRef" in node:
            found = self.document.find(node["$dynamicRef"], base, "$", "$dynamicRef")
            name = node["$dynamicRef"].rpartition("#")[2]
            if self.document.dynamic_name(found[0], name):
                homes = self.document.dynamic[name]
                found = next(((homes[home], home) for home in scope if home in homes), found)
            yield found
        if "$recursiveRef" in node:
            if not self.document.indexed:
                self.document.index()
            roots = self.document.resources
            found = roots[base], base
            if isinstance(found[0], dict) and found[0].get("$recursiveAnchor") is True:
                anchored = [
                    home for home in scope if isinstance(roots[home], dict) and roots[home].get("$recursiveAnchor") is True
                ]
                found = roots[anchored[0]], anchored[0]
            yield found

    def _in_place(
        self, node: dict[str, Any], base: str, value: Any, path: str, scope: tuple[str, ...], hops: int
    ) -> Iterator[str | None]:
        """The faults of the keywords that apply other schemas to the same value."""

        def good(sub: Any) -> bool:
            return self.fault(sub, base, value, path, scope, hops) is None

        for found, home in self._refs(node, base, scope):
            yield self.fault(found, home, value, path, scope, hops)
        for member in node.get("allOf", ()):
            yield self.fault(member, base, value, path, scope, hops)
        if "anyOf" in node and not any(map(good, node["anyOf"])):
            yield f"The value at {path[:300]} satisfies none of the schemas in 'anyOf'."
        if "oneOf" in node and (count := sum(map(good, node["oneOf"]))) != 1:
            yield f"The value at {path[:300]} satisfies {count} of the schemas in 'oneOf'."
        if "not" in node and good(node["not"]):
            yield f"The value at {path[:300]} satisfies the schema in 'not'."
        if "if" in node and self.document.draft not in (4, 6):
            yield self.fault(node.get("then" if good(node["if"]) else "else", True), base, value, path, scope, hops)
        for name, asked in dependencies_of(node, "$") if isinstance(value, dict) else ():
            if name in value and isinstance(asked, list) and not all(one in value for one in asked):
                yield f"The value at {path[:300]} lacks a property that {json.dumps(name)[:80]} asks for."
            elif name in value and not isinstance(asked, list):
                yield self.fault(asked, base, value, path, scope, hops)

    @staticmethod
    def _parts(node: dict[str, Any], value: Any) -> Iterator[tuple[Any, Any, Any]]:
        """(step, schema, value) for every part of an object or a list."""
        if isinstance(value, dict):
            known, patterns = node.get("properties", {}), node.get("patternProperties", {})
            for name, part in value.items():
                subs = [known[name]] if name in known else []
                subs += [sub for pattern, sub in patterns.items() if matches(pattern_term(pattern), name)]
                yield from ((name, sub, part) for sub in subs or [node.get("additionalProperties", True)])
                if "propertyNames" in node:
                    yield name, node["propertyNames"], name
        elif isinstance(value, list):
            first, rest = tuple_of(node)
            for i, part in enumerate(value):
                yield i, first[i] if i < len(first) else rest, part

    def _counted(self, node: dict[str, Any], base: str, value: Any, path: str, scope: tuple[str, ...]) -> str | None:
        if "contains" not in node or not isinstance(value, list):
            return None
        count = sum(self.fault(node["contains"], base, item, path, scope, 0) is None for item in value)
        if node.get("minContains", 1) <= count <= node.get("maxContains", count):
            return None
        return f"The value at {path[:300]} has {count} items that satisfy 'contains'."

    def _unevaluated(
        self, node: dict[str, Any], base: str, value: Any, path: str, scope: tuple[str, ...], hops: int
    ) -> str | None:
        word = "unevaluatedProperties" if isinstance(value, dict) else "unevaluatedItems"
        if word not in node or not isinstance(value, (dict, list)):
            return None
        seen = self.evaluated(node, base, value, scope, hops, word)
        rest = value.items() if isinstance(value, dict) else enumerate(value)
        faults = (self.fault(node[word], base, part, step_to(path, step), scope, 0) for step, part in rest if step not in seen)
        return next((fault for fault in faults if fault), None)

    def evaluated(
        self, node: dict[str, Any], base: str, value: Any, scope: tuple[str, ...], hops: int, skip: str = ""
    ) -> set[Any]:
        """The names or places of a value that a schema, which it satisfies, has looked at."""
        seen: set[Any] = set()
        if isinstance(value, dict):
            known, patterns = node.get("properties", {}), [pattern_term(p) for p in node.get("patternProperties", {})]
            every = "additionalProperties" in node or ("unevaluatedProperties" in node and skip != "unevaluatedProperties")
            seen = {name for name in value if every or name in known or any(matches(p, name) for p in patterns)}
        elif isinstance(value, list):
            first, _ = tuple_of(node)
            whole = isinstance(node.get("items"), (dict, bool)) or (
                "additionalItems" in node and isinstance(node.get("items"), list)
            )
            every = whole or ("unevaluatedItems" in node and skip != "unevaluatedItems")
            seen = set(range(len(value) if every else min(len(first), len(value))))
            if "contains" in node and self.document.draft != 2019:
                seen |= {i for i, item in enumerate(value) if self.fault(node["contains"], base, item, "$", scope, 0) is None}
        subs = [(found, home) for found, home in self._refs(node, base, scope)]
        subs += [
            (sub, base)
            for word in ("allOf", "anyOf", "oneOf", "if")
            for sub in ([node[word]] if word == "if" and word in node else node.get(word, ()))
        ]
        if "if" in node:
            then = "then" if self.fault(node["if"], base, value, "$", scope, hops) is None else "else"
            subs += [(node[then], base)] if then in node else []
        subs += [
            (asked, base)
            for name, asked in dependencies_of(node, "$")
            if isinstance(value, dict) and name in value and not isinstance(asked, list)
        ]
        for sub, home in subs:
            if isinstance(sub, dict) and self.fault(sub, home, value, "$", scope, hops + 1) is None:
                inner = self.document.within(sub, home)
                deeper = scope if scope[-1:] == (inner,) else (*scope, inner)
                seen |= self.evaluated(self.document.siblings(sub), inner, value, deeper, hops + 1)
        return seen


# ---- what is called from outside


def unknown_words(schema: Any) -> dict[str, str]:
    """The places of what a schema says that constrains nothing, because nobody knows it; with the word that was perhaps meant, or ""."""
    found: dict[str, str] = {}
    todo: list[tuple[str, Any]] = [("", schema)]
    known = {word.lower(): word for word in CONSTRAINING | _NOTES}
    while todo and len(found) < 1_000:
        path, node = todo.pop()
        for word in node if isinstance(node, dict) else ():
            place = f"{path}.{word[:60]}" if path else word[:60]
            if word not in CONSTRAINING | _NOTES:
                close = difflib.get_close_matches(word.lower(), known, 1, 0.85)
                found[place] = known[close[0]] if close else ""
            elif word == "format" and node[word] not in FORMATS:
                found[place] = ""
            elif word == "required" and isinstance(node[word], bool):
                found[place] = "a list"
        todo += [(f"{path}.{step}" if path else step, sub) for step, sub in _inside(node)]
    return found


def violation(schema: Any, value: Any, draft: int = 0) -> str | None:
    """Where and how a value fails the schema, in a sentence; None when it satisfies it."""
    document = Document(schema, draft)
    try:
        return Check(document).fault(schema, "", value, "$", (), 0)
    except RecursionError:
        return "The value nests too deep to be checked."
