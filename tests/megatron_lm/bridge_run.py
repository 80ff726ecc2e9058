"""A run of Megatron-Bridge: ``bridge_run.py '{"save": …, "iters": …, "load": …, "wsm": {…}}'``."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any


def main() -> None:
    options = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO)
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from tests.megatron_lm.standins.bridge import leave_shapes_alone
    from wsm_megatron.plugin.bridge import WSMCallback

    leave_shapes_alone()
    callbacks = [WSMCallback(**options["wsm"])] if options.get("wsm") else []
    pretrain(configuration(options), forward_step, callbacks=callbacks)


def configuration(options: dict[str, Any]) -> Any:
    """Two layers on two ranks, in Bridge's own words."""
    from megatron.bridge.training import config as c

    optimizer = c.OptimizerConfig(
        optimizer="adam",
        bf16=True,
        use_distributed_optimizer=True,
        clip_grad=1.0,
        lr=1e-3,
        min_lr=1e-3,
        weight_decay=0.01,
    )
    scheduler = c.SchedulerConfig(
        lr_decay_style="constant",
        lr_warmup_iters=options.get("warmup", 2),
        lr_decay_iters=10**13,
        start_weight_decay=0.01,
        end_weight_decay=0.01,
        weight_decay_incr_style="constant",
        override_opt_param_scheduler=True,
    )
    dataset = c.MockGPTDatasetConfig(
        random_seed=1,
        reset_attention_mask=False,
        reset_position_ids=False,
        eod_mask_loss=False,
        seq_length=16,
        num_dataset_builder_threads=1,
        data_sharding=True,
        dataloader_type="single",
        num_workers=0,
    )
    checkpoint = c.CheckpointConfig(
        save=options["save"],
        save_interval=2,
        load=options.get("load"),
        ckpt_format="torch_dist",
        async_save=options.get("async", False),
        async_strategy="mcore",
        dist_ckpt_optim_fully_reshardable=True,
    )
    ddp = c.DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_param_gather=options.get("overlap", False),
        overlap_grad_reduce=options.get("overlap", False),
    )
    return c.ConfigContainer(
        model=_model(),
        train=c.TrainingConfig(
            train_iters=options["iters"], global_batch_size=8, micro_batch_size=2
        ),
        validation=c.ValidationConfig(eval_interval=4, eval_iters=2),
        optimizer=optimizer,
        scheduler=scheduler,
        ddp=ddp,
        dataset=dataset,
        logger=c.LoggerConfig(log_interval=1),
        tokenizer=c.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=127),
        checkpoint=checkpoint,
        rng=c.RNGConfig(seed=1234),
        dist=c.DistributedInitConfig(distributed_backend="gloo"),
    )


def _model() -> Any:
    import torch
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec

    return GPTModelProvider(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        seq_length=16,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        position_embedding_type="rope",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        share_embeddings_and_output_weights=False,
        make_vocab_size_divisible_by=128,
        bf16=True,
        pipeline_dtype=torch.bfloat16,
        attention_softmax_in_fp32=True,
        transformer_layer_spec=local_layer_spec,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        cross_entropy_loss_fusion=False,
    )


if __name__ == "__main__":
    main()
