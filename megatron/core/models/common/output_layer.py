"""From the residual stream to logits, or straight to the loss of each token."""

import torch
from torch import Tensor, nn

from megatron.core.param_role import ParamRole, set_role
from megatron.core.tensor_parallel.cross_entropy import linear_cross_entropy
from megatron.core.transformer.init_rules import input_init
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.transformer_config import TransformerConfig


class OutputLayer(nn.Module):
    """Scores every token of the vocabulary, with a weight of its own or the embedding's."""

    weight: nn.Parameter | None

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        """Make the weight, if it is not tied to the embedding's.

        Args:
            config: Width, tying, initialisation.
            vocab_size: Padding included.
        """
        super().__init__()
        self.weight = None
        if config.untie_embeddings_and_output_weights:
            self.weight = set_role(
                nn.Parameter(
                    torch.empty(vocab_size, config.hidden_size, dtype=params_dtype(config))
                ),
                ParamRole(init=input_init(config)),
            )

    def forward(self, hidden_states: Tensor, embedding_weight: Tensor) -> Tensor:
        """Return the logits [s, b, v] of ``hidden_states`` [s, b, h].

        Args:
            hidden_states: Output of the last norm.
            embedding_weight: [v, h], used when the weights are tied.
        """
        return nn.functional.linear(hidden_states, self._weight(embedding_weight))

    def loss(self, hidden_states: Tensor, embedding_weight: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy of each token, [b, s]; logits of all are never held twice.

        Args:
            hidden_states: [s, b, h].
            embedding_weight: [v, h], used when the weights are tied.
            labels: [b, s], int64.
        """
        weight = self._weight(embedding_weight)
        return linear_cross_entropy(hidden_states, weight, labels.T).T

    def _weight(self, embedding_weight: Tensor) -> Tensor:
        return embedding_weight if self.weight is None else self.weight
