"""New experts of old ones: weights, moments, router rows, biases; tensor by tensor."""

from collections.abc import Mapping, Sequence
from hashlib import sha256

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.core.errors import CheckpointError
from tools.checkpoint.expert_plans import LayerPlan, NewExpert
from tools.checkpoint.keys import KeyParts, main_key, parts_of, with_expert
from tools.checkpoint.rewrite import Made, copied

_VALUES = ("model", "main_param")
_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
_SECOND_MOMENT = "exp_avg_sq"


def edited_tensors(
    source: StoredCheckpoint,
    plans: Mapping[int, LayerPlan],
    *,
    with_optim: bool = True,
    noise: float = 0.0,
) -> dict[str, Made]:
    """Return all tensors of the checkpoint after surgery.

    Args:
        source: Before it.
        plans: MoE layer -> its new experts; other layers stay.
        with_optim: Keep the optimizer's tensors.
        noise: Weights of copies after the first are multiplied by 1 + noise x N(0, 1).

    Raises:
        CheckpointError: Tensors of experts are missing, or of a kind that is not known here.
    """
    made: dict[str, Made] = {}
    for key in source.keys:
        parts = parts_of(key)
        if parts.is_optimizer and not with_optim:
            continue
        plan = None if parts.layer is None else plans.get(parts.layer)
        if plan is None or (parts.expert is None and parts.router is None):
            made[key] = copied(source, key)
            continue
        if parts.kind not in (*_VALUES, *_FIRST_MOMENTS, _SECOND_MOMENT):
            raise CheckpointError(f"{key}: surgery knows no state named {parts.kind}")
        if parts.router is not None:
            made[key] = _router_tensor(source, key, plan)
        elif parts.expert == 0:  # stands for all experts of the layer
            for number, new in enumerate(plan):
                spread = noise if new in plan[:number] else 0.0
                made[with_expert(key, number)] = _expert_tensor(source, key, number, new, spread)
    return made


def combined(kind: str, tensors: Sequence[Tensor], new: NewExpert) -> Tensor:
    """Return one tensor of a new expert.

    Weights are the weighted sum. The gradient of the new expert is ``new.share`` of the sum of its
    parts' gradients, so its first moment is that share of the sum of theirs. Its second moment is
    share^2 (sum of roots)^2: exact where the gradients are alike, as those of clones are, and else
    an upper bound (the triangle inequality), which makes steps smaller, never larger.

    Args:
        kind: ``model``, or the state of the optimizer.
        tensors: One for each of ``new.parts``.
        new: What to make.
    """
    first = tensors[0]
    if new.is_copy:
        factor = {_SECOND_MOMENT: new.share**2}.get(kind, 1.0 if kind in _VALUES else new.share)
        return first if factor == 1.0 else first * factor
    wide = torch.stack([tensor.double() for tensor in tensors])
    if kind in _VALUES:
        weights = torch.tensor([weight for _, weight in new.parts], dtype=torch.float64)
        total = (wide * weights.view(-1, *[1] * first.dim())).sum(dim=0)
    elif kind == _SECOND_MOMENT:
        total = (new.share * wide.sqrt().sum(dim=0)) ** 2
    else:
        total = new.share * wide.sum(dim=0)
    return total.to(first.dtype)


def _expert_tensor(
    source: StoredCheckpoint, key: str, number: int, new: NewExpert, noise: float
) -> Made:
    kind, facts = parts_of(key).kind, source.facts(key)
    origin = key if new.is_copy and not noise else _precise(source, key)
    needed = [with_expert(origin, expert) for expert, _ in new.parts]
    if missing := [name for name in needed if name not in source.index]:
        raise CheckpointError(f"{source.path} has no {missing[0]}")

    def make() -> Tensor:
        tensor = combined(kind, [source.read(name) for name in needed], new)
        if noise and kind in _VALUES:
            tensor = _noisy(tensor, noise, parts_of(with_expert(key, number)).name)
        return tensor.to(facts.dtype)

    return Made(facts, make)


def _router_tensor(source: StoredCheckpoint, key: str, plan: LayerPlan) -> Made:
    parts, facts = parts_of(key), source.facts(key)
    old = 1 + max(expert for new in plan for expert, _ in new.parts)
    if not facts.shape or facts.shape[0] < old:
        raise CheckpointError(f"{key} is {facts}: it has no row for each expert")
    origin = key if all(new.is_copy for new in plan) else _precise(source, key)

    def make() -> Tensor:
        rows = source.read(origin)
        picked = [_row(parts, rows, new) for new in plan]
        return torch.stack(picked).to(facts.dtype)

    return Made(TensorFacts((len(plan), *facts.shape[1:]), facts.dtype), make)


def _row(parts: KeyParts, rows: Tensor, new: NewExpert) -> Tensor:
    return combined(parts.kind, [rows[expert] for expert, _ in new.parts], new)


def _precise(source: StoredCheckpoint, key: str) -> str:
    """Return the key of the main weight, of which the weight is the rounded copy, if there is."""
    if parts_of(key).kind != "model" or main_key(key) not in source.index:
        return key
    return main_key(key)


def _noisy(tensor: Tensor, noise: float, name: str) -> Tensor:
    seed = int.from_bytes(sha256(name.encode()).digest()[:6], "big")
    drawn = torch.randn(
        tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return (tensor.double() * (1.0 + noise * drawn)).to(tensor.dtype)
