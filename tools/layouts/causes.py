"""What a wrong tensor and its factor say about the mistake: numbers with names, causes in words."""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from tools.layouts.first_difference import First
from tools.layouts.trace import LOSS

_CLOSE = 1e-3
"""A factor within this of a ratio of sizes is called by their names."""
_EXPLAINED = 1e-2
"""A residual below this: the tensor is the right one times the factor."""


def ratio_in_words(first: First, sizes: Mapping[str, int]) -> str:
    """Name the factor by the sizes that it may come from.

    Args:
        first: What differs.
        sizes: Name -> number, such as ``TP``: 2; ones are never named.
    """
    ratio, residual = first.difference.ratio, first.difference.residual
    if ratio != ratio:
        return "the right one is zero"
    if abs(ratio) < _CLOSE and residual < _CLOSE:
        return "factor 0: it is missing"
    shown = f"factor {ratio:.6g}"
    if not residual < _EXPLAINED:
        return f"no single factor (least squares {ratio:.4g}, unexplained {residual:.2g})"
    names = [name for name, value in _factors(sizes).items() if abs(ratio / value - 1) < _CLOSE]
    return f"{shown} = {' = '.join(names)}" if names else shown


def _factors(sizes: Mapping[str, int]) -> dict[str, float]:
    """Return sizes, products of two, and what is one over them, by name."""
    own = {name: float(size) for name, size in sizes.items() if size > 1}
    pairs = {f"{a} x {b}": own[a] * own[b] for n, a in enumerate(own) for b in list(own)[n + 1 :]}
    found = own | {name: value for name, value in pairs.items() if value not in own.values()}
    return found | {
        f"1 / ({name})" if " " in name else f"1 / {name}": 1 / value
        for name, value in found.items()
    }


class Kind(NamedTuple):
    """Parameters that are reduced alike."""

    name: str
    pattern: str


KINDS = (
    Kind("experts", r"\.experts\.|\.local_experts\."),
    Kind("routers", r"\.router\."),
    Kind("shared experts", r"\.shared_experts\."),
    Kind("norms", r"layernorm"),
    Kind("embedding", r"^embedding\."),
    Kind("output layer", r"^output_layer\."),
    Kind("attention", r"\.self_attention\."),
    Kind("MLPs", r"\.mlp\."),
)


def kind_of(name: str) -> str:
    """Return the kind of a parameter by its global name."""
    return next((kind.name for kind in KINDS if re.search(kind.pattern, name)), "others")


def likely_cause(first: First) -> str:
    """Say in words what usually makes such a difference."""
    what = first.difference.what
    return next(
        sentence(first) for words, sentence in _CAUSES.items() if what.endswith(words.strip())
    )


def _output(first: First) -> str:
    name = first.difference.name
    if name == "embedding":
        return (
            "embedding: rows of the vocabulary slices, positions of this rank's part of the "
            "sequence, or dropout that depends on the rank"
        )
    if name in (LOSS, "decoder.final_layernorm"):
        return "final norm, output layer or cross entropy over slices of the vocabulary"
    if name.endswith("self_attention"):
        return (
            "attention: heads or keys of other ranks, rotary positions, masks, or dropout of "
            "attention weights that depends on the rank"
        )
    if name.endswith("mlp"):
        return (
            "MLP or experts: order of slices, splits of the dispatcher, an output bias added by "
            "several ranks, or a choice of experts over the wrong tokens"
        )
    return "the residual sum behind a right branch: dropout that depends on the rank, or a bias"


def _loss(first: First) -> str:
    return (
        "the losses of tokens are right and their mean is not: summed, or their tokens counted, "
        "over the wrong group"
    )


def _activation_gradient(first: First) -> str:
    if first.difference.name == LOSS:
        return "the number of tokens that losses are divided by before backward"
    return (
        f"backward of what follows {first.difference.name}: a collective whose backward is not "
        "the mirror of its forward, or a gradient summed once too often"
    )


def _gradient(first: First) -> str:
    kinds = sorted({kind_of(name) for name in first.others})
    only = " and ".join(kinds)
    layers = sorted({int(n) for x in first.others for n in re.findall(r"layers\.(\d+)\.", x)})
    if kinds == ["experts"]:
        return (
            "gradients of experts only: summed over another group than the ranks that hold the "
            "same experts (expt_dp), or scaled"
        )
    if kinds == ["routers"]:
        return (
            "gradients of routers only: scale of balance losses, or not summed over the ranks "
            "that route other tokens (tp with shares of a sequence)"
        )
    if kinds == ["embedding"]:
        return "gradient of the embedding only: a tied weight summed twice or on one end only"
    if "norms" in kinds and not {"experts", "embedding"} & set(kinds):
        return (
            f"gradients of {only}: every tensor-parallel rank saw a share of the tokens and they "
            "are not summed over tp"
        )
    if len(layers) == 1 and len(first.others) > 1:
        return f"all gradients of layer {layers[0]}: those of a chunk or of a bucket are lost"
    return f"gradients of {only}: reduced over the wrong group, scaled, or a microbatch is lost"


def _norm(first: First) -> str:
    return (
        "every gradient is right and their norm is not: a part is counted twice, or not on "
        "every rank"
    )


def _weight(first: First) -> str:
    if all(name.endswith(("expert_bias", "qb_beta")) for name in first.others):
        return "expert biases: tokens counted over the wrong group, or moved more than once"
    return (
        "gradients and norm are right: clipping, the slices that the sharded optimizer owns, or "
        "weights that were not gathered"
    )


def _initial(first: First) -> str:
    return (
        "weights before the first step: drawn by something that depends on the rank, or slices "
        "in another order"
    )


def _counts(first: First) -> str:
    return "figures alone: summed over the wrong group, or recomputed forwards counted again"


_CAUSES: dict[str, Callable[[First], str]] = {
    "initial weight": _initial,
    "output": _output,
    "lm loss": _loss,
    "gradient of": _activation_gradient,
    "gradient": _gradient,
    "grad norm": _norm,
    "weight": _weight,
    "": _counts,
}


def named_sizes(sizes: Mapping[str, int], num_microbatches: int) -> dict[str, int]:
    """Return the numbers that a wrong factor may be, by name.

    Args:
        sizes: Ranks along ``tp``, ``cp``, ``pp``, ``dp``, ``ep`` and ``etp``.
        num_microbatches: Of one data rank and step.
    """
    world = math.prod(sizes[axis] for axis in ("tp", "cp", "pp", "dp"))
    edp = world // (sizes["ep"] * sizes["etp"] * sizes["pp"])
    named = {axis.upper(): sizes[axis] for axis in ("tp", "cp", "dp", "ep", "etp", "pp")}
    return named | {"EDP": edp, "microbatches": num_microbatches}
