"""The pages of proofs are true: each invariant that they name has tests that exist."""

import re
from pathlib import Path

import pytest

from tests.helpers.node_ids import missing, nodes_in, text_of
from tests.planted.layout_bugs import LAYOUT_BUGS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/layout_proofs.md").read_text()
CHECKPOINTS = (ROOT / "docs/checkpoint_proofs.md").read_text()
HUGGING_FACE = (ROOT / "docs/hf_proofs.md").read_text()
ROW = re.compile(r"^\| (R\d+) \| (.*) \|$", re.MULTILINE)
ROWS = {row[1]: row[2] for row in ROW.finditer(PAGE)}
ON_RANKS = re.compile(r"run_ranks|run_layout|verifier\(\)|Verifier")


def test_the_page_has_every_invariant_of_layouts():
    assert list(ROWS) == ["R1", "R2", "R3", "R7", "R8", "R9", "R14", "R18"]


@pytest.mark.parametrize("number", ROWS)
def test_an_invariant_is_shown_on_several_ranks(number):
    nodes = nodes_in(ROWS[number])
    assert len(nodes) >= 3
    assert any(ON_RANKS.search(text_of(node)) for node in nodes)


def test_the_page_of_checkpoints_has_every_invariant_of_them():
    rows = {row[1]: nodes_in(row[2]) for row in ROW.finditer(CHECKPOINTS)}
    assert list(rows) == ["R10", "R11", "R12", "R13", "R15"]
    assert min(len(nodes) for nodes in rows.values()) >= 3


def test_the_page_of_hugging_face_has_its_invariant_and_tests():
    assert "R17" in HUGGING_FACE
    assert len(nodes_in(HUGGING_FACE)) >= 10


@pytest.mark.parametrize(
    "page", [PAGE, CHECKPOINTS, HUGGING_FACE], ids=["layouts", "checkpoints", "hugging face"]
)
def test_every_test_that_is_named_exists(page):
    assert missing(nodes_in(page)) == []


def test_bugs_are_planted_against_what_a_layout_can_break_silently():
    numbers = {bug.invariant for bug in LAYOUT_BUGS}
    assert {"R1", "R2", "R3", "R7", "R14"} <= numbers <= {*ROWS, "R5"}
