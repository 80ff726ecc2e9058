"""What to build and how to train it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """A small GPT (RMSNorm, SwiGLU, RoPE, bf16), its parallel layout and its optimizer.

    The defaults are the test suite's tiny model. DP is what the world size leaves:
    ``world_size / (TP * PP)``.
    """

    num_layers: int = 2
    hidden_size: int = 32
    ffn_hidden_size: int = 64
    num_attention_heads: int = 4
    vocab_size: int = 128
    seq_length: int = 16
    tied_embeddings: bool = False
    num_experts: int | None = None
    """MoE with a sigmoid top-2 router and expert bias, instead of a dense MLP."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1

    optimizer: str = "distributed"
    """``distributed`` (ZeRO-1 over DP) or ``replicated``."""

    sharding_type: str = "dp_reshardable"
    """How the distributed optimizer is saved: ``dp_reshardable`` or ``fully_reshardable``."""

    overlap_grad_reduce: bool = False
    bucket_size: int | None = None
    """DDP bucket size in elements; with ``overlap_grad_reduce`` only."""

    micro_batch_size: int = 2
    global_batch_size: int = 8
    lr: float = 1e-3
    lr_warmup_steps: int = 2
    min_lr: float | None = None
    """Where a decay ends; ``lr`` if None. Megatron takes it from the optimizer state that a run
    resumes from, so it must be set before the decay."""
    lr_wsd_decay_style: str | None = None
    """``linear``, ``cosine``, ``exponential`` or ``minus_sqrt``: the last ``lr_wsd_decay_steps``
    before ``lr_decay_steps`` are decayed, whatever schedule a checkpoint has
    (``--override-opt_param-scheduler``). None: the LR is constant after the warm-up."""
    lr_wsd_decay_steps: int = 0
    lr_decay_steps: int = 0
    weight_decay: float = 0.1
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.optimizer not in ("distributed", "replicated"):
            raise ValueError(f"optimizer must be distributed or replicated, not {self.optimizer}")
        if self.sharding_type not in ("dp_reshardable", "fully_reshardable"):
            raise ValueError(f"unknown sharding type {self.sharding_type}")
        if self.lr_wsd_decay_style and not 0 < self.lr_wsd_decay_steps <= self.lr_decay_steps:
            raise ValueError("a decay needs lr_wsd_decay_steps, and lr_decay_steps no smaller")

    @property
    def lowest_lr(self) -> float:
        return self.lr if self.min_lr is None else self.min_lr

    @property
    def distributed_optimizer(self) -> bool:
        return self.optimizer == "distributed"
