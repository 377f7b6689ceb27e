"""Every family computes on every layout what transformers computes on one process."""

import pytest
import torch

from tests.helpers.hf_cases import CASES
from tests.helpers.hf_proof import (
    LAYOUTS,
    apart,
    imported,
    layouts_of,
    refuse_far,
    refuse_other_start,
    run,
)

QUICK = {("qwen3-biases", "tp2 pp2"), ("deepseek-v3", "tp2 ep2")}
PAIRS = [(name, layout) for name in CASES for layout in layouts_of(name)]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow, id="-".join(pair))
        for pair in PAIRS
    ],
)
def test_a_layout_computes_what_their_one_process_computes(name, layout, tmp_path):
    case, dtypes = imported(name, tmp_path), (torch.float32, torch.float64)
    runs = run(case, LAYOUTS[layout], dtypes)
    for dtype, ours in zip(dtypes, runs, strict=True):
        refuse_far(apart(case.theirs[dtype], ours), dtype)
    refuse_other_start(case, LAYOUTS[layout], runs[0])


def test_the_quick_pairs_exist():
    assert set(PAIRS) >= QUICK
