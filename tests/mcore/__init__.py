"""Test bed: real megatron-core on two CPU ranks.

In the pytest process::

    from tests.mcore import CONFIGS, run_ranks

    def test_something(tmp_path):
        results = run_ranks(_in_ranks, 2, tmp_path, config=CONFIGS["tp2"], root=tmp_path / "run")

and in each rank (megatron-core is imported there only)::

    def _in_ranks(config, root):
        from tests.mcore.bed import build, save_checkpoint, snapshot, train

        training = build(config)
        train(training, steps=2)
        save_checkpoint(training, root)
        return snapshot(training)

The first start of ranks costs seconds, every other one and a ``build`` in running ranks tenths: put
what belongs together into one rank function.
"""

from examples.cpu_ranks import GPTConfig, RankError, run_ranks

__all__ = ["CONFIGS", "WRONG_MAINS", "GPTConfig", "RankError", "run_ranks"]

CONFIGS = {
    "tp2": GPTConfig(tensor_parallel=2, optimizer="replicated"),
    "pp2": GPTConfig(pipeline_parallel=2, sharding_type="fully_reshardable"),
    "dp2": GPTConfig(),
    "dp2-fully_reshardable": GPTConfig(sharding_type="fully_reshardable"),
    "dp2-replicated": GPTConfig(optimizer="replicated"),
    "moe-ep2": GPTConfig(num_experts=4, expert_parallel=2, ffn_hidden_size=48),
    "moe-ep2-fully_reshardable": GPTConfig(
        num_experts=4, expert_parallel=2, ffn_hidden_size=48, sharding_type="fully_reshardable"
    ),
    "moe-ep2-replicated": GPTConfig(
        num_experts=4, expert_parallel=2, ffn_hidden_size=48, optimizer="replicated"
    ),
}
"""Every parallel layout and every way to save the optimizer, on two ranks."""

WRONG_MAINS = GPTConfig(
    sharding_type="fully_reshardable", overlap_grad_reduce=True, bucket_size=5000
)
"""megatron-core up to 0.19 saves wrong main params here: several padded buckets a DDP buffer."""
