#!/usr/bin/env bash
# 8 experts over 2 CPU ranks (expert parallel 2, gloo), on made-up data: seconds, no GPU, no files.
set -euo pipefail
cd "$(dirname "$0")/../.."
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 pretrain_gpt.py \
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-experts 8 --moe-router-topk 2 \
    --expert-model-parallel-size 2 --seq-length 64 --micro-batch-size 4 --global-batch-size 16 \
    --mock-data --train-iters 20 --lr 1e-3 --log-interval 5 --eval-iters 2 "$@"
