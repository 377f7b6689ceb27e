"""The GPT language model: embedding, layers, output."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from megatron.core.errors import ConfigError
from megatron.core.models.common.embeddings.language_model_embedding import (
    EmbeddingBesideHead,
    EmbeddingCopy,
    LanguageModelEmbedding,
)
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.output_layer import OutputLayer
from megatron.core.param_role import TiedEnds
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.sequence_slices import own_ranges
from megatron.core.stage_layers import StageLayers, whole_model
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.multi_token_prediction import MultiTokenPrediction
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig

_PLAIN = ForwardContext()


class GPTModel(nn.Module):
    """Decoder-only transformer; dense or mixture of experts by its spec.

    It may be some stages of a pipeline only, with what they hold under the names of the whole
    model; then one call goes through one of them, ``context.chunk``.

    Source: Radford et al. 2019 (GPT-2).
    """

    embedding: LanguageModelEmbedding | EmbeddingCopy | None
    rotary_pos_emb: RotaryEmbedding | None
    mtp: MultiTokenPrediction | None
    output_layer: OutputLayer | None

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: TransformerBlockSubmodules,
        vocab_size: int,
        max_sequence_length: int,
        *,
        unpadded_vocab_size: int | None = None,
        stages: Sequence[StageLayers] | None = None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        """Build the model; its parameters are drawn by their roles (see ``set_role``).

        Args:
            config: Resolved options; kind of positions and tying of weights are read from it.
            transformer_layer_spec: Of ``get_gpt_decoder_block_spec``, or the user's own.
            vocab_size: Rows of the embedding, padding included.
            max_sequence_length: Longest sequence that learned positions can hold.
            unpadded_vocab_size: Rows that are tokens; the others have no share in the softmax, and
                logits of -inf. None: all are tokens.
            stages: The pipeline stages of this rank, in the order of the model; the whole model
                when None.
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
        self.stages = tuple(stages or [whole_model(config.num_layers, config.mtp_depths)])
        self.embedding = self._make_embedding(pg_collection)
        self.rotary_pos_emb = None
        if config.has_rotary_positions:
            self.rotary_pos_emb = RotaryEmbedding(
                config, channels=config.rotary_channels, rotary_dim=config.rotary_dim
            )
        self.decoder = TransformerBlock(
            config, transformer_layer_spec, stages=self.stages, pg_collection=pg_collection
        )
        self.mtp = None
        if any(stage.mtp_layers for stage in self.stages):
            assert transformer_layer_spec.mtp_layer is not None, "a spec without mtp_layer"
            ends = [stage.head for stage in self.stages if stage.mtp_layers]
            assert all(ends), "multi-token prediction is in the stage of the output head"
            self.mtp = MultiTokenPrediction(
                config, transformer_layer_spec.mtp_layer, pg_collection=pg_collection
            )
        self.output_layer = None
        if any(stage.head for stage in self.stages):
            self.output_layer = OutputLayer(
                config,
                vocab_size,
                unpadded_vocab_size=unpadded_vocab_size,
                pg_collection=pg_collection,
            )

    def _make_embedding(
        self, pg_collection: ProcessGroupCollection
    ) -> LanguageModelEmbedding | EmbeddingCopy | None:
        """Make the embedding, or the copy that the last stage needs, or neither.

        A tied output layer reads the token table, multi-token prediction looks up in all of it.
        """
        config, vocab_size = self.config, self.vocab_size
        begins = [stage.embedding for stage in self.stages]
        ends = [stage.head for stage in self.stages]
        tied_ends: TiedEnds = "no"
        if config.mtp_depths or not config.untie_embeddings_and_output_weights:
            tied_ends = "here" if any(begins) and any(ends) else "apart"
        is_looked_up_apart = bool(any(ends) and config.mtp_depths)
        if any(begins) or is_looked_up_apart:
            kind = LanguageModelEmbedding if any(begins) else EmbeddingBesideHead
            return kind(
                config,
                vocab_size,
                self.max_sequence_length,
                pg_collection=pg_collection,
                tied_ends="no" if begins == ends else tied_ends,
            )
        if any(ends) and tied_ends == "apart":
            return EmbeddingCopy(config, vocab_size, pg_collection=pg_collection)
        return None

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
            [b, s, v] in the dtype of the model. Of a stage without output layer the hidden states
            [s, b, h].

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
        stage = self.stages[context.chunk]
        hidden_states = context.pipeline_input  # [s, b, h]
        context = replace(context, token_ids=input_ids, pipeline_input=None)
        if stage.embedding:
            assert self.embedding is not None, "the first stage has an embedding"
            hidden_states = self.embedding(input_ids, position_ids, context)
        assert hidden_states is not None, f"stage {stage} got nothing from the one before"
        rotary = None
        if self.rotary_pos_emb is not None:
            positions = own_ranges(length * ranks, self.cp_group.rank(), ranks)
            if offset:
                positions = (range(offset, offset + length),)
            cache = context.kv_cache
            whole = length * ranks if cache is None else cache.max_len
            rotary = self.rotary_pos_emb(positions, hidden_states, length=whole)
        hidden_states = self.decoder(hidden_states, attention_mask, rotary, context)
        if context.kv_cache is not None:
            context.kv_cache.advance(length)
        if not stage.head:
            return hidden_states
        assert self.output_layer is not None, "a stage with a head has an output layer"
        tied = self._tied_weight()
        if labels is None:
            logits: Tensor = self.output_layer(hidden_states, tied)
            return logits.transpose(0, 1)
        head = partial(_loss_of_head, self.output_layer, tied)
        loss = head(hidden_states, labels)
        if self.mtp is not None and context.ahead is not None:
            read = (hidden_states, attention_mask, rotary, context)
            loss = self.mtp(loss, *read, embedding=self.embedding, head=head)
        return loss

    def _tied_weight(self) -> Tensor | None:
        if self.config.untie_embeddings_and_output_weights:
            return None  # not to be asked for where it is not read: it may be a shard
        if isinstance(self.embedding, EmbeddingCopy | EmbeddingBesideHead):
            return self.embedding()
        return None if self.embedding is None else self.embedding.word_embeddings.weight

    def _check_length(self, positions: int) -> None:
        is_learned = self.config.position_embedding_type == "learned_absolute"
        if is_learned and positions > self.max_sequence_length:
            raise ConfigError(
                f"a sequence of {positions} tokens does not fit --max-position-embeddings "
                f"{self.max_sequence_length}; shorten it or use --position-embedding-type rope"
            )


def _loss_of_head(
    head: OutputLayer, tied: Tensor | None, hidden_states: Tensor, labels: Tensor
) -> Tensor:
    return head.loss(hidden_states, tied, labels)
