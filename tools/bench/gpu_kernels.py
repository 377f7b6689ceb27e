"""Triton's kernels against torch's functions on one GPU, at the sizes of a Mixtral layer in bf16.

All of them are bound by memory: ``of_copy`` is the rate of the bytes that must move, against that
of a copy measured in this run. Without a GPU it does nothing; --device cpu tries torch's side out.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megatron.core.extensions import triton_ops
from megatron.core.transformer.config.activation import SWIGLU
from megatron.core.transformer.moe import expert_activation, permutation
from megatron.core.transformer.moe.fused_on_cuda import FUSED_ROWS, FUSED_SWIGLU
from tools.bench.timing import alternate, report

Way = Callable[[permutation.RowMover, expert_activation.Activation], object]


def ways(args: argparse.Namespace) -> Iterator[tuple[str, float, Way]]:
    """Yield (what, bytes that must move, call) for inputs that are made now."""
    hidden, ffn, topk = args.hidden_size, args.moe_ffn_hidden_size, args.moe_router_topk
    rng = torch.Generator().manual_seed(1)
    scores = torch.rand((args.tokens, args.num_experts), generator=rng)
    routing = torch.zeros_like(scores, dtype=torch.bool)
    routing.scatter_(1, scores.topk(topk, dim=1).indices, value=True)
    num_rows = args.tokens * topk
    plan = permutation.plan_rows(routing.to(args.device), num_rows=num_rows)
    plan = permutation.RowPlan(**(vars(plan) | {"max_rows_per_token": topk}))
    like = {"device": args.device, "dtype": torch.bfloat16}
    tokens, rows = torch.randn(args.tokens, hidden, **like), torch.randn(num_rows, hidden, **like)
    inner, grad = torch.randn(num_rows, 2 * ffn, **like), torch.randn(num_rows, ffn, **like)
    probs = torch.rand(num_rows, device=args.device)
    index, slots, kind = plan.token_of_row, plan.slots, SWIGLU
    small, large = 2.0 * num_rows * hidden, 2.0 * num_rows * ffn
    yield "gather", 2 * small, lambda move, _: move.gather(tokens, index, tokens.dtype)
    yield "sum", small + small / topk, lambda move, _: move.add_up(rows, slots, rows.dtype)
    yield "swiglu", 3 * large, lambda _, act: act.activate(inner, probs, kind=kind)
    yield (
        "swiglu gradient",
        6 * large,
        lambda _, act: act.differentiate(inner, probs, grad, kind=kind),
    )


def copy_gb_per_s(args: argparse.Namespace) -> float:
    """Measure a copy: bytes read and bytes written, 1 GiB each on a GPU."""
    source = torch.randn(2**20 if args.device == "cpu" else 2**28, device=args.device)
    target = torch.empty_like(source)
    copy = alternate({"copy": lambda: target.copy_(source)}, args.rounds)["copy"]
    return 8e-9 * source.numel() / copy.median


def bench(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield a row for each kernel and each way."""
    copy_rate = copy_gb_per_s(args)
    named = {"torch": (permutation.IN_TORCH, expert_activation.IN_TORCH)}
    if triton_ops.unusable() is None:
        named["triton"] = (FUSED_ROWS, FUSED_SWIGLU)
    for what, num_bytes, way in ways(args):
        calls = {name: partial(way, *parts) for name, parts in named.items()}
        for name, timing in alternate(calls, args.rounds, warm_up=3).items():
            rate = 1e-9 * num_bytes / timing.median
            yield {
                "what": what,
                "who": name,
                "us": 1e6 * timing.median,
                "low_us": 1e6 * timing.low,
                "high_us": 1e6 * timing.high,
                "gb_per_s": rate,
                "of_copy": rate / copy_rate,
            }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cuda when not set.")
    parser.add_argument("--tokens", type=int, default=8192, help="Tokens of a microbatch.")
    parser.add_argument("--hidden-size", type=int, default=4096, help="Width of a token.")
    parser.add_argument("--moe-ffn-hidden-size", type=int, default=14336, help="Of an expert.")
    parser.add_argument("--num-experts", type=int, default=8, help="Experts of a layer.")
    parser.add_argument("--moe-router-topk", type=int, default=2, help="Experts of a token.")
    parser.add_argument("--rounds", type=int, default=20, help="Timed calls of each.")
    parser.add_argument("--output", type=Path, default=None, help="Folder for the JSON file.")
    args = parser.parse_args()
    if args.device is None and not torch.cuda.is_available():
        print("gpu_kernels needs a GPU: nothing is measured (--device cpu tries torch's side)")
        return
    args.device = args.device or "cuda"
    print(f"triton: {triton_ops.unusable() or 'measured'}")
    report("gpu_kernels", list(bench(args)), args.output)


if __name__ == "__main__":
    main()
