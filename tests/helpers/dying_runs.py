"""Runs under torchrun, some of whose ranks die by SIGKILL at moments that are planned."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from megatron.core.dist_checkpointing.serialization import read_tensors, stored_tensors
from megatron.core.dist_checkpointing.store import open_checkpoint

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests/helpers/dying_pretrain_gpt.py"
PLAN = "TEST_DEATHS"
PAUSE = "TEST_PAUSE_SECONDS"
"""Variable: how long a rank sleeps before each microbatch."""
LAYERS = (
    "--mock-data --num-layers 2 --hidden-size 32 --num-attention-heads 2 --num-experts 4 "
    "--moe-router-topk 2 --moe-router-enable-expert-bias --moe-router-score-function sigmoid "
    "--seq-length 32 --micro-batch-size 2 --global-batch-size 8 --hidden-dropout 0.1 "
    "--attention-dropout 0.1 --lr 1e-2 --lr-decay-style cosine --min-lr 1e-3 --lr-warmup-iters 2 "
    "--log-interval 1 --eval-interval 3 --eval-iters 1 --device cpu --num-workers 0"
)
"""A small model with all that a restart could lose: dropout, schedule, expert bias, evaluation."""
CLOCK = ("step_ms", "tokens_per_second")


class Death(NamedTuple):
    """When one rank kills itself."""

    restart: int
    """0 for the first start of the ranks, 1 for the first that torchrun makes again."""
    rank: int
    moment: Literal["microbatch", "fsync", "rename", "replace"]
    """A microbatch in training or evaluation, or a change of the disk in a save."""
    call: int
    """How many of them to count since the start, this one included."""


def planned(environment: Mapping[str, str]) -> list[Death]:
    """Return the deaths of this process."""
    here = (int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)), int(environment.get("RANK", 0)))
    deaths = [Death(*entry) for entry in json.loads(environment[PLAN])]
    return [death for death in deaths if (death.restart, death.rank) == here]


class Ended(NamedTuple):
    """What a run left on its way out."""

    code: int
    out: str
    err: str


class DyingRun:
    """A run in progress."""

    def __init__(
        self,
        flags: str,
        deaths: tuple[Death, ...] = (),
        *,
        ranks: int = 2,
        torchrun: str = "--standalone --max-restarts 3",
        script: Path = SCRIPT,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        words = [sys.executable, "-m", "torch.distributed.run", *torchrun.split()]
        words += ["--nproc-per-node", str(ranks), str(script), *flags.split()]
        free = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), PLAN: json.dumps(deaths)}
        self.process = subprocess.Popen(
            words,
            env=free | own | dict(variables or {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, timeout: float = 180) -> Ended:
        """Wait for the end; a run that hangs is killed and its output shown."""
        try:
            out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # torchrun ends its ranks
            out, err = self.process.communicate()
            raise AssertionError(f"the run hangs:\n{out[-4000:]}\n{err[-4000:]}") from None
        return Ended(self.process.returncode, out, err)

    def ranks(self) -> list[int]:
        """Return the processes of its ranks, in order."""
        return children(self.process.pid)


_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` has started, oldest first."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def steps(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what depends on the clock."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    plain = [json.loads(line) for line in lines if line.endswith("}")]
    return [{name: line[name] for name in line if name not in CLOCK} for line in plain]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return weights and moments of the newest checkpoint in ``folder``."""
    opened = open_checkpoint(folder, None)
    assert opened is not None, f"{folder} has no checkpoint"
    held = {
        key: torch.empty(facts.shape, dtype=facts.dtype)
        for key, facts in stored_tensors(opened.path).items()
        if not key.startswith("rng.")
    }
    read_tensors(opened.path, held, None, prefixes=("model.", "optimizer."))
    return held
