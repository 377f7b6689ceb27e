"""Documented names exist: paths and dotted names in the pages, and the README's commands."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
PATH = re.compile(r"`((?:megatron|tools|tests|examples|docs|\.ci)/[\w./-]*\w/?|[\w-]+\.(?:py|md))`")
DOTTED = re.compile(r"`(megatron(?:\.\w+)+)`")
# Listed in docs/map.md by folder, not file by file.
MAPPED_BY_FOLDER = ("__init__.py",)


def missing_paths(text: str) -> list[str]:
    """Return the paths in backquotes of ``text`` that are not in the project."""
    return [p for p in PATH.findall(text) if "/" in p and not (ROOT / p).exists()]


def missing_names(text: str) -> list[str]:
    """Return the dotted names in backquotes of ``text`` that cannot be imported."""
    return [name for name in DOTTED.findall(text) if not _exists(name)]


def _exists(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        try:
            return hasattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError:
            return False
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_documented_names_exist(page):
    text = page.read_text()
    assert missing_paths(text) == []
    assert missing_names(text) == []


def test_a_made_up_name_is_caught():
    assert missing_paths("see `megatron/core/nonsense.py`")
    assert missing_names("`megatron.core.transformer.moe.router.TopKRooter`")
    assert not missing_names("`megatron.core.transformer.moe.router.TopKRouter`")


def test_the_map_lists_every_source_file():
    text = (ROOT / "docs/map.md").read_text()
    files = [
        path
        for folder in ("megatron", "tools")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in MAPPED_BY_FOLDER
    ]
    listed = set(PATH.findall(text))
    absent = [str(p.relative_to(ROOT)) for p in files if str(p.relative_to(ROOT)) not in listed]
    assert absent == [], "add a line to docs/map.md"


def _commands(text: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", "", text)
    found = re.findall(r"^ *((?:python tools/|torchrun )[^|\n]*)", joined, re.MULTILINE)
    return [" ".join(command.split()) for command in found]


def test_the_tutorial_is_the_quickstart_command_by_command():
    script = _commands((ROOT / "examples/quickstart/run.sh").read_text())
    tutorial = (ROOT / "README.md").read_text().split("## Tutorial")[1].split("\n## ")[0]
    assert len(script) >= 6
    assert _commands(tutorial) == script
