from typing import Any

import pytest

from megatron.training.checkpoint_misfits import softmax_notices
from megatron.training.config.run_config import RunConfig


def run_config(tokens: int | None) -> RunConfig:
    return RunConfig.from_flat({"unpadded_vocab_size": tokens})


@pytest.mark.parametrize(
    ("tokenizer", "tokens", "is_told"),
    [
        ({}, 250, True),
        ({}, 256, False),  # nothing pads
        ({}, None, False),  # all rows are tokens, as before
        ({"unpadded_vocab_size": 250}, 250, False),
        ({"unpadded_vocab_size": None}, 250, False),
    ],
)
def test_an_older_softmax_over_padding_is_told(
    tokenizer: dict[str, Any], tokens: int | None, is_told: bool
) -> None:
    common = {"config": {"tokenizer": tokenizer}, "padded_vocab_size": 256}
    found = softmax_notices(common, run_config(tokens))
    assert [("256" in text, "250" in text) for text in found] == [(True, True)] * is_told
