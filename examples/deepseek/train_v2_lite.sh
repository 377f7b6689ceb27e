#!/usr/bin/env bash
# DeepSeek-V2-Lite (arXiv:2405.04434, appendix B): 16B parameters on one node of 8 GPUs.
# deepseek/v2_lite.yaml is the same run; how to start either, plan it or try it on a laptop: examples/README.md.
GPUS=8
PLAN_BATCH=16
MODEL=(
    --num-layers 27 --hidden-size 2048 --ffn-hidden-size 10944 --padded-vocab-size 102400
    --norm-epsilon 1e-6
    --num-attention-heads 16
    --multi-latent-attention --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64
    --v-head-dim 128
    --rotary-base 10000 --rope-scaling-type yarn --rope-scaling-factor 40
    --rope-scaling-original-max-position-embeddings 4096
    --yarn-beta-fast 32 --yarn-beta-slow 1 --max-position-embeddings 163840
    --mscale 0.707 --mscale-all-dim 0.707
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --untie-embeddings-and-output-weights --hidden-dropout 0 --attention-dropout 0
    --num-experts 64 --moe-router-topk 6 --moe-ffn-hidden-size 1408 --moe-layer-freq '([0]*1+[1]*26)'
    --moe-shared-expert-intermediate-size 2816 --moe-router-pre-softmax
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-3
)
RECIPE=(
    --seq-length 4096 --train-iters 300000 --lr 4.2e-4 --min-lr 4.2e-5 --lr-warmup-iters 2000
    --lr-decay-style cosine --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 1.0
)
CLUSTER=(
    --micro-batch-size 1 --global-batch-size 4608
    --expert-model-parallel-size 8 --recompute-granularity full --recompute-method uniform
    --recompute-num-layers 1
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --device cuda
)
# instead of CLUSTER with --toy, after LAPTOP of launch.sh: the same features, small, on 2 CPU ranks
TOY=(
    --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16
    --rope-scaling-original-max-position-embeddings 32 --ffn-hidden-size 128 --moe-ffn-hidden-size 32
    --num-experts 16 --moe-router-topk 3 --moe-layer-freq '([0]*1+[1]*3)'
    --moe-shared-expert-intermediate-size 32
    --expert-model-parallel-size 2
)
source "$(dirname "$0")/../launch.sh"
