"""Merging inside a run, however main params are kept: megatron-core, and stand-ins for CUDA's part.

On every rank, a swap writes what a float64 merge of the float32 values says, split or rounded as
the optimizer would, and puts everything back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mcore import GPTConfig, run_ranks
from tests.reference import rebuilt, rounded, same_bits, split, weighted_sum64

ITERATIONS = (2, 3, 5)
AWARE = {"use_precision_aware_optimizer": True}
FP8 = {"fp8_recipe": "blockwise"}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "remainders": ("fused_adam", AWARE),
    "masters": ("fused_adam", AWARE | {"store_param_remainders": False}),
    "fp16-masters": ("fused_adam", AWARE | {"main_params_dtype": torch.float16}),
    "small-moments": (
        "fused_adam",
        AWARE | {"exp_avg_dtype": torch.uint8, "exp_avg_sq_dtype": torch.bfloat16},
    ),
    "offloaded": (
        "fused_adam,host_memory",
        AWARE | {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
    ),
    "fp8-weights": ("fp8_tensor", FP8),
    "inert": ("fused_adam,fp8_tensor", FP8 | AWARE | {"exp_avg_dtype": torch.float16}),
    "adam8bit": ("adam8bit", {}),
    "layer-wise": ("layer_wise", {}),
}
"""The stand-ins, and the options of the optimizer."""


@pytest.fixture(scope="module", params=KINDS)
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each rank found, of one kind."""
    folder = tmp_path_factory.mktemp(request.param)
    return run_ranks(_merge, 2, folder, name=request.param, timeout=300)


def test_what_is_written_is_the_merge(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["merged"] > 0 and report["wrong"] == []
        assert report["changed"] and report["same_weights"]


def test_everything_comes_back(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["undone"] == []


def test_training_goes_on_as_without(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["after"] == [] and report["losses"]


def test_main_params_of_other_weights_are_noticed(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["unlike"] == [] and report["noticed"]


def test_stale_remainders_are_not_the_merge(tmp_path: Path) -> None:
    """The check of what is written sees weights that were merged without their remainders."""
    for report in run_ranks(_merge, 2, tmp_path, name="remainders", stale=True, timeout=300):
        assert len(report["wrong"]) == report["merged"] > 0 and report["undone"] == []


def _merge(name: str, stale: bool = False) -> dict[str, Any]:
    from tests.mcore.bed import train
    from wsm_megatron.plugin.config import WSMConfig
    from wsm_megatron.plugin.optimizers import parts
    from wsm_megatron.plugin.shards import unlike_weights
    from wsm_megatron.plugin.wsm import WSM

    training = _build(name)
    wsm = WSM(training.model, training.optimizer, WSMConfig(num=3, optimizer_state="merge"))
    values: list[dict[str, torch.Tensor]] = []
    for iteration in range(1, 6):
        train(training, 1)
        if iteration in ITERATIONS:
            wsm.snapshot(iteration, 128 * iteration)
            values.append(dict(_values(training)))
    if stale:
        _leave_remainders()
    unlike = unlike_weights(training.model, training.optimizer)
    before = dict(_bits(training))
    with wsm.merged() as merge:
        merged = {
            key: rounded(weighted_sum64(merge.coefficients, [one[key] for one in values]), F32)
            for key in values[0]
        }
        written = dict(_values(training))
        wrong = [key for key in merged if not _is(name, key, merged[key], written[key])]
        wrong += [] if stale else list(_unlike(training, name, merged))
        changed = _differing(before, dict(_bits(training)))
        same = _same_on_ranks(training)
    undone = _differing(before, dict(_bits(training)))
    train(training, 1)
    after, losses = dict(_bits(training)), training.losses
    wsm.close()
    main = next(main for part in parts(training.optimizer) for main in part.main_params())
    main.param.data.copy_(main.param.data.float() * 2)
    noticed = bool(unlike_weights(training.model, training.optimizer))
    plain = _build(name)
    train(plain, 6)
    return {
        "merged": sum(key.startswith("main.") for key in merged),
        "wrong": wrong,
        "changed": changed,
        "same_weights": same,
        "undone": undone,
        "after": [] if stale else _differing(after, dict(_bits(plain))),
        "losses": losses == plain.losses,
        "unlike": unlike,
        "noticed": noticed or name in ("remainders", "small-moments"),  # any remainder fits
    }


F32 = torch.float32


def _build(name: str) -> Any:
    """A model and its optimizer, of real classes, with stand-ins where CUDA is needed."""
    from dataclasses import replace
    from functools import partial

    from examples.cpu_ranks import training as bed
    from tests.mcore.bed import build
    from tests.megatron_lm import standins

    names, options = KINDS[name]
    if not hasattr(bed, "_plain"):
        bed._plain = bed._optimizer_config  # type: ignore[attr-defined]
        if name == "layer-wise":
            bed.get_megatron_optimizer = _layer_wise
        else:
            standins.install(names)
        if "fp8_recipe" in options:
            bed.DistributedDataParallelConfig = partial(
                bed.DistributedDataParallelConfig, fp8_param_gather=True
            )
    bed._optimizer_config = lambda config: replace(bed._plain(config), **options)  # type: ignore[attr-defined]
    distributed = "replicated" if name == "layer-wise" else "distributed"
    return build(GPTConfig(optimizer=distributed))


def _layer_wise(config: Any, chunks: list[Any]) -> Any:
    """Megatron's class over an optimizer with one moment, as Muon has."""
    from megatron.core.optimizer import _get_param_groups
    from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = _get_param_groups(chunks, config, {})
    sgd = torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    collection = ProcessGroupCollection.use_mpu_process_groups()
    optimizer = LayerWiseDistributedOptimizer([sgd], config, collection, [None])
    optimizer.allgather_params = optimizer.broadcast_params  # gloo gathers equal sizes only
    return optimizer


def _steps(training: Any) -> Iterator[tuple[int, Any]]:
    links = getattr(training.optimizer, "chained_optimizers", [training.optimizer])
    return enumerate(link.optimizer for link in links)


def _values(training: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Float32 main params and moments of this rank, from the optimizer's own state."""
    for number, steps in _steps(training):
        params = [param for group in steps.param_groups for param in group["params"]]
        for index, param in enumerate(params):
            state = steps.state[param]
            read: Callable[[str], torch.Tensor] = lambda key, state=state: state[key]  # noqa: E731
            if hasattr(steps, "get_unscaled_state"):
                read = lambda key, param=param, s=steps: s.get_unscaled_state(param, key)  # noqa: E731
            main = read("master_param") if "master_param" in state else param
            if main.dtype == torch.int16:
                main = rebuilt(param.detach(), main)
            yield f"main.{number}.{index}", main.detach().clone()
            for key in sorted(state):
                if key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                    yield f"{key}.{number}.{index}", read(key).detach().clone()


def _is(name: str, key: str, merged: torch.Tensor, written: torch.Tensor) -> bool:
    """Whether a merged value is what was written, in the bits that it is kept in."""
    kept = KINDS[name][1].get(f"{key.split('.')[0].replace('main', 'main_params')}_dtype", F32)
    if written.dtype == torch.uint8:
        return True  # codes: compared with those before, by ``_unlike``
    if kept in (torch.float16, torch.uint8):
        near = 2.0**-11 if kept == torch.float16 else 2.0**-4
        return bool(((written - merged).abs() <= near * merged.abs().max()).all())
    return same_bits(written, merged.to(kept).float())


def _unlike(training: Any, name: str, merged: dict[str, torch.Tensor]) -> Iterator[str]:
    """Model weights of this rank's shards that are not the merged main params'."""
    from wsm_megatron.plugin.optimizers import parts

    mains = [main for part in parts(training.optimizer) for main in part.main_params()]
    numbers = {
        id(param): f"main.{number}.{index}"
        for number, steps in _steps(training)
        for index, param in enumerate(p for g in steps.param_groups for p in g["params"])
    }
    for main in mains:
        value = merged[numbers[id(main.stepped)]].view(-1)
        weights = main.param.detach()
        if hasattr(weights, "_quantizer"):
            own = weights.float().view(-1)[main.offset : main.offset + value.numel()]
            if ((own - value).abs() > value.abs().max() * 2**-4).any():
                yield f"weights of {numbers[id(main.stepped)]}"
            continue
        own = weights.view(-1)[main.offset : main.offset + value.numel()]
        rule = split(value)[0] if name in ("remainders", "small-moments") else value.bfloat16()
        if not same_bits(own, rule):
            yield f"weights of {numbers[id(main.stepped)]}"


def _bits(training: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that training goes on from, copied; quantised ones by what they hold."""
    for name, param in training.model[0].named_parameters():
        yield from _held(f"model.{name}", param)
    for number, steps in _steps(training):
        for index, param in enumerate(p for g in steps.param_groups for p in g["params"]):
            yield from _held(f"main.{number}.{index}", param)
            for key, state in steps.state[param].items():
                if isinstance(state, torch.Tensor):
                    yield from _held(f"{key}.{number}.{index}", state)
            for key, scale in getattr(steps, "_scales", {}).get(param, {}).items():
                yield f"scale.{key}.{number}.{index}", scale.clone()


def _held(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if not hasattr(tensor, "_quantizer"):
        yield name, tensor.detach().clone()
        return
    held: Any = tensor
    yield f"{name}.codes", held._rowwise_data.clone()
    yield f"{name}.scales", held._rowwise_scale_inv.clone()
    yield f"{name}.amax", held._quantizer.amax.clone()
    if held._columnwise_data is not None:
        yield f"{name}.transposed", held._columnwise_data.clone()


def _differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [
        key
        for key in sorted({*one, *other})
        if key not in one or key not in other or not same_bits(one[key], other[key])
    ]


def _same_on_ranks(training: Any) -> bool:
    """Whether both data-parallel ranks have the same model weights."""
    import torch.distributed as dist

    for param in training.model[0].parameters():
        own = param.detach().float().contiguous()
        both = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(both, own)
        if not same_bits(both[0], both[1]):
            return False
    return True


def _leave_remainders() -> None:
    """A swap that forgets what the optimizer keeps beside the weights."""
    from wsm_megatron.plugin.values import Remainders

    write = Remainders.write

    def forgetful(self: Any, value: torch.Tensor, start: int = 0) -> bool:
        kept = self._remainders().clone()
        finite = write(self, value, start)
        self._remainders().copy_(kept)
        return finite

    Remainders.write = forgetful  # type: ignore[method-assign]
