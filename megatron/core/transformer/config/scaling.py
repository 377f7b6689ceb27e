"""Options of the residual stream: what is multiplied, capped, added and normalised on the way.

TransformerConfig inherits them. Factors of 1 and caps of None change no bit and cost nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(kw_only=True)
class ScalingConfig:
    """Factors, caps, and how branches join the residual stream."""

    embedding_multiplier: float = 1.0
    """Factor of a token's vector as it enters the residual stream; the output layer does not see
    it, tied or not (Granite, Grok-1, Gemma)."""

    residual_multiplier: float = 1.0
    """Factor of what attention and MLP add to the residual stream, biases included (Granite)."""

    logits_multiplier: float = 1.0
    """Factor of the logits, before --final-logit-softcapping: 1 / logits_scaling of Granite, the
    output multiplier of Grok-1."""

    final_logit_softcapping: float | None = None
    """Logits x become c * tanh(x / c), so that none is larger than this c (Gemma 2); None caps
    nothing."""

    parallel_residual: bool = False
    """Attention and MLP both read the input of the layer, and the sum of all three leaves it
    (GPT-J, GPT-NeoX), instead of one after the other."""

    parallel_residual_shared_norm: bool = False
    """Under --parallel-residual, one norm for attention and MLP (GPT-J) instead of one each."""

    sandwich_norm: bool = False
    """Normalise the output of attention and of the MLP too, before it is added to the residual
    stream (Grok-1, Gemma 2)."""

    def scaling_problems(self) -> Iterator[str]:
        """Yield one sentence for each contradiction, in the user's flags."""
        if self.parallel_residual_shared_norm and not self.parallel_residual:
            yield (
                "--parallel-residual-shared-norm needs --parallel-residual: one after the other, "
                "attention and MLP read different things"
            )
