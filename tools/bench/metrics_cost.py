"""What the metrics of MoE layers cost: steps of bench-S with and without them, in one run.

Processor time, not the clock: the difference is far below the noise of a shared machine. So the
calls that only metrics make are also timed alone, which is the figure to go by.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.load_balancing import router_entropy
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker
from megatron.core.transformer.transformer_config import TransformerConfig
from tools.bench.step import Size, Step, add_size_options, bench_s, size_of
from tools.bench.timing import report
from tools.bench.world import world_of_one

LOG_INTERVAL = 100  # steps over which a report is spread: the default of --log-interval


def make_tracker(config: TransformerConfig, device: str) -> MoEMetricsTracker:
    """Return slots for one microbatch of every layer."""
    assert config.num_moe_experts is not None, "bench-S is a mixture of experts"
    layers = range(config.num_layers)
    return MoEMetricsTracker(layers, config.num_moe_experts, config.moe_router_topk, 1, device)


def train(step: Step, tracker: MoEMetricsTracker | None) -> None:
    """Make one step, with metrics if there is a tracker."""
    step.run = replace(step.run, moe_metrics=tracker)
    step()


def only_metrics(
    config: TransformerConfig, tracker: MoEMetricsTracker, size: Size, device: str
) -> Callable[[], None]:
    """Return a call that does for every layer what a step does for the metrics alone."""
    tokens = size.microbatch * size.sequence
    logits = torch.randn(tokens, config.num_moe_experts or 1, device=device)
    routing_map = logits > 1.0
    loss = torch.ones((), device=device)

    def once() -> None:
        for layer in range(config.num_layers):
            tracker.record(
                layer,
                0,
                tokens_per_expert=routing_map.sum(dim=0),
                entropy=router_entropy(logits),
                load_balancing_loss=loss,
            )
        tracker.end_step()

    return once


def processor_seconds(call: Callable[[], object]) -> float:
    """Return the processor time of one call, all threads; on CUDA the time until it is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(config: TransformerConfig, size: Size, device: str, rounds: int) -> dict[str, object]:
    """Return one row of the table."""
    step, tracker = Step(config, size, device), make_tracker(config, device)
    groups = ProcessGroupCollection.create(config.layout(1))
    calls = {"with": partial(train, step, tracker), "without": partial(train, step, None)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        order = list(calls) if turn % 2 else list(reversed(calls))
        for name in order:
            spent = processor_seconds(calls[name])
            if turn:
                seconds[name].append(spent)
    recording = only_metrics(config, tracker, size, device)
    alone = [processor_seconds(recording) for _ in range(200)]
    reports = [processor_seconds(lambda: tracker.report(groups)) for _ in range(50)]
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    plain = statistics.median(seconds["without"])
    cost = statistics.median(alone) + statistics.median(reports) / LOG_INTERVAL
    return {
        "experts": config.num_moe_experts,
        "topk": config.moe_router_topk,
        "step_ms": 1e3 * plain,
        "with_minus_without": statistics.median(a / b for a, b in pairs) - 1,
        "metrics_ms": 1e3 * cost,
        "share_of_step": cost / plain,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for metrics_cost.json.")
    parser.add_argument("--rounds", type=int, default=10, help="Steps with and without metrics.")
    add_size_options(parser)
    args = parser.parse_args()
    size = size_of(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    with world_of_one():
        for experts, topk, ffn in ((8, 2, 2 * size.hidden), (64, 8, size.hidden // 2)):
            config = bench_s(size.hidden, bf16=False)
            config.num_moe_experts, config.moe_router_topk = experts, topk
            config.moe_ffn_hidden_size = ffn
            rows.append(measure(config, size, device, args.rounds))
    report("metrics_cost", rows, args.output)


if __name__ == "__main__":
    main()
