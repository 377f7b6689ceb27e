"""The tokenizer of a run, and how many rows its vocabulary needs."""

import logging

from megatron.core.errors import ConfigError
from megatron.core.tokenizers.base import Tokenizer
from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from megatron.training.config.run_config import RunConfig

log = logging.getLogger(__name__)


def setup_tokenizer(config: RunConfig) -> Tokenizer | None:
    """Build the tokenizer and resolve ``config.tokenizer.padded_vocab_size``.

    Returns:
        None without a tokenizer, as mock data may be; the padded size is then known already.

    Raises:
        ConfigError: The given padded size is smaller than the vocabulary.
    """
    options = config.tokenizer
    tokenizer = None if options.tokenizer_type is None else build_tokenizer(options)
    size = options.vocab_size if tokenizer is None else tokenizer.vocab_size
    if options.padded_vocab_size is None:
        assert size is not None, "neither a tokenizer nor --vocab-size: config is not resolved"
        unit = options.make_vocab_size_divisible_by * config.model.tensor_model_parallel_size
        options.padded_vocab_size = -(-size // unit) * unit
    if size is not None and options.padded_vocab_size < size:
        raise ConfigError(
            f"--padded-vocab-size {options.padded_vocab_size} is smaller than the {size} ids of "
            f"{options.tokenizer_type}"
        )
    log.info(
        " > padded vocab (size: %s) with %s dummy tokens (new size: %s)",
        size,
        options.padded_vocab_size - (size or options.padded_vocab_size),
        options.padded_vocab_size,
    )
    return tokenizer
