"""Upcycling where rows pad the vocabulary, and with scores that are not divided."""

import json
import math
from pathlib import Path

import pytest

from megatron.training.huggingface import import_checkpoint
from tests.helpers.hf_tiny import tiny_folder
from tests.helpers.small_runs import alone_in_the_world
from tools.checkpoint import upcycle, upcycle_receipt

SIGMOID = ("--moe-router-score-function", "sigmoid", "--no-moe-router-norm-topk-prob")


@pytest.mark.parametrize("words", [(), SIGMOID], ids=["softmax", "not divided"])
def test_padding_of_the_vocabulary_has_no_share_in_the_receipt(
    words: tuple[str, ...], call, tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    folder = tiny_folder(tmp_path / "hf", "llama2")
    import_checkpoint(folder, tmp_path / "dense", make_vocab_size_divisible_by=100)
    base = ("--load", tmp_path / "dense", "--save", tmp_path / "moe", "--num-experts", 4)
    with alone_in_the_world():
        code, text, errors = call(upcycle.main, *base, "--receipt-tokens", 128, *words)
    assert (code, errors) == (0, ""), text
    receipt = json.loads((tmp_path / "moe" / upcycle_receipt.RECEIPT).read_text())
    assert receipt["kept"]
    assert receipt["rounding"] > 0
    assert math.isfinite(receipt["perplexity_before"])
    assert math.isfinite(receipt["kl_divergence"])
