"""How many tokens each expert had in a routing trace, of the experts of a checkpoint."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from megatron.core.errors import DataError
from megatron.core.transformer.moe.router_trace_files import RoutingTrace
from tools.inspect_routing import load


def tokens_of(
    folder: Path, args: argparse.Namespace, layers: Mapping[int, int]
) -> dict[int, list[int]]:
    """Count tokens, padding left out.

    Args:
        folder: As of --moe-routing-trace-path.
        args: With ``first_step`` and ``last_step`` (None for the last).
        layers: MoE layer -> its number of experts in the checkpoint.

    Returns:
        Layer -> tokens of each expert.

    Raises:
        DataError: No trace, no such steps, or of another model.
    """
    trace = RoutingTrace(folder)
    steps = [s for s in trace.steps if args.first_step <= s <= (args.last_step or s)]
    if not steps:
        have = f"{trace.steps[0]} to {trace.steps[-1]}" if trace.steps else "none"
        raise DataError(f"{folder} has no step in that range; it has {have}")
    for layer, number in layers.items():
        if layer not in trace.moe_layers:
            raise DataError(f"{folder} is of another model: layer {layer} has no experts there")
        if trace.num_experts(layer) != number:
            raise DataError(
                f"{folder} is of another model: layer {layer} has {trace.num_experts(layer)} "
                f"experts there and {number} in the checkpoint"
            )
    return {
        layer: np.sum([load(trace, step, layer) for step in steps], axis=0).tolist()
        for layer in layers
    }
