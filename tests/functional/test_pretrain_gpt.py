"""``pretrain_gpt.py`` as a user starts it: one process, torchrun with EP 2, stopped, failing."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = (
    "--mock-data --num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-experts 4 "
    "--moe-router-topk 2 --seq-length 32 --micro-batch-size 2 --global-batch-size 8 --lr 1e-3 "
    "--lr-decay-style constant --log-interval 2 --eval-iters 2 --device cpu --num-workers 0"
)
ITERATION = re.compile(
    r"^ \[[\d\- :.]{26}\] iteration +(\d+)/ +\d+ \| consumed samples: +(\d+) \|.* lm loss: (\S+) \|"
    r" load_balancing_loss: (\S+) \| loss scale: 1.0 \| grad norm: (\S+) \|",
    re.MULTILINE,
)


def _environment() -> dict[str, str]:
    free = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return free | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def _start(launcher: list[str], flags: list[str], script: Path | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher, str(script or ROOT / "pretrain_gpt.py"), *TINY.split(), *flags],
        env=_environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(launcher: list[str], flags: str, script: Path | None = None) -> tuple[int, str, str]:
    process = _start(launcher, flags.split(), script)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def _metrics(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("one")
    code, out, err = _run(PYTHON, f"--train-iters 4 --log-dir {folder}")
    assert code == 0, err
    return folder, out


def test_one_process_trains_and_says_so(one_process: tuple[Path, str]) -> None:
    folder, out = one_process
    assert out.startswith("starting a fresh run at iteration 0")
    assert [match[0] for match in ITERATION.findall(out)] == ["1", "2", "4"]
    assert "1 rank on cpu" in out
    assert re.search(r"^MoE layer 1: tokens/expert \[[\d ]+\]", out, re.MULTILINE)
    assert "validation loss at iteration 4 on validation set | lm loss value:" in out
    assert "validation loss at iteration 4 on test set" in out
    assert out.splitlines()[-2:] == [
        f"  metrics      {folder / 'metrics.jsonl'}",
        f"  plot         {folder / 'training.png'}",
    ]
    assert (folder / "training.png").stat().st_size > 10_000


def test_every_step_has_a_line_of_metrics(one_process: tuple[Path, str]) -> None:
    lines = _metrics(one_process[0])
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert [line["consumed_tokens"] for line in lines] == [256, 512, 768, 1024]
    assert all(line["updated"] and line["step_ms"] > 0 for line in lines)
    assert "moe/max_violation_max" in lines[3]


def test_two_ranks_with_expert_parallelism_train_alike(
    one_process: tuple[Path, str], tmp_path: Path
) -> None:
    flags = f"--train-iters 4 --log-dir {tmp_path} --expert-model-parallel-size 2"
    code, out, err = _run(TORCHRUN, flags)
    assert code == 0, err
    assert "2 ranks on cpu" in out
    expected = [line["lm_loss"] for line in _metrics(one_process[0])]
    assert [line["lm_loss"] for line in _metrics(tmp_path)] == pytest.approx(expected, rel=1e-5)


def test_a_run_stopped_half_way_goes_on_as_if_it_had_not(
    one_process: tuple[Path, str], tmp_path: Path
) -> None:
    flags = f"--train-iters 4 --save {tmp_path} --load {tmp_path} --exit-interval 2"
    code, out, err = _run(PYTHON, f"{flags} --allow-fresh-start")
    assert code == 0, err
    assert "stopped after iteration 2 by --exit-interval 2" in out
    code, out, err = _run(PYTHON, flags)
    assert code == 0, err
    assert out.startswith(f"resuming at iteration 2 from {tmp_path}")
    keys = ("iteration", "lm_loss", "grad_norm", "learning_rate", "consumed_samples")
    found, expected = (
        [[line[key] for key in keys] for line in _metrics(folder)]
        for folder in (tmp_path, one_process[0])
    )
    assert found == expected


def test_an_evaluation_that_is_due_when_a_run_stops_is_made(tmp_path: Path) -> None:
    flags = f"--train-iters 4 --save {tmp_path} --eval-interval 2 --exit-interval 2"
    code, out, err = _run(PYTHON, flags)
    assert code == 0, err
    assert "validation loss at iteration 2 on validation set" in out
    code, out, err = _run(PYTHON, f"{flags} --load {tmp_path}")
    assert code == 0, err
    assert "stopped after" not in out, "the last iteration is the end, not a stop"
    assert "validation loss at iteration 4 on test set" in out


def test_a_run_that_only_skips_updates_is_ended_and_saves_nothing(tmp_path: Path) -> None:
    flags = f"--train-iters 20 --lr 1e30 --optimizer sgd --clip-grad 0 --save {tmp_path}"
    code, out, err = _run(PYTHON, flags)
    assert code == 2, out + err
    assert "the last 10 updates" in err
    assert "lm loss nan" in out
    assert not list(tmp_path.glob("iter_*"))


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_sigterm_to_one_rank_saves_and_exits_0(ranks: int, tmp_path: Path) -> None:
    flags = f"--train-iters 100000 --save {tmp_path} --num-workers 1".split()
    process = _start(TORCHRUN if ranks == 2 else PYTHON, flags)
    deadline = time.monotonic() + 60
    while len(_metrics(tmp_path)) < 3:
        assert time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    pid = _children(process.pid)[-1] if ranks == 2 else process.pid
    os.kill(pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    last = _metrics(tmp_path)[-1]["iteration"]
    assert f"stopped after iteration {last} by a termination signal" in out
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text().strip() == str(last)


FAILING = """
import os, sys, time
from pathlib import Path
from pretrain_gpt import forward_step, model_provider, train_valid_test_datasets_provider
from megatron.training import pretrain

calls, stuck, marker = 0, {stuck}, Path({marker!r})

def failing_step(data_iterator, model):
    global calls
    calls += 1
    if calls == 3 and os.environ["RANK"] == "1":
        marker.write_text(str(time.time()))
        raise {error}
    if calls == 3 and stuck:
        time.sleep(100)
    return forward_step(data_iterator, model)

if __name__ == "__main__":
    pretrain(train_valid_test_datasets_provider, model_provider, failing_step)
"""


@pytest.mark.parametrize("stuck", [False, True])
def test_a_failing_rank_ends_the_job_and_is_named_last(stuck: bool, tmp_path: Path) -> None:
    script, marker = tmp_path / "script.py", tmp_path / "failed_at"
    error = "ValueError('this went wrong')"
    script.write_text(FAILING.format(stuck=stuck, marker=str(marker), error=error))
    code, out, err = _run(TORCHRUN, "--train-iters 4", script)
    took = time.time() - float(marker.read_text())
    assert code != 0
    assert took < 15, f"{took:.1f} s"
    last = [line.strip() for line in err.splitlines() if line.strip()][-3:]
    assert last[0] == "ValueError: this went wrong"
    assert last[1] == "First failure of the run: rank 1 (dp 1, ep 0), iteration 2"
    told = "another rank failed" if stuck else "ValueError: this went wrong"
    assert re.search(rf"^error \[rank 0\]: rank 0 .*{told}$", out, re.MULTILINE)
    assert "Connection closed" not in err


def test_bad_data_in_training_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    error = "__import__('megatron.core.errors').core.errors.DataError('x.bin is damaged')"
    text = FAILING.format(stuck=False, marker=str(tmp_path / "m"), error=error)
    script.write_text(text.replace('os.environ["RANK"] == "1"', "True"))
    code, out, err = _run(PYTHON, "--train-iters 4", script)
    assert code == 2
    assert err.splitlines()[-1] == "x.bin is damaged"
    assert "Traceback" not in err + out
