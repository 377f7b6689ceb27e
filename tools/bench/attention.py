"""Causal attention, forward and backward: ours in compiled blocks, ours by torch, torch's kernel.

The limit is the seven products of attention, their causal half, at the rate of this machine's best
product; ``products_ms`` are the same products by torch, in blocks of queries and nothing between.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor, nn

from megatron.core.cpu_kernels import choice
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.attention_weights import PLAIN
from megatron.core.transformer.blocked_attention import BLOCK, blocked_causal_attention
from megatron.core.transformer.compiled_attention import (
    compiled_attention,
    compiled_attention_of_projection,
)
from megatron.core.transformer.config.rotary import RotaryConfig
from megatron.core.transformer.fused_attention import fused_causal_attention
from megatron.core.transformer.rotary import split_and_rotate
from tools.bench.timing import Timing, alternate, gemm_gflops, report

_CALLS = ("ours", "blocked", "sdpa", "products", "ours_projection", "torch_projection")


class Sizes(NamedTuple):
    """Of the tensors of a layer."""

    samples: int
    heads: int
    groups: int
    sequence: int
    channels: int

    def flops(self) -> float:
        """Return the FLOPs of two products forward and five backward, their causal half."""
        return 7.0 * self.samples * self.heads * self.sequence**2 * self.channels


class Case:
    """The inputs of one size, and the calls that are timed."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype, device: str) -> None:
        b, heads, groups, s, d = sizes
        slots = heads // groups + 2
        self.sizes, self.device = sizes, device
        made = {"dtype": dtype, "device": device}
        self.mixed = torch.randn(s, b, groups, slots, d, **made).requires_grad_()
        self.qkv = [
            torch.randn(b, n, s, d, **made).requires_grad_() for n in (heads, groups, groups)
        ]
        self.upstream = torch.randn(s, b, heads, d, **made)
        config = RotaryConfig(position_embedding_type="rope")
        rotary = RotaryEmbedding(config, channels=d, rotary_dim=d)
        self.tables = rotary([range(s)], self.mixed, length=s)

    def calls(self) -> dict[str, Callable[[], object]]:
        """Return what can be timed on this device."""
        if self.device != "cpu":
            return {
                "ours": lambda: self._heads(lambda *x: fused_causal_attention(*x, None, PLAIN)),
                "blocked": lambda: self._heads(blocked_causal_attention),
                "sdpa": lambda: self._heads(self._sdpa),
                "products": self._products,
            }
        calls: dict[str, Callable[[], object]] = {
            "blocked": lambda: self._heads(blocked_causal_attention),
            "sdpa": lambda: self._heads(self._sdpa),
            "products": self._products,
            "torch_projection": self._by_torch,
        }
        if compiled_attention(*self.qkv, PLAIN) is None:
            return calls
        return {
            "ours": lambda: self._heads(lambda *x: _made(compiled_attention(*x, PLAIN))),
            "ours_projection": self._one_pass,
            **calls,
        }

    def _heads(self, attend: Callable[..., Tensor]) -> object:
        """Attend with heads that are split off and rotated."""
        return torch.autograd.grad(attend(*self.qkv), self.qkv, self.upstream.permute(1, 2, 0, 3))

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        return nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=grouped
        )

    def _one_pass(self) -> object:
        out = _made(compiled_attention_of_projection(self.mixed, self.tables, PLAIN))
        return torch.autograd.grad(out, self.mixed, self.upstream.flatten(2))

    def _by_torch(self) -> object:
        """From the projection to its gradient, as with --cpu-kernels torch."""
        with choice.using("torch"):
            heads = split_and_rotate(self.mixed, self.tables)
            attend = blocked_causal_attention if self.sizes.sequence <= 1024 else self._sdpa
            out = attend(*heads).permute(2, 0, 1, 3).flatten(2)
            return torch.autograd.grad(out, self.mixed, self.upstream.flatten(2))

    @torch.no_grad()
    def _products(self) -> None:
        b, _, groups, s, d = self.sizes
        query, key, value = (x.detach().reshape(b * groups, -1, s, d) for x in self.qkv)
        key, value = key[:, 0], value[:, 0]
        for start in range(0, s, BLOCK):
            end = min(start + BLOCK, s)
            rows, k, v = query[:, :, start:end].flatten(1, 2), key[:, :end], value[:, :end]
            scores = torch.bmm(rows, k.mT)
            torch.bmm(scores, v)
            torch.bmm(scores.mT, rows)
            torch.bmm(rows, v.mT)
            torch.bmm(scores.mT, rows)
            torch.bmm(scores, k)
            torch.bmm(rows, k.mT)


def _made(out: Tensor | None) -> Tensor:
    assert out is not None, "the kernel was there a moment ago"
    return out


def _row(
    sizes: Sizes, dtype: torch.dtype, limit: float, timings: dict[str, Timing]
) -> dict[str, object]:
    limit_ms = 1e-6 * sizes.flops() / limit
    row: dict[str, object] = {
        "dtype": str(dtype).removeprefix("torch."),
        "sequence": sizes.sequence,
        "samples": sizes.samples,
        "limit_ms": limit_ms,
    }
    for name in _CALLS:
        timing = timings.get(name)
        row[f"{name}_ms"] = None if timing is None else 1e3 * timing.busy
    if "ours" in timings:
        row["share"] = limit_ms / (1e3 * timings["ours"].busy)
        row["low_ms"], row["high_ms"] = 1e3 * timings["ours"].low, 1e3 * timings["ours"].high
    return row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=None, help="Folder for attention.json.")
    parser.add_argument("--rounds", type=int, default=7, help="Timed calls of each.")
    parser.add_argument("--tokens", type=int, default=2048, help="Of all samples, at least one.")
    parser.add_argument("--heads", type=int, default=8, help="Of queries.")
    parser.add_argument("--groups", type=int, default=8, help="Heads of keys and values.")
    parser.add_argument("--channels", type=int, default=64, help="Of a head.")
    parser.add_argument(
        "--sequences", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], help="Positions."
    )
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        limit = gemm_gflops(512, 512, 2048, dtype, device)
        for s in args.sequences:
            samples = max(1, args.tokens // s)
            sizes = Sizes(samples, args.heads, args.groups, s, args.channels)
            timings = alternate(Case(sizes, dtype, device).calls(), args.rounds)
            rows.append(_row(sizes, dtype, limit, timings))
    report("attention", rows, args.output)


if __name__ == "__main__":
    main()
