#!/usr/bin/env bash
# GPT-OSS-20B (arXiv:2508.10925) on 16 GPUs: sinks, windows in every other layer, clamped activation.
# gpt_oss/20b.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=16
PLAN_BATCH=32
MODEL=(
    --num-layers 24 --hidden-size 2880 --ffn-hidden-size 2880 --padded-vocab-size 201088 --num-experts 32
    --num-attention-heads 64 --group-query-attention --num-query-groups 8 --kv-channels 64
    --softmax-type learnable --window-size 127,0 --window-attn-skip-freq 2
    --max-position-embeddings 131072 --position-embedding-type rope --rotary-base 150000
    --rope-scaling-type yarn --rope-scaling-factor 32
    --rope-scaling-original-max-position-embeddings 4096
    --yarn-beta-fast 32 --yarn-beta-slow 1 --no-yarn-correction-range-round-to-int
    --quick-geglu --glu-linear-offset 1.0 --activation-func-clamp-value 7.0 --moe-router-bias
    --normalization RMSNorm --untie-embeddings-and-output-weights --hidden-dropout 0
    --attention-dropout 0
    --moe-router-topk 4 --moe-ffn-hidden-size 2880 --moe-aux-loss-coeff 1e-3
)
RECIPE=(
    --seq-length 4096 --train-iters 500000 --lr 2e-4 --min-lr 2e-5 --lr-warmup-iters 2000
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 1 --global-batch-size 512 --expert-model-parallel-size 8
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --num-query-groups 2 --kv-channels 16 --window-size 15,0
    --rope-scaling-original-max-position-embeddings 32
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32 --ffn-hidden-size 32
    --expert-model-parallel-size 2
)
source "$(dirname "$0")/../launch.sh"
