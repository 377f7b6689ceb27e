"""``get_args()`` and friends, for users' scripts only: our own code takes these as arguments."""

from argparse import Namespace

from megatron.core.timers import Timers
from megatron.core.tokenizers.base import Tokenizer
from megatron.training.config.run_config import RunConfig

_args: Namespace | None = None
_tokenizer: Tokenizer | None = None
_timers = Timers()


def set_global_variables(
    config: RunConfig, tokenizer: Tokenizer, timers: Timers | None = None
) -> None:
    """Set what the getters return; ``pretrain`` does it before it calls a provider."""
    global _args, _tokenizer, _timers
    _args = Namespace(**config.flat())
    _tokenizer = tokenizer
    _timers = timers or Timers()


def get_args() -> Namespace:
    """Return every option by its field name; options are resolved."""
    assert _args is not None, "get_args() was called before pretrain()"
    return _args


def get_tokenizer() -> Tokenizer:
    """Return the tokenizer of the run."""
    assert _tokenizer is not None, "get_tokenizer() was called before pretrain()"
    return _tokenizer


def get_timers() -> Timers:
    """Return the run's named timers."""
    return _timers
