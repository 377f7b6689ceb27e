from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from tools.checkpoint import average, experts, mean
from tools.checkpoint.keys import parts_of


def stored(folder: Path, *steps: int) -> list[StoredCheckpoint]:
    return [StoredCheckpoint.open(folder, step) for step in steps]


def test_the_last_checkpoints_are_averaged(run_folder: Path, tmp_path: Path, call) -> None:
    code, text, errors = call(
        average.main, "--load", run_folder, "--last", 2, "--weights", "1,3", "--save", tmp_path
    )
    assert (code, errors) == (0, "")
    assert "0.250000 x" in text
    assert text.splitlines()[-1] == f"to train on: --load {tmp_path} --no-load-optim"
    new, (old, last) = StoredCheckpoint.open(tmp_path), stored(run_folder, 4, 6)
    assert new.common["iteration"] == 6
    assert new.common["optimizer"] is None
    assert {parts_of(key).kind for key in new.keys} == {"model", "rng"}
    for key in new.keys:
        if key.startswith("rng."):
            assert torch.equal(new.read(key), last.read(key))
            continue
        expected = 0.25 * old.read(key).double() + 0.75 * last.read(key).double()
        assert torch.equal(new.read(key), expected.float()), key
    bias = "model.decoder.layers.1.mlp.router.expert_bias"
    assert not torch.equal(new.read(bias), last.read(bias)), "the case was meant to move it"


def test_an_exponential_mean_is_the_recursion(run_folder: Path, tmp_path: Path, call) -> None:
    call(average.main, "--load", run_folder, "--steps", "2,4,6", "--ema", 0.8, "--save", tmp_path)
    key = "model.decoder.layers.2.mlp.experts.local_experts.1.linear_fc2.weight"
    sources = stored(run_folder, 2, 4, 6)
    state = sources[0].read(key).double()
    for source in sources[1:]:
        state = 0.8 * state + 0.2 * source.read(key).double()
    torch.testing.assert_close(StoredCheckpoint.open(tmp_path).read(key), state.float())
    assert sum(mean.exponential(0.8, 5)) == pytest.approx(1.0)


def test_main_weights_are_averaged_and_then_rounded(bf16_folder: Path, tmp_path: Path, call):
    words = ("--load", bf16_folder / "iter_0000002", "--load", bf16_folder, "--save", tmp_path)
    assert call(average.main, *words, "--keep-optim")[0] == 0
    new, sources = StoredCheckpoint.open(tmp_path), stored(bf16_folder, 2, 4)
    assert new.common["optimizer"]["step_count"] == 4
    name = "decoder.layers.1.mlp.router.weight"
    main, second = f"optimizer.main_param.{name}", f"optimizer.exp_avg_sq.{name}"
    expected = sum(source.read(main).double() for source in sources) / 2
    assert torch.equal(new.read(main), expected.float())
    assert torch.equal(new.read(f"model.{name}"), expected.bfloat16())
    rounded = sum(source.read(f"model.{name}").double() for source in sources) / 2
    assert not torch.equal(new.read(f"model.{name}"), rounded.bfloat16())
    moments = sum(source.read(second).double() for source in sources) / 2
    assert torch.equal(new.read(second), moments.float())


def test_another_architecture_is_refused_by_name(run_folder: Path, tmp_path: Path, call) -> None:
    call(experts.main, "clone", "--load", run_folder, "--save", tmp_path / "more")
    words = ("--load", run_folder, "--load", tmp_path / "more", "--save", tmp_path / "new")
    code, _, errors = call(average.main, *words)
    assert code == 2
    assert "--num-experts is 4 in" in errors
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a mean needs two checkpoints or more"),
        (["--last", 9], "has 3 checkpoints (2, 4, 6), fewer than --last 9"),
        (["--last", 2, "--weights", "1"], "--weights 1: 1 for 2 checkpoints"),
        (["--last", 2, "--weights", "1,x"], "--weights 1,x are no numbers"),
        (["--last", 2, "--weights", "0,0"], "0 or more each, not all 0"),
        (["--last", 2, "--weights", "2,-1"], "0 or more each, not all 0"),
        (["--last", 2, "--ema", "1.5"], "--ema 1.5 must lie between 0 and 1"),
        (["--last", 2, "--ema", "0.5", "--weights", "1,1"], "exclude each other"),
        (["--last", 2, "--steps", "2,4"], "--last and --steps are of one folder"),
    ],
)
def test_mistakes_are_one_line_and_code_2(run_folder, tmp_path, call, words, message) -> None:
    words = ["--load", run_folder, *words, "--save", tmp_path / "new"]
    code, text, errors = call(average.main, *words)
    assert (code, text, errors.count("\n")) == (2, "", 1)
    assert message in errors


def test_nothing_is_written_beside_its_source(run_folder: Path, call) -> None:
    words = ("--load", run_folder, "--last", 2, "--save", run_folder)
    assert "give another folder" in call(average.main, *words)[2]
