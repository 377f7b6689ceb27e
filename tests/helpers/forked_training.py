"""A run of ``pretrain_gpt.py`` on forked ranks, which need not import torch again."""

from megatron.training import pretrain, training
from megatron.training.arguments import parse_args
from pretrain_gpt import forward_step, model_provider, train_valid_test_datasets_provider


def train(flags: list[str], world_size: int = 2) -> None:
    """Train as this rank of ``run_ranks``."""
    training.shut_down = lambda: None  # run_ranks does it
    config = parse_args(flags, world_size=world_size)
    pretrain(train_valid_test_datasets_provider, model_provider, forward_step, config=config)
