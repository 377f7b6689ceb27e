"""The quick layouts of `tools/verify_layouts.py`, and what it says when one is wrong."""

import functools

import pytest

from megatron.core.distributed.distributed_data_parallel import DistributedDataParallel
from tests.helpers.processes import child_seconds
from tools import verify_layouts
from tools.layouts.cases import DEFAULT_WORDS, read_base
from tools.layouts.matrix import chosen
from tools.layouts.quick import QUICK
from tools.layouts.verification import BIT_EQUAL, DIFFERS, EQUAL, FAILS, REFUSED, Verifier


@functools.cache
def verifier() -> Verifier:
    """Keep runs on one process for all layouts."""
    return Verifier(read_base(DEFAULT_WORDS, "fp64").values, dtype="fp64")


@pytest.mark.parametrize("layout", QUICK)
def test_layout_equals_one_process(layout):
    (row,) = chosen([layout], verifier().axes, verifier().judge)
    outcome = verifier().run(row)
    assert outcome.verdict in (EQUAL, BIT_EQUAL, REFUSED), outcome
    assert bool(row.reasons) == (outcome.verdict == REFUSED)


def test_a_refused_layout_is_told_with_what_the_rules_say(capsys):
    words = ["--layouts", "quick", "--only", "tp2 rope", *DEFAULT_WORDS]
    words += ["--num-attention-heads", "1"]
    assert verify_layouts.main(words) == 0
    said = capsys.readouterr().out
    assert "refused" in said
    assert "--num-attention-heads 1" in said


def _experts_summed_over_all_data_ranks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DistributedDataParallel, "_group", lambda self, key: self.pg_collection.dp_cp)


def test_a_wrong_layout_is_told_with_its_first_tensor_and_exits_with_1(
    monkeypatch, capsys, tmp_path
):
    _experts_summed_over_all_data_ranks(monkeypatch)
    page = tmp_path / "layouts.md"
    words = ["--layouts", "quick", "--only", "ep2 allgather*", "--markdown", str(page)]
    assert verify_layouts.main(words) == 1
    said = capsys.readouterr().out
    assert DIFFERS in said
    assert "first: gradient of decoder.layers.3.mlp.experts.local_experts" in said
    assert "likely: gradients of experts only" in said
    assert "| DIFFERS |" in page.read_text()


def _a_rank_that_raises(patch: pytest.MonkeyPatch) -> None:
    def group(self, key):
        raise RuntimeError("planted")

    patch.setattr(DistributedDataParallel, "_group", group)


def test_a_layout_that_raises_is_told_and_exits_with_1(monkeypatch, capsys):
    verifier().reference(("dp2",))
    _a_rank_that_raises(monkeypatch)
    (row,) = chosen(["dp2"], verifier().axes, verifier().judge)
    outcome = verifier().run(row)
    assert outcome.verdict == FAILS
    assert outcome.notes == ("RuntimeError: planted",)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_quick_layouts_are_equal_in_the_dtypes_that_are_trained_in(dtype, capsys):
    assert verify_layouts.main(["--layouts", "quick", "--dtype", dtype]) == 0, capsys.readouterr()


@pytest.mark.slow
def test_quick_layouts_take_less_than_four_minutes_of_processors():
    before = child_seconds()
    assert verify_layouts.main(["--layouts", "quick"]) == 0
    assert child_seconds() - before < 240
