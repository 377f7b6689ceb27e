import dataclasses
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron.core.dist_checkpointing.mapping import model_tensors, optimizer_tensors
from megatron.core.errors import CheckpointError
from megatron.core.tokenizers.byte_tokenizer import ByteTokenizer
from megatron.core.tokenizers.null_tokenizer import NullTokenizer
from megatron.training import checkpointing
from megatron.training.checkpoint_state import LoadedState, SaveResult, TrainState
from megatron.training.checkpointing import load_checkpoint, restart_seed, save_checkpoint
from megatron.training.config.run_config import RunConfig
from tests.helpers.ranks import run_ranks
from tests.unit_tests.core.dist_checkpointing.stand_in import build, fill, wrong_keys


def run_config(**options: object) -> RunConfig:
    defaults: dict = {
        "num_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_moe_experts": 4,
        "lr": 1e-3,
        "train_iters": 10,
        "lr_decay_iters": 10,
        "global_batch_size": 8,
    }
    return RunConfig.from_flat(defaults | options)


class Trained:
    """A stand-in run: model, optimizer, and what its checkpoint should hold."""

    def __init__(self, ep: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.model, self.optimizer = build(ep, dtype)
        self.optimizer.step_count = 3

    def weights(self) -> dict[str, torch.Tensor]:
        return model_tensors(self.model.module)

    def moments(self) -> dict[str, torch.Tensor]:
        return optimizer_tensors(self.optimizer.named_state())

    def save(self, folder: Path, config: RunConfig | None = None, **options) -> SaveResult:
        state = {"iteration": 10, "consumed_samples": 80, "dropout_seed": 7}
        state |= {name: options.pop(name) for name in state if name in options}
        return save_checkpoint(
            folder,
            TrainState(**state),
            config=config or run_config(),
            model=self.model,
            optimizer=self.optimizer,
            **options,
        )

    def load(self, folder: Path | None, config: RunConfig | None = None, **options) -> LoadedState:
        return load_checkpoint(
            folder,
            config=config or run_config(),
            model=self.model,
            optimizer=self.optimizer,
            **options,
        )


@pytest.fixture
def alone() -> Iterator[None]:
    """A world of one rank, gone afterwards: tests that fork ranks must find none."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def saved(tmp_path: Path, alone: None) -> Path:
    trained = Trained()
    fill(trained.weights() | trained.moments())
    result = trained.save(tmp_path, tokenizer=ByteTokenizer())
    assert result.error == ""
    return tmp_path


def test_a_run_goes_on_where_it_was(saved: Path) -> None:
    fresh = Trained()
    fresh.optimizer.step_count = 0
    state = fresh.load(saved)
    assert state.iteration == 10
    assert state.consumed_train_samples == 80
    assert state.dropout_seed == 7
    assert state.notices == ()
    assert fresh.optimizer.step_count == 3
    assert wrong_keys(fresh.weights() | fresh.moments()) == []
    assert state.line() == f"resumed at iteration 10 (80 samples) from {saved}/iter_0000010"


def test_global_generators_go_on_where_they_were(tmp_path: Path, alone: None) -> None:
    Trained().save(tmp_path)
    expected = torch.rand(3)
    torch.rand(5)
    Trained().load(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_without_a_folder_the_run_is_fresh(alone: None) -> None:
    state = Trained().load(None, run_config(seed=5))
    assert (state.iteration, state.dropout_seed, state.path) == (0, 5, None)


def test_an_empty_folder_ends_the_run_unless_allowed(tmp_path: Path, alone: None) -> None:
    with pytest.raises(CheckpointError, match=r"holds no checkpoint.*--allow-fresh-start"):
        Trained().load(tmp_path)
    assert Trained().load(tmp_path, run_config(allow_fresh_start=True)).path is None


def test_no_load_optim_keeps_a_fresh_optimizer(saved: Path) -> None:
    fresh = Trained()
    fresh.optimizer.step_count = 0
    state = fresh.load(saved, run_config(no_load_optim=True, lr=5.0))
    assert state.iteration == 10
    assert fresh.optimizer.step_count == 0
    assert wrong_keys(fresh.weights()) == []
    assert all(moment.eq(0).all() for moment in fresh.moments().values())


@pytest.mark.parametrize("was", [{}, {"no_save_optim": True}])
@pytest.mark.parametrize("now", [{"lr": 5.0, "train_iters": 99}, {"optimizer": "sgd"}])
def test_evaluation_asks_nothing_of_optimizer_and_schedule(
    tmp_path: Path, alone: None, was: dict, now: dict
) -> None:
    trained = Trained()
    fill(trained.weights())
    trained.save(tmp_path, run_config(**was))
    fresh = Trained()
    fresh.optimizer.step_count = 0
    assert fresh.load(tmp_path, run_config(skip_train=True, **now)).iteration == 10
    assert wrong_keys(fresh.weights()) == []
    assert fresh.optimizer.step_count == 0


def test_no_load_rng_starts_another_dropout_stream(saved: Path) -> None:
    before = torch.get_rng_state()
    state = Trained().load(saved, run_config(no_load_rng=True))
    assert state.dropout_seed == restart_seed(1234, 10) not in (7, 1234)
    assert torch.equal(torch.get_rng_state(), before)
    assert "fresh stream" in state.notices[0]


def test_finetuning_takes_the_weights_alone(saved: Path) -> None:
    fresh = Trained()
    state = fresh.load(saved, run_config(finetune=True, lr=5.0))
    assert (state.iteration, state.consumed_train_samples, state.dropout_seed) == (0, 0, 1234)
    assert wrong_keys(fresh.weights()) == []
    assert all(moment.eq(0).all() for moment in fresh.moments().values())


def test_bf16_weights_and_their_fp32_main_weights_agree_after_loading(
    tmp_path: Path, alone: None
) -> None:
    trained = Trained(dtype=torch.bfloat16)
    fill(trained.moments())
    trained.optimizer.after_load(with_optim=True)
    with torch.no_grad():
        trained.model.module.dense += 1  # as if main weights and weights had come apart
    trained.save(tmp_path)
    resumed, restarted = Trained(dtype=torch.bfloat16), Trained(dtype=torch.bfloat16)
    resumed.load(tmp_path)
    restarted.load(tmp_path, run_config(no_load_optim=True))
    main = "optimizer.main_param.dense"
    for fresh in (resumed, restarted):
        assert torch.equal(fresh.weights()["model.dense"], fresh.moments()[main].bfloat16())
    assert torch.equal(resumed.moments()[main], trained.moments()[main])
    assert torch.equal(restarted.weights()["model.dense"], trained.weights()["model.dense"])


@pytest.mark.parametrize(
    ("option", "answer"),
    [("no_save_optim", "--no-load-optim"), ("no_save_rng", "--no-load-rng")],
)
def test_what_was_left_out_must_not_be_asked_for(
    tmp_path: Path, alone: None, option: str, answer: str
) -> None:
    Trained().save(tmp_path, run_config(**{option: True}))
    with pytest.raises(CheckpointError, match=answer):
        Trained().load(tmp_path)
    Trained().load(tmp_path, run_config(**{answer[2:].replace("-", "_"): True}))


def test_all_misfits_are_told_at_once_and_nothing_is_touched(saved: Path) -> None:
    fresh = Trained()
    config = run_config(hidden_size=64, num_layers=3, lr=2e-3)
    with pytest.raises(CheckpointError) as caught:
        fresh.load(saved, config, tokenizer=NullTokenizer(100))
    text = str(caught.value)
    assert "--num-layers is 2 in the checkpoint and 3 in this run" in text
    assert "--hidden-size is 32 in the checkpoint and 64 in this run" in text
    assert "tokenizer ByteTokenizer of 257 ids" in text
    assert "NullTokenizer of 101 ids" in text
    assert "--lr is 0.001 in the checkpoint and 0.002 in this run" in text
    assert all(weight.eq(0).all() for weight in fresh.weights().values())


def test_a_changed_learning_rate_is_taken_with_the_override(saved: Path) -> None:
    state = Trained().load(saved, run_config(lr=2e-3, override_opt_param_scheduler=True))
    assert "--lr was 0.001 and now is 0.002" in state.notices[0]


def test_another_optimizer_is_refused_by_name(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="--optimizer is adam in the checkpoint and sgd"):
        Trained().load(saved, run_config(optimizer="sgd"))


def test_an_older_iteration_can_be_chosen(saved: Path) -> None:
    Trained().save(saved, iteration=20)
    assert Trained().load(saved, run_config(ckpt_step=10)).iteration == 10
    assert Trained().load(saved).iteration == 20


def test_a_failed_save_is_one_line_and_no_exception(saved: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        result = Trained().save(saved, iteration=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.path is None
    assert "iteration 20 was NOT saved: File too large" in result.line()
    assert "\n" not in result.line()
    assert Trained().load(saved).iteration == 10


def test_the_whole_configuration_is_saved(saved: Path) -> None:
    from megatron.core.dist_checkpointing.store import open_checkpoint
    from megatron.training.resume_rules import config_from_data

    opened = open_checkpoint(saved, None)
    assert opened is not None
    again = config_from_data(opened.common["config"])
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in again.flat().items()} == (
        run_config().flat()
    )
    assert dataclasses.asdict(again.model) == dataclasses.asdict(run_config().model)


def _save(folder: str) -> None:
    trained = Trained(ep=dist.get_world_size())
    fill(trained.weights() | trained.moments())
    assert trained.save(Path(folder)).error == ""


def _load_alone(folder: str) -> None:
    fresh = Trained()
    state = fresh.load(Path(folder))
    assert wrong_keys(fresh.weights() | fresh.moments()) == []
    assert "saved by 2 ranks, resumed on 1" in state.notices[0]


def test_a_run_of_two_ranks_goes_on_alone(tmp_path: Path) -> None:
    run_ranks(_save, 2, str(tmp_path))
    run_ranks(_load_alone, 1, str(tmp_path))


def _rank_1_cannot_read_the_index(folder: str) -> None:
    def unreadable(path: Path) -> None:
        raise CheckpointError(f"{path.name}/index.json is damaged")

    if dist.get_rank() == 1:
        checkpointing.stored_tensors = unreadable
    with pytest.raises(CheckpointError, match=r"rank 1: iter_0000010/index.json is damaged"):
        Trained(ep=2).load(Path(folder))


def test_an_index_that_one_rank_cannot_read_ends_all_ranks(tmp_path: Path) -> None:
    run_ranks(_save, 2, str(tmp_path))
    run_ranks(_rank_1_cannot_read_the_index, 2, str(tmp_path))


def _hidden_sizes_differ(folder: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Trained(ep=2).load(Path(folder), run_config(hidden_size=64))
    messages: list = [None, None]
    dist.all_gather_object(messages, str(caught.value))
    assert messages[0] == messages[1]


def test_all_ranks_refuse_together(tmp_path: Path) -> None:
    run_ranks(_save, 1, str(tmp_path))
    run_ranks(_hidden_sizes_differ, 2, str(tmp_path))


def test_the_order_of_the_data_is_remembered(alone, tmp_path):
    Trained().save(tmp_path, data_fingerprint="of the data")
    assert Trained().load(tmp_path).data_fingerprint == "of the data"
    assert Trained().load(tmp_path, run_config(finetune=True)).data_fingerprint is None
