"""What a checkpoint's ``args`` say of its model; what they do not say is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from wsm_megatron.errors import UsageError

_DEFAULTS: dict[str, Any] = {
    "beta_fast": 32,
    "beta_slow": 1,
    "glu_linear_offset": 0.0,
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "original_max_position_embeddings": 4096,
    "position_embedding_type": "learned_absolute",
    "rotary_percent": 1.0,
    "rope_scaling_factor": 8.0,
    "softmax_type": "vanilla",
}
"""Megatron's values of what its ``args`` do not have, in older versions or at all, or have as None.
Of anything else there is no default."""
_OFF = frozenset(
    [
        "add_bias_linear",
        "add_qkv_bias",
        "apply_layernorm_1p",
        "apply_residual_connection_post_layernorm",
        "attention_output_gate",
        "enable_mhc_connections",
        "group_query_attention",
        "is_hybrid_model",
        "moe_apply_probs_on_input",
        "moe_router_enable_expert_bias",
        "moe_router_pre_softmax",
        "moe_shared_expert_gate",
        "mtp_use_repeated_layer",
        "multi_latent_attention",
        "qk_l2_norm",
        "qk_layernorm",
        "quick_geglu",
        "rotary_interleaved",
        "squared_relu",
        "use_mup",
        "use_rope_scaling",
    ]
)
"""Switches that are off where nothing is said of them."""
_ALSO = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}
"""Names that newer versions have for what older ones called otherwise."""


@dataclass(frozen=True)
class ModelArgs:
    """A model's hyperparameters under the names of Megatron-LM's ``args``.

    Attributes:
        values: of the checkpoint, and over them those that the user gave.
        where: names the checkpoint in messages.
        tokenizer_size: entries of the tokenizer that was given.
    """

    values: Mapping[str, Any]
    where: str = "the checkpoint"
    tokenizer_size: int | None = None
    _asked: set[str] = field(default_factory=set, compare=False, repr=False)

    def need(self, name: str) -> Any:
        """A value. Raises ``UsageError``, which asks for it, where nothing says it."""
        value = self.get(name)
        if value is None:
            raise UsageError(
                f"{self.where}: its args do not say {name}, which the export needs: give "
                f"--arg {name}=VALUE"
            )
        return value

    def get(self, name: str) -> Any:
        """A value; where nothing says it, that of a Megatron without such an option, or None."""
        value = self.values.get(name)
        if value is None:
            value = self.values.get(_ALSO.get(name, name))
        if value is None:
            value = False if name in _OFF else _DEFAULTS.get(name)
        return value

    @property
    def head_dim(self) -> int:
        found = self.get("kv_channels")
        return found or self.need("hidden_size") // self.need("num_attention_heads")

    @property
    def query_groups(self) -> int:
        """Heads of keys and values. ``num_query_groups`` alone is a default, and means nothing."""
        if self.get("group_query_attention"):
            return self.need("num_query_groups")
        return self.need("num_attention_heads")

    @property
    def layers(self) -> int:
        return self.need("num_layers")

    @property
    def mtp_layers(self) -> int:
        return self.get("mtp_num_layers") or 0

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return not self.need("untie_embeddings_and_output_weights")

    @cached_property
    def vocab_size(self) -> int:
        """Tokens, without padding: as given, of the tokenizer, as recorded."""
        if self.tokenizer_size is not None and "vocab_size" not in self._asked:
            return self.tokenizer_size
        size = self.get("vocab_size")
        if size is None:
            raise UsageError(
                f"{self.where}: its args do not say how many tokens the vocabulary has without "
                f"padding (padded: {self.get('padded_vocab_size')}): give --tokenizer DIR or --arg "
                "vocab_size=N"
            )
        null = self.get("tokenizer_type") == "NullTokenizer" and "vocab_size" not in self._asked
        return int(size) + null  # Megatron's NullTokenizer adds an end of document

    def moe_layers(self) -> list[bool]:
        """By layer, whether it has experts (``moe_layer_freq``)."""
        if self.get("num_experts") is None:
            return [False] * self.layers
        freq = self.get("moe_layer_freq")
        if isinstance(freq, int):
            return [layer % freq == 0 for layer in range(self.layers)]
        pattern = [bool(one) for one in freq]
        if len(pattern) != self.layers:
            raise UsageError(f"{self.where}: moe_layer_freq is of {len(pattern)} layers")
        return pattern


def model_args(
    recorded: Mapping[str, Any], given: Iterable[str], where: str, tokenizer_size: int | None
) -> ModelArgs:
    """Args of a checkpoint.

    Args:
        given: what the user says of them, ``NAME=VALUE``, each value as YAML has it.

    Raises:
        UsageError: something given is of another form.
    """
    own: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (equals and name.strip()):
            raise UsageError(f"--arg {text!r} is not NAME=VALUE")
        try:
            own[name.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--arg {text!r}: {' '.join(str(error).split())}") from error
    return ModelArgs({**recorded, **own}, where, tokenizer_size, set(own))
