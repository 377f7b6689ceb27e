"""How a run in progress writes its checkpoints: at once, or in the background.

With --async-save a save is a copy of this rank's share into host memory; a thread writes it while
training goes on. Requested and completed are logged apart.
"""

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

from megatron.core.dist_checkpointing.folders import Place, checkpoint_path
from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.dist_checkpointing.save_plan import SavePlans
from megatron.core.dist_checkpointing.staging import Staging
from megatron.core.dist_checkpointing.store import CheckpointContent
from megatron.core.errors import CheckpointError
from megatron.core.process_groups_config import background_group
from megatron.core.tokenizers.base import Tokenizer
from megatron.training.checkpoint_state import Retention, SaveResult, TrainState
from megatron.training.checkpointing import checkpoint_content, publish, world_group
from megatron.training.non_persistent import NonPersistent
from megatron.training.run import Run

log = logging.getLogger(__name__)


class Saver:
    """Saves the states of one run to --save. All ranks call everything here, at the same step."""

    def __init__(
        self,
        run: Run,
        tokenizer: Tokenizer,
        data_fingerprint: str | None,
        saved_iteration: int | None = None,
        non_persistent: NonPersistent | None = None,
    ) -> None:
        """Write nothing yet.

        Args:
            run: The run.
            tokenizer: Goes along with every checkpoint.
            data_fingerprint: Of the training data and its order.
            saved_iteration: Of the checkpoint that lies in --save already, because it was loaded.
            non_persistent: Where the checkpoints between those go; None without them.
        """
        self._run = run
        self._tokenizer = tokenizer
        self._data_fingerprint = data_fingerprint
        self._saved_iteration = saved_iteration
        self._non_persistent = non_persistent
        options = run.config.checkpoint
        self._folder = None if options.save is None else place(options.save)
        self._keep = Retention.of(options)
        self._plans = SavePlans(world_group())
        self._background: BackgroundWriter | None = None
        if options.async_save:
            minutes = run.config.distributed.distributed_timeout_minutes
            self._background = BackgroundWriter(timedelta(minutes=minutes))

    def save(self, state: TrainState) -> None:
        """Save ``state``, unless that is done; with --async-save return when it is copied.

        A save that fails is told, and training goes on.
        """
        self._settle()
        self._tell(self._write(state))

    def save_between(self, state: TrainState) -> None:
        """Save ``state`` in place of the non-persistent checkpoint before it; waits until it is.

        A save that fails is told, and training goes on.
        """
        assert self._non_persistent is not None, "there is no place for it"
        self._settle()
        result = self._non_persistent.save(state.iteration, self._content(state))
        if result.error:
            log.warning("%s; training goes on", result.line())
        else:
            log.info("%s", result.line())

    def look(self) -> None:
        """Tell of a save that has ended in the background since the last look; does not wait."""
        if self._background is not None and self._background.has_ended:
            self._settle()

    def finish(self, state: TrainState) -> None:
        """Save the last ``state``, unless that is done, and wait until it is written.

        Raises:
            CheckpointError: It cannot be written.
        """
        self._settle()
        result = self._write(state) or self._wait()
        if result is not None and result.path is None:
            raise CheckpointError(result.line())
        self._tell(result)
        self._save_huggingface(state)
        if self._non_persistent is not None:
            self._non_persistent.clean()

    def _save_huggingface(self, state: TrainState) -> None:
        options = self._run.config.checkpoint
        if options.save_hf is None:
            return
        if state.iteration < self._run.train_iters:
            log.warning("training is not over, so --save-hf %s is not written", options.save_hf)
            return
        assert self._folder is not None, "--save-hf needs --save"
        from megatron.training.huggingface_save import save_huggingface  # an optional package

        save_huggingface(checkpoint_path(self._folder, state.iteration), options)

    def _write(self, state: TrainState) -> SaveResult | None:
        """Save ``state``; None when that is done already or goes on in the background."""
        if self._folder is None or self._saved_iteration == state.iteration:
            return None
        content = self._content(state)
        if self._background is not None:
            return self._background.begin(self._folder, state.iteration, content, self._keep)
        content = replace(content, plans=self._plans)
        return publish(self._folder, state.iteration, content, self._plans.group, self._keep)

    def _content(self, state: TrainState) -> CheckpointContent:
        return checkpoint_content(
            state,
            config=self._run.config,
            model=self._run.model,
            optimizer=self._run.optimizer,
            tokenizer=self._tokenizer,
            data_fingerprint=self._data_fingerprint,
        )

    def _wait(self) -> SaveResult | None:
        return None if self._background is None else self._background.wait()

    def _settle(self) -> None:
        """Wait for the save in the background, if there is one, and tell how it went."""
        self._tell(self._wait())

    def _tell(self, result: SaveResult | None) -> None:
        if result is None:
            return
        if result.path is None:
            if self._run.world.is_first:  # the result is the same on every rank
                log.warning("%s; training goes on", result.line())
        else:
            self._saved_iteration = result.iteration
            log.info("%s", result.line())


class BackgroundWriter:
    """Writes one checkpoint at a time on a thread, whose messages go over a group of their own.

    On the groups that train its messages would mix with theirs.
    """

    def __init__(self, timeout: timedelta) -> None:
        """Make group and thread; every rank must call this, at the same point.

        Args:
            timeout: Of every message of the group.
        """
        self._group = background_group(timeout)
        self._staging = Staging(self._group)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[SaveResult] | None = None

    def begin(
        self, folder: Place, iteration: int, content: CheckpointContent, keep: Retention
    ) -> SaveResult | None:
        """Copy ``content`` and let the thread write it; the one before must have been awaited.

        Returns:
            None; a failure, on every rank, where some rank has no memory for its copy.
        """
        assert self._written is None, "one save at a time"
        begin = time.perf_counter()
        try:
            staged = replace(content, tensors=self._staging.copy(content.tensors))
        except CheckpointError as error:
            return SaveResult(iteration=iteration, path=None, error=str(error))
        log.info(
            "saving checkpoint of iteration %d in the background (%.1f MiB copied in %.3f s)",
            iteration,
            self._staging.nbytes / 2**20,
            time.perf_counter() - begin,
        )
        self._written = self._thread.submit(publish, folder, iteration, staged, self._group, keep)
        return None

    @property
    def has_ended(self) -> bool:
        """Whether a save waits to be told of."""
        return self._written is not None and self._written.done()

    def wait(self) -> SaveResult | None:
        """Wait for the save that was begun last and return how it went; None if there is none."""
        written, self._written = self._written, None
        return None if written is None else replace(written.result(), in_background=True)
