"""One run; names are imported when first used, so that ``--help`` never waits for torch."""

from typing import TYPE_CHECKING

from megatron.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from megatron.core.log import print_rank_0
    from megatron.training.global_vars import get_args, get_timers, get_tokenizer
    from megatron.training.training import pretrain

__all__ = ["get_args", "get_timers", "get_tokenizer", "pretrain", "print_rank_0"]

__getattr__ = lazy_exports(
    __name__,
    {
        "get_args": "megatron.training.global_vars",
        "get_timers": "megatron.training.global_vars",
        "get_tokenizer": "megatron.training.global_vars",
        "pretrain": "megatron.training.training",
        "print_rank_0": "megatron.core.log",
    },
)
