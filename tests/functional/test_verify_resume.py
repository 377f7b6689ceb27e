"""``tools/verify_resume.py`` as a user starts it: a pass, a failure that is named, his mistakes.

Two ranks of a tiny MoE model with dropout and expert bias. All omissions one by one: slow, and
`make planted-resume`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planted import run_resume
from tests.planted.omissions import OMISSIONS, Omission
from tests.planted.plants import copy_project

ROOT = Path(__file__).parents[2]
SCRIPT_WITH_A_SECRET = '''
import torch

from pretrain_gpt import forward_step as plain_step
from pretrain_gpt import model_provider, train_valid_test_datasets_provider

seen = 0


def forward_step(data_iterator, model):
    """Scale the loss by what no checkpoint knows: the microbatches that this process has seen."""
    global seen
    output, loss_func = plain_step(data_iterator, model)
    seen += torch.is_grad_enabled()
    factor = 1.0 + seen / 64

    def scaled(output):
        loss = loss_func(output)
        return loss._replace(loss_sum=loss.loss_sum * factor)

    return output, scaled
'''


def verify(words: str, flags: str = run_resume.FLAGS) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/verify_resume.py"), *words.split(), *flags.split()],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_run_item_by_item(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    done = verify(
        f"--nproc 2 --iterations 6 --layouts 1 --output {tmp_path / 'out'} --json {report}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SIGKILL to all 2 ranks" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("PASS: resumed at iteration ")
    told = json.loads(report.read_text())
    verdicts = {row["item"]: row["verdict"] for row in told["items"]}
    absent = {"main weights", "buffers", "loss scale"}
    assert {item for item, verdict in verdicts.items() if verdict == "-"} == absent
    assert {verdict for item, verdict in verdicts.items() if item not in absent} == {"same"}
    assert [layout["passes"] for layout in told["layouts"]] == [True]
    killed = told["killed"]["checkpoint"]
    resumed = (tmp_path / "out" / "resumed" / "rank0.log").read_text()
    assert (
        f"resumed at iteration {killed} (" in resumed
        or f"resuming at iteration {killed}" in resumed
    )


@pytest.mark.slow
def test_a_run_with_a_state_of_its_own_fails_and_the_loss_is_named(tmp_path: Path) -> None:
    script = tmp_path / "my_pretrain.py"
    script.write_text(SCRIPT_WITH_A_SECRET)
    done = verify(f"--nproc 1 --iterations 4 --layouts none --script {script} --", ONE_RANK)
    assert done.returncode == 1, done.stdout + done.stderr
    first = next(line for line in done.stdout.splitlines() if line.startswith("first: "))
    assert first.startswith("first: loss, step ")
    assert "likely: tensors, counters and samples are the same" in done.stdout
    assert done.stdout.splitlines()[-1] == "FAIL: loss (seed 1)"


ONE_RANK = " ".join(run_resume.FLAGS.split()).replace("--expert-model-parallel-size 2 ", "")


@pytest.mark.parametrize(
    ("words", "flags", "said"),
    [
        ("--nproc 2", f"{run_resume.FLAGS} --num-lyers 3", "--num-lyers is unknown"),
        ("--nproc 3", run_resume.FLAGS, "does not divide the world size 3"),
        ("--nproc 2 --iterations 2", run_resume.FLAGS, "at least 3 steps are needed"),
        ("--nproc 2 --layouts 3,ep=2 --", run_resume.FLAGS, "--layouts 3,ep=2"),
        ("--nproc 2 --script gone.py", run_resume.FLAGS, "--script gone.py"),
        ("--nproc 2", f"{run_resume.FLAGS} --no-save-rng", "--no-save-rng"),
    ],
)
def test_a_mistake_of_the_user_is_told_and_ends_with_2(words: str, flags: str, said: str) -> None:
    done = verify(words, flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("copy")
    copy_project(copy)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("omission", OMISSIONS, ids=lambda one: one.name)
def test_an_omission_is_called_what_it_is(project: Path, omission: Omission) -> None:
    assert run_resume.is_named(project, omission)
