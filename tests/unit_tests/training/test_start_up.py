from pathlib import Path

import pytest

from megatron.training.arguments import parse_args
from megatron.training.initialize import Launch
from megatron.training.start_up import start_line

FIRST, AGAIN = Launch(0, 2, 0, 2, restarts=0, max_restarts=3), Launch(0, 2, 0, 2, 2, 3)


def line(launch: Launch, *flags: str) -> str:
    words = ["--mock-data", "--num-layers=1", "--hidden-size=32", "--device=cpu", *flags]
    return start_line(parse_args(words), launch)


@pytest.mark.parametrize("launch", [FIRST, AGAIN])
def test_the_first_line_says_fresh_or_from_where_and_which_restart(
    launch: Launch, tmp_path: Path
) -> None:
    load = (f"--load={tmp_path}", "--allow-fresh-start")
    restart = "; restart 2 of at most 3 by torchrun" if launch is AGAIN else ""
    fresh = "starting a fresh run at iteration 0"
    assert line(launch) == f"{fresh} (no --load){restart}"
    assert line(launch, *load) == f"{fresh} ({tmp_path} holds no checkpoint yet){restart}"
    saved = tmp_path / "iter_0000007"
    saved.mkdir()
    (saved / "manifest.json").touch()
    assert line(launch, *load) == f"resuming at iteration 7 from {saved}{restart}"
    assert line(launch, *load, "--finetune") == (
        f"finetuning at iteration 0 with the weights of {saved}{restart}"
    )


def test_the_first_line_says_where_a_newer_checkpoint_may_be_taken(tmp_path: Path) -> None:
    load = (f"--load={tmp_path}", "--allow-fresh-start", "--non-persistent-ckpt-type=in_memory")
    newer = ", unless a newer in_memory checkpoint is there"
    assert line(FIRST, *load).endswith(f"holds no checkpoint yet){newer}")
    saved = tmp_path / "iter_0000007"
    saved.mkdir()
    (saved / "manifest.json").touch()
    assert line(FIRST, *load).endswith(f"from {saved}{newer}")
    for fixed in ("--finetune", "--ckpt-step=7"):
        assert newer not in line(FIRST, *load, fixed)


def test_restarts_are_read_from_what_torchrun_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert Launch.from_environment()[-2:] == (2, 3)
