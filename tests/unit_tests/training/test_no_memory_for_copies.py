"""--async-save where a rank has no memory for its copies: told on all ranks, training goes on."""

import logging
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron.core.dist_checkpointing import staging
from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from megatron.training.run import TrainState
from megatron.training.saver import Saver
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import tiny_run


def _no_memory(like: object) -> None:
    raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _save_twice(folder: str) -> None:
    run, lines = tiny_run(f"--save {folder} --async-save"), Lines()
    logging.getLogger("megatron.training.saver").addHandler(lines)
    saver = Saver(run, build_tokenizer(run.config.tokenizer), None)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(staging, "_host_memory", _no_memory)
        saver.save(TrainState(iteration=3))
    told = [text for text in lines.texts if "iteration 3 was NOT saved: rank 1: no host" in text]
    assert len(told) == int(dist.get_rank() == 0)
    assert all(
        text.endswith("earlier checkpoints are untouched; training goes on") for text in told
    )
    assert not list(Path(folder).glob("*"))
    saver.save(TrainState(iteration=4))  # there is memory again
    saver.finish(TrainState(iteration=4))
    assert Path(folder, "latest_checkpointed_iteration.txt").read_text().strip() == "4"


def test_a_rank_without_memory_for_its_copy_ends_no_training(tmp_path: Path) -> None:
    run_ranks(_save_twice, 2, str(tmp_path))
