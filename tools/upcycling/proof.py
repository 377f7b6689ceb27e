"""Upcycling of small dense models in every way that keeps the function, each with its receipt."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.offline import StoredCheckpoint
from megatron.training.resume_rules import config_from_data
from megatron.training.upcycling.preservation import Recipe
from megatron.training.upcycling.widths import upcycled_config
from megatron.training.upcycling.writing import write_upcycled
from tools.checkpoint.upcycle_receipt import Receipt, measured
from tools.checkpoint.upcycle_text import rows_of

EXPERTS, TOKENS = 8, 1024
SCORES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax over all": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to upcycle."""

    granularity: int
    """1 for whole copies."""
    copies: int
    """Whole copies that a token goes through; --moe-router-topk is granularity times that."""
    score: str
    """Key of ``SCORES``."""
    fold: bool = False
    """The second matrices take the factor."""

    @property
    def topk(self) -> int:
        """--moe-router-topk."""
        return self.copies * self.granularity

    @property
    def values(self) -> dict[str, Any]:
        """Options of the MoE layers, by field name."""
        sizes = {"num_moe_experts": EXPERTS, "moe_router_topk": self.topk}
        return {**sizes, **SCORES[self.score]}

    def __str__(self) -> str:
        how = f"split {self.granularity}" if self.granularity > 1 else "copy"
        fold = ", folded" if self.fold else ""
        return f"{how}, top-{self.topk} of {EXPERTS}, {self.score}{fold}"


def cases() -> Iterator[Case]:
    """Yield all: copies and slices, one, two and all copies a token, every score."""
    for granularity in (1, 2):
        for copies in (1, 2, EXPERTS // granularity):
            for score in SCORES:
                if granularity * copies > 1 or score != "softmax":  # one weight of 1 learns nothing
                    yield Case(granularity=granularity, copies=copies, score=score)
    yield Case(granularity=2, copies=1, score="softmax over all", fold=True)
    yield Case(granularity=4, copies=1, score="sigmoid", fold=True)


def proved(dense: Path, folder: Path, case: Case, recipe: Recipe | None = None) -> Receipt:
    """Upcycle and compare.

    Args:
        dense: Checkpoint of a dense model without tokenizer.
        folder: For the upcycled one.
        case: How.
        recipe: Where it is not only the granularity of the case.
    """
    source = StoredCheckpoint.open(dense)
    recipe = recipe or Recipe(granularity=case.granularity)
    config = config_from_data(dict(source.common["config"]))
    new = upcycled_config(config, case.values, case.granularity, fold=case.fold)
    write_upcycled(source, folder, new, recipe, history=f"proof: {case}")
    rows = rows_of(
        None,
        None,
        source.common["padded_vocab_size"],
        length=config.data.seq_length or 1,
        num_tokens=TOKENS,
    )
    return measured(source, StoredCheckpoint.open(folder), rows, recipe)
