"""Two small records of the same run, as ranks write them, for tests that change one thing."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from megatron.core.param_role import LogicalShard
from megatron.training.metrics import EXPERT_LOAD
from tools.resume.record_names import LOADED, STEP, after_step_folder, steps_file
from tools.resume.records import Record, read_record
from tools.resume.state_files import write_state

BEGIN, END, RANKS = 2, 4, 2
EXPERT = "decoder.layers.0.mlp.experts.local_experts"
NAMES = (
    "weight.decoder.layers.0.norm.weight",
    *(f"weight.{EXPERT}.{expert}.linear_fc1.weight" for expert in range(2)),
    "exp_avg.decoder.layers.0.norm.weight",
    *(f"exp_avg.{EXPERT}.{expert}.linear_fc1.weight" for expert in range(2)),
    "exp_avg_sq.decoder.layers.0.norm.weight",
    *(f"exp_avg_sq.{EXPERT}.{expert}.linear_fc1.weight" for expert in range(2)),
    "main_param.decoder.layers.0.norm.weight",
    "buffer.decoder.layers.0.mlp.router.expert_bias",
    "buffer.decoder.layers.0.mlp.router.qb_beta",
    "scratch.rotary.cosines",
)


class Run:
    """What two ranks write; change it, then ``write`` it."""

    def __init__(self, *, begin: int) -> None:
        """Make a run that begins at ``begin`` and ends at ``END``."""
        self.begin = begin
        self.lines = [self._lines_of(rank) for rank in range(RANKS)]
        self.tensors = {
            name: {key: _values(key) for key in NAMES}
            for name in (LOADED, after_step_folder(BEGIN), after_step_folder(END))
        }
        self.tokens_per_expert = {step: [[30_000, 34_000]] for step in range(begin + 1, END + 1)}

    def _lines_of(self, rank: int) -> list[dict[str, Any]]:
        loaded = {"event": LOADED, "tp": 0, "cp": 0, "pp": 0, **_standing(self.begin)}
        steps = [
            {
                "event": STEP,
                "samples": [[8 * step + 4 * rank + i, 1000 + step + i] for i in range(2)],
                "rates": [[1e-3 * step, 0.0], [1e-3 * step, 0.1]],
                "loss": 5.0 - step / 7,
                "grad_norm": 1.0 + step / 3,
                "updated": True,
                **_standing(step),
            }
            for step in range(self.begin + 1, END + 1)
        ]
        return [loaded, *steps]

    def step(self, rank: int, iteration: int) -> dict[str, Any]:
        """Return the line of a step, to be changed."""
        return self.lines[rank][iteration - self.begin]

    def write(self, folder: Path) -> Record:
        """Write everything, each tensor in two halves, and read it back."""
        folder.mkdir(parents=True)
        for rank, lines in enumerate(self.lines):
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / steps_file(rank)).write_text(text)
        for name, tensors in self.tensors.items():
            for rank in range(RANKS):
                blocks = [halves(key, tensor)[rank] for key, tensor in tensors.items()]
                write_state(folder / name, rank, blocks)
        loads = [
            json.dumps({"iteration": step, "tokens_per_expert": found})
            for step, found in self.tokens_per_expert.items()
        ]
        (folder / EXPERT_LOAD).write_text("\n".join(loads) + "\n")
        return read_record(folder, RANKS)


def _standing(iteration: int) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "iteration": iteration,
            "consumed_samples": 8 * iteration,
            "optimizer_steps": iteration,
            "dropout_seed": 1234,
            "loss_scale": {"scale": 65536.0, "growth_tracker": iteration},
            "generators": {"torch": f"t{iteration}", "python": f"p{iteration}"},
        }
    )


def _values(key: str) -> torch.Tensor:
    return torch.arange(1, 13, dtype=torch.float32).view(4, 3) / (1 + len(key))


def halves(key: str, tensor: torch.Tensor) -> list[LogicalShard]:
    """Return the blocks of two ranks: the first rows, the last rows."""
    shape = tuple(tensor.shape)
    return [
        LogicalShard(key, tensor[:2], shape, (0, 0)),
        LogicalShard(key, tensor[2:], shape, (2, 0)),
    ]
