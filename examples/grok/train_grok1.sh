#!/usr/bin/env bash
# Grok-1, the shape of its open weights (314B parameters), on 256 GPUs of our choice.
# grok/grok1.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=256
PLAN_BATCH=128
MODEL=(
    --num-layers 64 --hidden-size 6144 --ffn-hidden-size 32768 --padded-vocab-size 131072
    --num-attention-heads 48 --group-query-attention --num-query-groups 8 --kv-channels 128
    --max-position-embeddings 8192 --position-embedding-type rope --rotary-base 10000
    --geglu --openai-gelu --disable-bias-linear --normalization RMSNorm --sandwich-norm
    --hidden-dropout 0 --attention-dropout 0
    --attn-logit-softcapping 30 --embedding-multiplier 78.38367176906169
    --logits-multiplier 0.5773502691896257
    --num-experts 8 --moe-router-topk 2 --moe-router-pre-softmax --moe-aux-loss-coeff 1e-2
)
RECIPE=(
    --seq-length 8192 --train-iters 500000 --lr 1e-4 --min-lr 1e-5 --lr-warmup-iters 2000
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 1 --global-batch-size 512
    --tensor-model-parallel-size 4 --sequence-parallel --expert-model-parallel-size 8
    --expert-tensor-parallel-size 1
    --pipeline-model-parallel-size 8
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --num-query-groups 2 --kv-channels 16
    --ffn-hidden-size 128 --tensor-model-parallel-size 2 --sequence-parallel
    --expert-model-parallel-size 2 --expert-tensor-parallel-size 1
)
source "$(dirname "$0")/../launch.sh"
