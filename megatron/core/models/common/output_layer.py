"""From the residual stream to logits, or straight to the loss of each token."""

import torch
from torch import Tensor, nn

from megatron.core.param_role import ParamRole, set_role
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.cross_entropy import LogitTransform, linear_cross_entropy
from megatron.core.tensor_parallel.linear_product import linear
from megatron.core.tensor_parallel.region_entry import RegionEntry
from megatron.core.tensor_parallel.regions import gather_from_region
from megatron.core.tensor_parallel.weight_split import split_over
from megatron.core.transformer.init_rules import input_init
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.transformer_config import TransformerConfig


class OutputLayer(nn.Module):
    """Scores every token of the vocabulary, with a weight of its own or the embedding's."""

    weight: nn.Parameter | None

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        *,
        unpadded_vocab_size: int | None = None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Make the weight, if it is not tied to the embedding's.

        Args:
            config: Width, tying, initialisation.
            vocab_size: Padding included.
            unpadded_vocab_size: Rows that are tokens; those after them pad, and have no share in
                the softmax. None: all are tokens.
            pg_collection: Its ``tp`` splits the vocabulary.
        """
        super().__init__()
        self.tp_group = pg_collection.tp
        self.entry = RegionEntry(pg_collection.tp, config.sequence_parallel)
        own = vocab_size // pg_collection.tp.size()
        columns = None
        if unpadded_vocab_size is not None and unpadded_vocab_size < vocab_size:
            columns = min(max(unpadded_vocab_size - pg_collection.tp.rank() * own, 0), own)
        self.transform = LogitTransform(
            config.logits_multiplier, config.final_logit_softcapping, columns
        )
        self.weight = None
        if config.untie_embeddings_and_output_weights:
            split = split_over("tp", pg_collection, dim=0, parts=(vocab_size,))
            here = split.local_shape((vocab_size, config.hidden_size))
            weight = nn.Parameter(torch.empty(here, dtype=params_dtype(config)))
            self.weight = set_role(weight, ParamRole(init=input_init(config), split=split))

    def forward(self, hidden_states: Tensor, embedding_weight: Tensor | None) -> Tensor:
        """Return the logits [s, b, v] of ``hidden_states`` [s, b, h].

        With tensor parallelism they have no gradient: ``loss`` has.

        Args:
            hidden_states: Output of the last norm.
            embedding_weight: [v / tp, h], used when the weights are tied, else None.
        """
        here = linear(hidden_states, self._weight(embedding_weight), entry=self.entry)
        return gather_from_region(self.tp_group, self.transform.of(here))

    def loss(
        self, hidden_states: Tensor, embedding_weight: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Return the cross entropy of each token, [b, s]; logits of all are never held twice.

        Args:
            hidden_states: [s, b, h], or [s / tp, b, h] with sequence parallelism.
            embedding_weight: [v / tp, h], used when the weights are tied, else None.
            labels: [b, s], int64.
        """
        weight = self._weight(embedding_weight)
        of_tokens = linear_cross_entropy(
            hidden_states, weight, labels.T, self.entry, transform=self.transform
        )
        return of_tokens.T

    def _weight(self, embedding_weight: Tensor | None) -> Tensor:
        weight = embedding_weight if self.weight is None else self.weight
        assert weight is not None, "an output layer that is tied needs the embedding's weight"
        return weight
