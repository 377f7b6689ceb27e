"""--check-collectives with --async-save: messages of the thread that writes are not compared."""

from pathlib import Path

from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from megatron.training.initialize import collective_checks
from megatron.training.run import TrainState
from megatron.training.saver import Saver
from megatron.training.train_step import train_step
from tests.helpers.ranks import run_ranks
from tests.unit_tests.training.tiny_run import tiny_batches, tiny_run


def _train_and_save(folder: str) -> None:
    run = tiny_run(f"--micro-batch-size 1 --save {folder} --async-save --check-collectives")
    state, data = TrainState(), tiny_batches(run)
    with collective_checks(run.config):
        saver = Saver(run, build_tokenizer(run.config.tokenizer), None)
        for _ in range(6):
            assert train_step(run, state, data, (0.0, 0.0)).updated
            state.iteration += 1
            state.consumed_samples += run.global_batch_size
            saver.save(state)
        saver.finish(state)
    assert (Path(folder) / "latest_checkpointed_iteration.txt").read_text().strip() == "6"


def test_a_run_that_is_checked_saves_in_the_background(tmp_path: Path) -> None:
    run_ranks(_train_and_save, 2, str(tmp_path))
