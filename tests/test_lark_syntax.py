"""Grammars in lark's syntax as one regex."""

import re

import pytest

from constraints import Unsupported
from lark_syntax import lark_regex

PATCH = r"""
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk   // what may happen to a file
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
ADD = '*** Begin Patch\n*** Add File: a.py\n+print("// \\n")\n+\n*** End Patch'
UPDATE = "*** Begin Patch\n*** Update File: a\n*** Move to: b\n@@ def f\n-x\n+y\n z\n*** Delete File: c\n*** End Patch\n"


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (PATCH, [ADD, UPDATE], ["", ADD + "\n\n", ADD.replace("+print", "print"), UPDATE.replace("@@ def f", "def f")]),
        ('start: "a" | "b"\n     | "c"', ["a", "b", "c"], ["", "ab", "|"]),
        ('start: ("x" ~ 2..3) ["y"] "z"~2', ["xxzz", "xxxyzz"], ["xzz", "xxz", "xxyyzz"]),
        ('start: "a".."f" DIGIT+ // no more\nDIGIT: "0".."9"', ["a1", "f09"], ["g1", "a"]),
        ("start: INT (\",\" INT)*\n%import common.INT", ["1", "1,22"], ["1,", "", "a"]),
        ("start: N\n%import common.SIGNED_NUMBER -> N", ["-1.5e3", "7"], ["x"]),
        (r'start: "\"\\\n." /\/[^\/]+/', ['"\\\n./a'], ['"\\\nx/a']),
        ("?start: word\n!word.2: /[a-z]+/ | _rest\n_rest: \"*\"", ["abc", "*"], ["A", ""]),
        ('start: "(" | ")" | "//"', ["(", ")", "//"], ["()"]),
    ],
)  # fmt: skip
def test_what_it_accepts(grammar, right, wrong):
    regex = re.compile(lark_regex(grammar))
    assert [text for text in right if not regex.fullmatch(text)] == []
    assert [text for text in wrong if regex.fullmatch(text)] == []


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ('start: "(" start ")" | "x"', "refers to itself"),
        ('start: a\na: b\nb: a | "x"', "refers to itself"),
        ("start: missing", "no rule missing"),
        ('begin: "x"', "no rule start"),
        ('start: "a"\nstart: "b"', "twice"),
        ("start: WS\n%ignore WS", "%ignore"),
        ("start: X\n%import python.X", "%import python"),
        ("start: X\n%import common.NOTHING", "common.NOTHING"),
        ('start: "a"i', "case"),
        ("start: /a/i", "flags"),
        ('start: ("a"', "not closed"),
        ('start: "a")', "not understood"),
        ('start: "a" {', "not understood"),
        ("start: + ", "not understood"),
        ('start: "ab".."c"', "range"),
        ("nonsense", "alone can be honoured"),
        ("\n".join([f"r{i}: r{i + 1} r{i + 1}" for i in range(30)] + ['r30: "x"', "start: r0"]), "too large"),
    ],
)
def test_refused(grammar, why):
    with pytest.raises(Unsupported, match=re.escape(why)):
        lark_regex(grammar)
