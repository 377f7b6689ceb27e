"""The receipt of upcycling: how far the mixture is from the dense model, on real text, in fp32.

Rounding is measured, not guessed: it is how far the dense model in fp32 is from itself in fp64.
"""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron.core.dist_checkpointing.mapping import model_tensors
from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.core.dist_checkpointing.store import OpenCheckpoint
from megatron.core.errors import CheckpointError
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.training.checkpoint_model import empty_model, for_one_process
from megatron.training.resume_rules import config_from_data
from megatron.training.upcycling.preservation import Recipe
from tools.checkpoint.upcycle_text import Rows

RECEIPT = "upcycling_receipt.json"
ALLOWED = 10.0
"""A difference of up to this many times the largest rounding of the dense model is rounding: sums
of experts are in another order than the product of the MLP, and weights are rounded too."""
_ROUNDING_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What was compared, and how far it is apart. Logits, perplexities and KL are of all tokens."""

    dense: str
    mixture: str
    text: str
    num_tokens: int
    row_length: int
    largest_logit: float
    max_logit_difference: float
    mean_logit_difference: float
    kl_divergence: float
    """Of the mixture from the dense model, nats a token."""
    perplexity_before: float
    perplexity_after: float
    rounding: float
    """Largest difference of a logit of the dense model in fp32 from the same in fp64."""
    busiest_expert: float
    """Tokens of the busiest expert of any layer, in multiples of the mean of its layer."""
    changes: str
    """What was asked for that changes the function; empty if nothing."""

    @property
    def kept(self) -> bool:
        """Whether the mixture computes what the dense model does, to rounding."""
        return self.max_logit_difference <= ALLOWED * self.rounding

    @property
    def is_wrong(self) -> bool:
        """Whether the function should have been kept and was not."""
        return not self.kept and not self.changes

    @property
    def verdict(self) -> str:
        """Say it in one line."""
        ratio = self.max_logit_difference / self.rounding if self.rounding else math.inf
        times = f"the largest difference is {ratio:.3g} times the rounding of the dense model"
        if self.kept:
            return f"kept to rounding: {times}"
        if self.changes:
            return f"changed by {self.changes}: {times}"
        return f"NOT KEPT: {times}, more than {ALLOWED:g}"

    def table(self) -> str:
        """Return it for people."""
        rows = {
            "text": f"{self.num_tokens} tokens of {self.text}",
            "largest logit": f"{self.largest_logit:.4g}",
            "logit difference, max": f"{self.max_logit_difference:.3e}",
            "logit difference, mean": f"{self.mean_logit_difference:.3e}",
            "rounding (fp32 - fp64)": f"{self.rounding:.3e}",
            "KL divergence": f"{self.kl_divergence:.3e} nats a token",
            "perplexity before": f"{self.perplexity_before:.6f}",
            "perplexity after": f"{self.perplexity_after:.6f}",
            "busiest expert": f"{self.busiest_expert:.2f} x the mean",
            "verdict": self.verdict,
        }
        width = max(map(len, rows)) + 2
        return "\n".join(f"{name:{width}}{text}" for name, text in rows.items())

    def data(self) -> dict[str, Any]:
        """Return it for programs."""
        return {**asdict(self), "allowed": ALLOWED, "kept": self.kept, "verdict": self.verdict}

    def write(self, folder: Path) -> Path:
        """Write it as JSON beside the checkpoint; returns the file."""
        file = folder / RECEIPT
        file.write_text(json.dumps(self.data(), indent=1) + "\n", encoding="utf-8")
        return file


def measured(
    dense: StoredCheckpoint, mixture: StoredCheckpoint, rows: Rows, recipe: Recipe
) -> Receipt:
    """Compare two checkpoints.

    Args:
        dense: Before upcycling.
        mixture: After it.
        rows: What they read.
        recipe: What changed.

    Raises:
        CheckpointError: Tensors of one of them are not those of its model.
    """
    known = known_ids(dense)
    few = rows.tokens[: max(1, _ROUNDING_TOKENS // rows.tokens.shape[1])]
    wide = [logits.clone() for logits in _logits(_model(dense, torch.float64), few, known)]
    before, after = _model(dense, torch.float32), _model(mixture, torch.float32)
    sums, rounding = _Sums(), 0.0
    with _Loads(after) as loads:
        both = (_logits(model, rows.tokens, known) for model in (before, after))
        pairs = zip(*both, strict=True)
        for number, (one, other) in enumerate(pairs):
            sums.add(one.double(), other.double(), rows.tokens[number, 1:])
            if number < len(wide):
                rounding = max(rounding, float((wide[number] - one).abs().max()))
    return Receipt(
        dense=str(dense.path),
        mixture=str(mixture.path),
        text=rows.source,
        num_tokens=sums.num_tokens,
        row_length=rows.tokens.shape[1] - 1,
        largest_logit=sums.largest,
        max_logit_difference=sums.max_difference,
        mean_logit_difference=sums.difference / sums.num_logits,
        kl_divergence=sums.kl / sums.num_tokens,
        perplexity_before=math.exp(sums.loss_before / sums.num_tokens),
        perplexity_after=math.exp(sums.loss_after / sums.num_tokens),
        rounding=rounding,
        busiest_expert=loads.busiest(),
        changes=recipe.changes(),
    )


def known_ids(checkpoint: StoredCheckpoint) -> int:
    """Return the ids of a model; rows of its vocabulary behind them pad, and have no logits."""
    rows: int = checkpoint.common["padded_vocab_size"]
    tokens = checkpoint.common["config"]["tokenizer"].get("unpadded_vocab_size")
    return rows if tokens is None else min(int(tokens), rows)


class _Sums:
    """What is added up over rows; a difference that is no number is infinite."""

    def __init__(self) -> None:
        self.num_tokens = self.num_logits = 0
        self.difference = self.max_difference = self.largest = 0.0
        self.kl = self.loss_before = self.loss_after = 0.0

    def add(self, before: Tensor, after: Tensor, labels: Tensor) -> None:
        """Take logits [s, v] in fp64 and labels [s]."""
        apart = (after - before).abs().nan_to_num(math.inf, math.inf)
        self.num_tokens += len(labels)
        self.num_logits += apart.numel()
        self.difference += float(apart.sum())
        self.max_difference = max(self.max_difference, float(apart.max()))
        self.largest = max(self.largest, float(before.abs().max()))
        one, other = before.log_softmax(dim=1), after.log_softmax(dim=1)
        self.kl += float((one.exp() * (one - other)).sum())
        self.loss_before -= float(one.gather(1, labels.unsqueeze(1)).sum())
        self.loss_after -= float(other.gather(1, labels.unsqueeze(1)).sum())


class _Loads:
    """Counts the tokens of each expert while the model runs. A context."""

    def __init__(self, model: nn.Module) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        self._counts: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "_Loads":
        self._hooks = [router.register_forward_hook(self._count) for router in self._routers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, router: TopKRouter, _: Any, routing: Any) -> None:
        counts = routing.routing_map.sum(dim=0)
        self._counts[router.layer_number] = self._counts.get(router.layer_number, 0) + counts

    def busiest(self) -> float:
        """Return the most tokens of an expert, in multiples of the mean of its layer."""
        return max((float(c.max() / c.double().mean()) for c in self._counts.values()), default=0.0)


@torch.no_grad()
def _logits(model: GPTModel, tokens: Tensor, known: int) -> Iterator[Tensor]:
    """Yield the logits [s, known] of each row."""
    places = torch.arange(tokens.shape[1] - 1).unsqueeze(0)
    for row in tokens:
        yield model(row[:-1].unsqueeze(0), places)[0, :, :known]


def _model(checkpoint: StoredCheckpoint, dtype: torch.dtype) -> GPTModel:
    """Build the model of a checkpoint in ``dtype``, whatever it was saved in."""
    config = copy.deepcopy(config_from_data(dict(checkpoint.common["config"])))
    for_one_process(config)
    config.model.bf16 = config.model.fp16 = False
    config.model.fp64 = dtype == torch.float64
    model = empty_model(OpenCheckpoint(checkpoint.path, dict(checkpoint.common)), config)
    wanted = model_tensors(model)
    there = {key for key in checkpoint.keys if key.startswith("model.")}
    if lost := sorted(wanted.keys() ^ there):
        side = "is missing" if lost[0] in wanted else "belongs to no part of the model"
        raise CheckpointError(f"{checkpoint.path}: {lost[0]} {side} ({len(lost)} such tensors)")
    for key, tensor in wanted.items():
        stored = checkpoint.read(key)
        if stored.shape != tensor.shape:
            raise CheckpointError(
                f"{checkpoint.path}: {key} is {list(stored.shape)}, not {list(tensor.shape)}"
            )
        tensor.copy_(stored)
    return model.eval()
