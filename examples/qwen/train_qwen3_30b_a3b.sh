#!/usr/bin/env bash
# Qwen3-30B-A3B (arXiv:2505.09388) on 16 GPUs: 128 experts spread over all of them.
# qwen/qwen3_30b_a3b.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=16
PLAN_BATCH=32
MODEL=(
    --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144 --padded-vocab-size 151936
    --norm-epsilon 1e-6
    --num-attention-heads 32 --group-query-attention --num-query-groups 4 --kv-channels 128
    --qk-layernorm
    --max-position-embeddings 40960 --rotary-base 1000000
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768
    --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3
)
RECIPE=(
    --seq-length 4096 --train-iters 500000 --lr 3e-4 --min-lr 3e-5 --lr-warmup-iters 2000
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 1 --global-batch-size 1024 --expert-model-parallel-size 16
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --num-query-groups 2 --kv-channels 16
    --num-experts 16 --moe-router-topk 4 --moe-ffn-hidden-size 32 --ffn-hidden-size 128
    --expert-model-parallel-size 2
)
source "$(dirname "$0")/../launch.sh"
