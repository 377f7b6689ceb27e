#!/usr/bin/env bash
# DeepSeek-V3 (arXiv:2412.19437) on 2048 GPUs, as there: 16 stages, experts on 64 GPUs, ZeRO-1.
# deepseek/v3.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=2048
PLAN_BATCH=4096
MODEL=(
    --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --padded-vocab-size 129280
    --norm-epsilon 1e-6
    --num-attention-heads 128 --q-lora-rank 1536
    --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --rotary-base 10000 --rope-scaling-type yarn --rope-scaling-factor 40
    --rope-scaling-original-max-position-embeddings 4096
    --yarn-beta-fast 32 --yarn-beta-slow 1 --max-position-embeddings 163840
    --mscale 1.0 --mscale-all-dim 1.0
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048 --moe-layer-freq '([0]*3+[1]*58)'
    --moe-shared-expert-intermediate-size 2048 --moe-router-score-function sigmoid
    --moe-router-topk-scaling-factor 2.5
    --moe-router-num-groups 8 --moe-router-group-topk 4 --moe-router-enable-expert-bias
    --moe-router-bias-update-rate 1e-3
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4 --mtp-num-layers 1
    --mtp-loss-scaling-factor 0.3
)
RECIPE=(
    --seq-length 4096 --train-iters 240000 --lr 2.2e-4 --min-lr 2.2e-5 --lr-warmup-iters 2000
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 1 --global-batch-size 15360
    --expert-model-parallel-size 64 --pipeline-model-parallel-size 16
    --decoder-first-pipeline-num-layers 4 --decoder-last-pipeline-num-layers 1
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16
    --rope-scaling-original-max-position-embeddings 32 --ffn-hidden-size 128 --moe-ffn-hidden-size 32
    --q-lora-rank 24 --num-experts 16 --moe-router-topk 4 --moe-layer-freq '([0]*1+[1]*3)'
    --moe-shared-expert-intermediate-size 32
    --moe-router-num-groups 4 --moe-router-group-topk 2 --expert-model-parallel-size 2
)
source "$(dirname "$0")/../launch.sh"
