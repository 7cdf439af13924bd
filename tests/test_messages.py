"""The wording of messages, pinned in one file: tests/messages.txt.

After a change of wording, read the new file through and commit it:

    python tests/test_messages.py
"""

import ast
import pathlib
import sys

import bitmixer_jax

GOLDEN = pathlib.Path(__file__).with_name("messages.txt")
PACKAGE = pathlib.Path(bitmixer_jax.__file__).parent
# Calls whose first text is a message: errors, and the readers of files that fail with one.
ERRORS = {
    "UserError": "bad-value",
    "Damaged": "damaged",
    "EmptySplit": "no-data",
    "UncalibratedPairs": "uncalibrated",
    "fail": "damaged",
}


def template(node):
    """The text of a message, with {expressions} in the places of values; None for other values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = (
            part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}"
            for part in node.values
        )
        return "".join(parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = template(node.left), template(node.right)
        return None if None in sides else "".join(sides)
    return None


def messages():
    """One line for each message: where, code, wording."""
    lines = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            text = template(node.args[0])
            if text is None or name not in ERRORS:
                continue
            given = [*node.args[1:], *(k.value for k in node.keywords if k.arg == "code")]
            codes = [n.value for n in given if isinstance(n, ast.Constant)]
            lines.add(f"{module} [{codes[0] if codes else ERRORS[name]}] {text}")
    return sorted(lines)


def test_the_wording_of_messages_is_what_was_read_and_agreed():
    written = GOLDEN.read_text().splitlines()
    assert messages() == written, "see the top of tests/test_messages.py"


def test_messages_are_one_line_and_end_without_a_stop():
    for line in messages():
        assert "\n" not in line
        assert not line.endswith((".", " "))


if __name__ == "__main__":
    GOLDEN.write_text("\n".join(messages()) + "\n")
    sys.exit(f"{len(messages())} messages")
