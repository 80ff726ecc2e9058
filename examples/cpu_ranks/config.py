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
    weight_decay: float = 0.1
    seed: int = 1234

    def __post_init__(self) -> None:
        if self.optimizer not in ("distributed", "replicated"):
            raise ValueError(f"optimizer must be distributed or replicated, not {self.optimizer}")
        if self.sharding_type not in ("dp_reshardable", "fully_reshardable"):
            raise ValueError(f"unknown sharding type {self.sharding_type}")

    @property
    def distributed_optimizer(self) -> bool:
        return self.optimizer == "distributed"
