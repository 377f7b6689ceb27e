"""A training step with the expert all-to-all hidden behind another microbatch, and without.

Two ranks, expert parallel, over a network that is made slow: one way of a microbatch's rows takes
--way-ms where rows are spread evenly. Both runs train the same model; losses must be the same.
"""

import argparse
import json
import sys
import tempfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from megatron.training.datasets.batch import Batch
from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from tools.bench.slow_network import SlowNetwork
from tools.bench.timing import alternate, report
from tools.layouts.oracle import make_config, make_run, microbatches
from tools.layouts.ranks import run_ranks

RANKS = 2
VOCABULARY = 1024
BY_TURNS = {"overlap_moe_expert_parallel_comm": True}
KINDS: dict[str, dict[str, bool]] = {
    "one by one": {},
    "by turns": BY_TURNS,
    "weights late": BY_TURNS | {"delay_wgrad_compute": True},
}


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the model and the batch of the command line, by option name."""
    return {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": 4,
        "ffn_hidden_size": 2 * args.hidden_size,
        "seq_length": args.seq_length,
        "max_position_embeddings": args.seq_length,
        "padded_vocab_size": VOCABULARY,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "fp64": False,
        "init_method_std": 0.02,
        "expert_model_parallel_size": RANKS,
        "micro_batch_size": args.micro_batch_size,
        "global_batch_size": args.micro_batch_size * RANKS * args.num_microbatches,
    }


def random_batch(length: int, sample_ids: range) -> Batch:
    """Return samples of ``length`` tokens that are functions of their numbers."""
    drawn = [
        torch.randint(VOCABULARY, (length + 1,), generator=torch.Generator().manual_seed(number))
        for number in sample_ids
    ]
    ids = torch.stack(drawn)
    return Batch(
        tokens=ids[:, :-1].contiguous(),
        labels=ids[:, 1:].contiguous(),
        loss_mask=torch.ones(len(drawn), length),
        position_ids=torch.arange(length).expand(len(drawn), length).contiguous(),
        attention_mask=None,
        sample_ids=tuple(sample_ids),
    )


class Steps:
    """A run whose steps can be called; all of them read the same samples."""

    def __init__(self, options: dict[str, Any], network: SlowNetwork | None) -> None:
        self._run = make_run(make_config(**options))
        self._network = network
        self._batch_of = partial(random_batch, options["seq_length"])
        self.losses: list[float] = []

    def __call__(self) -> None:
        """Train one step."""
        with nullcontext() if self._network is None else self._network.installed():
            batches = microbatches(self._run, 0, self._batch_of)
            self.losses.append(train_step(self._run, TrainState(dropout_seed=1), batches).lm_loss)


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Time steps on one of the ranks; rank 0 leaves its rows in ``folder``."""
    options = options_of(args)
    tokens = args.micro_batch_size * args.seq_length
    to_others = tokens * 2 * args.hidden_size * 4 * (RANKS - 1) / RANKS  # top-2, fp32
    network = SlowNetwork(to_others / (1e-3 * args.way_ms))
    runs = {
        (speed, name): Steps(options | flags, cable)
        for speed, cable in (("free", None), ("slow", network))
        for name, flags in KINDS.items()
    }
    timings = alternate({f"{s}, {n}": steps for (s, n), steps in runs.items()}, args.rounds)
    losses = [steps.losses for steps in runs.values()]
    assert all(found == losses[0] for found in losses), f"runs differ: {losses}"
    base = {speed: timings[f"{speed}, one by one"].median for speed in ("free", "slow")}
    steps_sent = len(KINDS) * (args.rounds + 1)
    rows = [
        {
            "network": speed,
            "microbatches": name,
            "step_ms": 1e3 * timing.median,
            "low_ms": 1e3 * timing.low,
            "high_ms": 1e3 * timing.high,
            "cable_ms": 1e3 * network.busy_s / steps_sent if speed == "slow" else None,
            "of_one_by_one": timing.median / base[speed],
            "network_hidden": (base["slow"] - timing.median) / (base["slow"] - base["free"])
            if speed == "slow"
            else None,
        }
        for (speed, name), timing in zip(runs, timings.values(), strict=True)
    ]
    if dist.get_rank() == 0:
        (folder / "rows.json").write_text(json.dumps(rows))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for the JSON.")
    parser.add_argument("--rounds", type=int, default=5, help="Timed steps of each run.")
    parser.add_argument("--way-ms", type=float, default=30.0, help="One way of even rows.")
    parser.add_argument("--num-layers", type=int, default=4, help="All are MoE layers.")
    parser.add_argument("--hidden-size", type=int, default=256, help="Width of a token.")
    parser.add_argument("--seq-length", type=int, default=256, help="Tokens of a sample.")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="Samples of a microbatch.")
    parser.add_argument("--num-microbatches", type=int, default=6, help="Of a step.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(measure, RANKS, args, Path(folder))
        rows = json.loads((Path(folder) / "rows.json").read_text())
    report("expert_overlap", rows, args.output)


if __name__ == "__main__":
    main()
