"""A large model made small keeps its features, and the rules of the configuration accept it."""

import pytest

from tools.layouts.cases import config_of, read_base
from tools.layouts.scale_down import kept_layers, scaled_down

DEEPSEEK = """
    --num-layers 61 --hidden-size 7168 --num-attention-heads 128 --ffn-hidden-size 18432 --swiglu
    --moe-ffn-hidden-size 2048 --num-experts 256 --moe-router-topk 8 --moe-router-num-groups 8
    --moe-router-group-topk 4 --moe-layer-freq ([0]*3+[1]*58) --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5 --normalization RMSNorm
    --moe-shared-expert-intermediate-size 2048 --position-embedding-type rope --bf16
    --disable-bias-linear --untie-embeddings-and-output-weights --seq-length 4096
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.0001
    --tensor-model-parallel-size 2 --expert-model-parallel-size 64 --use-distributed-optimizer
    --save /nowhere --data-path /nowhere/data --lr 1e-4 --train-iters 100 --micro-batch-size 1
"""
MIXTRAL = """
    --num-layers 32 --hidden-size 4096 --num-attention-heads 32 --group-query-attention
    --num-query-groups 8 --ffn-hidden-size 14336 --num-experts 8 --moe-router-topk 2 --swiglu
    --position-embedding-type rope --seq-length 4096 --padded-vocab-size 32000
"""
DENSE = "--num-layers 2 --hidden-size 64 --num-attention-heads 8 --seq-length 64"


def _small(words: str):
    base = read_base(words.split(), "fp64")
    pattern = config_of(base.values, [], 1, "sgd").model.moe_layer_pattern
    return config_of(scaled_down(base.values, pattern), [], 1, "sgd"), base


def test_features_and_ratios_stay():
    config, base = _small(DEEPSEEK)
    model = config.model
    assert list(model.moe_layer_pattern) == [False, True, True, True]
    assert (model.num_moe_experts, model.moe_router_topk) == (8, 4)
    assert (model.moe_router_num_groups, model.moe_router_group_topk) == (4, 2)
    assert model.moe_shared_expert_intermediate_size == 8
    assert model.moe_router_enable_expert_bias
    assert model.untie_embeddings_and_output_weights
    assert (model.hidden_size, config.data.seq_length) == (16, 16)
    assert base.own_layout is not None
    assert base.own_layout.sizes == {"tp": 2, "ep": 64}
    assert base.own_layout.words == (
        *["--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "64"],
        "--use-distributed-optimizer",
    )


def test_heads_keep_their_groups():
    model = _small(MIXTRAL)[0].model
    assert (model.num_attention_heads, model.num_query_groups) == (4, 1)


PHI = """
    --num-layers 32 --hidden-size 3072 --num-attention-heads 24 --kv-channels 128 --seq-length 8192
    --max-position-embeddings 131072 --rope-scaling-type longrope --position-embedding-type rope
    --rope-scaling-original-max-position-embeddings 4096 --rotary-percent 0.75 --rotary-interleaved
    --qk-layernorm --qk-layernorm-scope all_heads --normalization RMSNorm --disable-bias-linear
    --add-proj-bias --longrope-short-factor %s --longrope-long-factor %s
"""


def test_stretched_positions_stay_stretched_and_norms_of_heads_stay():
    factors = " ".join(map(str, range(1, 49)))
    model = _small(PHI % (factors, factors))[0].model
    assert (model.rope_scaling, model.rotary_dim, model.head_dim) == ("longrope", 4, 4)
    assert model.longrope_long_factor == [47.0, 48.0]
    assert model.rope_is_long(16)
    assert model.qk_layernorm_scope == "all_heads"
    assert model.rotary_interleaved
    assert model.add_proj_bias
    llama = _small(DENSE + " --position-embedding-type rope --use-rope-scaling")[0].model
    assert (llama.rope_scaling, llama.rope_original_length) == ("llama3", 16)


def test_windows_end_within_short_sequences_and_layers_of_both_kinds_stay():
    gpt_oss = f"{MIXTRAL} --window-size 127,0 --window-attn-skip-freq 2 --softmax-type learnable"
    model = _small(gpt_oss)[0].model
    assert model.attention_windows == [5, 5, None, None]  # layers 0, 10, 21 and 31
    assert model.softmax_type == "learnable"
    model = _small(f"{MIXTRAL} --window-size 2,0 --window-attn-skip-freq 30")[0].model
    assert model.attention_windows == [2, None, 2, None]
    model = _small(f"{MIXTRAL} --window-size 8191,0")[0].model  # longer than a sample
    assert model.attention_windows == [16] * 4


def test_scores_stay_as_large_as_they_were_for_the_cap():
    model = _small(f"{MIXTRAL} --softmax-scale 0.0078125 --attn-logit-softcapping 30")[0].model
    assert model.softmax_scale == pytest.approx(0.0078125 * (128 / 4) ** 0.5)
    assert model.attn_logit_softcapping == 1.0


def test_latent_attention_stays_and_its_widths_shrink():
    latents = "--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --v-head-dim 192"
    model = _small(f"{DEEPSEEK} {latents}")[0].model
    assert model.multi_latent_attention
    assert (model.q_lora_rank, model.kv_lora_rank) == (12, 8)
    assert (model.qk_head_dim, model.qk_pos_emb_head_dim, model.v_head_dim) == (6, 4, 9)
    stretched = "--multi-latent-attention --rotary-scaling-factor 40 --mscale-all-dim 1.0"
    model = _small(f"{DEEPSEEK} {stretched}")[0].model
    assert (model.q_lora_rank, model.rope_scaling, model.rope_factor) == (None, "yarn", 40.0)


def test_a_dense_model_stays_dense():
    config, _ = _small(DENSE)
    assert config.model.num_moe_experts is None
    assert config.model.num_layers == 2


@pytest.mark.parametrize(
    ("pattern", "kept"),
    [
        ([True] * 61, [0, 20, 40, 60]),
        ([False] * 3 + [True] * 58, [0, 20, 40, 60]),
        ([True] * 2, [0, 1]),
        ([True] * 30 + [False] + [True] * 30, [0, 30, 40, 60]),
        ([False, True] * 4, [0, 2, 5, 7]),
    ],
)
def test_layers_that_stay_are_spread_and_of_both_kinds(pattern, kept):
    assert kept_layers(pattern) == kept


def test_what_a_run_reads_and_writes_is_left_out():
    config, _ = _small(DEEPSEEK)
    assert config.checkpoint.save is None
    assert config.data.mock_data
