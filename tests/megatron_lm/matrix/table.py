"""The table's rows and columns: configurations of a run, versions of Megatron-LM, resumes across.

Everything here is data. What a cell promises is in :mod:`.promises`, how it is run in :mod:`.cell`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from tests.megatron_lm.matrix.kinds import Kind

PLUGIN, OFFLINE, RESUME = "plugin", "offline", "resume"
COLUMNS = (PLUGIN, OFFLINE, RESUME)

UNTIED = "--untie-embeddings-and-output-weights"
SHARDED = f"{UNTIED} --use-distributed-optimizer"
FULLY = "--dist-ckpt-optim-fully-reshardable"
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type allgather "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias "
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-3"
)
EP2 = f"{EXPERTS} --expert-model-parallel-size 2"
TP2_SP = "--tensor-model-parallel-size 2 --sequence-parallel"
LATENT = (
    "--multi-latent-attention --q-lora-rank 32 --kv-lora-rank 32 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 8"
)
FSDP = (
    "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params "
    "--no-gradient-reduce-div-fusion"
)

AWARE = f"{SHARDED} --use-precision-aware-optimizer"
BF16_MOMENTS = "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
FP8 = f"{SHARDED} --fp8-format e4m3 --fp8-recipe blockwise --fp8-param-gather"
ADAM, QUANTISED, MUON = ("fused_adam",), ("fp8_tensor",), ("emerging",)

TRAIN = "--train-iters 8 --min-lr 0 --save-interval 2 --eval-interval 4 --eval-iters 2"
"""A constant LR ignores --min-lr; a launch from a merge can then ask for LR 0: Megatron takes --lr
and --min-lr of loaded optimizer state from the checkpoint."""
LR_0 = (
    "--train-iters {next} --override-opt_param-scheduler --lr-decay-style linear "
    "--lr-decay-iters 1 --lr-warmup-iters 0 --min-lr 0 --eval-interval 100 --eval-iters 0"
)
SAMPLES = (
    "--rampup-batch-size 4 4 8 --train-samples 56 --lr-warmup-samples 16 --min-lr 0 "
    "--save-interval 2 --eval-interval 4 --eval-iters 2"
)
SAMPLES_LR_0 = (
    "--rampup-batch-size 4 4 8 --train-samples 64 --override-opt_param-scheduler "
    "--lr-decay-style linear --lr-decay-samples 1 --lr-warmup-samples 0 --min-lr 0 "
    "--eval-interval 100 --eval-iters 0"
)


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A run: two layers, hidden size 32, eight iterations.

    Attributes:
        name: of the row.
        flags: for ``pretrain_gpt.py``, beside ``checkout.MODEL``.
        without: flags of ``checkout.MODEL`` that are left out.
        where_known: flags given where this Megatron-LM knows the first of them.
        train, resume: how it is trained, and resumed with LR 0 (``{next}``: the last iteration).
        wsm: more flags of the plugin.
        state: ``--optimizer-state``, offline and (``--wsm-merge-optimizer-state``) in the run.
        nproc: ranks.
        script: of Megatron-LM.
        standins: modules of ``tests.megatron_lm.standins``.
        env: of the ranks, beside what all launches have.
        kind: how main params are kept, where not as float32 that the weights are rounded from.
        refuses: columns that are refused, and words of the message.
        core: run on every version before anything else.
    """

    name: str
    flags: str
    without: tuple[str, ...] = ()
    where_known: tuple[str, ...] = ()
    train: str = TRAIN
    resume: str = LR_0
    wsm: str = ""
    state: str = "last"
    nproc: int = 2
    script: str = "pretrain_gpt.py"
    standins: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    kind: Kind | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    core: bool = False


@dataclass(frozen=True, kw_only=True)
class Version:
    """A version of Megatron-LM.

    Attributes:
        name: of its tag without ``core_v``, or ``main``; also of its folder among the trees.
        standins: that every configuration needs there.
        unknown: flags of ``checkout.MODEL`` that it does not know.
    """

    name: str
    standins: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


OLDER = ("older_core",)
VERSIONS = (
    Version(name="0.14.0", standins=OLDER, unknown=("--disable-jit-fuser",)),
    Version(name="0.15.3", standins=OLDER, unknown=("--disable-jit-fuser",)),
    Version(name="0.16.1"),
    Version(name="0.17.1"),
    Version(name="0.18.2"),
    Version(name="0.19.0"),
    Version(name="main"),
)

LAYERS = ("local_layers",)
_LEGACY = "is a legacy checkpoint"
IN_FSDP = {PLUGIN: "does not merge inside a run with"}

CONFIGURATIONS = tuple(
    Configuration(**one)
    for one in (
        {"name": "dp2", "flags": SHARDED, "core": True},
        {"name": "dp2-fully_reshardable", "flags": f"{SHARDED} {FULLY}", "core": True},
        {"name": "dp2-replicated", "flags": UNTIED, "core": True},
        {"name": "tp2", "flags": f"{UNTIED} --tensor-model-parallel-size 2", "core": True},
        {
            "name": "pp2",
            "flags": f"{SHARDED} --pipeline-model-parallel-size 2",
            "where_known": (FULLY,),
            "core": True,
        },
        {"name": "moe-ep2", "flags": f"{SHARDED} {EP2}", "core": True},
        {
            "name": "async",
            "flags": f"{SHARDED} --async-save --use-persistent-ckpt-worker",
            "where_known": ("--async-strategy mcore",),  # later ones ask for NVRx otherwise
            "core": True,
        },
        {"name": "moe-ep2-fully_reshardable", "flags": f"{SHARDED} {FULLY} {EP2}"},
        {
            "name": "pp2-tied",
            "flags": "--use-distributed-optimizer --pipeline-model-parallel-size 2",
        },
        {
            "name": "dp2-overlap",
            "flags": f"{SHARDED} --overlap-grad-reduce --overlap-param-gather",
        },
        {
            "name": "dp2-overlap-buckets",
            "flags": f"{SHARDED} --overlap-grad-reduce --overlap-param-gather "
            "--ddp-bucket-size 4096",
        },
        {"name": "dp2-merge", "flags": SHARDED, "state": "merge"},
        {"name": "dp2-drop", "flags": SHARDED, "state": "drop"},
        {"name": "fully_reshardable-merge", "flags": f"{SHARDED} {FULLY}", "state": "merge"},
        {"name": "fully_reshardable-drop", "flags": f"{SHARDED} {FULLY}", "state": "drop"},
        {
            "name": "pp4-virtual",
            "flags": f"{SHARDED} --num-layers 8 --pipeline-model-parallel-size 4 "
            "--num-layers-per-virtual-pipeline-stage 1 --no-overlap-p2p-communication",
            "nproc": 4,
        },
        {"name": "cp2", "flags": f"{SHARDED} --context-parallel-size 2", "standins": LAYERS},
        {"name": "tp2-sequence", "flags": f"{SHARDED} {TP2_SP}", "standins": LAYERS},
        {
            "name": "moe-etp2",
            "flags": f"{SHARDED} {TP2_SP} {EXPERTS} --expert-tensor-parallel-size 2",
            "standins": LAYERS,
        },
        {
            "name": "moe-tp2-etp1",
            "flags": f"{SHARDED} {TP2_SP} {EP2} --expert-tensor-parallel-size 1",
            "standins": LAYERS,
        },
        {
            "name": "dp4-instances2",
            "flags": f"{SHARDED} --num-distributed-optimizer-instances 2",
            "nproc": 4,
        },
        {
            "name": "rampup-samples",
            "flags": SHARDED,
            "without": ("--lr-warmup-iters",),
            "train": SAMPLES,
            "resume": SAMPLES_LR_0,
        },
        {
            "name": "fp16",
            "flags": f"{SHARDED} --fp16 --initial-loss-scale 1024",
            "without": ("--bf16",),
        },
        {"name": "fp32", "flags": SHARDED, "without": ("--bf16",)},
        {"name": "fp32-replicated", "flags": UNTIED, "without": ("--bf16",)},
        {"name": "mla", "flags": f"{SHARDED} {LATENT}", "standins": LAYERS},
        {
            "name": "moe-shared",
            "flags": f"{SHARDED} {EP2} --moe-shared-expert-intermediate-size 32",
        },
        {
            "name": "moe-grouped",
            "flags": f"{SHARDED} {FULLY} {EP2} --moe-grouped-gemm",
            "where_known": ("--moe-use-legacy-grouped-gemm",),
            "standins": ("grouped_gemm",),
        },
        {"name": "moe-freq", "flags": f"{SHARDED} {EP2} --moe-layer-freq [0,1]"},
        {"name": "mtp", "flags": f"{SHARDED} --mtp-num-layers 1", "standins": LAYERS},
        {
            "name": "hybrid",
            "flags": f"{SHARDED} --hybrid-override-pattern M* "
            "--spec megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec",
            "script": "pretrain_mamba.py",
        },
        {
            "name": "nonpersistent",
            "flags": f"{SHARDED} {FULLY} --non-persistent-ckpt-type global "
            "--non-persistent-save-interval 3",
        },
        {
            "name": "precision-remainders",
            "flags": f"{AWARE} {FULLY}",
            "standins": ADAM,
            "kind": Kind(mains="remainders", state="merge"),
            "state": "merge",
        },
        {
            "name": "precision-remainders-flat",
            "flags": f"{AWARE} {BF16_MOMENTS}",
            "standins": ADAM,
            "kind": Kind(mains="remainders"),
            "refuses": {OFFLINE: "remainders"},
        },
        {
            "name": "precision-masters",
            "flags": f"{AWARE} {FULLY} {BF16_MOMENTS}",
            "standins": ADAM,
            "env": (("TE_VERSION", "2.0"),),  # before remainders
            "kind": Kind(state="merge", moments=torch.bfloat16),
            "state": "merge",
        },
        {
            "name": "precision-masters-fp16",
            "flags": f"{AWARE} {FULLY} --main-params-dtype fp16",
            "standins": ADAM,
            "kind": Kind(mains="near"),
        },
        {
            "name": "offload",
            "flags": f"{AWARE} {FULLY} --optimizer-cpu-offload --optimizer-offload-fraction 0.5",
            "standins": (*ADAM, "host_memory"),
            "env": (("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"),),  # its state names classes
            "kind": Kind(state="merge"),
            "state": "merge",
            "refuses": {OFFLINE: "standins.fused_adam.FusedAdam"},  # the stand-in's class, not TE's
        },
        {
            "name": "fp8-weights",
            "flags": f"{FP8} {FULLY}",
            "standins": QUANTISED,
            "kind": Kind(weights="quantised", state="merge"),
            "state": "merge",
        },
        {
            "name": "fp8-weights-overlap",
            "flags": f"{FP8} --overlap-grad-reduce --overlap-param-gather",
            "standins": QUANTISED,
            "kind": Kind(weights="quantised"),
        },
        {
            "name": "fp8-weights-precision",
            "flags": f"{FP8} {FULLY} --use-precision-aware-optimizer --exp-avg-dtype fp8",
            "standins": (*ADAM, *QUANTISED),
            "kind": Kind(weights="quantised"),
        },
        {
            "name": "adam-8bit",
            "flags": SHARDED,
            "standins": ("adam8bit",),
            "kind": Kind(state="merge"),
            "state": "merge",
        },
        {
            "name": "sgd",
            "flags": f"{UNTIED} --optimizer sgd",
            "kind": Kind(state="merge"),
            "state": "merge",
        },
        {
            "name": "muon",
            "flags": f"{UNTIED} --optimizer muon",
            "standins": MUON,
            "kind": Kind(state="merge"),
            "state": "merge",
        },
        {
            "name": "muon-layer-wise",
            "flags": f"{SHARDED} --optimizer muon",
            "standins": MUON,
            "kind": Kind(state="merge"),
            "state": "merge",
        },
        {
            "name": "muon-layer-wise-overlap",
            "flags": f"{SHARDED} --optimizer muon --overlap-grad-reduce --overlap-param-gather",
            "standins": MUON,
            "kind": Kind(),
        },
        {
            "name": "fsdp_dtensor",
            "flags": f"{SHARDED} {FSDP} --ckpt-format fsdp_dtensor",
            "standins": ("fsdp",),
            "refuses": IN_FSDP,
        },
        {
            "name": "torch_dcp",
            "flags": f"{UNTIED} --use-torch-fsdp2 --ckpt-format torch_dcp",
            "standins": ("fsdp",),
            "refuses": IN_FSDP,
        },
        {
            "name": "ckpt-torch",
            "flags": f"{UNTIED} --ckpt-format torch",
            "refuses": {PLUGIN: "torch_dist", OFFLINE: _LEGACY, RESUME: _LEGACY},
        },
    )
)
BY_NAME = {one.name: one for one in CONFIGURATIONS}

ACROSS = (
    *(("0.14.0", "0.15.3"), ("0.15.3", "0.16.1"), ("0.16.1", "0.17.1"), ("0.17.1", "0.18.2")),
    *(("0.18.2", "0.19.0"), ("0.19.0", "main"), ("0.16.1", "main"), ("0.14.0", "main")),
    *(("main", "0.19.0"), ("0.19.0", "0.18.2"), ("main", "0.16.1"), ("0.17.1", "0.16.1")),
    *(("0.16.1", "0.15.3"), ("0.15.3", "0.14.0")),
)
"""Runs of the first version, merged, and resumed by the second. Towards versions before 0.19 the
merge is written with ``--format 0.16``."""
ACROSS_ROWS = ("dp2", "dp2-fully_reshardable", "dp2-replicated")
