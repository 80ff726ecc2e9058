"""Build the GPT with megatron-core's parts and train it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils

from examples.cpu_ranks.config import GPTConfig

if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None  # 0.16 reads it, but defines it with Transformer Engine only

Data = Callable[[int, int], torch.Tensor]
"""``data(first_sample, count)`` gives int64 tokens of shape (count, seq_length + 1)."""


@dataclass(kw_only=True)
class Training:
    """One rank's share of a run: what Megatron-LM's training loop holds."""

    config: GPTConfig
    model: list[DistributedDataParallel]
    """Model chunks wrapped in DDP; one, as there is no virtual pipeline here."""
    optimizer: Any
    scheduler: OptimizerParamScheduler
    iteration: int = 0
    losses: list[float] = field(default_factory=list)
    """Mean training loss of each iteration, in nats a token; same on the last pipeline stage's
    ranks, empty elsewhere."""

    @property
    def consumed_samples(self) -> int:
        return self.iteration * self.config.global_batch_size


def build(config: GPTConfig) -> Training:
    """Set up the parallel groups, the model and the optimizer; all ranks call it.

    A second call in a process replaces the groups: the Training of the first is dead from then on.
    """
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        expert_model_parallel_size=config.expert_parallel,
    )
    _seed(config.seed)
    model = _wrap(config, _gpt(config))
    optimizer = get_megatron_optimizer(_optimizer_config(config), [model])
    model.config.grad_scale_func = optimizer.scale_loss
    model.config.finalize_model_grads_func = finalize_model_grads
    return Training(
        config=config,
        model=[model],
        optimizer=optimizer,
        scheduler=lr_scheduler(config, optimizer),
    )


def _seed(seed: int) -> None:
    """As Megatron-LM: one seed a pipeline stage, the same in all its TP and DP ranks."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _transformer_config(config: GPTConfig) -> TransformerConfig:
    moe: dict[str, Any] = {}
    if config.num_experts is not None:
        moe = {
            "num_moe_experts": config.num_experts,
            "moe_router_topk": 2,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 1e-3,
            "moe_token_dispatcher_type": "allgather",  # alltoall needs CUDA
        }
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        tensor_model_parallel_size=config.tensor_parallel,
        pipeline_model_parallel_size=config.pipeline_parallel,
        expert_model_parallel_size=config.expert_parallel,
        pipeline_dtype=torch.bfloat16,
        params_dtype=torch.bfloat16,
        bf16=True,
        use_cpu_initialization=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        **moe,
    )


def _gpt(config: GPTConfig) -> GPTModel:
    transformer = _transformer_config(config)
    if config.num_experts is None:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    else:
        spec = get_gpt_decoder_block_spec(
            transformer, use_transformer_engine=False, normalization="RMSNorm"
        )
    return GPTModel(
        transformer,
        spec,
        vocab_size=config.vocab_size,
        max_sequence_length=config.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="rope",
    )


def _wrap(config: GPTConfig, model: GPTModel) -> DistributedDataParallel:
    for param in model.parameters():
        tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=config.distributed_optimizer,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.overlap_grad_reduce,
        bucket_size=config.bucket_size if config.overlap_grad_reduce else None,
    )
    return DistributedDataParallel(model.config, ddp, Float16Module(model.config, model))


def _optimizer_config(config: GPTConfig) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.lowest_lr,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        clip_grad=1.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=config.distributed_optimizer,
    )


def lr_scheduler(config: GPTConfig, optimizer: Any) -> OptimizerParamScheduler:
    """What ``--lr-decay-style constant`` or ``WSD`` builds; steps are samples."""
    batch, decays = config.global_batch_size, config.lr_wsd_decay_style is not None
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lowest_lr,
        lr_warmup_steps=config.lr_warmup_steps * batch,
        lr_decay_steps=(config.lr_decay_steps if decays else 1_000_000) * batch,
        lr_decay_style="WSD" if decays else "constant",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=1_000_000 * batch,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=not decays,
        override_opt_param_scheduler=decays,
        wsd_decay_steps=config.lr_wsd_decay_steps * batch if decays else None,
        lr_wsd_decay_style=config.lr_wsd_decay_style,
    )


def mock_data(config: GPTConfig) -> Data:
    """Tokens that depend on the sample's number alone."""

    def data(first_sample: int, count: int) -> torch.Tensor:
        rows = []
        for sample in range(first_sample, first_sample + count):
            generator = torch.Generator().manual_seed(sample)
            shape = (config.seq_length + 1,)
            rows.append(torch.randint(config.vocab_size, shape, generator=generator))
        return torch.stack(rows)

    return data


def train(
    training: Training,
    steps: int,
    data: Data | None = None,
    on_step: Callable[[Training], None] | None = None,
) -> None:
    """Train ``steps`` iterations; ``on_step`` is called after each. All ranks call it."""
    data = data or mock_data(training.config)
    for chunk in training.model:
        chunk.train()
    for _ in range(steps):
        _train_step(training, data)
        if on_step is not None:
            on_step(training)


def _train_step(training: Training, data: Data) -> None:
    config = training.config
    for chunk in training.model:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    losses = _run_batches(training, data, training.consumed_samples, forward_only=False)
    updated, _, _ = training.optimizer.step()
    assert updated, "bf16 has no loss scale that could skip a step"
    training.scheduler.step(increment=config.global_batch_size)
    training.iteration += 1
    if losses:
        training.losses.append(_mean_over_data_parallel(losses))


def evaluate(training: Training, data: Data, batches: int, first_sample: int = 0) -> float | None:
    """Mean loss in nats a token over ``batches`` global batches; None before the last stage.

    All ranks call it. The weights are those of ``training.model``.
    """
    for chunk in training.model:
        chunk.eval()
    losses = []
    with torch.no_grad():
        for batch in range(batches):
            start = first_sample + batch * training.config.global_batch_size
            losses += _run_batches(training, data, start, forward_only=True)
    return _mean_over_data_parallel(losses) if losses else None


def _run_batches(
    training: Training, data: Data, first_sample: int, forward_only: bool
) -> list[torch.Tensor]:
    """One global batch; the losses of this rank's micro-batches on the last stage, else []."""
    config = training.config
    replicas = parallel_state.get_data_parallel_world_size()
    num_microbatches, rest = divmod(config.global_batch_size, config.micro_batch_size * replicas)
    assert rest == 0, "micro_batch_size * DP does not divide global_batch_size"
    first = first_sample + parallel_state.get_data_parallel_rank() * (
        num_microbatches * config.micro_batch_size
    )
    results = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=_micro_batches(config, data, first, num_microbatches),
        model=training.model,
        num_microbatches=num_microbatches,
        seq_length=config.seq_length,
        micro_batch_size=config.micro_batch_size,
        forward_only=forward_only,
    )
    return [result["loss"] for result in results]


def _micro_batches(
    config: GPTConfig, data: Data, first_sample: int, count: int
) -> Iterator[torch.Tensor]:
    size = config.micro_batch_size
    for batch in range(count):
        yield data(first_sample + batch * size, size)


def _forward_step(batches: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(batches)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    length = inputs.shape[1]
    future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    output = model(inputs, positions, attention_mask=future, labels=labels)
    return output, partial(_loss, num_tokens=labels.numel())


def _loss(output: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.float().sum() / num_tokens
    return loss, {"loss": loss.detach().clone()}  # the schedule scales loss in place


def _mean_over_data_parallel(losses: list[torch.Tensor]) -> float:
    mean = torch.stack(losses).mean()
    torch.distributed.all_reduce(mean, group=parallel_state.get_data_parallel_group())
    return mean.item() / parallel_state.get_data_parallel_world_size()
