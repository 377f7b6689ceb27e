from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.throughput import flops_per_token

SHAPE = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "ffn_hidden_size": 16}


def _flops(**changes) -> float:
    return flops_per_token(TransformerConfig(**SHAPE | changes), seq_length=4, vocab_size=32)


def test_the_count_is_that_of_the_products_written_out() -> None:
    # projections 4*8*8, causal core 8*4, two matrices of 8*16; twice; logits 32*8
    assert _flops() == 6 * (2 * (256 + 32 + 256) + 256)


def test_a_gated_mlp_has_three_matrices() -> None:
    assert _flops(swiglu=True) - _flops() == 6 * 2 * 8 * 16


def test_only_the_chosen_experts_count() -> None:
    moe = _flops(num_moe_experts=8, moe_router_topk=2, moe_layer_freq=[0, 1])
    assert moe - _flops() == 6 * 2 * 8 * 16


def test_shared_experts_count_for_every_token() -> None:
    experts = {"num_moe_experts": 8, "moe_layer_freq": [0, 1], "swiglu": True}
    shared = _flops(**experts, moe_shared_expert_intermediate_size=5)
    assert shared - _flops(**experts) == 6 * 3 * 8 * 5


def test_latent_experts_are_narrower_and_cost_two_matrices() -> None:
    experts = {"num_moe_experts": 8, "moe_layer_freq": [0, 1], "moe_router_topk": 3}
    latent = _flops(**experts, moe_latent_size=2)
    assert _flops(**experts) - latent == 6 * (3 * 2 * (8 - 2) * 16 - 2 * 8 * 2)


def test_grouped_queries_save_projections_only() -> None:
    grouped = _flops(group_query_attention=True, num_query_groups=1)
    assert _flops() - grouped == 6 * 2 * 8 * 8


def test_latent_attention_counts_the_ways_down_and_up() -> None:
    widths = {"kv_lora_rank": 3, "qk_head_dim": 5, "qk_pos_emb_head_dim": 2, "v_head_dim": 7}
    latent = {"multi_latent_attention": True, "position_embedding_type": "rope", **widths}
    # queries 8*2*7; down 8*(3+2), up 3*2*(5+7), out 2*7*8; scores 2*7*2, values 2*7*2
    one = 112 + 40 + 72 + 112 + 28 + 28 + 256
    assert _flops(**latent) == 6 * (2 * one + 256)
    # down 8*4, up 4*2*7 in place of 8*2*7
    assert _flops(**latent) - _flops(**latent, q_lora_rank=4) == 6 * 2 * (112 - 32 - 56)


def test_a_window_counts_the_keys_in_it() -> None:
    # of 4 positions, w = 2: 2 - 4 / 8 = 1.5 keys a query where a whole layer counts 2
    assert _flops() - _flops(window_size=[1, 0]) == 6 * 2 * 2 * 8 * (2 - 1.5)
    half = _flops(window_size=[1, 0], window_attn_skip_freq=2)
    assert _flops() - half == 6 * 2 * 8 * (2 - 1.5)
    for reach in ([3, 0], [100, 0], [-1, 0]):
        assert _flops(window_size=reach) == _flops()


def test_a_depth_of_multi_token_prediction_costs_a_layer_a_head_and_a_projection() -> None:
    # projections 4*8*8, causal core 8*4, two matrices of 8*16; logits 32*8; two widths to one
    depth = 256 + 32 + 256 + 256 + 2 * 8 * 8
    assert _flops(mtp_num_layers=2) - _flops() == 6 * 2 * depth
    experts = {"num_moe_experts": 8, "moe_router_topk": 3, "moe_layer_freq": [0, 1]}
    of_last = 6 * (depth + 2 * 2 * 8 * 16)
    assert _flops(**experts, mtp_num_layers=1) - _flops(**experts) == of_last
