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


@pytest.mark.parametrize(
    "layout",
    [
        "tp2 sp cp2-p2p ep2 etp1",
        *[
            pytest.param(layout, marks=pytest.mark.slow)
            for layout in (
                "pp2 dualpipev",
                "pp2 zb-h1 untied",
                "pp2 interleaved ep2 expert-comm",
                "dp2 recompute-block zero3",
                "ep2 etp2 dedup recompute-full",
            )
        ],
    ],
)
def test_what_flows_through_an_equal_layout_differs_nowhere(layout):
    (row,) = chosen([layout], verifier().axes, verifier().judge)
    assert row.reasons == ()
    assert verifier().first_difference(row.levels) is None


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--layout nonsense", "there is no nonsense; names are tp2"),
        ("--layout tp2 --layout", "expected one argument"),
        ("--layouts quick --only nonsense", "no layout has such a name"),
        ("--num-layerz 3", "--num-layerz is unknown; did you mean --num-layers?"),
        ("--num-layers 999 --hidden-size 9216 --num-attention-heads 64", "add --scale-down"),
        ("--steps 0", "must be at least 1"),
    ],
)
def test_mistakes_are_told_with_exit_code_2(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        verify_layouts.main(words.split())
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_two_levels_of_one_axis_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        verify_layouts.main(["--layout", "tp2 tp4"])
    assert "tp2 and tp4 exclude each other" in capsys.readouterr().err


def test_the_users_own_layout_is_a_row_and_a_large_model_is_made_small(capsys):
    words = """
        --scale-down --layout yours --num-layers 61 --hidden-size 7168 --num-attention-heads 128
        --num-experts 256 --moe-router-topk 8 --moe-layer-freq ([0]*3+[1]*58) --bf16 --seq-length
        4096 --tensor-model-parallel-size 2 --expert-model-parallel-size 2
    """
    assert verify_layouts.main(words.split()) == 0
    assert "equal      4 ranks" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_quick_layouts_are_equal_in_the_dtypes_that_are_trained_in(dtype, capsys):
    assert verify_layouts.main(["--layouts", "quick", "--dtype", dtype]) == 0, capsys.readouterr()


@pytest.mark.slow
def test_quick_layouts_take_less_than_four_minutes_of_processors():
    before = child_seconds()
    assert verify_layouts.main(["--layouts", "quick"]) == 0
    assert child_seconds() - before < 240
