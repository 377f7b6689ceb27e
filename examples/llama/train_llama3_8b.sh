#!/usr/bin/env bash
# Llama 3 8B (arXiv:2407.21783), dense, on one node of 8 GPUs.
# llama/llama3_8b.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=8
PLAN_BATCH=4
MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --padded-vocab-size 128256
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
    --max-position-embeddings 131072 --rotary-base 500000 --use-rope-scaling --rope-scaling-factor 8.0
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
)
RECIPE=(
    --seq-length 8192 --train-iters 1200000 --lr 3e-4 --min-lr 3e-6 --lr-warmup-iters 8000
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 1 --global-batch-size 512 --context-parallel-size 2 --tensor-model-parallel-size 2
    --sequence-parallel
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --num-query-groups 2 --kv-channels 16
    --ffn-hidden-size 128 --context-parallel-size 2
)
source "$(dirname "$0")/../launch.sh"
