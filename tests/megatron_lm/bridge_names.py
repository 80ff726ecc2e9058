"""What Megatron-Bridge makes of a model: ``bridge_names.py IN OUT``, files of ``torch.save``.

``IN``: by Bridge's class, the arguments of its heads, whatever its mapping asks of a Hugging Face
config, and tensors under the names of Megatron's parameters, of one layer and expert each. ``OUT``:
by class, the tensors under the names that Bridge publishes them as.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch


def main() -> None:
    asked = torch.load(sys.argv[1])
    torch.save({name: dict(published(name, **one)) for name, one in asked.items()}, sys.argv[2])


def published(
    name: str, heads: dict[str, int], config: dict[str, int], tensors: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    from megatron.bridge.models.conversion import param_mapping

    module, _, kind = name.rpartition(".")
    bridge = getattr(importlib.import_module(module), kind)()
    bridge.hf_config = SimpleNamespace(**config)
    registry = bridge.mapping_registry()
    for parameter, tensor in tensors.items():
        mapping = registry.megatron_to_hf_lookup(parameter)
        assert mapping is not None, parameter
        hf: Any = mapping.hf_param
        if isinstance(hf, str):
            yield hf, tensor
        elif set(hf) == {"q", "k", "v"}:
            parts = param_mapping.split_qkv_weights(SimpleNamespace(**heads), tensor)
            yield from ((hf[one], part.clone()) for one, part in zip("qkv", parts, strict=True))
        else:
            halves = zip(("gate", "up"), tensor.chunk(2), strict=True)
            yield from ((hf[one], half.clone()) for one, half in halves)


if __name__ == "__main__":
    main()
