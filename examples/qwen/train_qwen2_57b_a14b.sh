#!/usr/bin/env bash
# Qwen2-57B-A14B (arXiv:2407.10671) on 64 GPUs: shared experts behind a gate, biases of queries, keys and values.
# qwen/qwen2_57b_a14b.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=64
MODEL=(
    --num-layers 28 --hidden-size 3584 --ffn-hidden-size 18944 --padded-vocab-size 151936
    --norm-epsilon 1e-6
    --num-attention-heads 28 --group-query-attention --num-query-groups 4 --kv-channels 128
    --add-qkv-bias
    --max-position-embeddings 131072 --rotary-base 1000000
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --num-experts 64 --moe-router-topk 8 --moe-ffn-hidden-size 2560 --moe-router-pre-softmax
    --moe-shared-expert-intermediate-size 20480 --moe-shared-expert-gate --moe-aux-loss-coeff 1e-3
)
RECIPE=(
    --seq-length 4096 --train-iters 500000 --lr 2e-4 --min-lr 2e-5 --lr-warmup-iters 2000
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
    --num-query-groups 2 --kv-channels 16
    --num-experts 16 --moe-router-topk 4 --moe-ffn-hidden-size 32 --ffn-hidden-size 128
    --moe-shared-expert-intermediate-size 64
    --expert-model-parallel-size 2
)
source "$(dirname "$0")/../launch.sh"
