"""R9 over stages: evaluation, skipped updates, reports and replicas are those of all stages."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.distributed.param_and_grad_buffer import ParamAndGradBuffer
from megatron.core.distributed.replica_check import ReplicaError, check_replicas
from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.executor import _Walk
from megatron.core.pipeline_parallel.schedule_step import Step
from megatron.training import setup_model
from megatron.training.checkpoint_model import load_trained_model
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.evaluate import evaluate
from megatron.training.run import TrainState
from megatron.training.train_step import train_step
from pretrain_gpt import forward_step, model_provider
from tests.helpers.layouts import make_config, make_run, microbatches
from tests.helpers.ranks import run_ranks

STAGES = {
    "num_layers": 4,
    "pipeline_model_parallel_size": 2,
    "num_virtual_stages_per_pipeline_rank": 2,
}


def one_rank(options: dict) -> dict:
    return {"num_layers": options["num_layers"], "pipeline_model_parallel_size": 1}


def _evaluates(losses: list[float]) -> None:
    options = STAGES if dist.get_world_size() == 2 else one_rank(STAGES)
    run = make_run(make_config(**options))
    loss = evaluate(run, (batch for _ in range(2) for batch in microbatches(run, 0)), 2)
    assert run.model.training
    assert losses == [] or loss == pytest.approx(losses[0], rel=1e-12)
    if dist.get_rank() == 0:
        torch.save(loss, "loss.pt")


def test_every_rank_gets_the_held_out_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_ranks(_evaluates, 1, [])
    run_ranks(_evaluates, 2, [torch.load("loss.pt")])


def _skips(where: str, options: dict) -> None:
    run = make_run(make_config(**options, fp64=False))
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("megatron.training.train_step").addHandler(handler)
    logging.getLogger("megatron.training.train_step").setLevel(logging.INFO)
    before = [param.clone() for _, param in run.model.trainable_parameters()]

    def poisoned(data, model):
        output, loss_func = forward_step(data, model)
        if where == "loss" and run.world.rank == 1:
            return output * float("nan"), loss_func
        return output, loss_func

    if where == "gradient" and run.world.rank == 1:
        zero = run.model.zero_grad_buffer

        def spoil() -> None:
            zero()
            run.model.module.decoder.layers["1"].mlp.router.weight.main_grad[0, 0] = float("inf")

        run.model.zero_grad_buffer = spoil
    outcome = train_step(replace(run, forward_step=poisoned), TrainState(), microbatches(run, 0))
    assert not outcome.updated
    assert (outcome.grad_norm is None) == (where == "loss")
    for (_, param), old in zip(run.model.trainable_parameters(), before, strict=True):
        assert torch.equal(param, old)
    if where == "gradient":
        told = "the gradient is not finite in 1 parameters: decoder.layers.1.mlp.router.weight"
        assert told in records, records  # on the rank that has not the layer, too


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_on_one_stage_skips_the_update_of_all(where: str) -> None:
    run_ranks(_skips, 2, where, STAGES)


def test_ends_that_share_out_a_tied_embedding_name_parameters_of_their_own() -> None:
    # the stages have not the same number of parameters: only the last has the final norm
    options = {"num_layers": 2, "pipeline_model_parallel_size": 2}
    run_ranks(_skips, 2, "gradient", options | {"use_distributed_optimizer": True})


def _copies_differ() -> None:
    run = make_run(make_config(num_layers=2, pipeline_model_parallel_size=2))
    check_replicas(run.model)
    if run.world.rank == 1:
        run.model.module.embedding.word_embeddings.weight.data[3, 4] += 1e-9
    with pytest.raises(ReplicaError, match=r"1 tensor.*embedding.word_embeddings.weight on rank 1"):
        check_replicas(run.model, iteration=3)


def test_copies_of_a_tied_embedding_that_differ_are_seen() -> None:
    run_ranks(_copies_differ, 2)


def _refuses_whole_models() -> None:
    config = make_config(num_layers=2, pipeline_model_parallel_size=2)
    world = make_run(config).world
    whole = make_config(num_layers=2)

    def provider(config, groups):
        return model_provider(whole, replace(groups, pp=groups.cp))

    with pytest.raises(ConfigError, match=r"stages=stages_of_rank"):
        setup_model.setup_run(config, world, provider, forward_step)


def test_a_model_that_ignores_the_stages_is_refused() -> None:
    run_ranks(_refuses_whole_models, 2)


def _counts(expected: str) -> None:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("megatron.training.setup_model").addHandler(handler)
    logging.getLogger("megatron.training.setup_model").setLevel(logging.INFO)
    run = make_run(make_config(**STAGES))
    assert any("stages (E embedding, t layer, L output layer): Et|(t|)*2,tL" in r for r in records)
    assert f" > number of parameters of the whole model: {expected}" in " ".join(records)
    rank = run.world.pg_collection.pp.rank()
    assert any(f"model parallel rank (0, {rank})" in r for r in records)


def _count_alone(path: str) -> None:
    run = make_run(make_config(**one_rank(STAGES)))
    count = sum(param.numel() for _, param in run.model.trainable_parameters())
    torch.save(count, path)


def test_parameters_of_all_stages_are_told_each_once(tmp_path) -> None:
    path = str(tmp_path / "count.pt")
    run_ranks(_count_alone, 1, path)
    run_ranks(_counts, 2, str(torch.load(path)))


def _vocabulary(folder: str, save: bool) -> None:
    vocab = 64 if save else 72
    config = make_config(num_layers=2, pipeline_model_parallel_size=2, padded_vocab_size=vocab)
    run = make_run(config)
    if save:
        state = TrainState(iteration=1)
        save_checkpoint(folder, state, config=config, model=run.model, optimizer=run.optimizer)
        return
    with pytest.raises(Exception, match="a vocabulary padded to 64 and this run pads it to 72"):
        load_checkpoint(folder, config=config, model=run.model, optimizer=run.optimizer)


def test_another_vocabulary_is_refused_on_stages_without_embedding_too(tmp_path) -> None:
    for save in (True, False):
        run_ranks(_vocabulary, 2, str(tmp_path), save)


def _stage_of_nothing() -> None:
    layout = "Et||tL"
    options = {"pipeline_model_parallel_size": 3, "pipeline_model_parallel_layout": layout}
    run = make_run(make_config(num_layers=2, **options))
    assert bool(list(run.model.trainable_parameters())) == (run.world.rank != 1)
    outcome = train_step(run, TrainState(), microbatches(run, 0))
    assert outcome.updated
    assert outcome.learning_rate == 0.05
    check_replicas(run.model)


def test_a_rank_without_a_parameter_takes_part() -> None:
    run_ranks(_stage_of_nothing, 3)


def _shares_out_nothing() -> None:
    config = make_config()
    world = replace(make_run(config).world, device=torch.device("meta"))
    assert setup_model.share_out(config, world, torch.nn.Module()).device.type == "meta"


def test_a_rank_without_a_parameter_knows_its_device() -> None:
    run_ranks(_shares_out_nothing, 1)


def _saves(folder: str) -> None:
    config = make_config(**STAGES, pipeline_schedule="dualpipev")
    run = make_run(config)
    state = TrainState(iteration=1)
    save_checkpoint(folder, state, config=config, model=run.model, optimizer=run.optimizer)


def _reads(folder: str) -> None:
    trained = load_trained_model(Path(folder))
    expected = make_run(make_config(num_layers=4)).model.module
    found = trained.model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())
    ids = torch.arange(6).unsqueeze(0)
    expected.eval()
    assert torch.equal(trained.model(ids, ids), expected(ids, ids))


def test_a_model_that_stages_saved_is_whole_for_who_generates(tmp_path) -> None:
    run_ranks(_saves, 2, str(tmp_path))
    run_ranks(_reads, 1, str(tmp_path))


def _reduces_early() -> None:
    run = make_run(make_config(**STAGES, overlap_grad_reduce=True, bucket_size=700))
    events: list[str] = []
    backward, reduce = _Walk._run_backward, ParamAndGradBuffer.start_reduce

    def noted_backward(walk: _Walk, step: Step) -> None:
        backward(walk, step)
        events.append(f"backward {step.chunk}")

    def noted_reduce(buffer: ParamAndGradBuffer, start: int, end: int) -> object:
        events.append("reduce" if buffer.layout.key.tied_ends == "no" else "reduce ends")
        return reduce(buffer, start, end)

    _Walk._run_backward, ParamAndGradBuffer.start_reduce = noted_backward, noted_reduce
    assert train_step(run, TrainState(), microbatches(run, 0)).updated
    first = events.index("reduce")
    last_of_chunk = len(events) - 1 - events[::-1].index("backward 1")
    assert events[:first].count("backward 1") == 3  # in the fourth, the last of this stage
    assert first < last_of_chunk
    assert "backward 0" in events[first:]  # the other stage goes on meanwhile
    assert events[-1] == "reduce ends"  # of the tied embedding, complete only now
    assert events.count("reduce ends") == 1


def test_a_stage_is_reduced_while_the_other_goes_backward() -> None:
    run_ranks(_reduces_early, 2)
