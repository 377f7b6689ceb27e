"""Files stay under 400 lines and functions under 50, so that each fits one screenful of thought."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ["megatron", "tools", "tests", "examples"]
SOURCES = sorted(
    [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")] + [*ROOT.glob("*.py")]
)
MAX_FILE, MAX_FUNCTION = 400, 50


def oversized(text: str) -> list[str]:
    """Name what is too long in the source ``text``."""
    found = []
    if text.count("\n") > MAX_FILE:
        found.append(f"{text.count(chr(10))} lines: split it by what it knows")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            length = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
            if length > MAX_FUNCTION:
                found.append(f"line {node.lineno}: {node.name} has {length} lines of code")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sizes_are_within_the_budget(path):
    assert oversized(path.read_text()) == []


def test_the_budget_catches_a_long_file_and_a_long_function():
    assert oversized("x = 1\n" * (MAX_FILE + 1))
    assert oversized("def f():\n" + "    x = 1\n" * MAX_FUNCTION)
    assert not oversized("def f():\n    x = 1\n")
