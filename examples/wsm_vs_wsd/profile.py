"""How large everything is."""

from __future__ import annotations

from dataclasses import dataclass

from examples.cpu_ranks import GPTConfig


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Sizes of the whole experiment. Steps are optimizer steps.

    Attributes:
        seeds: of the initial weights and the order of the data; the same in all arms.
        steps: where every arm of the main comparison ends.
        interval: steps between two points of a path, the checkpoints that can be merged.
        block_every: K, steps between two points of a block mean.
        windows: lengths of decays and merges; the middle one is used where one must do.
        save_every: steps between full Megatron checkpoints in the last ``windows[-1]`` steps.
        early_ends: ends of windows for merging too early.
        second_lr: of another stable run, for the theory.
        more: steps of what goes on from a merge: moments, fine-tuning, spike.
        noisy_steps, moe_steps: of the run on noisy text, which is clean in the middle window, and
            of the MoE's.
        batches: evaluated, of the validation split and of the test split each.
    """

    name: str
    seeds: tuple[int, ...]
    steps: int
    interval: int
    block_every: int
    windows: tuple[int, int, int]
    save_every: int
    early_ends: tuple[int, ...]
    more: int
    noisy_steps: int
    moe_steps: int
    batches: int
    lr: float = 3e-3
    second_lr: float = 1e-3
    warmup: int = 100
    hidden: int = 64
    ffn: int = 172
    experts: int = 8
    expert_ffn: int = 64
    seq_length: int = 64
    batch: int = 16

    def __post_init__(self) -> None:
        ends = (*self.windows, *self.early_ends, self.steps, self.noisy_steps, self.moe_steps)
        assert all(n % self.save_every == 0 for n in ends)
        assert self.save_every % self.interval == self.interval % self.block_every == 0
        assert self.windows[-1] >= 2 * self.middle and self.steps >= 2 * self.windows[-1]
        assert min(self.noisy_steps, self.moe_steps) >= 2 * self.middle

    @property
    def middle(self) -> int:
        return self.windows[1]

    @property
    def durations(self) -> list[int]:
        """Windows of the question how long one should be."""
        short = [
            n
            for n in (self.windows[0] // 4, self.windows[0] // 2)
            if n % self.interval == 0 and n > self.interval
        ]
        return [*short, *self.windows, 2 * self.windows[-1]]

    def intervals(self, window: int) -> list[int]:
        """Of the question how many points a window needs: in the last, its two ends."""
        doubled = [self.interval * 2**k for k in range(12)]
        return [n for n in doubled if n <= window and window % n == 0]

    def config(self, seed: int, lr: float, experts: bool = False) -> GPTConfig:
        """A dense model, or a MoE with sigmoid router and expert bias."""
        return GPTConfig(
            num_layers=2,
            hidden_size=self.hidden,
            ffn_hidden_size=self.expert_ffn if experts else self.ffn,
            num_attention_heads=4,
            vocab_size=256,
            seq_length=self.seq_length,
            num_experts=self.experts if experts else None,
            optimizer="replicated",
            micro_batch_size=self.batch,
            global_batch_size=self.batch,
            lr=lr,
            min_lr=0.0,
            lr_warmup_steps=self.warmup,
            seed=seed,
        )


_HOUR = Profile(
    name="hour",
    seeds=(1, 2, 3, 4, 5),
    steps=4000,
    interval=25,
    block_every=5,
    windows=(200, 400, 800),
    save_every=50,
    early_ends=(400, 600, 1000, 2000, 3000),
    more=150,
    noisy_steps=2000,
    moe_steps=1000,
    batches=32,
)
_CI = Profile(
    name="ci",
    seeds=(1, 2),
    steps=32,
    interval=2,
    block_every=1,
    windows=(4, 8, 16),
    save_every=4,
    early_ends=(8, 16),
    more=10,
    noisy_steps=16,
    moe_steps=16,
    batches=1,
    warmup=2,
    hidden=32,
    ffn=64,
    experts=4,
    expert_ffn=32,
    seq_length=32,
    batch=4,
)
_NIGHT = Profile(
    name="night",
    seeds=tuple(range(1, 11)),
    steps=8000,
    interval=25,
    block_every=5,
    windows=(400, 800, 1600),
    save_every=50,
    early_ends=(400, 800, 1600, 3200, 6000),
    more=300,
    noisy_steps=6000,
    moe_steps=4000,
    batches=64,
)
PROFILES = {one.name: one for one in (_CI, _HOUR, _NIGHT)}
"""ci: a minute. hour: about 50 minutes of two cores. night: four to eight hours of them."""
