"""What is not given is derived, announced, and never changes what is given."""

from dataclasses import dataclass

import pytest
from hypothesis import given as any_of
from hypothesis import strategies as st

from megatron.training.arguments import parse_args
from megatron.training.config.data_source import DataSource
from megatron.training.config.defaults import derive
from megatron.training.config.options import options_of
from megatron.training.config.run_config import RunConfig

OPTIONS = options_of(RunConfig)
SHAPE = {"num_layers": 2, "hidden_size": 64}


@dataclass
class Facts:
    """Stands in for DataFacts."""

    num_tokens: int

    def samples_per_epoch(self, seq_length):
        return (self.num_tokens - 1) // seq_length


def _derive(world_size=1, facts=None, vocab_size=None, **values):
    values = SHAPE | values
    config = RunConfig.from_flat(values, dict.fromkeys(values, "cli"))
    source = DataSource(facts=facts, vocab_size=vocab_size)
    return derive(config, OPTIONS, world_size, source)


@pytest.mark.parametrize(
    ("given", "heads"),
    [
        ({"hidden_size": 768}, 12),
        ({"hidden_size": 64}, 1),
        ({"hidden_size": 320}, 5),
        ({"hidden_size": 48}, 1),
        ({"hidden_size": 100}, 2),
        ({"hidden_size": 257}, 1),
        ({"hidden_size": 1024, "kv_channels": 128}, 8),
        ({"hidden_size": 768, "group_query_attention": True, "num_query_groups": 8}, 16),
    ],
)
def test_heads_of_about_64(given, heads):
    assert _derive(**given).config.model.num_attention_heads == heads


@any_of(hidden=st.integers(1, 5000), groups=st.integers(1, 16))
def test_derived_heads_always_fit(hidden, groups):
    heads = _derive(
        hidden_size=hidden, group_query_attention=True, num_query_groups=groups
    ).config.model.num_attention_heads
    assert hidden % heads == 0
    assert heads % groups == 0 or hidden % groups


def test_samples_fit_positions_and_data():
    assert _derive().config.data.seq_length == 1024
    short = _derive(max_position_embeddings=100).config
    assert (short.data.seq_length, short.model.max_position_embeddings) == (100, 100)
    tiny = _derive(facts=Facts(num_tokens=100)).config
    assert (tiny.data.seq_length, tiny.model.max_position_embeddings) == (64, 64)
    assert _derive(seq_length=7).config.model.max_position_embeddings == 7


@pytest.mark.parametrize(
    ("world_size", "given", "micro", "whole"),
    [
        (1, {}, 2, 2),
        (8, {}, 2, 16),
        (2, {"micro_batch_size": 3}, 3, 6),
        (2, {"global_batch_size": 16}, 2, 16),
        (2, {"global_batch_size": 6}, 1, 6),
        (2, {"global_batch_size": 2}, 1, 2),
        (2, {"global_batch_size": 10}, 1, 10),
        (1, {"micro_batch_size": 2, "global_batch_size": 8}, 2, 8),
    ],
)
def test_batches(world_size, given, micro, whole):
    training = _derive(world_size, **given).config.training
    assert (training.micro_batch_size, training.global_batch_size) == (micro, whole)


def test_one_epoch_when_no_iterations_are_given():
    run = _derive(2, facts=Facts(num_tokens=1024 * 80 + 1))
    assert run.config.training.train_iters == 20
    assert run.config.scheduler.lr_decay_iters == 20
    assert any("--train-iters 20 (one epoch" in notice for notice in run.notices)
    assert _derive(8, facts=Facts(num_tokens=2000)).config.training.train_iters == 1
    assert _derive().config.training.train_iters == 100, "mock data has no end"


def test_warm_up_comes_only_with_the_default_learning_rate():
    assert _derive().config.scheduler.lr_warmup_fraction == 0.01
    assert _derive().config.optimizer.lr == 3e-4
    assert _derive(lr=1e-3).config.scheduler.lr_warmup_fraction is None
    assert _derive(lr_warmup_iters=5).config.scheduler.lr_warmup_fraction is None
    assert _derive(lr_warmup_iters=0).config.scheduler.lr_warmup_fraction is None


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        ({}, 384),
        ({"make_vocab_size_divisible_by": 1}, 257),
        ({"padded_vocab_size": 300}, 300),
    ],
)
def test_vocabulary_is_padded(given, rows):
    assert _derive(vocab_size=257, **given).config.tokenizer.padded_vocab_size == rows


def test_padding_below_the_vocabulary_is_a_problem():
    problems = _derive(vocab_size=257, padded_vocab_size=256).problems
    assert problems
    assert "--padded-vocab-size 256 must be at least the 257 ids" in problems[0]


@pytest.mark.parametrize(
    ("given", "iters"),
    [
        ({"mock_data": True}, 10),
        ({"mock_data": True, "train_iters": 5000}, 100),
        ({"mock_data": True, "train_iters": 3}, 1),
        ({"mock_data": True, "eval_iters": 7}, 7),
        ({"data_path": ["x"], "split": "1,0,0"}, 0),
        ({"train_data_path": ["x"]}, 0),
        ({"train_data_path": ["x"], "valid_data_path": ["y"]}, 10),
    ],
)
def test_evaluation_takes_a_share_of_the_run(given, iters):
    assert _derive(**given).config.validation.eval_iters == iters


def test_balancing_in_force_is_said_loudly():
    run = _derive(num_moe_experts=8)
    assert run.config.model.aux_loss_coeffs == {"aux_loss": 0.01}
    two = _derive(num_moe_experts=8, moe_router_load_balancing_type=["seq_aux_loss", "aux_loss"])
    assert two.config.model.aux_loss_coeffs == {"seq_aux_loss": 0.01, "aux_loss": 0.01}
    assert "load balancing: aux_loss with coefficient 0.01" in run.notices[-1]
    forced = _derive(num_moe_experts=8, moe_router_force_load_balancing=True)
    assert any("routing is RANDOM" in notice for notice in forced.notices)
    skewed = _derive(num_moe_experts=8, moe_router_force_biased=-1.0)
    assert any("RANDOM and skewed" in notice for notice in skewed.notices)
    replay = _derive(num_moe_experts=8, moe_enable_routing_replay=True)
    assert any("each router owns a RouterReplay" in notice for notice in replay.notices)
    for choice in ("sinkhorn", "quantile_balancing"):
        chosen = _derive(num_moe_experts=8, moe_router_load_balancing_type=[choice])
        assert chosen.config.model.moe_aux_loss_coeff is None
        assert chosen.config.model.aux_loss_coeffs == {}
        assert not any("balancing" in notice for notice in chosen.notices)
    by_bias = _derive(
        num_moe_experts=8, moe_aux_loss_coeff=[0.0], moe_router_enable_expert_bias=True
    )
    assert not any("balancing" in notice for notice in by_bias.notices)
    off = _derive(num_moe_experts=8, moe_aux_loss_coeff=[0.0])
    assert "load balancing: OFF" in off.notices[-1]
    assert not any("balancing" in notice for notice in _derive().notices)
    assert not any(
        "balancing" in n for n in _derive(num_moe_experts=8, moe_aux_loss_coeff=[0.1]).notices
    )


def test_no_experts_means_dense():
    assert _derive(num_moe_experts=0).config.model.num_moe_experts is None


def test_the_options_given_are_left_alone():
    config = RunConfig.from_flat(SHAPE)
    derive(config, OPTIONS, 1, DataSource())
    assert config == RunConfig.from_flat(SHAPE)


def test_everything_is_resolved_after_parsing():
    line = "--num-layers 2 --hidden-size 64 --mock-data"
    config = parse_args(line.split(), world_size=1)
    missing = {
        name
        for name, option in OPTIONS.items()
        if option.default is None and not option.optional and config.flat()[name] is None
    }
    assert missing == set()
    assert set(config.sources.values()) == {"default", "derived", "cli"}


def test_the_node_is_what_torchrun_started_unless_said():
    values = SHAPE | {"num_moe_experts": 8, "moe_token_dispatcher_type": "alltoall_hierarchical"}

    def node_size(**more):
        config = RunConfig.from_flat(values | more, dict.fromkeys(values | more, "cli"))
        run = derive(config, OPTIONS, 8, DataSource(), node_size=4)
        return run.config.model.moe_dispatcher_node_size

    assert node_size() == 4
    assert node_size(moe_dispatcher_node_size=2) == 2
    assert node_size(moe_token_dispatcher_type="alltoall") is None


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("expert_choice", ("none (experts take equal numbers of tokens)", "CAUSALITY")),
        ("hash", ("none (a loss cannot move a hash)",)),
    ],
)
def test_where_tokens_do_not_choose_there_is_no_balance_loss_and_it_is_said(kind, words):
    run = _derive(num_moe_experts=4, moe_router_type=kind)
    assert run.config.model.moe_router_load_balancing_type == ["none"]
    assert run.config.model.aux_loss_coeffs == {}
    told = [notice for notice in run.notices if any(word in notice for word in words)]
    assert len(told) == len(words)
    assert not any("load balancing" in notice for notice in run.notices)
    asked = _derive(
        num_moe_experts=4, moe_router_type=kind, moe_router_load_balancing_type=["aux_loss"]
    )
    assert any("excludes" in problem for problem in asked.config.model.moe_problems())


def test_the_largest_layer_stands_for_all_where_one_number_is_asked():
    run = _derive(moe_num_experts_per_layer=[4, 8], moe_router_topk_per_layer=[3, 1])
    model = run.config.model
    assert (model.num_moe_experts, model.moe_router_topk) == (8, 3)
    assert _derive(moe_num_experts_per_layer=[0, 0]).config.model.num_moe_experts is None
