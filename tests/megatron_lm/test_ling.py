"""The launch of WSM's own authors (Ling-V2, ``examples/pretrain/run_pretrain_4k.sh``), scaled down,
with ``--wsm-merge`` in place of its cosine decay.

Every flag of theirs is here: as published, or in ``SCALED``, or in ``REPLACED`` and ``LEFT_OUT``
with the reason. Their Megatron is core 0.13 with patches of their own.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from tests.megatron_lm.checkout import pretrain
from tests.megatron_lm.matrix.kinds import Kind, assert_is_merge, assert_same
from tests.reference import load_tensors, rounded, same_bits, weighted_sum64
from wsm_megatron.schedule.decay import coefficients

PUBLISHED = shlex.split("""
    --moe-enable-deepep --expert-model-parallel-size 8 --expert-tensor-parallel-size 1
    --moe-grouped-gemm --moe-token-dispatcher-type flex --moe-router-dtype fp32 --num-experts 256
    --moe-ffn-hidden-size 512 --moe-shared-expert-intermediate-size 512
    --moe-router-score-function sigmoid --moe-router-topk 8 --moe-router-enable-expert-bias
    --moe-router-topk-scaling-factor 2.5 --moe-router-num-groups 8 --moe-router-group-topk 4
    --moe-z-loss-coeff 0.0000035 --moe-router-bias-update-rate 1e-3
    --moe-layer-freq [0,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1] --bias-zero-mean-update
    --mtp-num-layers 1 --mtp-loss-scaling-factor 0.1
    --num-layers 20 --hidden-size 2048 --ffn-hidden-size 5120 --num-attention-heads 16
    --num-query-groups 4 --group-query-attention --qk-layernorm --use-flash-attn
    --max-position-embeddings 4096 --vocab-size 157184 --make-vocab-size-divisible-by 128
    --position-embedding-type rope --rotary-base 10000 --rotary-percent 0.5
    --rotary-scaling-factor 40 --swiglu --untie-embeddings-and-output-weights
    --normalization RMSNorm --norm-epsilon 1e-06 --disable-bias-linear
    --transformer-impl transformer_engine --attention-dropout 0 --hidden-dropout 0
    --micro-batch-size 1 --global-batch-size 128 --seq-length 4096 --train-iters 2000
    --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --init-method-std 0.02 --clip-grad 1.0
    --bf16 --fp8-param-gather --fp8-recipe blockwise --fp8-format e4m3
    --optimizer adamw-bnb-8bit --lr 3.0e-5 --lr-decay-style cosine --min-lr 3.0e-6
    --lr-warmup-iters 0 --seed 42 --manual-gc --manual-gc-interval 200
    --pipeline-model-parallel-size 1 --tensor-model-parallel-size 1 --sequence-parallel
    --use-distributed-optimizer --recompute-granularity selective --recompute-modules moe
    --overlap-param-gather --overlap-grad-reduce
    --data-path DATA --tokenizer-type BailingTokenizer --tokenizer-model MODEL --split 999,1,0
    --dataloader-type single --no-create-attention-mask-in-dataloader --eod-mask-loss
    --save-interval 1000 --eval-interval 1000 --save SAVE --load LOAD --finetune
    --ckpt-format torch_dist --async-save --eval-iters 10 --log-interval 1 --log-throughput
    --tensorboard-dir RUNS --log-timers-to-tensorboard --log-memory-to-tensorboard
    --log-world-size-to-tensorboard --log-validation-ppl-to-tensorboard
    --attention-backend auto --no-masked-softmax-fusion --attention-softmax-in-fp32
    --cross-entropy-loss-fusion
""")
SCALED = {
    "--expert-model-parallel-size": "2",
    "--num-experts": "8",
    "--moe-ffn-hidden-size": "32",
    "--moe-shared-expert-intermediate-size": "32",
    "--moe-router-topk": "2",
    "--moe-router-num-groups": "4",
    "--moe-router-group-topk": "2",
    "--moe-layer-freq": "[0,1,1,1]",
    "--num-layers": "4",
    "--hidden-size": "64",
    "--ffn-hidden-size": "128",
    "--num-query-groups": "2",
    "--num-attention-heads": "4",
    "--max-position-embeddings": "16",
    "--seq-length": "16",
    "--vocab-size": "127",
    "--global-batch-size": "8",
    "--train-iters": "8",
    "--save-interval": "2",
    "--eval-interval": "4",
    "--eval-iters": "2",
    "--split": "80,10,10",
}
REPLACED = {
    "--lr-decay-style": ("constant", "WSM takes the place of the decay"),
    "--optimizer": ("adam", "no choice of upstream's; standins/adam8bit.py is what adam builds"),
    "--transformer-impl": ("local", "Transformer Engine needs CUDA"),
    "--moe-token-dispatcher-type": ("allgather", "DeepEP, and all-to-all's sorting, need CUDA"),
    "--tokenizer-type": ("NullTokenizer", "of their patched Megatron"),
    "--min-lr": ("0", "a constant schedule ignores it"),
}
LEFT_OUT = {
    "--moe-enable-deepep": "DeepEP needs CUDA",
    "--moe-grouped-gemm": "the grouped GEMM needs CUDA: experts are sequential",
    "--bias-zero-mean-update": "no flag of upstream's: their patch, of expert_bias",
    "--use-flash-attn": "FlashAttention needs CUDA",
    "--no-create-attention-mask-in-dataloader": "local attention wants the mask",
    "--recompute-granularity": "recomputing restores CUDA's RNG states",
    "--recompute-modules": "with the line above",
    "--data-path": "mock data",
    "--tokenizer-model": "mock data",
    "--tensorboard-dir": "no TensorBoard here",
    "--load": "their base model",
    "--finetune": "with the line above",
    "--save": "the test's own",
}
"""``--fp8-param-gather --fp8-recipe blockwise`` stay: ``standins/fp8_tensor.py`` answers them."""
STANDINS = "fp8_tensor,adam8bit"
KIND = Kind(weights="quantised", smallest=16)
WSM = "--wsm-merge --wsm-merge-num 3 --wsm-merge-decay 1-sqrt --wsm-merge-save-interval 4"


def scaled_down() -> str:
    """Their flags, as they can run here."""
    flags: list[str] = []
    used: set[str] = set()
    for word in PUBLISHED:
        if word.startswith("--"):
            used.add(word)
            flags.append(word)
        elif flags[-1].startswith("--"):
            name = flags[-1]
            flags.append(SCALED.get(name) or REPLACED.get(name, (word, ""))[0])
    assert used >= {*SCALED, *REPLACED, *LEFT_OUT}
    kept, skip = [], False
    for word in flags:
        skip = word in LEFT_OUT if word.startswith("--") else skip
        kept += [] if skip else [word]
    return " ".join([*kept, "--use-persistent-ckpt-worker"])


def test_the_published_launch(megatron: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags, env = scaled_down(), {"STANDINS": STANDINS}
    if "async_strategy" in (megatron / "megatron" / "training" / "arguments.py").read_text():
        flags += " --async-strategy mcore"  # main asks for NVRx otherwise
    merged = pretrain(megatron, f"{flags} --save {run} {WSM}", env=env, timeout=1200)
    assert merged.returncode == 0, merged.log[-8000:]
    plain = pretrain(
        megatron, f"{flags} --save {tmp_path / 'plain'}", plugin=False, env=env, timeout=1200
    )
    assert plain.returncode == 0, plain.log[-8000:]
    assert len(plain.losses) == 8 + 4 and merged.losses == plain.losses
    assert_same(run / "iter_0000008", tmp_path / "plain" / "iter_0000008", KIND)
    for iterations in ((2, 4), (4, 6, 8)):
        assert_is_merge(run, iterations, KIND)
        assert_buffers_are_merged(run, iterations)


def assert_buffers_are_merged(run: Path, iterations: tuple[int, ...]) -> None:
    """``expert_bias``, which no optimizer has."""
    folder = f"iter_{iterations[-1]:07d}"
    by = coefficients([float(i) for i in iterations], "1-sqrt")
    sources = [load_tensors(run / f"iter_{i:07d}") for i in iterations]
    found = [key for key in sources[-1] if key.endswith("expert_bias")]
    assert found
    for key in found:
        total = weighted_sum64(by, [source[key] for source in sources])
        merged = load_tensors(run / "wsm" / folder)[key]
        assert same_bits(merged, rounded(total, merged.dtype)), key
