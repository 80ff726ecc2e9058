#!/bin/bash
# WSM against WSD on one GPU: a GPT of 250M parameters (150M without its embeddings), with
# pretrain_gpt.py. For each seed: a run at a constant LR; from it, at equal tokens, decays (linear,
# cosine, minus_sqrt) over every window; merges of the same windows; the loss of each on the
# validation split, in one log a model. Ready to run; run on CPU ranks alone so far, a tiny model.
#
#   MEGATRON_LM=~/Megatron-LM DATA_PATH=/data/text_document OUT=/runs/evidence bash gpu.sh [FLAG...]
#
# Flags go to every pretrain_gpt.py, and win over those given here.
# Run it again after an interruption: what is there is not done again. DRY_RUN=1 prints the commands.
set -euo pipefail

: "${MEGATRON_LM:?a checkout of Megatron-LM}"
: "${DATA_PATH:?an indexed dataset, without .bin; or mock, to try the script}"
: "${OUT:?a folder}"

SEEDS=${SEEDS:-1 2 3 4 5}
ITERS=${ITERS:-20000} LR=${LR:-1e-3} WARMUP=${WARMUP:-500}
WINDOWS=${WINDOWS:-1000 2000 4000} INTERVAL=${INTERVAL:-100}
MBS=${MBS:-16} GBS=${GBS:-128} SEQ=${SEQ:-1024} EVAL_ITERS=${EVAL_ITERS:-64}
TOKENIZER=(--tokenizer-type "${TOKENIZER_TYPE:-HuggingFaceTokenizer}"
  --tokenizer-model "${TOKENIZER_MODEL:-gpt2}")
data=(--data-path "$DATA_PATH")
if [ "$DATA_PATH" = mock ]; then data=(--mock-data); fi

common=(
  --num-layers 12 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16
  --seq-length "$SEQ" --max-position-embeddings "$SEQ" --position-embedding-type rope
  --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
  --attention-dropout 0 --hidden-dropout 0 --bf16 --micro-batch-size "$MBS"
  --global-batch-size "$GBS" --lr "$LR" --min-lr 0 --lr-warmup-iters "$WARMUP"
  --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --ckpt-format torch_dist
  "${data[@]}" --split 980,10,10 "${TOKENIZER[@]}"
  --eval-iters "$EVAL_ITERS" --log-interval 100
)
own=("$@")

# run LOG FLAG...: pretrain_gpt.py, unless its log says that it has finished.
run() {
  local log=$1
  shift
  if grep -qs '^finished$' "$log"; then return; fi
  local command=(torchrun --nproc-per-node 1 "$MEGATRON_LM/pretrain_gpt.py" "${common[@]}" "$@"
    "${own[@]}")
  if [ -n "${DRY_RUN:-}" ]; then
    printf '%q ' "${command[@]}"
    echo
    return
  fi
  mkdir -p "$(dirname "$log")"
  "${command[@]}" >>"$log" 2>&1
  echo finished >>"$log"
}

export CUDA_DEVICE_MAX_CONNECTIONS=1
for seed in $SEEDS; do
  root=$OUT/seed$seed
  # --min-lr 0 from the start: a decay takes it from the checkpoint (docs/resume.md, Traps).
  run "$root/logs/stable" --seed "$seed" --train-iters "$ITERS" --lr-decay-style constant \
    --save "$root/stable" --load "$root/stable" --save-interval "$INTERVAL" \
    --eval-interval "$ITERS"

  for window in $WINDOWS; do
    for style in linear cosine minus_sqrt; do
      run "$root/logs/decay-$style-$window" --seed "$seed" --train-iters "$ITERS" \
        --load "$root/stable" --ckpt-step "$((ITERS - window))" --override-opt_param-scheduler \
        --lr-decay-style WSD --lr-wsd-decay-style "$style" --lr-wsd-decay-iters "$window" \
        --lr-decay-iters "$ITERS" --eval-interval "$ITERS"
    done
    for decay in mean ema cosine 1-sqrt; do
      merged=$root/merge-$decay-$window
      merge=(wsm merge --load "$root/stable" --save "$merged" --to "$ITERS"
        --window-iterations "$window" --decay "$decay")
      if [ -n "${DRY_RUN:-}" ]; then
        printf '%q ' "${merge[@]}"
        echo
      elif [ ! -e "$merged/latest_checkpointed_iteration.txt" ]; then
        "${merge[@]}"
      fi
      run "$root/logs/merge-$decay-$window" --seed "$seed" --train-iters "$ITERS" --skip-train \
        --load "$merged" --no-load-optim --no-load-rng --lr-decay-style constant \
        --eval-interval "$ITERS"
    done
  done
done
