"""One run. Names are imported when first used, so that ``--help`` never waits for torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.log import print_rank_0
    from megatron.training.global_vars import get_args, get_timers, get_tokenizer
    from megatron.training.training import pretrain

_HOMES = {
    "get_args": "megatron.training.global_vars",
    "get_timers": "megatron.training.global_vars",
    "get_tokenizer": "megatron.training.global_vars",
    "pretrain": "megatron.training.training",
    "print_rank_0": "megatron.core.log",
}

__all__ = ["get_args", "get_timers", "get_tokenizer", "pretrain", "print_rank_0"]


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
