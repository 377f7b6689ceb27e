"""Train a GPT, dense or mixture of experts: ``[torchrun ...] pretrain_gpt.py --num-layers ...``.

Three functions say what is trained; ``pretrain`` does the rest. Copy this file to change them.
Options are checked before torch is loaded, so that ``--help`` and mistakes answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from megatron.training.arguments import parse_args
from megatron.training.user_errors import exit_on_user_error

if TYPE_CHECKING:
    from torch import Tensor, nn

    from megatron.core.datasets.gpt_dataset import SampleDataset
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tokenizers.base import Tokenizer
    from megatron.training.batch import Batch
    from megatron.training.config.run_config import RunConfig
    from megatron.training.loss import MaskedLoss


def model_provider(config: RunConfig, pg_collection: ProcessGroupCollection) -> nn.Module:
    """Build the model of this rank."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel.layer_homes import stages_of_rank

    return GPTModel(
        config.model,
        get_gpt_decoder_block_spec(config.model),
        vocab_size=config.tokenizer.padded_vocab_size,
        max_sequence_length=config.model.max_position_embeddings,
        unpadded_vocab_size=config.tokenizer.unpadded_vocab_size,
        stages=stages_of_rank(config.model, pg_collection.pp.rank()),
        pg_collection=pg_collection,
    )


def train_valid_test_datasets_provider(
    num_samples: tuple[int, int, int], config: RunConfig, tokenizer: Tokenizer
) -> tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]:
    """Build the datasets of training, validation and test."""
    from megatron.training.setup_data import build_train_valid_test_datasets

    return build_train_valid_test_datasets(
        config.data,
        seed=config.training.seed,
        num_samples=num_samples,
        eod_id=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
    )


def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> MaskedLoss:
    """Sum the losses of the tokens that count.

    Args:
        loss_mask: [b, s].
        output_tensor: [b, s], the loss of each token.
    """
    from megatron.training.loss import masked_loss

    return masked_loss(output_tensor, loss_mask)


def forward_step(
    data_iterator: Iterator[Batch], model: Callable[..., Tensor]
) -> tuple[Tensor, Callable[[Tensor], MaskedLoss]]:
    """Run one microbatch through the model."""
    from megatron.training.batch import get_batch

    tokens, labels, loss_mask, attention_mask, position_ids = get_batch(data_iterator)
    output_tensor = model(tokens, position_ids, attention_mask, labels=labels)
    return output_tensor, partial(loss_func, loss_mask)


def main() -> None:
    """Check the options, then train."""
    with exit_on_user_error():
        config = parse_args()
    from megatron.training import pretrain

    pretrain(train_valid_test_datasets_provider, model_provider, forward_step, config=config)


if __name__ == "__main__":
    main()
