#!/usr/bin/env bash
# DeepSeek-V2 (arXiv:2405.04434): 16 stages, experts on 8 GPUs, ZeRO-1, no tensor parallelism, as there.
# deepseek/v2.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=1024
PLAN_BATCH=2048
MODEL=(
    --num-layers 60 --hidden-size 5120 --ffn-hidden-size 12288 --padded-vocab-size 102400
    --norm-epsilon 1e-6
    --num-attention-heads 128 --q-lora-rank 1536
    --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --rotary-base 10000 --rope-scaling-type yarn --rope-scaling-factor 40
    --rope-scaling-original-max-position-embeddings 4096
    --yarn-beta-fast 32 --yarn-beta-slow 1 --max-position-embeddings 163840
    --mscale 0.707 --mscale-all-dim 0.707
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --num-experts 160 --moe-router-topk 6 --moe-ffn-hidden-size 1536 --moe-layer-freq '([0]*1+[1]*59)'
    --moe-shared-expert-intermediate-size 3072 --moe-router-pre-softmax
    --moe-router-topk-scaling-factor 16.0
    --moe-router-num-groups 8 --moe-router-group-topk 3 --moe-router-group-score-topk 1
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 3e-3
)
RECIPE=(
    --seq-length 4096 --train-iters 220000 --lr 2.4e-4 --min-lr 2.4e-5 --lr-warmup-iters 2000
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 1 --global-batch-size 9216
    --expert-model-parallel-size 8 --pipeline-model-parallel-size 16
    --decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 1
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16
    --rope-scaling-original-max-position-embeddings 32 --ffn-hidden-size 128 --moe-ffn-hidden-size 32
    --q-lora-rank 24 --num-experts 16 --moe-router-topk 3 --moe-layer-freq '([0]*1+[1]*3)'
    --moe-shared-expert-intermediate-size 32
    --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 2.0
    --expert-model-parallel-size 2
)
source "$(dirname "$0")/../launch.sh"
