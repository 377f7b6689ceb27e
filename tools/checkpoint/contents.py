"""What a checkpoint holds, counted: parts of the model, experts, parameters, bytes by kind."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from tools.checkpoint.keys import KeyParts, model_order, parts_of

_BUFFERS = ("expert_bias", "qb_beta")
KINDS = {
    "model": "weights",
    "exp_avg": "first moments",
    "exp_avg_sq": "second moments",
    "momentum_buffer": "momentum",
    "main_param": "main weights",
    "rng": "random states",
}
"""Kind of a key -> its name for users."""


@dataclass
class Part:
    """A layer of the model, or what stands outside of layers."""

    name: str
    """``layer 3``, ``embedding``, ..."""
    experts: int = 0
    """Routed experts; 0 in what is dense."""
    topk: int | None = None
    """Experts of a token."""
    parameters: int = 0
    expert_parameters: int = 0
    """Of them, those of routed experts."""
    bytes_of: Counter[str] = field(default_factory=Counter)
    """Kind -> bytes."""
    dtypes: set[str] = field(default_factory=set)
    """Of its weights."""

    @property
    def kind(self) -> str:
        """``MoE``, ``dense`` or nothing."""
        if not self.name.startswith("layer"):
            return ""
        return "MoE" if self.experts else "dense"


@dataclass(frozen=True)
class Contents:
    """A checkpoint, counted."""

    parts: list[Part]
    bytes_of: Counter[str]
    """Kind -> bytes of all of it."""
    tensors: int
    files: int
    """Files of tensors."""

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(part.parameters for part in self.parts)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses."""
        return self.parameters - sum(
            part.expert_parameters // part.experts * (part.experts - (part.topk or 0))
            for part in self.parts
            if part.experts
        )

    def data(self) -> dict[str, Any]:
        """Return it as plain data for JSON."""
        return {
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "tensors": self.tensors,
            "files": self.files,
            "bytes": dict(self.bytes_of),
            "parts": [
                {
                    "name": part.name,
                    "kind": part.kind,
                    "experts": part.experts,
                    "topk": part.topk,
                    "parameters": part.parameters,
                    "expert_parameters": part.expert_parameters,
                    "bytes": dict(part.bytes_of),
                    "dtypes": sorted(part.dtypes),
                }
                for part in self.parts
            ],
        }


def contents_of(checkpoint: StoredCheckpoint) -> Contents:
    """Count what ``checkpoint`` holds; reads no tensor."""
    parts: dict[str, Part] = {}
    total: Counter[str] = Counter()
    topk = _topk_by_layer(checkpoint.common)
    for key in sorted(checkpoint.keys, key=model_order):
        found, facts = parts_of(key), checkpoint.facts(key)
        total[found.kind] += facts.nbytes
        if found.kind == "rng":
            continue
        part = parts.setdefault(name := _part_name(found), Part(name))
        part.bytes_of[found.kind] += facts.nbytes
        if found.expert is not None:
            part.experts = max(part.experts, found.expert + 1)
            part.topk = topk.get(found.layer)
        if found.kind == "model":
            part.dtypes.add(str(facts.dtype).removeprefix("torch."))
            if found.router not in _BUFFERS:
                part.parameters += math.prod(facts.shape)
            if found.expert is not None:
                part.expert_parameters += math.prod(facts.shape)
    files = {block.file for tensor in checkpoint.index.values() for block in tensor.blocks}
    return Contents(list(parts.values()), total, len(checkpoint.keys), len(files))


def matching(checkpoint: StoredCheckpoint, patterns: str | None) -> list[str]:
    """Return the keys that match one of ``patterns``, in the order of the model.

    Args:
        checkpoint: Has the keys.
        patterns: Separated by commas; with * and ?, or a part of the key. All when None.
    """
    words = ["*"] if not patterns else [word.strip() for word in patterns.split(",")]
    globs = [word if set(word) & set("*?[") else f"*{word}*" for word in words]
    keys = [key for key in checkpoint.keys if any(fnmatchcase(key, glob) for glob in globs)]
    return sorted(keys, key=model_order)


def _part_name(parts: KeyParts) -> str:
    if parts.layer is not None:
        return f"layer {parts.layer}"
    if parts.name.startswith("embedding."):
        return "embedding"
    return parts.name.removeprefix("decoder.").partition(".")[0].replace("_", " ")


def _topk_by_layer(common: Mapping[str, Any]) -> dict[int | None, int]:
    flags = common["architecture"]
    by_layer = flags.get("--moe-router-topk-per-layer")
    if by_layer:
        return dict(enumerate(by_layer))
    layers = range(flags.get("--num-layers") or 0)
    return {layer: flags.get("--moe-router-topk") or 0 for layer in layers}
