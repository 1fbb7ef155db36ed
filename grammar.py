"""One grammar text for every engine: how terms are written as rules, read back, and put into each engine's dialect.

The text is a core that both dialects are made of. A line is a rule, ``name ::= body``; a body is of literals, positive character
classes, names, groups, alternatives and repetitions of one atom; a rule may instead be ``a & b & ~c``, the texts that are in the
first rules and not in those marked ``~`` (all of them regular); or ``%{low,high} a b? c*``, members in any order with commas between
them, low to high of them: a once, b at most once, c any number of times (towards `low` it is one, as it may be repeated). `root` is the whole. Texts are put together by `prefixed`.
A name with t is a token: it leads to tokens only, and where it may begin, it is read as far as it goes. Others begin with r.

Only what the dialects take alike is written: rule names of letters and digits, ``""`` for an empty alternative, the escapes
``\\\\"``, ``\\\\\\\\``, ``\\\\uXXXX`` and ``\\\\UXXXXXXXX`` (``\\\\x`` takes two digits in one and any number in the other), positive classes (xgrammar
cuts negative ones at U+007F). A grammar with a dead end ends llama.cpp's process, and is no constraint at all in xgrammar: what
cannot end is taken out before a grammar is handed out, and an empty grammar is refused.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable
from functools import lru_cache

from regular import (
    ALL,
    EMPTY,
    MAX_REPEAT,
    NONE,
    Automaton,
    Ranges,
    States,
    Term,
    Unsupported,
    alt,
    both,
    common_ranges,
    has,
    lit,
    ordered,
    other,
    rep,
    seq,
    without,
    words,
)

MAX_RULES, MAX_TEXT, MAX_DEPTH = 20_000, 2_000_000, 64
MAX_OWN = 5_000  # rules and repeated groups of a client's grammar: a chain of them may take time as their number squared
MAX_PICKED, MAX_COUNTED = 62, 4_000  # the bits that llguidance has for both, but two
MAX_FEW, MAX_WATCHED, MAX_WATCHING = (
    5,
    8,
    1_000,
)  # in EBNF: members kept apart whether needed or not, and needed ones, in any order


# ---- writing


_ESCAPED = re.compile(r'["\\\x00-\x1f\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]')


def _quoted(text: str) -> str:
    return '"' + _ESCAPED.sub(lambda m: "\\" + m[0] if m[0] in '"\\' else f"\\u{ord(m[0]):04X}", text) + '"'


def _class_char(code: int) -> str:
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


@lru_cache(maxsize=512)
def _class(ranges: Ranges) -> str:
    return "[" + "".join(_class_char(a) + ("-" + _class_char(b) if b > a else "") for a, b in ranges) + "]"


def _suffix(low: int, high: int | None) -> str:
    marks = {(0, 1): "?", (0, None): "*", (1, None): "+"}
    return marks.get((low, high)) or (f"{{{low}}}" if low == high else f"{{{low},{'' if high is None else high}}}")


class Grammar:
    """Named rules, written out from the root on: what the root does not reach is left out."""

    def __init__(self) -> None:
        self.rules: dict[str, Term] = {}
        self.names: dict[Term, Term] = {}  # the reference of each term that has a rule
        self.todo: deque[str] = deque()
        self.seen: set[str] = set()
        self.watching = 0  # rules for what has been written of members in any order

    def name(self, term: Term | None = None) -> str:
        """A fresh rule: a token where its term is whole and leads to no other, else to be filled in."""
        if len(self.rules) >= MAX_RULES:
            raise Unsupported(f"a grammar of more than {MAX_RULES} rules is not supported")
        fresh = f"{'r' if term is None or has(term, 'ref', 'pick') else 't'}{len(self.rules)}"
        term = term or EMPTY
        self.rules[fresh] = term
        return fresh

    def share(self, term: Term) -> Term:
        """The term itself when it is short, else a reference to a rule of it (the same rule for the same term)."""
        if term.op in ("lit", "ref") or term is NONE or (term.op == "set" and _inline(term)):
            return term
        return self.rule(term)

    def rule(self, term: Term) -> Term:
        if term.op == "ref":
            return term
        found = self.names.get(term)
        if found is None:
            found = self.names[term] = Term("ref", self.name(self.spelled(term)))
        return found

    def spelled(self, term: Term) -> Term:
        """Remainders have no notation: what they are part of is written as its states, one rule each."""
        return self.states(States(term)) if term.op == "and" and has(term, "mod") else term

    def states(self, made: States) -> Term:
        """A deterministic automaton as rules, one for each state that more than one way leads to."""
        ways = [0] * len(made.ends)
        for state, row in enumerate(made.moves):
            for after in row:
                ways[after] += after != state
        refs = {state: Term("ref", self.name()) for state, count in enumerate(ways) if count != 1 or not state}
        bodies: dict[int, Term] = {}
        todo = [(state, False) for state in refs]
        while todo:  # depth first, without recursion: a chain of states may be long
            state, ready = todo.pop()
            row = made.moves[state]
            if not ready:
                todo.append((state, True))
                todo += [(after, False) for after in row if after != state and after not in refs]
                continue
            tails = {after: refs.get(after) or bodies[after] for after in row if after != state}
            body = alt(
                [
                    *(seq(Term("set", ranges=row[after]), tail) for after, tail in tails.items()),
                    *([EMPTY] if made.ends[state] else []),
                ]
            )
            body = seq(rep(Term("set", ranges=row[state]), 0, None), body) if state in row else body
            bodies[state] = self.share(body) if len(row) > 8 else body
        for state, ref in refs.items():
            self.rules[ref.text] = bodies[state]
        return refs[0]

    # members with commas between them

    def pick(self, term: Term) -> Term:
        """Members in any order. Too many for that are kept apart only where they are needed, or follow each other as they stand."""
        once = sum(part.high is not None or part.op != "rep" for part in term.parts)
        if once > MAX_PICKED and not term.low and term.high is None:
            parts = tuple(rep(part.parts[0], 0, None) if part.op == "rep" else part for part in term.parts)
            term, once = Term("pick", parts=parts), sum(part.op != "rep" for part in parts)
        return self.in_turn(term) if once + (term.high or 0).bit_length() > MAX_PICKED else self.rule(term)

    def in_turn(self, pick: Term) -> Term:
        """The members in the order of the parts, those that may come any number of times last: a rule for each part and count."""
        once, free, low, high = self._members(pick)
        most = min(len(once), max(low, 1) if high is None else high)  # this many, or more than need to be counted
        if (low or high is not None) and len(once) * (most + 1) > MAX_COUNTED:
            raise Unsupported("a count of so many members is not supported")
        after: list[Term] = []
        for count in range(most + 1):
            left, room = max(low - count, 0), None if high is None else high - count
            if free is NONE or room == 0 or left > 1:
                after.append(NONE if left else EMPTY)
                continue
            more = rep(self.share(seq(lit(","), free)), 0, None if room is None else room - 1)
            some = more if count and not left and high is None else seq(lit("," if count else ""), free, more)
            after.append(some if left or some is more else self.share(alt([EMPTY, some])))
        for i, (part, needed) in reversed([*enumerate(once)]):
            here = []
            for count in range(min(most, i) + 1):
                then = after[min(count + 1, most)] if high is None or count < high else NONE
                member = seq(lit(","), part) if count else part
                if not needed and count == most and high is None:
                    here.append(self.share(seq(rep(member, 0, 1), then)))
                else:
                    here.append(self.share(alt([seq(member, then), *([] if needed else [after[count]])])))
            after = here
        return after[0]

    def _members(self, pick: Term) -> tuple[list[tuple[Term, bool]], Term, int, int | None]:
        """(part, whether it is needed) of those that are there once, all others as one term, and the bounds that matter."""
        once = [
            (part.parts[0], False) if part.op == "rep" else (part, True) for part in pick.parts if part.high or part.op != "rep"
        ]
        free = self.share(alt(part.parts[0] for part in pick.parts if part.op == "rep" and part.high is None))
        low = pick.low if pick.low > sum(needed for _, needed in once) else 0
        return once, free, low, None if free is NONE and pick.high is not None and pick.high >= len(once) else pick.high

    def any_order(self, pick: Term) -> Term:
        """A rule for each set of members that have been written, as far as that matters: the needed ones, or all of a few.

        The others may come anywhere and, where nothing is counted, twice: of equal names JSON's readers keep the last. Of very many
        needed ones, and where many are counted, the order is that of the parts.
        """
        once, free, low, high = self._members(pick)
        bounded, few = low > 0 or pick.high is not None, len(once) <= MAX_FEW
        if bounded and (free is not NONE or not few):
            return self.in_turn(pick)
        watched = [one for one in once if one[1] or few]
        others = self.share(alt([*(part for part, needed in once if not (needed or few)), free]))
        between = rep(self.share(seq(lit(","), others)), 0, None)
        known: dict[int, Term] = {}
        most = MAX_WATCHED if self.watching < MAX_WATCHING else 3
        self.watching += 2 ** len(watched) if len(watched) <= most else len(watched)
        needs = sum(1 << i for i, (_, needed) in enumerate(watched) if needed)

        def ways(written: int, comma: Term) -> Term:
            left = [i for i in range(len(watched)) if not written >> i & 1]
            count = len(watched) - len(left)
            room = left[:1] if len(watched) > most else left if high is None or count < high else []
            found = [seq(comma, watched[i][0], tail(written | 1 << i)) for i in room]
            return alt([*found, *([EMPTY] if written & needs == needs and count >= low else [])])

        def tail(written: int) -> Term:
            if written not in known:
                known[written] = self.share(seq(between, ways(written, lit(","))))
            return known[written]

        return self.share(alt([ways(0, EMPTY), *([] if others is NONE else [seq(others, tail(0))])]))

    def text(self, root: Term) -> str:
        """The grammar's text; rules that can never end are left out of it."""
        self._prune(root)
        if root.op == "ref":
            root = self.rules[root.text]
        if root is NONE:
            raise Unsupported("a grammar that can never end is not supported")
        lines, size = [], 0
        self.rules["root"] = root
        self.todo.append("root")
        self.seen.add("root")
        while self.todo:
            name = self.todo.popleft()
            lines.append(f"{name} ::= {self._body(self.rules[name])}\n")
            size += len(lines[-1])
            if size > MAX_TEXT or len(lines) > MAX_RULES:
                raise Unsupported(f"a grammar over {MAX_RULES} rules or {MAX_TEXT} characters is not supported")
        return "".join(lines)

    def _refer(self, term: Term) -> str:
        name = self.rule(term).text
        if name not in self.seen:
            self.seen.add(name)
            self.todo.append(name)
        return name

    def _body(self, term: Term) -> str:
        if term.op == "set":
            return _class(term.ranges)
        if term.op == "and":
            return " & ".join(
                "~" + self._refer(part.parts[0]) if part.op == "not" else self._refer(part) for part in term.parts
            )
        if term.op == "pick":
            bounds = f"%{{{term.low},{'' if term.high is None else term.high}}}"
            return " ".join([bounds, *(self._write(part) for part in term.parts)])
        return self._write(term)

    def _write(self, term: Term, inside: str = "") -> str:
        if term.op == "lit":
            return _quoted(term.text)
        if term.op == "set" and _inline(term):
            return _class(term.ranges)
        if term.op in ("set", "ref", "and", "pick"):
            return self._refer(term)
        if term.op == "rep":
            if max(term.low, term.high or 0) > MAX_REPEAT:
                raise Unsupported(f"a repetition over {MAX_REPEAT} is not supported")
            return self._write(self.share(term.parts[0])) + _suffix(term.low, term.high)
        text = (" " if term.op == "seq" else " | ").join(self._write(part, term.op) for part in term.parts)
        return f"({text})" if term.op == "alt" and inside else text

    def _prune(self, root: Term) -> None:
        """Take out what can never end, so that no rule is a dead end."""
        good = settle(self.rules, _ends)
        if len(good) == len(self.rules):
            return

        def kept(name: str) -> Term:
            return Term("ref", name) if name in good else NONE

        for name in self.rules:
            self.rules[name] = _mapped(self.rules[name], kept) if name in good else NONE
        if root.op != "ref" or root.text not in good:
            raise Unsupported("a grammar that can never end is not supported")


def _inline(term: Term) -> bool:
    """xgrammar lets wrong bytes through where two classes beyond ASCII stand side by side, but not where they are rules."""
    return term.ranges[-1][1] < 128


def settle(rules: dict[str, Term], test: Callable[[Term, set[str]], bool]) -> set[str]:
    """The rules that pass the test, given that those found before pass it."""
    done: set[str] = set()
    for name in reversed(rules):  # what a rule leads to mostly comes after it
        if test(rules[name], done):
            done.add(name)
    todo = deque(name for name in rules if name not in done)
    users: dict[str, list[str]] = {}
    for name in todo:
        for used in _used(rules[name]):
            users.setdefault(used, []).append(name)
    while todo:
        name = todo.popleft()
        if name not in done and test(rules[name], done):
            done.add(name)
            todo += [user for user in users.get(name, ()) if user not in done]
    return done


def _used(term: Term) -> set[str]:
    found, stack = set(), [term]
    while stack:
        one = stack.pop()
        stack += one.parts
        if one.op == "ref":
            found.add(one.text)
    return found


def _ends(term: Term, done: set[str]) -> bool:
    if not has(term, "ref", "pick"):  # tokens are known to hold a text before they are made
        return term is not NONE
    if term.op == "ref":
        return term.text in done
    if term.op == "rep":
        return term.low == 0 or _ends(term.parts[0], done)
    if term.op == "pick":
        found = [part for part in term.parts if _ends(part.parts[0] if part.op == "rep" else part, done)]
        return len(found) >= term.low and all(part in found for part in term.parts if part.op != "rep")
    if term.op in ("alt", "seq"):
        return (any if term.op == "alt" else all)(_ends(part, done) for part in term.parts)
    return True


def _mapped(term: Term, refs: Callable[[str], Term]) -> Term:
    """The term with other references."""
    if term.op == "ref":
        return refs(term.text)
    if not term.parts or term.op in ("and", "not"):
        return term
    parts = [_mapped(part, refs) for part in term.parts]
    if term.op == "pick":
        return Term("pick", parts=tuple(part for part in parts if part != EMPTY), low=term.low, high=term.high)
    return seq(*parts) if term.op == "seq" else alt(parts) if term.op == "alt" else rep(parts[0], term.low, term.high)


# ---- text as a JSON string holds it: one spelling for each text, so that what is apart stays apart


_SHORT = {8: "b", 9: "t", 10: "n", 12: "f", 13: "r", 34: '"', 92: "\\"}
_PLAIN: Ranges = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, 0x10FFFF))


def _json_set(ranges: Ranges) -> Term:
    plain = common_ranges(ranges, _PLAIN)
    marked = [code for a, b in common_ranges(ranges, ((1, 0x22), (0x5C, 0x5C))) for code in range(a, b + 1)]
    short = ordered((ord(_SHORT[code]),) * 2 for code in marked if code in _SHORT)
    parts = [Term("set", ranges=plain)] if plain else []
    parts += [seq(lit("\\"), Term("set", ranges=short))] if short else []
    for high in (0, 1):
        digits = ordered((ord(f"{code & 15:x}"),) * 2 for code in marked if code >> 4 == high and code not in _SHORT)
        parts += [seq(lit(f"\\u00{high}0"[:-1]), Term("set", ranges=digits))] if digits else []
    return alt(parts)


@lru_cache(maxsize=4096)
def in_json(term: Term) -> Term:
    """The term's texts as JSON writes them, without the quotes."""
    if term.op == "lit":
        return lit(json.dumps(term.text, ensure_ascii=False)[1:-1])
    if term.op == "set":
        return _json_set(term.ranges)
    if term.op == "seq":
        return seq(*map(in_json, term.parts))
    if term.op == "alt":
        return alt(map(in_json, term.parts))
    if term.op == "rep":
        return rep(in_json(term.parts[0]), term.low, term.high)
    return Term(term.op, parts=tuple(map(in_json, term.parts)))


def quoted(term: Term, after: str = "") -> Term:
    """As a JSON string. Of texts in all of several terms, each is one: what strings are is then the same for every name."""
    if term.op in ("and", "not"):
        return Term(term.op, parts=tuple(quoted(part, after) for part in term.parts))
    return seq(lit('"'), in_json(term), lit('"' + after))


# ---- grammars in the client's own words, and the core's own lines


_TOKEN = re.compile(
    r'''(?P<rule>[A-Za-z][A-Za-z0-9_-]*)(?=\s*::=)|(?P<is>::=)|(?P<ref>[A-Za-z][A-Za-z0-9_-]*)|"(?P<lit>(?:[^"\\\n]|\\.)*)"'''
    r"""|\[(?P<set>\^?(?:[^\]\\\n]|\\.)*)\]|(?P<dot>\.)|(?P<suffix>[?*+]|\{\s*\d{1,6}\s*(?:,\s*(?:\d{1,6})?\s*)?\})|(?P<mark>[()|])"""
    r"""|(?P<core>[&~%])"""
)
_SKIP = re.compile(r"(?:\s|#[^\n]*)*")
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.S)
_NAMED_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", **{c: c for c in '"\\[]^-/'}}


class Gbnf:
    """A reader of llama.cpp's GBNF (grammars/README.md of that project), so that a client's grammar is proved and written anew.

    An engine must not see it as it came: a dead end ends llama.cpp's process, and a mistake OpenVINO's pipeline. `core` reads this
    module's own text, with its & and ~.
    """

    def __init__(self, text: str, core: bool = False) -> None:
        self.tokens: list[tuple[str, str]] = []
        at = _SKIP.match(text).end()  # type: ignore[union-attr]
        while at < len(text):
            found = _TOKEN.match(text, at)
            if not found or (found["core"] and not core):
                raise Unsupported(f"the grammar cannot be read at {text[at : at + 30]!r}")
            kind = found.lastgroup or ""
            self.tokens.append((kind, found[kind]))
            at = _SKIP.match(text, found.end()).end()  # type: ignore[union-attr]
        self.tokens.reverse()  # the next one is the last: pop() is cheap
        self.grammar = Grammar()
        self.names: dict[str, str] = {}
        self.defined: set[str] = set()

    def read(self) -> Term:
        """All rules into `grammar`; the root's reference."""
        while self.tokens:
            kind, name = self.tokens.pop()
            if kind != "rule" or name in self.defined:
                raise Unsupported(
                    f"the grammar {'defines' if kind == 'rule' else 'has no rule around'} {name!r}{' twice' * (kind == 'rule')}"
                )
            self.tokens.pop()
            self.defined.add(name)
            self.grammar.rules[self.ref(name).text] = self.alternatives(0)
        missing = next((name for name in ("root", *self.names) if name not in self.defined), None)
        if missing:
            raise Unsupported(f"the grammar does not define the rule {missing!r}")
        return Term("ref", self.names["root"])

    def text(self) -> str:
        root = self.read()
        if len(self.grammar.rules) > MAX_OWN:
            raise Unsupported(f"a grammar of more than {MAX_OWN} rules, repeated groups counted, is not supported")
        self._prove()
        self.check_repetitions()
        rules = self.grammar.rules
        flat = settle(rules, _leads_to)
        self.grammar = Grammar()
        self.grammar.rules = {
            self.named(name, flat): _mapped(term, lambda name: Term("ref", self.named(name, flat)))
            for name, term in rules.items()
        }
        return self.grammar.text(Term("ref", self.named(root.text, flat)))

    @staticmethod
    def named(name: str, flat: set[str]) -> str:
        """What leads to no recursion is a token."""
        return "t" + name[1:] if name in flat else name

    def _prove(self) -> None:
        said = {name: text for text, name in self.names.items()}
        for test, fault in ((_ends, "can never end"), (_reads, "reads nothing before it repeats")):
            stuck = self.grammar.rules.keys() - settle(self.grammar.rules, test)
            if stuck:
                where = next((said[name] for name in sorted(stuck) if name in said), "root")
                raise Unsupported(f"the recursion of the rule {where!r} {fault}, which is not supported")

    def ref(self, name: str) -> Term:
        if name not in self.names:
            self.names[name] = self.grammar.name()
        return Term("ref", self.names[name])

    def next(self) -> str:
        return self.tokens[-1][0] if self.tokens else ""

    def alternatives(self, depth: int) -> Term:
        if depth > MAX_DEPTH:
            raise Unsupported(f"a grammar nested deeper than {MAX_DEPTH} is not supported")
        if self.tokens[-1:] == [("core", "%")]:
            self.tokens.pop()
            low, high = self.bounds(self.tokens.pop()[1])
            return Term("pick", parts=tuple(self.parts(depth)), low=low, high=high)
        branches = [self.sequence(depth)]
        while self.tokens and self.tokens[-1] in (("mark", "|"), ("core", "&")):
            joint = self.tokens.pop()[1]
            negated = bool(self.tokens) and self.tokens[-1] == ("core", "~") and bool(self.tokens.pop())
            term = self.sequence(depth)
            branches[-1:] = [both(branches[-1], other(term) if negated else term)] if joint == "&" else [branches[-1], term]
        return alt(branches)

    def sequence(self, depth: int) -> Term:
        return seq(*self.parts(depth))

    def parts(self, depth: int) -> list[Term]:
        parts = []
        while self.next() in ("ref", "lit", "set", "dot") or self.tokens[-1:] == [("mark", "(")]:
            term = self.atom(depth)
            while self.next() == "suffix":
                low, high = self.bounds(self.tokens.pop()[1])
                if max(low, high or 0) > MAX_REPEAT:
                    raise Unsupported(f"a repetition over {MAX_REPEAT} in the grammar is not supported")
                term = rep(self.grammar.share(term), low, high)
            parts.append(term)
        return parts

    def atom(self, depth: int) -> Term:
        kind, text = self.tokens.pop()
        if kind == "ref":
            return self.ref(text)
        if kind == "lit":
            return lit("".join(chr(code) for code in self.codes(text)))
        if kind == "dot":
            return Term("set", ranges=ALL)
        if kind == "set":
            return self.members(text)
        inner = self.alternatives(depth + 1)
        if self.tokens[-1:] != [("mark", ")")]:
            raise Unsupported("the grammar has a '(' without its ')'")
        self.tokens.pop()
        return inner

    @staticmethod
    def bounds(suffix: str) -> tuple[int, int | None]:
        if suffix in "?*+":
            return {"?": (0, 1), "*": (0, None), "+": (1, None)}[suffix]
        low, comma, high = suffix.strip("{}").replace(" ", "").partition(",")
        bounds = int(low), (int(high) if high else None) if comma else int(low)
        if bounds[1] is not None and bounds[1] < bounds[0]:
            raise Unsupported(f"the grammar's repetition {suffix} has no number in it")
        return bounds

    @staticmethod
    def codes(text: str) -> list[int]:
        def plain(found: re.Match[str]) -> str:
            digits = found[1] or found[2] or found[3]
            if digits:
                code = int(digits, 16)
                if code == 0 or code > 0x10FFFF or 0xD800 <= code < 0xE000:
                    raise Unsupported(f"the character {found[0]} of the grammar is not supported")
                return chr(code)
            if found[4] not in _NAMED_ESCAPES:
                raise Unsupported(f"the escape {found[0]} of the grammar is not supported")
            return _NAMED_ESCAPES[found[4]]

        return [ord(char) for char in _ESCAPE.sub(plain, text)]

    def members(self, text: str) -> Term:
        negated = text.startswith("^")
        pieces = _ESCAPE.split(text[negated:])  # text, then the four groups of an escape, and so on
        codes: list[tuple[int, bool]] = [(ord(char), char == "-") for char in pieces[0]]
        for i in range(1, len(pieces), 5):
            x, u, long, char = pieces[i : i + 4]
            escape = f"\\x{x}" if x else f"\\u{u}" if u else f"\\U{long}" if long else f"\\{char}"
            codes += [(self.codes(escape)[0], False), *((ord(char), char == "-") for char in pieces[i + 4])]
        ranges, at = [], 0
        while at < len(codes):
            if at + 2 < len(codes) and codes[at + 1][1]:
                ranges.append((codes[at][0], codes[at + 2][0]))
                at += 3
            else:
                ranges.append((codes[at][0], codes[at][0]))
                at += 1
        found = common_ranges(without(ranges) if negated else ordered(r for r in ranges if r[0] <= r[1]), ALL)
        if not found or any(a > b for a, b in ranges):
            raise Unsupported(f"the class [{text[:40]}] of the grammar holds no character")
        return Term("set", ranges=found)

    def check_repetitions(self) -> None:
        """Engines hang on some repetitions of what may be empty."""
        empty = settle(self.grammar.rules, _may_be_empty)
        stack = list(self.grammar.rules.values())
        while stack:
            term = stack.pop()
            if term.op == "rep" and (term.high is None or term.high > 1) and _may_be_empty(term.parts[0], empty):
                raise Unsupported("the grammar repeats something that may be empty, which is not supported")
            stack += term.parts


def _reads(term: Term, done: set[str]) -> bool:
    if term.op == "ref":
        return term.text in done
    return all(_reads(part, done) for part in (term.parts if term.op == "alt" else term.parts[:1]))


def _leads_to(term: Term, done: set[str]) -> bool:
    return term.text in done if term.op == "ref" else all(_leads_to(part, done) for part in term.parts)


def _may_be_empty(term: Term, empty: set[str]) -> bool:
    if term.op == "ref":
        return term.text in empty
    if term.op == "rep":
        return term.low == 0 or _may_be_empty(term.parts[0], empty)
    if term.op in ("seq", "alt"):
        return (any if term.op == "alt" else all)(_may_be_empty(part, empty) for part in term.parts)
    return term == EMPTY


def own_grammar(text: str) -> str:
    """A client's GBNF, proved and written anew. Raises Unsupported with what is wrong with it."""
    return Gbnf(text).text()


# ---- dialects


_CORE_TOKEN = re.compile(r'("(?:[^"\\]|\\.)*")|(\[(?:[^\]\\]|\\.)*\])|\{(\d+)\}|\b([A-Za-z]\w*)')
# what is another in Lark, and what must not be looked into
_LARK_TOKEN = re.compile(_CORE_TOKEN.pattern.replace("[A-Za-z]", "t"))


def prefixed(text: str, prefix: str) -> str:
    """The same grammar with other names, `root` is `r{prefix}root`: to put several into one text."""

    def fresh(name: str) -> str:
        return f"r{prefix}root" if name == "root" else name[0] + prefix + name[1:]

    return _CORE_TOKEN.sub(lambda m: fresh(m[4]) if m[4] else m[0], text)


def spaced(text: str) -> str:
    """The same with any whitespace between two tokens, which llguidance alone can follow."""
    return f'{text}{_SPACED} ::= ""\n'


_SPACED = "spaced"


def lark_grammar(text: str) -> str:
    """The core in llguidance's dialect of Lark (its own converter from GBNF breaks escapes).

    Its lexer takes the longest token and never goes back: what may begin alike must be a token as a whole, or of single characters.
    """
    converted = _LARK_TOKEN.sub(
        lambda m: m[1] or (f"/{m[2]}/" if m[2] else m[4].upper() if m[4] else f"{{{m[3]},{m[3]}}}"), text
    )
    rules = dict(line.split(" ::= ", 1) for line in converted.splitlines())
    ignored = ["%ignore /[ \\n\\r\\t]+/"] if rules.pop(_SPACED, None) else []
    if not any(m[4] and m[4][0] == "r" for m in _CORE_TOKEN.finditer(rules["root"])):
        rules = {"ROOT" if name == "root" else name: body for name, body in rules.items()}
    lines = [_picked(name, body) if body[0] == "%" else f"{name}: {body}" for name, body in rules.items()]
    return "\n".join([f"start: {'ROOT' if 'ROOT' in rules else 'root'}", *lines, *ignored])


_MEMBER = re.compile(r'("(?:[^"\\]|\\.)*"|/.*?/|\w+)([?*]?)')


def _picked(name: str, body: str) -> str:
    """Members in any order, as rules with a parameter (llguidance's docs/parametric.md): a bit for each that is there once, the needed
    ones first, one for all others, and a count where there is a limit."""
    bounds, _, members = body.partition(" ")
    low, high = Gbnf.bounds(bounds[1:])
    found = sorted(_MEMBER.findall(members), key=lambda one: ("", "?", "*").index(one[1]))
    needed, once = (sum(mark in marks for _, mark in found) for marks in (("",), ("", "?")))
    limit = [] if high is None else [f"lt([{once + 1}:{once + 2 + high.bit_length()}], {high})"]
    ends = [f"is_ones([0:{needed}])"] * (needed > 0) + [f"bit_count_ge([0:{once + 1}], {low})"] * (low > needed)
    ways = []
    for i, (part, mark) in enumerate(found):
        marked = f"set_bit({min(i, once)})" if mark != "*" or low > needed else "_"
        ways.append(f"{part} {name}_b::{marked}{_if([f'bit_clear({i})'] * (mark != '*') + limit)}")
    counted = f"incr([{once + 1}:{once + 2 + high.bit_length()}])" if high is not None else "_"
    lines = [  # a rule of nothing but another with a changed parameter would lose the change
        f"{name}: {name}_{'c' if ends else 'a'}::0x0",
        f'{name}_b::_: "," {name}_c::{counted} | ""{_if(ends)}',
        f"{name}_c::_: {' | '.join(ways)}",
    ]
    return "\n".join(lines if ends else [*lines, f'{name}_a::_: {name}_c::_ | ""'])


def _if(tests: list[str]) -> str:
    return f" %if {tests[0] if len(tests) == 1 else f'and({tests[0]}, {tests[1]})'}" if tests else ""


def ebnf_grammar(text: str) -> str:
    """The core in the EBNF of xgrammar and llama.cpp, which know neither & nor ~: those rules become their automaton's states.

    Both walk all ways to read a text at once, for every token of the vocabulary: at thousands of places one token takes seconds, and
    everyone waits. What is so ambiguous is made deterministic too, or refused where it recurs or would be too large.
    """
    try:
        return _ebnf(text)
    except RecursionError:
        raise Unsupported("a grammar nested this deep is not supported") from None


def _ebnf(text: str) -> str:
    reader = Gbnf(text, core=True)
    if text.endswith(spaced("")):
        raise Unsupported("'whitespace': 'any' is not supported: only llguidance can follow it, leave it out")
    root = reader.read()
    rules = reader.grammar.rules
    for name, term in list(rules.items()):
        if term.op == "pick":
            rules[name] = reader.grammar.any_order(term)
    named = {fresh: name for name, fresh in reader.names.items()}
    flat = settle(rules, _leads_to)
    for name, term in list(rules.items()):
        plain = named.get(name, "r")[0] == "t" or (name == root.text and name in flat)
        if term.op == "and":
            rules[name] = reader.grammar.states(_few_states(term, rules))
        elif plain and _repeats_twice(term, rules) and Automaton(rules=rules).widest(term) > MAX_PLACES:
            rules[name] = reader.grammar.states(States(term, rules))
    for name, term in list(rules.items()):
        rules[name] = _in_sixteens(term)
    if root.text not in flat and Automaton(rules=rules).widest(root) > MAX_PLACES:
        raise Unsupported("text that may be read in so many ways at once is not supported")
    return reader.grammar.text(root)


MAX_PLACES, MAX_MASKS, CHUNK = 150, 24, 16


def _in_sixteens(term: Term) -> Term:
    """Repetitions counted in sixteens, and sixteens of these, where there are many: xgrammar takes seconds a token for [..]{0,500}."""
    if not has(term, "rep"):
        return term
    parts = tuple(map(_in_sixteens, term.parts))
    if term.op != "rep":
        return Term(term.op, term.text, parts, term.ranges, term.low, term.high)
    return _counted(parts[0], term.low, term.high)


def _counted(part: Term, low: int, high: int | None) -> Term:
    if low > 2 * CHUNK:
        rest = low % CHUNK
        many = _counted(rep(part, CHUNK, CHUNK), low // CHUNK, low // CHUNK)
        return seq(many, rep(part, rest, rest), _counted(part, 0, None if high is None else high - low))
    if high is not None and high - low > 2 * CHUNK:
        turns = (high - low - CHUNK + 1) // CHUNK  # the rest is at least fifteen, so that no count is left out
        return seq(_counted(rep(part, CHUNK, CHUNK), 0, turns), _counted(part, low, high - turns * CHUNK))
    return rep(part, low, high)


def _few_states(term: Term, rules: dict[str, Term]) -> States:
    """The states of an &. xgrammar works out the vocabulary for each, so of many words to be kept apart, what begins alike goes too."""
    made = States(term, rules)
    for length in (4, 3, 2):  # with the quotation mark
        if len(made.ends) > MAX_MASKS:
            parts = [_begun(part, rules, length) if part.op == "not" else part for part in term.parts]
            shorter = both(*parts)
            if shorter.op == "and" and not Automaton(rules=rules).nothing(shorter):
                made = States(shorter, rules)
    return made


def _begun(part: Term, rules: dict[str, Term], length: int) -> Term:
    """~words, with all texts that begin as one of them does; another complement as it is."""
    automaton = Automaton(rules=rules)
    now = {"": automaton.start(part.parts[0])}
    found: list[Term] = []
    for _ in range(length):
        found += [lit(text) for text, state in now.items() if 0 in state]
        moves = [(text, move) for text, state in now.items() for move in automaton.moves(state)]
        if len(moves) > 5_000 or any(a != b for _, (a, b, _) in moves):
            return part
        now = {text + chr(a): after for text, (a, _, after) in moves}
    return other(alt([*found, seq(words(now), rep(Term("set", ranges=ALL), 0, None))])) if now else part


def _repeats_twice(term: Term, rules: dict[str, Term]) -> bool:
    """Whether one repetition stands in another, or two in a row: only these may be read in many ways."""
    count, seen, stack = 0, set[str](), [term]
    while stack and count < 2:
        one = stack.pop()
        if one.op == "ref" and one.text not in seen:
            seen.add(one.text)
            stack.append(rules[one.text])
        count += one.op == "rep"
        stack += one.parts
    return count > 1
