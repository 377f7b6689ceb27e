#!/usr/bin/env bash
# From text to a trained Mixture-of-Experts model, on two CPU ranks, in under ten minutes.
# `make quickstart` runs this; README.md shows the same commands one by one (a test compares them).
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1
OUT=runs/quickstart
rm -rf $OUT
started=$SECONDS
step() { printf '\n== [%d s] %s\n' $((SECONDS - started)) "$1"; }

step "1. A corpus that every machine has: the source text of Python's own standard library"
python tools/make_stdlib_corpus.py --output runs/quickstart/corpus.jsonl

step "2. A SentencePiece tokenizer of 8192 pieces"
python tools/train_tokenizer.py --input runs/quickstart/corpus.jsonl --vocab-size 8192 \
    --output runs/quickstart/tokenizer.model

step "3. Text -> tokens"
python tools/preprocess_data.py --input runs/quickstart/corpus.jsonl \
    --output-prefix runs/quickstart/stdlib --workers 2 --append-eod \
    --tokenizer-type SentencePieceTokenizer --tokenizer-model runs/quickstart/tokenizer.model

step "4. Train an 8-expert top-2 model on 2 ranks, stop half way"
torchrun --nproc-per-node 2 pretrain_gpt.py --yaml-cfg examples/quickstart/tiny_moe.yaml \
    --data-path runs/quickstart/stdlib --save runs/quickstart/checkpoints --exit-interval 120

step "5. Resume and finish"
torchrun --nproc-per-node 2 pretrain_gpt.py --yaml-cfg examples/quickstart/tiny_moe.yaml \
    --data-path runs/quickstart/stdlib --save runs/quickstart/checkpoints \
    --load runs/quickstart/checkpoints

step "6. Generate text"
python tools/generate.py --load runs/quickstart/checkpoints --prompt "def __init__(self" \
    --max-new-tokens 160 --temperature 0.7 --top-k 40 | tee runs/quickstart/sample.txt

step "done"
cat <<EOF
plot        $OUT/checkpoints/training.png
log         $OUT/checkpoints/metrics.jsonl
checkpoint  $OUT/checkpoints (iteration $(cat $OUT/checkpoints/latest_checkpointed_iteration.txt))
sample      $OUT/sample.txt
EOF
