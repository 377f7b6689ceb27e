"""Builds the model of every rank without memory, and counts what lies where."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

from megatron.core.param_role import ParamRole, deferred_init, logical_shards, role_of
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.config.run_config import RunConfig
from megatron.training.dry_run.rank_groups import GroupTable
from megatron.training.setup_model import ModelProvider


@dataclass(frozen=True, kw_only=True)
class RankModel:
    """What one rank holds of the model."""

    rank: int
    layers: tuple[int, ...]
    """Global numbers of its transformer layers."""
    parts: tuple[str, ...]
    """What else it holds: ``embedding``, ``final norm``, ``head``."""
    experts: tuple[int, ...]
    """Routed experts of each of its MoE layers; 0 for a dense layer."""
    dense_params: int
    expert_params: int
    weight_bytes: int
    kind: str
    """Equal for ranks whose parameters are alike but for the numbers of layers and experts."""

    @property
    def params(self) -> int:
        """Parameters of the rank."""
        return self.dense_params + self.expert_params


class PartSize(NamedTuple):
    """Parameters of a part of the model, every weight counted once."""

    dense_params: int = 0
    expert_params: int = 0
    active_params: int = 0
    """Those that one token meets: all dense ones, and of each MoE layer its top-k experts."""


class WholeModel(NamedTuple):
    """All ranks together."""

    parts: dict[str, PartSize]
    """By the first word of the parameters' names: embedding, decoder, mtp, output_layer."""
    missing: tuple[str, ...]
    """What no rank holds, or not all of; empty in a sound layout."""

    @property
    def dense_params(self) -> int:
        """Parameters outside of routed experts."""
        return sum(part.dense_params for part in self.parts.values())

    @property
    def expert_params(self) -> int:
        """Parameters of routed experts."""
        return sum(part.expert_params for part in self.parts.values())

    @property
    def active_params(self) -> int:
        """Those that one token meets."""
        return sum(part.active_params for part in self.parts.values())

    @property
    def params(self) -> int:
        """Parameters of the model."""
        return self.dense_params + self.expert_params


@dataclass(frozen=True, kw_only=True)
class Census:
    """All ranks of a run."""

    ranks: tuple[RankModel, ...]
    whole: WholeModel


_PARTS = {
    "embedding.": "embedding",
    "decoder.final_layernorm.": "final norm",
    "output_layer.": "head",
}


def take_census(config: RunConfig, provider: ModelProvider, table: GroupTable) -> Census:
    """Build the model of each rank in turn; at most one exists at a time.

    Ranks that differ in the samples they read alone hold the same: one of them is built.
    """
    ranks: list[RankModel] = []
    alike: dict[tuple[int, ...], RankModel] = {}
    tally = _Tally()
    for rank in range(table.layout.world_size):
        groups = table.collection(rank)
        parted = (groups.tp, groups.cp, groups.pp, groups.ep, groups.expt_tp)
        places = tuple(group.rank() for group in parted)
        if places not in alike:
            with torch.device("meta"), deferred_init(), _checked(rank > 0):
                model = provider(config, groups)
            alike[places] = _describe(rank, model)
            tally.add(model)
        ranks.append(replace(alike[places], rank=rank))
    return Census(ranks=tuple(ranks), whole=tally.whole(config.model))


@contextmanager
def _checked(already: bool) -> Iterator[None]:
    """Do not check the config again in every layer of every rank; it is one and the same."""
    if not already:
        yield
        return
    with mock.patch.object(TransformerConfig, "check", return_value=None):
        yield


def _describe(rank: int, model: nn.Module) -> RankModel:
    layers: dict[int, int] = {}
    parts: dict[str, None] = {}
    params = {False: 0, True: 0}
    size = 0
    alike = hashlib.sha256()
    for name, param in model.named_parameters():
        role = role_of(param)
        params[role.is_expert] += param.numel()
        size += param.numel() * param.element_size()
        number, rest = _layer_of(name)
        if number is not None:
            place = list(layers).index(number) if number in layers else len(layers)
            layers[number] = max(layers.get(number, 0), len(_experts(name, role)))
            rest = f"{place}.{rest}"
        else:
            parts |= {part: None for prefix, part in _PARTS.items() if name.startswith(prefix)}
        shape = tuple(param.shape)
        alike.update(repr((_without_expert(rest, role), shape, str(param.dtype))).encode())
    stages = getattr(model, "stages", None)
    if stages is not None:  # it knows, also of a head that is tied to the embedding
        names = [name for stage in stages for name in stage.parts()]
        parts = dict.fromkeys(n for n in names if not n.startswith("layer ") and n != "loss")
    return RankModel(
        rank=rank,
        layers=tuple(layers),
        parts=tuple(parts),
        experts=tuple(layers.values()),
        dense_params=params[False],
        expert_params=params[True],
        weight_bytes=size,
        kind=alike.hexdigest(),
    )


def _layer_of(name: str) -> tuple[int | None, str]:
    """Return the number of the transformer layer that ``name`` is in, and its name there."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return None, name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return int(number), rest


def _experts(name: str, role: ParamRole) -> Sequence[int]:
    if role.expert_ids is not None:
        return role.expert_ids
    before, found, after = name.partition(".local_experts.")
    return range(int(after.partition(".")[0]) + 1) if found and before else ()


def _without_expert(name: str, role: ParamRole) -> str:
    """Leave out the global number of an expert that has a parameter of its own."""
    if not role.is_expert or ".local_experts." not in name:
        return name
    before, _, after = name.partition(".local_experts.")
    return f"{before}.expert.{after.partition('.')[2]}"


class _Tally:
    """Every logical tensor that came, and which blocks of it."""

    def __init__(self) -> None:
        self._sizes: dict[str, tuple[int, bool]] = {}
        self._blocks: dict[str, dict[tuple[int, ...], int]] = {}
        self._seen: set[tuple[str, str]] = set()
        self._layers: set[int] = set()

    def add(self, model: nn.Module) -> None:
        for name, param in model.named_parameters():
            role = role_of(param)
            key = (name, repr(role))
            if key in self._seen:
                continue  # a replica
            self._seen.add(key)
            number, _ = _layer_of(name)
            if number is not None:
                self._layers.add(number)
            for shard in logical_shards(name, param, role):
                self._sizes[shard.name] = (torch.Size(shard.shape).numel(), role.is_expert)
                self._blocks.setdefault(shard.name, {})[shard.offset] = shard.tensor.numel()

    def whole(self, config: TransformerConfig) -> WholeModel:
        sizes: dict[tuple[str, int | None], list[int]] = {}
        for name, (size, is_expert) in self._sizes.items():
            place = (name.partition(".")[0], _layer_of(name)[0])
            sizes.setdefault(place, [0, 0])[is_expert] += size
        parts: dict[str, PartSize] = {}
        for (part, number), (dense, experts) in sizes.items():
            own = config if number is None or not experts else config.for_layer(number)
            count = own.num_moe_experts or 1
            used = experts * own.moe_router_topk // count
            old = parts.get(part, PartSize())
            added = PartSize(dense, experts, dense + used)
            parts[part] = PartSize(*(a + b for a, b in zip(old, added, strict=True)))
        return WholeModel(parts, tuple(self._missing(config.num_layers)))

    def _missing(self, num_layers: int) -> Iterator[str]:
        yield from (f"layer {n}" for n in range(num_layers) if n not in self._layers)
        for name, (size, _) in self._sizes.items():
            held = sum(self._blocks[name].values())
            if held != size:
                yield f"{name}: {held:,} of {size:,} elements"
