"""The GPT language model: embedding, layers, output."""

from dataclasses import replace

from torch import Tensor, nn

from megatron.core.errors import ConfigError
from megatron.core.models.common.embeddings.language_model_embedding import (
    LanguageModelEmbedding,
)
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.output_layer import OutputLayer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.sequence_slices import own_ranges
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig

_PLAIN = ForwardContext()


class GPTModel(nn.Module):
    """Decoder-only transformer; dense or mixture of experts by its spec.

    Source: Radford et al. 2019 (GPT-2).
    """

    rotary_pos_emb: RotaryEmbedding | None

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: TransformerBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        *,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build the model; its parameters are drawn by their roles (see ``set_role``).

        Args:
            config: Resolved options; kind of positions and tying of weights are read from it.
            transformer_layer_spec: Of ``get_gpt_decoder_block_spec``, or the user's own.
            vocab_size: Rows of the embedding, padding included.
            max_sequence_length: Longest sequence that learned positions can hold.
            pg_collection: Groups of this rank.

        Raises:
            ConfigError: ``config`` contradicts itself; see ``TransformerConfig.check``.
        """
        super().__init__()
        config.check()
        self.config = config
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self.cp_group = pg_collection.cp
        self.embedding = LanguageModelEmbedding(
            config, vocab_size, max_sequence_length, pg_collection=pg_collection
        )
        self.rotary_pos_emb = None
        if config.position_embedding_type == "rope":
            self.rotary_pos_emb = RotaryEmbedding(
                config.head_dim,
                rotary_percent=config.rotary_percent,
                rotary_base=config.rotary_base,
            )
        self.decoder = TransformerBlock(config, transformer_layer_spec, pg_collection=pg_collection)
        self.output_layer = OutputLayer(config, vocab_size, pg_collection=pg_collection)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        context: ForwardContext = _PLAIN,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the next token at each position.

        With context parallelism all that is [b, s] holds this rank's positions (``take_own``).

        Args:
            input_ids: [b, s], int64.
            position_ids: [b, s], int64; read by learned positions. Rotary positions count on from
                the cache, for only their differences matter.
            attention_mask: bool [b, 1, s, positions], True where a query may *not* look, on top
                of causality; None forbids nothing more. ``positions`` are of the whole sequence.
            labels: [b, s], int64.
            context: Random numbers, metrics, cache; the default is evaluation without a cache.
            padding_mask: [b, s] bool, True where a token is padding: MoE layers count it nowhere.
                Replaces ``context.padding_mask``; None leaves that as it is. Attention and loss
                have masks of their own.

        Returns:
            With labels the loss of each token [b, s], in fp32 (fp64 in fp64); otherwise logits
            [b, s, v] in the dtype of the model.

        Raises:
            ConfigError: The sequence is longer than the table of learned positions.
        """
        if padding_mask is not None:
            context = replace(context, padding_mask=padding_mask)
        offset = 0 if context.kv_cache is None else context.kv_cache.length
        length = input_ids.shape[1]
        ranks = self.cp_group.size()
        assert ranks == 1 or context.kv_cache is None, "a cache holds whole sequences, on one rank"
        self._check_length(offset + length * ranks)
        context = replace(context, token_ids=input_ids)
        hidden_states = self.embedding(input_ids, position_ids, context)  # [s, b, h]
        rotary = None
        if self.rotary_pos_emb is not None:
            positions = own_ranges(length * ranks, self.cp_group.rank(), ranks)
            if offset:
                positions = (range(offset, offset + length),)
            rotary = self.rotary_pos_emb(positions, hidden_states)
        hidden_states = self.decoder(hidden_states, attention_mask, rotary, context)
        if context.kv_cache is not None:
            context.kv_cache.advance(length)
        tied = None  # a weight that is not read must not be asked for: it may be a shard here
        if not self.config.untie_embeddings_and_output_weights:
            tied = self.embedding.word_embeddings.weight
        if labels is not None:
            return self.output_layer.loss(hidden_states, tied, labels)
        logits: Tensor = self.output_layer(hidden_states, tied)
        return logits.transpose(0, 1)

    def _check_length(self, positions: int) -> None:
        if self.embedding.position_embeddings is not None and positions > self.max_sequence_length:
            raise ConfigError(
                f"a sequence of {positions} tokens does not fit --max-position-embeddings "
                f"{self.max_sequence_length}; shorten it or use --position-embedding-type rope"
            )
