# How every example starts. An example sets GPUS and the arrays MODEL, RECIPE, CLUSTER and TOY, then reads this file.
#
#   train_X.sh --data-path my_data ...   train on this node's share of the cluster: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT
#                                        and GPUS_PER_NODE as for torchrun
#   train_X.sh --plan ...                look at all ranks without a GPU (--dry-run): parameters, memory, traffic, deadlocks; of a
#                                        step of PLAN_BATCH samples, which has all that ranks ever hold at once, but fewer repeats
#   train_X.sh --toy ...                 the same features in a small model, 30 steps on 2 CPU ranks, no data
#
# Further flags are passed on, and win.
set -euo pipefail
LAPTOP=(
    --mock-data --num-layers 4 --hidden-size 64 --num-attention-heads 4 --padded-vocab-size 1024 --vocab-size 1000
    --seq-length 64 --max-position-embeddings 128 --micro-batch-size 4 --global-batch-size 16
    --train-iters 30 --lr 3e-3 --min-lr 3e-4 --lr-warmup-iters 3 --eval-iters 0 --log-interval 5 --device cpu
)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
--plan)
    exec python pretrain_gpt.py "${MODEL[@]}" "${RECIPE[@]}" "${CLUSTER[@]}" \
        ${PLAN_BATCH:+--global-batch-size "$PLAN_BATCH"} \
        --mock-data --vocab-size 256 --dry-run --dry-run-world-size "$GPUS" "${@:2}"
    ;;
--toy)
    OMP_NUM_THREADS=1 exec torchrun --standalone --nproc-per-node 2 pretrain_gpt.py \
        "${MODEL[@]}" "${RECIPE[@]}" "${LAPTOP[@]}" "${TOY[@]}" "${@:2}"
    ;;
*)
    per_node=${GPUS_PER_NODE:-8}
    exec torchrun --nproc-per-node "$per_node" --nnodes "${NNODES:-$(((GPUS + per_node - 1) / per_node))}" \
        --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-6000}" \
        pretrain_gpt.py "${MODEL[@]}" "${RECIPE[@]}" "${CLUSTER[@]}" "$@"
    ;;
esac
