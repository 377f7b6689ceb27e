#!/usr/bin/env bash
# Mixtral 8x7B (arXiv:2401.04088) on 64 GPUs: 8 experts on 8 GPUs, 4 stages of 8 chunks.
# mixtral/8x7b.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=64
MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --padded-vocab-size 32000
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
    --max-position-embeddings 32768 --rotary-base 1000000
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --num-experts 8 --moe-router-topk 2 --moe-aux-loss-coeff 0.02
)
RECIPE=(
    --seq-length 4096 --train-iters 500000 --lr 1e-4 --min-lr 1e-5 --lr-warmup-iters 500
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 1 --global-batch-size 256
    --expert-model-parallel-size 8 --pipeline-model-parallel-size 4
    --num-layers-per-virtual-pipeline-stage 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --ffn-hidden-size 128 --num-query-groups 2 --kv-channels 16 --expert-model-parallel-size 2
)
source "$(dirname "$0")/../launch.sh"
