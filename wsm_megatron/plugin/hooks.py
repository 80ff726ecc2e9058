"""install() and uninstall(): the few functions of ``megatron.training`` that the plugin wraps.

Each is looked up by name when it is called, so replacing the module's attribute before
``pretrain()`` starts is enough. Which ones, by version: :mod:`.versions`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from wsm_megatron.plugin.arguments import add_arguments, config_from_args
from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.driver import Driver
from wsm_megatron.plugin.megatron_trainer import MegatronTrainer
from wsm_megatron.plugin.trainer import Progress
from wsm_megatron.plugin.versions import TESTED, wrapped_by

logger = logging.getLogger(__name__)

_driver: Driver | None = None
_originals: dict[tuple[str, str], Callable[..., Any]] = {}


def install() -> None:
    """Add the ``--wsm-merge`` flags to Megatron-LM and wrap what they need. Idempotent.

    Call it before ``pretrain()`` and before arguments are parsed, on every rank. Without
    ``--wsm-merge`` on the command line the wrappers only pass calls through.

    Raises ``ImportError`` naming the missing module or function, and the versions tested.
    """
    if _originals:
        return
    found = {name: _lookup(*name) for name in wrapped_by(_version())}
    for (module, function), original in found.items():
        _originals[module, function] = original
        setattr(_module(module), function, _WRAPPERS[module, function])
        logger.debug("wsm: wrapped megatron.training.%s.%s", module, function)


def uninstall() -> None:
    """Put Megatron's own functions back and forget the run. Idempotent."""
    for (module, function), original in _originals.items():
        setattr(_module(module), function, original)
    _originals.clear()
    _set_driver(None)


def _set_driver(driver: Driver | None) -> None:
    global _driver
    if _driver is not None:
        _driver.close()
    _driver = driver


def _version() -> str:
    """Of Megatron core; one that does not say is taken for the newest."""
    _module("training")  # or what is missing would be said of megatron.core
    return str(vars(importlib.import_module("megatron.core")).get("__version__", "unknown"))


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"megatron.training.{name}")
    except ImportError as error:
        raise ImportError(
            f"--wsm-merge needs Megatron-LM on the Python path (tested: {TESTED}): {error}"
        ) from error


def _lookup(module: str, function: str) -> Callable[..., Any]:
    original = getattr(_module(module), function, None)
    if original is None:
        raise ImportError(
            f"this Megatron-LM has no megatron.training.{module}.{function}, which --wsm-merge "
            f"wraps (tested: {TESTED})"
        )
    return original


def _add_megatron_arguments(parser: Any) -> Any:
    return add_arguments(_originals["arguments", "add_megatron_arguments"](parser))


def _setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
    _set_driver(None)
    config = _config_of_run()
    build = _originals["training", "setup_model_and_optimizer"]
    if config is None:
        return build(*args, **kwargs)
    trainer = _trainer(config)
    driver = Driver(trainer, config)
    with trainer.checkpoints.watched(_module("training")):
        built = build(*args, **kwargs)
    driver.attach(*built)
    _set_driver(driver)
    return built


def _config_of_run() -> WSMConfig | None:
    """None without ``--wsm-merge``. Raises ``UsageError`` for flags that contradict each other."""
    run = _module("training").get_args()
    config = config_from_args(run)
    if config is not None and run.skip_train:
        logger.warning("--wsm-merge has no effect with --skip-train")
        return None
    return config


def _trainer(config: WSMConfig) -> MegatronTrainer:
    training = _module("training")
    return MegatronTrainer(
        training=training,
        checkpointing=_module("checkpointing"),
        save_checkpoint=_originals["training", "save_checkpoint"],
        args=training.get_args(),
        interval=config.snapshot_every,
    )


def _save_checkpoint(
    iteration: int,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    flops: Any,
    *args: Any,
    train_data_iterator: Any = None,
    non_persistent_ckpt: bool = False,
    **kwargs: Any,
) -> Any:
    def save() -> Any:
        return _originals["training", "save_checkpoint"](
            iteration,
            model,
            optimizer,
            scheduler,
            flops,
            *args,
            train_data_iterator=train_data_iterator,
            non_persistent_ckpt=non_persistent_ckpt,
            **kwargs,
        )

    if _driver is None or non_persistent_ckpt:
        return save()
    progress = Progress(
        iteration=iteration, flops=flops, scheduler=scheduler, data_iterator=train_data_iterator
    )
    with _driver.saving(progress):
        return save()


def _schedule_async_save(request: Any, *args: Any, **kwargs: Any) -> Any:
    if _driver is not None:
        _driver.scheduled(request)
    return _originals["checkpointing", "schedule_async_save"](request, *args, **kwargs)


def _evaluate_and_print_results(
    prefix: str,
    forward_step_func: Any,
    data_iterator: Any,
    model: Any,
    iteration: int,
    process_non_loss_data_func: Any,
    *args: Any,
    non_loss_data_func: Any = None,
    **kwargs: Any,
) -> Any:
    def evaluate(tag: str, data: Any, complete: bool) -> Any:
        return _originals["training", "evaluate_and_print_results"](
            tag + prefix,
            forward_step_func,
            data,
            model,
            iteration,
            process_non_loss_data_func if complete else None,
            *args,
            non_loss_data_func=non_loss_data_func if complete else None,
            **kwargs,
        )

    if _driver is None:
        return evaluate("", data_iterator, True)
    return _driver.evaluated(iteration, data_iterator, evaluate)


def _checkpoint_and_decide_exit(
    model: Any,
    optimizer: Any,
    scheduler: Any,
    iteration: int,
    flops: Any,
    checkpointing_context: Any,
    train_data_iterator: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    exits = _originals["training", "checkpoint_and_decide_exit"](
        model,
        optimizer,
        scheduler,
        iteration,
        flops,
        checkpointing_context,
        train_data_iterator,
        *args,
        **kwargs,
    )
    if _driver is not None:
        _driver.stepped(
            Progress(
                iteration=iteration,
                flops=flops,
                scheduler=scheduler,
                data_iterator=train_data_iterator,
            )
        )
    return exits


def _train(
    forward_step_func: Any,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    train_data_iterator: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    trained = _originals["training", "train"](
        forward_step_func, model, optimizer, scheduler, train_data_iterator, *args, **kwargs
    )
    if _driver is not None:
        iteration, flops = trained
        _driver.finished(
            Progress(
                iteration=iteration,
                flops=flops,
                scheduler=scheduler,
                data_iterator=train_data_iterator,
            )
        )
    return trained


_WRAPPERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("arguments", "add_megatron_arguments"): _add_megatron_arguments,
    ("training", "setup_model_and_optimizer"): _setup_model_and_optimizer,
    ("training", "save_checkpoint"): _save_checkpoint,
    ("training", "evaluate_and_print_results"): _evaluate_and_print_results,
    ("training", "checkpoint_and_decide_exit"): _checkpoint_and_decide_exit,
    ("training", "train"): _train,
    ("checkpointing", "schedule_async_save"): _schedule_async_save,
}
