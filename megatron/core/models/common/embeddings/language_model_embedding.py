"""From ids to the residual stream: token vectors, learned positions, dropout."""

from torch import Tensor, nn

from megatron.core.param_role import TiedEnds
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import Embedding, VocabParallelEmbedding
from megatron.core.tensor_parallel.random import sequence_share
from megatron.core.tensor_parallel.regions import share_sequence
from megatron.core.transformer.forward_context import ForwardContext
from megatron.core.transformer.init_rules import input_init
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.transformer_config import TransformerConfig

_PLAIN = ForwardContext()


class LanguageModelEmbedding(nn.Module):
    """Multiple of a token's vector and, with learned positions, its position's; then dropout."""

    position_embeddings: Embedding | None

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        *,
        pg_collection: ProcessGroupCollection,
        tied_ends: TiedEnds = "no",
    ) -> None:
        """Make the tables.

        Args:
            config: Width, kind of positions, dropout, initialisation.
            vocab_size: Rows of the token table, padding included.
            max_sequence_length: Rows of the position table.
            pg_collection: Its ``tp`` splits the token table, its ``cp`` shares the sequence.
            tied_ends: Of both tables; see ``ParamRole``.
        """
        super().__init__()
        self.hidden_dropout, self.multiplier = config.hidden_dropout, config.embedding_multiplier
        self.tp_group, self.sequence_parallel = pg_collection.tp, config.sequence_parallel
        self.share = sequence_share(pg_collection, sequence_parallel=False)  # not yet shared out
        init, dtype = input_init(config), params_dtype(config)
        self.word_embeddings = _token_table(config, vocab_size, pg_collection, tied_ends)
        self.position_embeddings = None
        if config.position_embedding_type == "learned_absolute":
            self.position_embeddings = Embedding(
                max_sequence_length,
                config.hidden_size,
                init=init,
                dtype=dtype,
                tied_ends=tied_ends if config.mtp_depths else "no",
            )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        context: ForwardContext,
        *,
        site: str = "embedding",
    ) -> Tensor:
        """Look up ``input_ids`` and ``position_ids``, both [b, s].

        Args:
            input_ids: Tokens.
            position_ids: Read by learned positions.
            context: Of the forward.
            site: Names the dropout mask, where a forward looks up more than once.

        Returns:
            [s, b, h], or [s / tp, b, h] with sequence parallelism.
        """
        hidden_states: Tensor = self.word_embeddings(input_ids.T)
        if self.multiplier != 1.0:
            hidden_states = hidden_states * self.multiplier
        if self.position_embeddings is not None:
            hidden_states = hidden_states + self.position_embeddings(position_ids.T)
        if context.rng is not None:
            hidden_states = context.rng.dropout(
                hidden_states,
                self.hidden_dropout,
                layer=-1,
                site=site,
                batch_dim=1,
                share=self.share,
            )
        return share_sequence(
            self.tp_group, hidden_states, sequence_parallel=self.sequence_parallel
        )


class EmbeddingBesideHead(LanguageModelEmbedding):
    """The embedding beside an output layer on another rank than it, for multi-token prediction.

    Under the names that it has there. To read the weight of the token table, call the module with
    nothing; see ``EmbeddingCopy``.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        context: ForwardContext = _PLAIN,
        *,
        site: str = "embedding",
    ) -> Tensor:
        """Look up as ``LanguageModelEmbedding.forward``; without ids return the weight."""
        if input_ids is None or position_ids is None:
            return self.word_embeddings.weight
        return super().forward(input_ids, position_ids, context, site=site)


class EmbeddingCopy(nn.Module):
    """The token table beside an output layer that is tied to it and on another rank than it.

    Under the name that it has there. To read the weight, call the module: weights that are still
    being gathered are waited for when a module is called.
    """

    def __init__(
        self, config: TransformerConfig, vocab_size: int, *, pg_collection: ProcessGroupCollection
    ) -> None:
        """Make the table; see ``LanguageModelEmbedding``."""
        super().__init__()
        self.word_embeddings = _token_table(config, vocab_size, pg_collection, "apart")

    def forward(self) -> Tensor:
        """Return the weight, [v / tp, h]."""
        return self.word_embeddings.weight


def _token_table(
    config: TransformerConfig,
    vocab_size: int,
    pg_collection: ProcessGroupCollection,
    tied_ends: TiedEnds,
) -> VocabParallelEmbedding:
    return VocabParallelEmbedding(
        vocab_size,
        config.hidden_size,
        init=input_init(config),
        dtype=params_dtype(config),
        pg_collection=pg_collection,
        tied_ends=tied_ends,
    )
