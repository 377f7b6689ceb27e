#!/usr/bin/env bash
# Qwen3-235B-A22B (arXiv:2505.09388) on 256 GPUs: TP 2, 8 stages, experts on 32 GPUs.
# qwen/qwen3_235b_a22b.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=256
PLAN_BATCH=256
MODEL=(
    --num-layers 94 --hidden-size 4096 --ffn-hidden-size 12288 --padded-vocab-size 151936
    --norm-epsilon 1e-6
    --num-attention-heads 64 --group-query-attention --num-query-groups 4 --kv-channels 128
    --qk-layernorm
    --max-position-embeddings 40960 --rotary-base 1000000
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 1536
    --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3
)
RECIPE=(
    --seq-length 4096 --train-iters 500000 --lr 2e-4 --min-lr 2e-5 --lr-warmup-iters 2000
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 1 --global-batch-size 2048
    --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 32
    --expert-tensor-parallel-size 1
    --pipeline-model-parallel-size 8 --decoder-first-pipeline-num-layers 11
    --decoder-last-pipeline-num-layers 11
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --num-query-groups 2 --kv-channels 16
    --num-experts 16 --moe-router-topk 4 --moe-ffn-hidden-size 32 --ffn-hidden-size 128
    --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2
    --expert-tensor-parallel-size 1
)
source "$(dirname "$0")/../launch.sh"
