"""fp32 matrix products by oneDNN instead of MKL, on processors where that is exact and faster.

``torch.set_float32_matmul_precision("medium")`` allows oneDNN to round to bf16. It does so where
the processor has AMX, and not elsewhere: there it computes true fp32, 1.03 to 1.24 times as fast as
MKL on AMD. What a run computes must not depend on a measured time, so nothing is timed here.
"""

from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron.core.errors import BackendError

Choice = Literal["auto", "onednn", "torch"]
EXACT = 1e-5
"""Largest error of a product of random numbers, of its largest entry, that is fp32's: products of
bf16 numbers are wrong by 1e-3, those of fp32 by 3e-7."""
_SIZES = ((64, 512, 64), (512, 512, 512))


def choose_products(choice: Choice, *, wanted_here: bool | None = None) -> str:
    """Take oneDNN's fp32 products if ``choice`` and all ranks agree; return a phrase.

    Every rank calls this once the default process group is there: the ranks compute alike.

    Args:
        choice: ``auto``: on AMD, where exact. ``onednn``: wherever exact. ``torch``: never.
        wanted_here: Whether auto wants them on this processor; looked up when None.

    Raises:
        BackendError: On every rank: ``onednn``, and some rank would get bf16 products.
    """
    wanted = choice == "onednn"
    if choice == "auto":
        wanted = is_faster_here() if wanted_here is None else wanted_here
    if not _all(wanted):
        return ""
    torch.set_float32_matmul_precision("medium")
    error = product_error()
    if _all(error < EXACT):
        return "fp32 products by oneDNN, which are exact here"
    torch.set_float32_matmul_precision("highest")
    if choice == "onednn":
        raise BackendError(
            f"--cpu-float32-products onednn: a product is wrong by {error:.0e} of its largest "
            "entry, on this rank or another whose processor has AMX: leave it out"
        )
    return "fp32 products by MKL: not exact with oneDNN on every rank"


def is_faster_here() -> bool:
    """Whether oneDNN was measured to be faster than MKL on processors of this maker: AMD."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return False


def product_error() -> float:
    """Return the largest error of fp32 products, against fp64, of the largest entry."""
    worst = 0.0
    generator = torch.Generator().manual_seed(1)
    for rows, inner, columns in _SIZES:
        left = torch.randn(rows, inner, generator=generator)
        right = torch.randn(columns, inner, generator=generator)
        exact = left.double() @ right.double().t()
        found = torch.nn.functional.linear(left, right).double()
        worst = max(worst, ((found - exact).abs().max() / exact.abs().max()).item())
    return worst


def _all(here: bool) -> bool:
    """Whether it holds on every rank."""
    votes = torch.tensor(int(here))
    dist.all_reduce(votes, op=dist.ReduceOp.MIN)
    return bool(votes.item())
