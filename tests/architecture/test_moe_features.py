"""docs/moe_features.md is true: every feature has its tests, and every test it names exists."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.node_ids import Node, missing, nodes_in, text_of
from tests.planted.bugs import BUGS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/moe_features.md").read_text()
# what the MoE package must have, by the first words of its row
REQUIRED = """
softmax over the chosen; softmax before top-k; sigmoid; sqrtsoftplus; scaling factor; groups;
expert bias; jitter; router in fp32; router in fp64; sinkhorn; quantile balancing; expert choice;
hash routing; router replay; forced balance; forced skew; aux_loss; seq_aux_loss; global_aux_loss;
z-loss; several losses at once; padding masks; capacity factor; padding to capacity;
drop policy probs; drop policy position; capacity agreed over the group; all-gather; all-to-all;
hierarchical all-to-all; deduplicated all-to-all; flex; expert tensor parallelism; GroupedMLP;
SequentialMLP; grouped_mm; other backends of grouped_mm; gated and plain activations;
bias of experts; weights before the second matrix; recomputed activation; experts in chunks;
interchangeable checkpoints; shared experts; gate of shared experts; overlapped shared experts;
latent experts; pattern of MoE layers; experts and top-k of each layer; metrics;
metrics of each layer; routing trace; warning of a collapse; Megatron's names
"""
# not built yet: whoever builds one takes its name out and adds its row
MISSING = """

"""
# G.3 of Megatron-LM 0.19.2: its defects that concern MoE
DEFECTS = """
position keeps the wrong tokens; expert bias and padding mask; padding to more than all tokens;
more groups than top-k; sinkhorn of large logits; padding mask upside down;
a metric of a loss that is off; a figure that vanishes
"""


class Row(NamedTuple):
    name: str
    cells: list[str]


def table(heading: str, page: str = PAGE) -> list[Row]:
    """Return the rows of the table under a heading, without its head."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    assert section, f"docs/moe_features.md has no heading {heading!r}"
    lines = [line for line in section[1].splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return [Row(first, rest) for first, *rest in cells if not first.startswith("---")]


def names(text: str) -> set[str]:
    return {name.strip() for name in text.replace("\n", " ").split(";")} - {""}


FEATURES = table("Features")


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: row.name)
def test_no_cell_is_empty(row):
    _flags, reference, gradient, ranks = row.cells
    for what, cell in (("reference", reference), ("gradient", gradient), ("ranks", ranks)):
        assert nodes_in(cell), f"{row.name}: no {what} test"
    gradients = "\n".join(map(text_of, nodes_in(gradient)))
    assert re.search(r"grad|backward|run_layout", gradients), "is that a test of gradients?"
    on_ranks = "\n".join(map(text_of, nodes_in(ranks)))
    assert re.search(r"run_ranks|run_layout", on_ranks), "is that a test on several ranks?"


def test_every_test_that_is_named_exists():
    planted = [nodes_in(f"`{test}`") for bug in BUGS for test in bug.tests]
    assert all(len(nodes) == 1 for nodes in planted)
    nodes = nodes_in(PAGE)
    assert len(nodes) > 100
    assert missing([*nodes, *(nodes[0] for nodes in planted)]) == []


def test_a_test_that_does_not_exist_is_caught():
    made_up = [
        Node("test_router.py", "test_nothing", ""),
        Node("test_no_such_file.py", "test_x", ""),
        Node("test_layouts.py", "test_layout_equals_one_process", "sigmoit"),
    ]
    real = Node("test_layouts.py", "test_layout_equals_one_process", "sigmoid")
    assert missing([*made_up, real]) == [*sorted(map(str, made_up[:2])), str(made_up[2])]


def test_every_flag_has_a_row():
    text = (ROOT / "docs/flags.md").read_text().partition("## Accepted without effect")[0]
    flags = set(re.findall(r"^\| `(--moe-[\w-]+)", text, re.MULTILINE))
    shown = {flag for row in FEATURES for flag in re.findall(r"`(--[\w-]+)", row.cells[0])}
    assert flags - shown == set(), "name them in the row of what they do"
    assert {flag for flag in shown if flag.startswith("--moe-")} - flags == set(), "are no flags"


@pytest.mark.parametrize(
    ("heading", "required", "absent"),
    [("Features", REQUIRED, MISSING), ("Defects", DEFECTS, "")],
)
def test_what_is_required_has_a_row_or_is_known_to_be_missing(heading, required, absent):
    shown = {row.name for row in table(heading)}
    assert names(absent) <= names(required)
    assert names(required) - shown == names(absent), "add a row, or take it out of the missing"


@pytest.mark.parametrize("row", table("Defects"), ids=lambda row: row.name)
def test_every_defect_has_a_test(row):
    assert nodes_in(row.cells[-1])


def test_invariants_are_proved_and_have_planted_bugs():
    rows = {row.name: row.cells for row in table("Invariants")}
    assert set(rows) == {"R1", "R2", "R4", "R5", "R6", "R7", "R8", "R19"}
    assert all(nodes_in(cells[-1]) for cells in rows.values())
