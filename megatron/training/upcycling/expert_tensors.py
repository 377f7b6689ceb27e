"""The tensors of an upcycled model, each made of one tensor of the dense one.

Nothing is kept but the dense tensor that was read last. What is drawn depends on the name of the
tensor and the seed, so that every run of the tool makes the same bytes.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.index import TensorFacts
from megatron.core.dist_checkpointing.mapping import MODEL
from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.core.errors import CheckpointError
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.upcycling.preservation import Recipe, folds, router_std
from megatron.training.upcycling.widths import Channels, channels_of

_MLP = re.compile(rf"^{re.escape(MODEL)}(decoder\.layers\.(\d+)\.mlp)\.(.+)$")
_FC2_WEIGHT, _FC2_BIAS = "linear_fc2.weight", "linear_fc2.bias"
# gate, up: of gated MLPs; dimension 0 runs over the ffn channels
_FC1 = frozenset(
    f"linear_fc1.{part}{kind}" for part in ("", "gate.", "up.") for kind in ("weight", "bias")
)


@dataclass(frozen=True)
class Made:
    """A tensor of the new checkpoint."""

    facts: TensorFacts
    make: Callable[[], Tensor]
    """Reads and computes it, of this shape and dtype."""


def upcycled_tensors(
    source: StoredCheckpoint, model: TransformerConfig, recipe: Recipe
) -> dict[str, Made]:
    """Return all tensors of the upcycled model by key; optimizer and random states are left out.

    Args:
        source: The dense model.
        model: The upcycled one; ``fitting_problems`` has found nothing.
        recipe: How experts are made.

    Raises:
        CheckpointError: The MLP of a layer has a tensor that is not known here, or lacks one.
    """
    made: dict[str, Made] = {}
    found: dict[int, set[str]] = {}
    reader = _LastRead(source)
    for key in source.keys:
        if not key.startswith(MODEL):
            continue
        match = _MLP.match(key)
        if match is None or int(match[2]) not in model.moe_layers:
            made[key] = Made(source.facts(key), partial(source.read, key))
            continue
        layer = _Layer(f"{MODEL}{match[1]}", int(match[2]), model, recipe, reader)
        if not found.setdefault(layer.number, set()):
            made |= layer.router_tensors(source)
        found[layer.number].add(match[3])
        made |= layer.tensors_of(match[3], source.facts(key))
    _refuse_holes(source, model.moe_layers, found)
    return made


class _LastRead:
    """Reads tensors of a checkpoint and keeps the last: the experts of a layer share one."""

    def __init__(self, source: StoredCheckpoint) -> None:
        self._source = source
        self._key, self._tensor = "", torch.empty(0)

    def __call__(self, key: str) -> Tensor:
        if key != self._key:
            self._tensor = torch.empty(0)  # never two of them
            self._key, self._tensor = key, self._source.read(key)
        return self._tensor


class _Layer:
    """One layer that becomes a mixture."""

    def __init__(
        self,
        prefix: str,
        number: int,
        model: TransformerConfig,
        recipe: Recipe,
        reader: Callable[[str], Tensor],
    ) -> None:
        self.prefix, self.number, self.recipe, self.reader = prefix, number, recipe, reader
        self.model = model.for_layer(number)
        self.experts = self.model.num_moe_experts or 1
        self.channels = channels_of(model, recipe.granularity)
        self.fold = folds(model, recipe.granularity)[number]

    def tensors_of(self, name: str, facts: TensorFacts) -> dict[str, Made]:
        """Return what the tensor ``name`` of the dense MLP becomes."""
        if name not in (*_FC1, _FC2_WEIGHT, _FC2_BIAS):
            raise CheckpointError(f"{self.prefix}.{name}: upcycling knows no such tensor of an MLP")
        whole = facts.shape[1 if name == _FC2_WEIGHT else 0]
        if name != _FC2_BIAS and whole != self.channels.total:
            raise CheckpointError(
                f"{self.prefix}.{name} is {facts}: it has no {self.channels.total} ffn channels"
            )
        made = {}
        if self.channels.shared:
            cut = slice(0, self.channels.shared)
            made[f"{self.prefix}.shared_experts.{name}"] = Made(
                _cut_facts(name, facts, cut), partial(self._shared, name, cut)
            )
        cut = self.channels.of_expert(0)
        for expert in range(self.experts):
            key = f"{self.prefix}.experts.local_experts.{expert}.{name}"
            made[key] = Made(_cut_facts(name, facts, cut), partial(self._expert, expert, name))
        return made

    def _dense(self, name: str) -> Tensor:
        return self.reader(f"{self.prefix}.{name}")

    def _shared(self, name: str, channels: slice) -> Tensor:
        return _cut(name, self._dense(name), channels).clone()

    def _expert(self, expert: int, name: str) -> Tensor:
        dense, recipe = self._dense(name), self.recipe
        tensor = _cut(name, dense, self.channels.of_expert(expert)).double()
        if recipe.drop and name != _FC2_BIAS:
            tensor = self._drawn_anew(tensor, expert, name)
        if recipe.noise and expert >= recipe.granularity:
            drawn = torch.randn(
                tensor.shape, generator=self._generator(expert, name), dtype=torch.float64
            )
            tensor = tensor * (1.0 + recipe.noise * drawn)
        if name == _FC2_WEIGHT:
            tensor = tensor * self.fold
        elif name == _FC2_BIAS:
            # the shared expert adds it, once for each token; else each slice adds its part
            share = 0.0 if self.channels.shared else self.fold / recipe.granularity
            tensor = tensor * share
        return tensor.to(dense.dtype).contiguous()

    def _drawn_anew(self, tensor: Tensor, expert: int, name: str) -> Tensor:
        """Draw some ffn channels from a normal distribution with the mean and spread they had."""
        width = self.channels.slice_width
        number = round(self.recipe.drop * width)
        picked = torch.randperm(width, generator=self._generator(expert, "channels"))[:number]
        dim = 1 if name == _FC2_WEIGHT else 0
        old = tensor.index_select(dim, picked)
        if not old.numel():
            return tensor
        generator = self._generator(expert, f"drop.{name}")
        drawn = torch.randn(old.shape, generator=generator, dtype=torch.float64)
        spread = old.std(correction=0)
        return tensor.index_copy(dim, picked, drawn * spread + old.mean())

    def _generator(self, expert: int, what: str) -> torch.Generator:
        name = f"{self.recipe.seed}/{self.prefix}.{expert}.{what}"
        seed = int.from_bytes(sha256(name.encode()).digest()[:6], "big")
        return torch.Generator().manual_seed(seed)

    def router_tensors(self, source: StoredCheckpoint) -> dict[str, Made]:
        """Return rows that are alike for the slices of a copy; biases and prices begin at 0."""
        hidden = self.model.hidden_size
        dtype = source.facts(f"{MODEL}embedding.word_embeddings.weight").dtype
        prefix = f"{self.prefix}.router."
        made = {
            prefix + "weight": Made(
                TensorFacts((self.experts, hidden), dtype), partial(self._router_rows, dtype)
            )
        }
        wide = TensorFacts((self.experts,), torch.float32)
        if self.model.moe_router_enable_expert_bias:
            made[prefix + "expert_bias"] = _zeros(wide)
        if self.model.moe_router_choice == "quantile_balancing":
            made[prefix + "qb_beta"] = _zeros(wide)
        if self.model.moe_router_bias:
            made[prefix + "bias"] = _zeros(TensorFacts((self.experts,), dtype))
        return made

    def _router_rows(self, dtype: torch.dtype) -> Tensor:
        # the router computes in fp32 at least, but fp16 rows cannot be as small
        rounding = max(2.0**-23, torch.finfo(torch.float16).eps * (dtype == torch.float16))
        std = self.recipe.router_std
        std = router_std(self.model, rounding) if std is None else std
        copies = self.experts // self.recipe.granularity
        shape = (copies, self.model.hidden_size)
        rows = torch.randn(shape, generator=self._generator(0, "router"), dtype=torch.float64)
        return (rows * std).to(dtype).repeat_interleave(self.recipe.granularity, dim=0)


def _cut(name: str, tensor: Tensor, channels: slice) -> Tensor:
    if name == _FC2_BIAS:
        return tensor
    return tensor[:, channels] if name == _FC2_WEIGHT else tensor[channels]


def _cut_facts(name: str, facts: TensorFacts, channels: slice) -> TensorFacts:
    width = channels.stop - channels.start
    if name == _FC2_BIAS:
        return facts
    first, *rest = facts.shape
    return TensorFacts((first, width) if name == _FC2_WEIGHT else (width, *rest), facts.dtype)


def _zeros(facts: TensorFacts) -> Made:
    return Made(facts, lambda: torch.zeros(facts.shape, dtype=facts.dtype))


def _refuse_holes(
    source: StoredCheckpoint, layers: Iterable[int], found: Mapping[int, set[str]]
) -> None:
    """Refuse layers whose MLP is not there, or is unlike that of the others."""
    names = set().union(*found.values())
    for layer in layers:
        if missing := sorted(names - found.get(layer, set())) or [] if names else ["linear_fc2"]:
            raise CheckpointError(f"{source.path} has no mlp.{missing[0]} of layer {layer}")


def channel_text(channels: Channels) -> str:
    """Say how the channels of the MLP are shared out."""
    slices = f" x {channels.granularity} slices" if channels.granularity > 1 else ""
    shared = f"{channels.shared} shared + " if channels.shared else ""
    return f"{channels.total} ffn channels = {shared}{channels.slice_width}{slices}"
