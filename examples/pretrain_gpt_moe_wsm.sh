#!/bin/bash
# Pre-train a mixture-of-experts GPT with Megatron-LM at a constant learning rate, and merge its last checkpoints
# as it goes (WSM). Experts have a data-parallel group of their own; the router's expert bias is in no
# optimizer and is merged beside the main params. Run it on every node; under Slurm: srun --ntasks-per-node=1 this script.
#
# Every setting below can be overridden from the environment, for example
#   MEGATRON_LM=~/Megatron-LM DATA_PATH=/data/text_document SAVE=/runs/a EP=16 bash pretrain_gpt_moe_wsm.sh
# and flags given to the script are passed on, after its own:
#   … pretrain_gpt_moe_wsm.sh --wandb-project wsm --save-retain-interval 100000
# DRY_RUN=1 prints the command and does not run it.
#
# Expected in the log, beside Megatron's own lines:
#   wsm: 8 snapshots, and one being copied, take … GB a rank, …
#   wsm: snapshot of iteration 1000, … bytes a rank, stall … s
#   validation loss at iteration 8000 | lm loss value: …
#   validation loss at wsm iteration 8000 | lm loss value: …
#   wsm: merged [1000, 2000, … 8000] into SAVE/wsm/iter_0008000 in … s
# and in the end SAVE/wsm/iter_…, which pretrain_gpt.py loads with --load SAVE/wsm.
set -euo pipefail

: "${MEGATRON_LM:?a checkout of Megatron-LM}" "${DATA_PATH:?an indexed dataset, without .bin}"
: "${SAVE:?the folder of the run}"

# Nodes
NNODES=${NNODES:-${SLURM_NNODES:-1}}
NODE_RANK=${NODE_RANK:-${SLURM_NODEID:-0}}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}

# Model: 16B, 2.5B active, 64 experts of which 6 a token, sigmoid router with expert bias
LAYERS=${LAYERS:-27} HIDDEN=${HIDDEN:-2048} FFN=${FFN:-10944} HEADS=${HEADS:-16} KV_HEADS=${KV_HEADS:-16}
EXPERTS=${EXPERTS:-64} TOPK=${TOPK:-6} EXPERT_FFN=${EXPERT_FFN:-1408} SHARED_FFN=${SHARED_FFN:-2816}
SEQ=${SEQ:-4096}
TOKENIZER_TYPE=${TOKENIZER_TYPE:-HuggingFaceTokenizer}
TOKENIZER_MODEL=${TOKENIZER_MODEL:-meta-llama/Meta-Llama-3-8B}

# Parallelism
TP=${TP:-1} PP=${PP:-1} CP=${CP:-1} EP=${EP:-8}

# Schedule: constant after the warm-up, never decayed
ITERS=${ITERS:-100000} WARMUP=${WARMUP:-2000} LR=${LR:-3e-4} MBS=${MBS:-1} GBS=${GBS:-1024}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000} EVAL_INTERVAL=${EVAL_INTERVAL:-1000} EVAL_ITERS=${EVAL_ITERS:-32}

# WSM: which checkpoints, which decay, how often a merged checkpoint
WSM_NUM=${WSM_NUM:-8} WSM_DECAY=${WSM_DECAY:-1-sqrt} WSM_START_ITER=${WSM_START_ITER:-0}
WSM_SAVE_INTERVAL=${WSM_SAVE_INTERVAL:-10000}
WSM_STORE=${WSM_STORE:-memory} # disk: where host memory is too small; WSM_DIR may be on the node
WSM_DIR=${WSM_DIR:-}

launch=(
  torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS_PER_NODE"
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT"
  -m wsm_megatron.launch "$MEGATRON_LM/pretrain_gpt.py"
)
model=(
  --num-layers "$LAYERS" --hidden-size "$HIDDEN" --ffn-hidden-size "$FFN"
  --num-attention-heads "$HEADS" --group-query-attention --num-query-groups "$KV_HEADS"
  --seq-length "$SEQ" --max-position-embeddings "$SEQ" --position-embedding-type rope
  --rotary-base 500000 --normalization RMSNorm --swiglu --disable-bias-linear
  --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --bf16
  --transformer-impl transformer_engine
)
moe=(
  --num-experts "$EXPERTS" --moe-router-topk "$TOPK" --moe-ffn-hidden-size "$EXPERT_FFN"
  --moe-shared-expert-intermediate-size "$SHARED_FFN" --moe-layer-freq "([0]*1+[1]*$((LAYERS - 1)))"
  --moe-router-score-function sigmoid --moe-router-enable-expert-bias
  --moe-router-bias-update-rate 1e-3 --moe-router-load-balancing-type seq_aux_loss
  --moe-aux-loss-coeff 1e-4 --moe-router-dtype fp32 --moe-grouped-gemm
  --moe-token-dispatcher-type alltoall
)
parallel=(
  --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
  --context-parallel-size "$CP" --expert-model-parallel-size "$EP" --sequence-parallel
  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
)
schedule=(
  --micro-batch-size "$MBS" --global-batch-size "$GBS" --train-iters "$ITERS"
  --lr "$LR" --min-lr "$LR" --lr-decay-style constant --lr-warmup-iters "$WARMUP"
  --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --init-method-std 0.02
)
data=(
  --data-path "$DATA_PATH" --split 990,8,2
  --tokenizer-type "$TOKENIZER_TYPE" --tokenizer-model "$TOKENIZER_MODEL"
  --eval-interval "$EVAL_INTERVAL" --eval-iters "$EVAL_ITERS"
)
checkpoints=(
  --save "$SAVE" --load "$SAVE" --save-interval "$SAVE_INTERVAL" --ckpt-format torch_dist
  --async-save --use-persistent-ckpt-worker --log-interval 10 --tensorboard-dir "$SAVE/tensorboard"
)
wsm=(
  --wsm-merge --wsm-merge-num "$WSM_NUM" --wsm-merge-decay "$WSM_DECAY"
  --wsm-merge-start-iter "$WSM_START_ITER" --wsm-merge-save-interval "$WSM_SAVE_INTERVAL"
  --wsm-merge-store "$WSM_STORE" --wsm-merge-eval
)
[ -z "$WSM_DIR" ] || wsm+=(--wsm-merge-dir "$WSM_DIR")

export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
command=(
  "${launch[@]}" "${model[@]}" "${moe[@]}" "${parallel[@]}" "${schedule[@]}" "${data[@]}"
  "${checkpoints[@]}" "${wsm[@]}" "$@"
)
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
