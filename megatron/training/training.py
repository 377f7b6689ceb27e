"""``pretrain()``: set up, go through the iterations, save, evaluate, finish.

Users' scripts call it with three functions of their own: which data, which model, and what a
forward step is. The loop itself decides nothing about a layout.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from megatron.core.datasets.gpt_dataset import SampleDataset
from megatron.core.dist_checkpointing.object_folders import place
from megatron.core.distributed.replica_check import check_replicas
from megatron.core.errors import ConfigError, DivergedError
from megatron.core.log import RankHandler, setup_logging
from megatron.core.timers import Timers
from megatron.core.tokenizers.base import Tokenizer
from megatron.core.tokenizers.build_tokenizer import build_tokenizer
from megatron.training.arguments import parse_args
from megatron.training.checkpoint_state import LoadedState
from megatron.training.checkpointing import load_checkpoint, world_group
from megatron.training.config.run_config import RunConfig
from megatron.training.datasets.batch import Batch
from megatron.training.evaluate import evaluate
from megatron.training.failure import FailureReport
from megatron.training.global_vars import set_global_variables
from megatron.training.initialize import Launch, collective_checks, initialize, shut_down
from megatron.training.metrics import MetricsWriter, log_folder
from megatron.training.non_persistent import NonPersistent
from megatron.training.observer import RunObserver
from megatron.training.progress import Progress
from megatron.training.reporting import Reporter
from megatron.training.routing_trace import open_tracer
from megatron.training.run import ForwardStep, Run, TrainState
from megatron.training.saver import Saver
from megatron.training.setup_data import build_data_iterator
from megatron.training.setup_model import ModelProvider, setup_run
from megatron.training.start_clock import start_clock
from megatron.training.start_up import ready, start_line
from megatron.training.stop import StopRequest
from megatron.training.train_step import train_step
from megatron.training.wrap_up import finish

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
"""Updates skipped one after the other before a run is ended; those that lower the loss scale, or
use up its hysteresis, do not count."""

Datasets = tuple[SampleDataset | None, SampleDataset | None, SampleDataset | None]
DatasetsProvider = Callable[[tuple[int, int, int], RunConfig, Tokenizer], Datasets]
"""``provider(num_samples, config, tokenizer)``: the train, validation and test datasets, each
with at least so many samples; None where there is none."""


@dataclass(kw_only=True)
class Session:
    """A run in progress: what its loop carries along."""

    run: Run
    state: TrainState
    tokenizer: Tokenizer
    datasets: Datasets
    reporter: Reporter
    timers: Timers
    failure: FailureReport
    saver: Saver
    observers: Sequence[RunObserver] = ()
    evaluated_iteration: int | None = None
    """Iteration of the newest validation."""


def pretrain(
    train_valid_test_datasets_provider: DatasetsProvider,
    model_provider: ModelProvider,
    forward_step_func: ForwardStep,
    *,
    config: RunConfig | None = None,
    observers: Sequence[RunObserver] = (),
) -> None:
    """Train a model as the options say; every rank calls this once.

    An error that the user can mend ends the process with exit code 2 after one message.

    Args:
        train_valid_test_datasets_provider: ``(num_samples, config, tokenizer) -> datasets``.
        model_provider: ``(config, pg_collection) -> model``, on the CPU, weights not yet drawn.
        forward_step_func: ``(data_iterator, model) -> (output, loss_func)`` for one microbatch;
            ``loss_func(output)`` gives the sum of losses and the number of tokens.
        config: Parsed options; the command line is parsed when None.
        observers: Told where the run begins and of every step.
    """
    launch = Launch.from_environment()
    start_clock.mark("imports")
    timers = Timers()
    timers("setup").start()
    handler = setup_logging(launch.rank, launch.world_size)
    with FailureReport() as failure, ExitStack() as watches:
        config = parse_args() if config is None else config
        dry_run_only(config, model_provider, forward_step_func)
        log.info("%s", start_line(config, launch))
        world = initialize(config)
        failure.where = world.place()
        failure.watch(world.start)
        watches.enter_context(collective_checks(config))
        tokenizer = build_tokenizer(config.tokenizer)
        set_global_variables(config, tokenizer, timers)
        ready(config)
        run = setup_run(config, world, model_provider, forward_step_func)
        loaded, between = load(run, tokenizer, launch)
        state = loaded.state()
        run = replace(run, router_tracer=open_tracer(run, state.iteration))
        check_replicas(run.model)
        datasets = train_valid_test_datasets_provider(num_samples(run, state), config, tokenizer)
        tell_changed_data(loaded, datasets)
        if datasets[0] is not None:
            log.info(" > training data: %s", datasets[0].describe(num_samples(run, state)[0]))
        writer = open_writer(run, state) if world.is_first else None
        session = Session(
            run=run,
            state=state,
            tokenizer=tokenizer,
            datasets=datasets,
            reporter=Reporter(run, writer, vocab_size=tokenizer.vocab_size),
            timers=timers,
            failure=failure,
            saver=make_saver(run, tokenizer, datasets, loaded, between),
            observers=observers,
        )
        go(session, handler)
        if writer is not None:
            writer.close()
            finish(run, state, timers, writer.folder, vocab_size=tokenizer.vocab_size)
        shut_down()


def dry_run_only(
    config: RunConfig, model_provider: ModelProvider, forward_step_func: ForwardStep
) -> None:
    """With --dry-run, write its report and end the program."""
    if config.dry_run.dry_run:
        from megatron.training.dry_run.command import dry_run  # 30 modules of its own

        raise SystemExit(dry_run(config, model_provider, forward_step_func))


def go(session: Session, handler: RankHandler) -> None:
    """Train and evaluate, watching for signals; the last state is saved."""
    run, state = session.run, session.state
    start_clock.mark("data")
    session.timers("setup").stop()
    for observer in session.observers:
        observer.after_load(run, state)
    with StopRequest(run.config.training) as stop:
        reason = None
        if not run.config.training.skip_train:
            with Progress(
                handler, done=state.iteration, total=run.train_iters, show=run.world.is_first
            ) as progress:
                reason = train(session, stop, progress)
            session.failure.iteration = None
            session.timers("save").start()
            session.saver.finish(state)
            session.timers("save").stop()
        if reason is not None:
            log.info("stopped after iteration %d by %s", state.iteration, reason)
            return
        validate(session)
        if session.datasets[2] is not None and run.config.validation.eval_iters:
            session.reporter.evaluation(state, "test", held_out_loss(session, 2))


def train(session: Session, stop: StopRequest, progress: Progress) -> str | None:
    """Go through the remaining iterations; return why it stopped early, None at the end."""
    run, state, timers = session.run, session.state, session.timers
    every_save = run.config.checkpoint.save_interval
    every_between = run.config.checkpoint.non_persistent_save_interval
    every_eval = run.config.validation.eval_interval
    if state.iteration >= run.train_iters:
        log.info("nothing to train: %d of %d iterations are done", state.iteration, run.train_iters)
        return None
    data = batches(session, 0, state.consumed_samples, loader_workers(run))
    session.reporter.resume_clock()
    skipped = 0
    while state.iteration < run.train_iters:
        session.failure.iteration = state.iteration + 1
        timers("train").start()
        outcome = train_step(run, state, data, stop.notes())
        timers("train").stop()
        start_clock.first_step_done()
        state.iteration += 1
        state.consumed_samples += run.global_batch_size
        is_last = state.iteration == run.train_iters
        reason = None if is_last else stop.reason(outcome.notes, state.iteration)
        check_replicas_in_time(run, state)
        for observer in session.observers:
            observer.after_step(run, state, outcome)
        session.saver.look()
        session.reporter.record(state, outcome, is_last=is_last or reason is not None)
        progress.update(outcome.lm_loss)
        skipped = 0 if outcome.updated else skipped + (not outcome.is_search)
        refuse_divergence(skipped, run, state)
        if is_last:
            break  # what is due now comes after the last save
        if every_save and state.iteration % every_save == 0:
            save(session, session.saver.save)
        elif every_between and state.iteration % every_between == 0:
            save(session, session.saver.save_between)
        in_time = reason is None or not reason.hurry
        if every_eval and state.iteration % every_eval == 0 and in_time:
            validate(session)
        if reason is not None:
            return reason.text
    return None


def check_replicas_in_time(run: Run, state: TrainState) -> None:
    """Compare the replicas at every --check-replica-hash iterations.

    Raises:
        ReplicaError: On every rank, before the state is logged or saved.
    """
    every = run.config.distributed.check_replica_hash
    if every and state.iteration % every == 0:
        check_replicas(run.model, iteration=state.iteration)


def refuse_divergence(skipped: int, run: Run, state: TrainState) -> None:
    """End a run that only skips: it would go on to its end for nothing, and save that.

    Raises:
        DivergedError: On every rank, since all skip together.
    """
    if skipped < MAX_SKIPPED_IN_A_ROW:
        return
    advice, optimizer = "with a lower --lr", run.config.optimizer
    if run.config.model.fp16 and optimizer.loss_scale is not None:
        advice += f", with less than --loss-scale {optimizer.loss_scale:g} or without it"
    elif run.config.model.fp16:
        advice += f", with less than --min-loss-scale {optimizer.min_loss_scale:g}"
    raise DivergedError(
        f"the last {skipped} updates, up to iteration {state.iteration}, were all skipped "
        "because loss or gradient was not finite; nothing is saved. Go back to a checkpoint "
        f"from before (--load, --ckpt-step) {advice}, or look at the samples that the warnings name"
    )


def batches(
    session: Session, which: int, consumed_samples: int, num_workers: int
) -> Iterator[Batch]:
    """Return the microbatches of this rank from dataset ``which`` (0 train, 1 valid, 2 test)."""
    run, dataset = session.run, session.datasets[which]
    assert dataset is not None, f"there is no dataset number {which} to read"
    return build_data_iterator(
        dataset,
        consumed_samples=consumed_samples,
        micro_batch_size=run.config.training.micro_batch_size,
        global_batch_size=run.global_batch_size,
        num_microbatches=run.num_microbatches,
        dp_rank=run.world.pg_collection.dp.rank(),
        dp_size=run.world.pg_collection.dp.size(),
        num_workers=num_workers,
    )


def loader_workers(run: Run) -> int:
    """Return how many processes read ahead: on CPU none, unless --num-workers was given.

    A forked reader keeps the memory of before the first step alive, weights and all, and takes
    its time from the cores that train; a sample costs less than a millisecond to read.
    """
    wanted = run.config.data.num_workers
    if run.world.device.type != "cpu" or not wanted or run.config.given("num_workers"):
        return wanted
    log.info(" > reading data in the training process (on CPU, unless --num-workers is given)")
    return 0


def validate(session: Session) -> None:
    """Evaluate on the validation set, unless there is none or it was just done."""
    done = session.evaluated_iteration == session.state.iteration
    if done or session.datasets[1] is None or not session.run.config.validation.eval_iters:
        return
    session.evaluated_iteration = session.state.iteration
    session.reporter.evaluation(session.state, "validation", held_out_loss(session, 1))


def held_out_loss(session: Session, which: int) -> float:
    """Return the mean loss of the first --eval-iters global batches of a held-out dataset."""
    session.timers("evaluate").start()
    data = batches(session, which, consumed_samples=0, num_workers=0)
    loss = evaluate(session.run, data, session.run.config.validation.eval_iters)
    session.timers("evaluate").stop()
    return loss


def save(session: Session, saving: Callable[[TrainState], None]) -> None:
    """Save a checkpoint of the state by a method of the saver."""
    session.timers("save").start()
    saving(session.state)
    session.timers("save").stop()
    session.reporter.resume_clock()


def load(
    run: Run, tokenizer: Tokenizer, launch: Launch
) -> tuple[LoadedState, NonPersistent | None]:
    """Load the checkpoint of --load, if any, into the run.

    Returns:
        Where training begins, and where non-persistent checkpoints are, if there are any.
    """
    between = NonPersistent.create(run.config, launch)
    config = run.config
    if config.checkpoint.moe_use_upcycling:
        from megatron.training.upcycling.online import after_upcycling

        config = after_upcycling(config, world_group())
    reader = functools.partial(
        load_checkpoint, model=run.model, optimizer=run.optimizer, tokenizer=tokenizer
    )
    if between is None:
        loaded = reader(config.checkpoint.load, config=config)
    else:
        loaded = between.load(config, reader)
    start_clock.mark("checkpoint")
    if loaded.path is not None:
        log.info("%s", loaded.line())
    for notice in loaded.notices:
        log.info(" > %s", notice)
    return loaded, between


def make_saver(
    run: Run,
    tokenizer: Tokenizer,
    datasets: Datasets,
    loaded: LoadedState,
    between: NonPersistent | None,
) -> Saver:
    """Return what saves the run, which knows what lies in --save already."""
    already = saved_already(run.config, loaded)
    return Saver(run, tokenizer, fingerprint(datasets), already, between)


def fingerprint(datasets: Datasets) -> str | None:
    """Return a hash of the training data and its order; None without training data."""
    return None if datasets[0] is None else datasets[0].fingerprint


def tell_changed_data(loaded: LoadedState, datasets: Datasets) -> None:
    """Warn when a resumed run goes on in another order of samples than the one it began in."""
    if loaded.data_fingerprint not in (None, fingerprint(datasets)):
        log.warning(
            "the training data is not that of the checkpoint, or has another order (other files, "
            "blend, split, --seq-length or --seed, or more epochs): the run goes on at sample %d "
            "of the new order, which may repeat samples and leave out others",
            loaded.consumed_train_samples,
        )


def saved_already(config: RunConfig, loaded: LoadedState) -> int | None:
    """Return the iteration that lies in --save because it was loaded from there, or None."""
    save, path = config.checkpoint.save, loaded.path
    same = save is not None and path is not None and place(save).resolve() == path.parent.resolve()
    return loaded.iteration if same and loaded.iteration else None


def num_samples(run: Run, state: TrainState) -> tuple[int, int, int]:
    """Return how many samples training, validation and test need over the whole run.

    A run resumed with another batch size has consumed more or less than its own would have.
    """
    held_out = run.config.validation.eval_iters * run.global_batch_size
    remaining = max(0, run.train_iters - state.iteration) * run.global_batch_size
    return state.consumed_samples + remaining, held_out, held_out


def open_writer(run: Run, state: TrainState) -> MetricsWriter:
    """Open the files of metrics, to go on after the state's iteration."""
    config = run.config
    folder = log_folder(config.logging, config.checkpoint.save)
    try:
        return MetricsWriter(config.logging, folder, state.iteration)
    except OSError as error:
        raise ConfigError(f"--log-dir (--save when not set) cannot be written: {error}") from error
