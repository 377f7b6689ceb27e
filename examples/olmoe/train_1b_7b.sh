#!/usr/bin/env bash
# OLMoE-1B-7B (arXiv:2409.02060) on 256 GPUs, as there: data parallel, weights sharded.
# olmoe/1b_7b.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=256
MODEL=(
    --num-layers 16 --hidden-size 2048 --ffn-hidden-size 1024 --padded-vocab-size 50304
    --num-attention-heads 16 --kv-channels 128 --qk-layernorm --qk-layernorm-scope all_heads
    --max-position-embeddings 4096 --rotary-base 10000
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --num-experts 64 --moe-router-topk 8 --moe-ffn-hidden-size 1024 --moe-router-pre-softmax
    --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 1e-3
)
RECIPE=(
    --seq-length 4096 --train-iters 1200000 --lr 4e-4 --min-lr 4e-5 --lr-warmup-iters 2500
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 4 --global-batch-size 1024 --expert-model-parallel-size 8
    --recompute-granularity selective --recompute-modules moe_act
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --kv-channels 16 --num-experts 16 --moe-router-topk 4 --moe-ffn-hidden-size 32 --ffn-hidden-size 32
    --expert-model-parallel-size 2
)
source "$(dirname "$0")/../launch.sh"
