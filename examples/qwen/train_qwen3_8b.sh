#!/usr/bin/env bash
# Qwen3-8B (arXiv:2505.09388), dense, on one node of 8 GPUs: TP 2 with sequence parallelism.
# qwen/qwen3_8b.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=8
PLAN_BATCH=8
MODEL=(
    --num-layers 36 --hidden-size 4096 --ffn-hidden-size 12288 --padded-vocab-size 151936
    --norm-epsilon 1e-6
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
    --qk-layernorm
    --max-position-embeddings 40960 --rotary-base 1000000
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
)
RECIPE=(
    --seq-length 4096 --train-iters 500000 --lr 3e-4 --min-lr 3e-5 --lr-warmup-iters 2000
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 1 --global-batch-size 512 --tensor-model-parallel-size 2 --sequence-parallel
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --num-query-groups 2 --kv-channels 16
    --ffn-hidden-size 128 --tensor-model-parallel-size 2 --sequence-parallel
)
source "$(dirname "$0")/../launch.sh"
