"""What one pipeline stage holds of a model. Pure; who decides it is the plans' business.

Stages count over the model: stage 0 has the embedding. Layers have their global numbers, from 0.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StageLayers:
    """What one stage holds, in the order of the model."""

    embedding: bool = False
    layers: range = range(0)
    """Global numbers of its transformer layers."""
    final_norm: bool = False
    mtp_layers: range = range(0)
    """Its layers of multi-token prediction, counted from 0."""
    head: bool = False
    """It has the output head, and the loss with it."""

    def parts(self) -> Iterator[str]:
        """Name what it holds, in order."""
        yield from ["embedding"] * self.embedding
        yield from (f"layer {number}" for number in self.layers)
        yield from ["final norm"] * self.final_norm
        yield from (f"mtp layer {number}" for number in self.mtp_layers)
        yield from ["output head", "loss"] * self.head

    def symbols(self) -> str:
        """Write it as a stage of ``--pipeline-model-parallel-layout``."""
        marks = {"E": self.embedding, "t": len(self.layers), "m": len(self.mtp_layers)}
        return "".join(symbol * times for symbol, times in marks.items()) + "L" * self.head


def whole_model(num_layers: int, mtp_num_layers: int = 0) -> StageLayers:
    """Return the only stage of a model that is not cut."""
    return StageLayers(
        embedding=True,
        layers=range(num_layers),
        final_norm=True,
        mtp_layers=range(mtp_num_layers),
        head=True,
    )
