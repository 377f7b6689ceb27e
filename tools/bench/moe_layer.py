"""Forward and backward of one MoE layer: ours, others', and the limit of its matrix products.

Ours is "grouped", and "fused" is the same layer under ``--moe-fused-activation auto``.

Every call sees new tokens, so new numbers of rows for each expert; all contenders see the same
ones, over the same weights, in turn. A few rounds go by untimed: kernels are compiled in them. The
limit is the time of exactly the products of one such call, whose shapes never change
(``ProductLimit``). The default is moe-L, which takes hours of one core and up to 8 GB;
``--preset small`` takes a minute.
"""

import argparse
import gc
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from tools.bench.moe_contenders import DTYPES, Contenders
from tools.bench.moe_parts import Parts
from tools.bench.moe_products import ProductLimit, Sums
from tools.bench.timing import Timing, alternate, report
from tools.bench.world import world_of_one

SHAPES = {"moe-L": (4096, 1024, 2048), "small": (1024, 256, 512)}
"""Preset -> tokens, hidden size, width of an expert."""
CASES = {"moe-L": ["8x2", "32x2", "64x2", "64x8"], "small": ["8x2", "32x4"]}
ROUTINGS = ("balanced", "skewed")
MODES = ("training", "standalone")


class Tokens:
    """New tokens for each round; those of skewed routing prefer some experts, each time others."""

    def __init__(self, args: argparse.Namespace, dtype: str, routing: str) -> None:
        self.shape = (args.tokens, 1, args.hidden_size)
        self.dtype, self.topk = DTYPES[dtype], args.moe_router_topk
        self.rng = torch.Generator().manual_seed(1)
        shape = (args.num_experts, args.hidden_size)
        self.gate = torch.randn(shape, generator=self.rng) / args.hidden_size**0.5
        rank = torch.arange(1, args.num_experts + 1, dtype=torch.float32)
        self.popularity = -rank.log() if routing == "skewed" else torch.zeros_like(rank)
        self.grad = torch.randn(self.shape, generator=self.rng).to(self.dtype)
        self.tokens = self.draw()

    def draw(self) -> Tensor:
        """Return new tokens, which the next steps take."""
        order = torch.randperm(len(self.popularity), generator=self.rng)
        wanted = self.popularity[order]
        shift = torch.linalg.lstsq(self.gate, wanted.unsqueeze(1)).solution.flatten()
        tokens = torch.randn(self.shape, generator=self.rng) + shift
        self.tokens = tokens.to(self.dtype)
        return self.tokens

    def sizes(self) -> list[int]:
        """Return the rows of each expert in this round."""
        logits = self.tokens.flatten(0, 1).float() @ self.gate.t()
        chosen = logits.topk(self.topk, dim=1).indices
        return chosen.flatten().bincount(minlength=len(self.gate)).tolist()

    def step(self, forward: Callable[[Tensor], Tensor]) -> None:
        """Do one forward and backward."""
        forward(self.tokens.detach().requires_grad_()).backward(self.grad)


def bench(
    args: argparse.Namespace, dtype: str, routing: str, mode: str, peers: ModuleType | None
) -> list[dict[str, object]]:
    """Return the rows of one case."""
    tokens = Tokens(args, dtype, routing)
    made = Contenders(args, dtype, tokens.gate, peers, trains=mode == "training")
    _, weight1, weight2 = made.stacks
    sums = Sums(weight1.main_grad, weight2.main_grad) if made.trains else None
    sizes = tokens.sizes()
    calls: dict[str, Callable[[], object]] = {"limit": ProductLimit(weight1, weight2, sizes, sums)}
    if sums is not None and sums.weight1.dtype != weight1.dtype:
        calls["products alone"] = ProductLimit(weight1, weight2, sizes, None)
    chosen = args.contenders or made.forwards
    for name, forward in ((n, f) for n, f in made.forwards.items() if n in {"grouped", *chosen}):
        calls[name] = lambda forward=forward: (made.forget_gradients(), tokens.step(forward))
    whole = Parts(made.ours, tokens.tokens, tokens.grad)
    parts = whole.calls() if made.trains else {}

    def renew() -> None:
        whole.take(tokens.draw())
        made.forget_gradients()

    timings = alternate(calls | parts, args.rounds, before=renew, warm_up=args.warm_up)
    work = 18e-9 * sum(sizes) * args.hidden_size * args.moe_ffn_hidden_size  # 3 matrices x 3 x 2
    case = {
        "case": f"{args.num_experts}x{args.moe_router_topk}",
        "dtype": dtype,
        "routing": routing,
        "mode": mode,
    }
    rows = [case | _row(name, timings[name], timings["limit"], work) for name in calls]
    busy = {name: timing.busy for name, timing in timings.items()}
    for layer, left_out in (("grouped", "fused activation"), ("fused", "activation")):
        spent = {name: busy[name] for name in parts if name != left_out and layer in calls}
        spent |= {"parts in all": sum(spent.values())} if spent else {}
        rows += [
            case | {"what": f"- {layer}: {name}", "ms": 1e3 * cost, "of_layer": cost / busy[layer]}
            for name, cost in spent.items()
        ]
    return rows


def _row(name: str, timing: Timing, limit: Timing, work: float) -> dict[str, object]:
    return {
        "what": name,
        "ms": 1e3 * timing.busy,
        "wall_ms": 1e3 * timing.median,
        "gflops": work / timing.busy,
        "share_of_limit": limit.busy / timing.busy,
        "of_layer": None,
    }


def peers_installed() -> ModuleType | None:
    """Return transformers' Mixtral module; None where it is not installed."""
    try:
        return importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    except ImportError:
        return None


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(SHAPES), default="moe-L", help="Default shapes.")
    parser.add_argument("--tokens", type=int, help="Rows of one microbatch.")
    parser.add_argument("--hidden-size", type=int, help="Width of a token.")
    parser.add_argument("--moe-ffn-hidden-size", type=int, help="Width of an expert.")
    parser.add_argument("--cases", nargs="+", help="Experts x top-k, such as 8x2.")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rounds", type=int, default=5, help="Timed calls of each.")
    parser.add_argument("--warm-up", type=int, default=4, help="Untimed calls of each before.")
    parser.add_argument("--contenders", nargs="+", help="Which layers; all when not given.")
    parser.add_argument("--output", type=Path, default=None, help="Folder for the JSON file.")
    args = parser.parse_args(words)
    names = ("tokens", "hidden_size", "moe_ffn_hidden_size")
    for name, value in zip(names, SHAPES[args.preset], strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.cases = args.cases or CASES[args.preset]
    return args


def main() -> None:
    """Print one table for each case, and all together at the end."""
    args = parse()
    torch.set_num_threads(1)  # one core is what a rank has, and what processor time measures
    peers = peers_installed()
    if peers is None:
        print("transformers is not installed: its Mixtral layer is left out")
    rows: list[dict[str, object]] = []
    with world_of_one():
        for case in args.cases:
            args.num_experts, args.moe_router_topk = map(int, case.split("x"))
            for dtype in args.dtypes:
                for routing in args.routings:
                    for mode in args.modes:
                        found = bench(args, dtype, routing, mode, peers)
                        report(f"{case} {dtype} {routing} {mode}", found, None)
                        rows += found
                        gc.collect()
    report("moe_layer", rows, args.output)


if __name__ == "__main__":
    main()
