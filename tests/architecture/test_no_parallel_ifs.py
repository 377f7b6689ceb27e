"""Model code asks no rank and no parallel size: a group of one rank is the same code path."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(
    [
        *(ROOT / "megatron/core/transformer").rglob("*.py"),
        *(ROOT / "megatron/core/models").rglob("*.py"),
    ]
)
BANNED = re.compile(r"(^|_)(tp|cp|pp|dp|ep|etp)_(size|rank)$|world_size|parallel_size|_rank$")


def parallel_conditionals(text: str) -> list[str]:
    """Name each ``if`` in the source ``text`` that asks for a rank or the size of a group."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            names = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node.test)}
            found += [
                f"line {node.lineno}: {name}" for name in sorted(names) if BANNED.search(name)
            ]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_model_code_asks_no_rank(path):
    assert parallel_conditionals(path.read_text()) == [], "choose at construction instead"


def test_a_parallel_conditional_is_caught():
    assert parallel_conditionals("if self.ep_size > 1:\n    pass\n")
    assert parallel_conditionals("y = 1 if dist.get_world_size() == 2 else 2\n".replace("get_", ""))
    assert not parallel_conditionals("if config.swiglu:\n    pass\n")
