"""Loads of experts, of routers whose tokens are known."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from wsm_megatron.plugin.load_balance import ExpertLoads, LoadBalance


class Router(torch.nn.Module):
    """Routes its tokens as it is told to."""

    def __init__(self, chosen: list[list[int]], layer_number: int | None = 1) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.config = SimpleNamespace(num_moe_experts=4)
        self.map = torch.zeros(len(chosen), 4, dtype=torch.bool)
        for token, experts in enumerate(chosen):
            self.map[token, experts] = True

    def forward(self, hidden: Any, padding_mask: Any = None) -> Any:
        return self.map.float(), self.map


@pytest.fixture(autouse=True)
def megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", ".core", ".core.transformer", ".core.transformer.moe"):
        monkeypatch.setitem(sys.modules, f"megatron{name}", ModuleType(f"megatron{name}"))
    module: Any = ModuleType("megatron.core.transformer.moe.router")
    module.Router = Router
    monkeypatch.setitem(sys.modules, module.__name__, module)


def model(*routers: Router) -> torch.nn.Module:
    layers = [torch.nn.ModuleDict({"router": router}) for router in routers]
    decoder = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
    return torch.nn.ModuleDict({"decoder": decoder})


def balance(chunks: list[torch.nn.Module], run: Callable[[], Any]) -> LoadBalance | None:
    loads = ExpertLoads(chunks)
    with loads.counting():
        run()
    return loads.balance()


def test_known_loads() -> None:
    """Loads 4, 2, 1, 1: mean 2, so max is twice it and min half of it."""
    router = Router([[0, 1], [0, 1], [0, 2], [0, 3]])
    assert balance([model(router)], lambda: router(None)) == LoadBalance(1.0, -0.5, 1.0)


def test_an_even_load_has_no_violation_and_an_idle_expert_the_largest() -> None:
    assert LoadBalance.of([[3, 3, 3]]) == LoadBalance(0.0, 0.0, 0.0)
    assert LoadBalance.of([[6, 3, 0]]) == LoadBalance(1.0, -1.0, 1.0)


def test_layers_are_weighed_alike_and_the_worst_is_told() -> None:
    assert LoadBalance.of([[30, 10], [1, 1]]) == LoadBalance(0.25, -0.25, 0.5)
    assert LoadBalance.of([[30, 10], [0, 0]]) == LoadBalance(0.5, -0.5, 0.5)
    assert LoadBalance.of([]) is None is LoadBalance.of([[0, 0]])


def test_batches_add_up_and_padding_does_not() -> None:
    router = Router([[0], [1], [2], [3]])
    padding = torch.tensor([[False, True], [True, True]])

    def run() -> None:
        router(None)
        router(None, padding)
        router(None, padding_mask=padding)

    assert balance([model(router)], run) == LoadBalance(3 / 1.5 - 1, 1 / 1.5 - 1, 1.0)


def test_layers_of_a_decoder_and_of_mtp_are_not_mixed_up() -> None:
    one, other = Router([[0], [0]]), Router([[1], [1]])
    main = model(one)
    main["mtp"] = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([other])})  # type: ignore[operator]
    found = balance([main], lambda: (one(None), other(None)))
    assert found == LoadBalance(3.0, -1.0, 3.0), "together they would be even by half"


def test_nothing_is_counted_outside_and_each_time_anew() -> None:
    router = Router([[0], [0], [1], [2]])
    loads = ExpertLoads([model(router)])
    router(None)
    with loads.counting():
        pass
    assert loads.balance() is None
    for _ in range(2):
        with pytest.raises(OSError), loads.counting():
            router(None)
            raise OSError
        assert loads.balance() == LoadBalance(1.0, -1.0, 1.0)
    assert not router._forward_hooks


def test_a_dense_model_has_no_load() -> None:
    dense = torch.nn.Linear(2, 2)
    assert balance([dense], lambda: dense(torch.ones(2))) is None
