"""Every family computes on every layout what transformers computes on one process."""

import pytest
import torch

from tests.helpers.hf_cases import CASES, RICHEST
from tests.helpers.hf_proof import (
    LAYOUTS,
    apart,
    check_trained_export,
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


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(
            name,
            "tp2 ep2" if CASES[name].experts else "tp2 pp2",
            marks=() if name == "gpt-oss" else pytest.mark.slow,
        )
        for name in RICHEST
    ],
)
def test_a_model_that_was_trained_on_a_layout_goes_out_as_it_is(name, layout, tmp_path):
    check_trained_export(imported(name, tmp_path), LAYOUTS[layout], tmp_path)
