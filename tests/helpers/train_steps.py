"""Steps of a run on the batches of the layout oracle, one after the other."""

from megatron.training.run import Run, TrainState
from megatron.training.train_step import train_step
from tests.helpers.layouts import microbatches


def train_steps(run: Run, state: TrainState, steps: int) -> list[float]:
    """Train ``steps`` steps from ``state``, which moves on; return their losses."""
    losses = []
    for _ in range(steps):
        losses.append(train_step(run, state, microbatches(run, state.consumed_samples)).lm_loss)
        state.iteration += 1
        state.consumed_samples += run.global_batch_size
    return losses
