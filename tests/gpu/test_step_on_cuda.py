"""The same step bodies on one CUDA device as on the CPU. Skipped where there is none."""

import pytest
import torch
import torch.distributed as dist

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.initialize import World
from megatron.training.run import TrainState
from megatron.training.setup_model import setup_run
from megatron.training.train_step import StepOutcome, train_step
from pretrain_gpt import forward_step, model_provider
from tests.helpers.layouts import make_config, microbatches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module", autouse=True)
def _world_of_one():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _train(device: str, steps: int = 3, **options: object) -> list[StepOutcome]:
    # without dropout: a CUDA generator draws other masks than a CPU one from the same seed
    config = make_config(hidden_dropout=0.0, attention_dropout=0.0, optimizer="sgd", **options)
    world = World(
        rank=0,
        world_size=1,
        device=torch.device(device),
        pg_collection=ProcessGroupCollection.create(config.model.layout(1)),
    )
    run = setup_run(config, world, model_provider, forward_step)
    state, outcomes = TrainState(), []
    for _ in range(steps):
        outcomes.append(train_step(run, state, microbatches(run, state.consumed_samples)))
        state.consumed_samples += run.global_batch_size
    return outcomes


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_fp64_losses_and_norms_equal_those_on_the_cpu(dispatcher):
    cpu = _train("cpu", moe_token_dispatcher_type=dispatcher)
    cuda = _train("cuda", moe_token_dispatcher_type=dispatcher)
    for ours, theirs in zip(cuda, cpu, strict=True):
        assert ours.lm_loss == pytest.approx(theirs.lm_loss, rel=1e-10)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-10)


def test_bf16_training_with_grouped_gemm_stays_near_fp32():
    options = {"fp64": False, "hidden_size": 64, "ffn_hidden_size": 64, "init_method_std": 0.05}
    fp32, bf16 = _train("cuda", **options), _train("cuda", bf16=True, **options)
    for ours, theirs in zip(bf16, fp32, strict=True):
        assert ours.lm_loss == pytest.approx(theirs.lm_loss, rel=2e-2)


def test_two_runs_give_the_same_bits():
    options = {"fp64": False, "hidden_size": 64, "ffn_hidden_size": 64}
    assert _train("cuda", **options) == _train("cuda", **options)


def test_fp16_training_with_a_loss_scale_stays_near_fp32():
    options = {"fp64": False, "hidden_size": 64, "ffn_hidden_size": 64, "init_method_std": 0.05}
    fp32, fp16 = _train("cuda", **options), _train("cuda", fp16=True, loss_scale=4096.0, **options)
    for ours, theirs in zip(fp16, fp32, strict=True):
        assert ours.lm_loss == pytest.approx(theirs.lm_loss, rel=2e-3)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=2e-2)


SCALED = {
    "embedding_multiplier": 3.5,
    "residual_multiplier": 0.22,
    "logits_multiplier": 0.3,
    "final_logit_softcapping": 1.5,
    "sandwich_norm": True,
    "layernorm_zero_centered_gamma": True,
}


@pytest.mark.parametrize(
    "options",
    [
        {"mtp_num_layers": 2},
        SCALED,
        SCALED | {"normalization": "RMSNorm", "parallel_residual": True},
    ],
    ids=["depths", "factors", "factors, RMSNorm, parallel"],
)
def test_fp64_features_of_the_residual_stream_equal_those_on_the_cpu(options):
    for ours, theirs in zip(_train("cuda", **options), _train("cpu", **options), strict=True):
        assert ours.lm_loss == pytest.approx(theirs.lm_loss, rel=1e-10)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-10)
        assert ours.mtp_losses == pytest.approx(theirs.mtp_losses, rel=1e-10)
