"""Tests named in tables: `test_file.py::test_name` or `test_file.py::test_name[case]`.

A file is named without its folder, which must be enough to find it. `[case]` is a whole part of
the parameters, so `[sigmoid]` stands for `[sigmoid-2-1]` and all others of that case.
"""

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
NODE = re.compile(r"`([\w/]+\.py)::(\w+)(?:\[(.+?)\])?`")


class Node(NamedTuple):
    """One name of a test."""

    file: str
    test: str
    case: str
    """Empty for all cases."""

    def __str__(self) -> str:
        return f"{self.file}::{self.test}" + (f"[{self.case}]" if self.case else "")

    @property
    def path(self) -> Path:
        """The file, under tests/."""
        return _files().get(self.file, ROOT / "tests" / self.file)


def nodes_in(text: str) -> list[Node]:
    """Return the tests that ``text`` names in backquotes."""
    return [Node(*found) for found in NODE.findall(text)]


def missing(nodes: Iterable[Node]) -> list[str]:
    """Return those that are no test; only files with cases are collected by pytest."""
    nodes = sorted(set(nodes))
    absent = [str(n) for n in nodes if n.test not in _functions(n.path)]
    with_case = [n for n in nodes if n.case and str(n) not in absent]
    if with_case:
        collected = _collected(sorted({str(n.path.relative_to(ROOT)) for n in with_case}))
        absent += [str(n) for n in with_case if not _has_case(n, collected)]
    return absent


def text_of(node: Node) -> str:
    """Return the source of a test with all functions and values of its file that it uses."""
    parts = _functions(node.path)
    todo, seen = [node.test], set[str]()
    while todo:
        name = todo.pop()
        if name in parts and name not in seen:
            seen.add(name)
            todo += re.findall(r"\w+", parts[name])
    return "\n".join(parts[name] for name in sorted(seen))


@functools.cache
def _files() -> dict[str, Path]:
    """Map the name of each test file that has it alone to its path."""
    found: dict[str, list[Path]] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        found.setdefault(path.name, []).append(path)
    return {name: paths[0] for name, paths in found.items() if len(paths) == 1}


@functools.cache
def _functions(path: Path) -> dict[str, str]:
    """Map the names that a file defines at its top to their source."""
    if not path.exists():
        return {}
    text = path.read_text()
    lines = text.splitlines()
    return {
        name: "\n".join(lines[first - 1 : node.end_lineno])
        for node in ast.parse(text).body
        for name, first in _names(node)
    }


def _names(node: ast.stmt) -> Iterator[tuple[str, int]]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)])
    elif isinstance(node, ast.Assign):
        yield from ((t.id, node.lineno) for t in node.targets if isinstance(t, ast.Name))
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id, node.lineno


def _collected(files: list[str]) -> str:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _has_case(node: Node, collected: str) -> bool:
    prefix = f"{node.path.relative_to(ROOT)}::{node.test}["
    cases = [
        line.removeprefix(prefix).removesuffix("]")
        for line in collected.splitlines()
        if line.startswith(prefix)
    ]
    return any(f"-{node.case}-" in f"-{case}-" for case in cases)
