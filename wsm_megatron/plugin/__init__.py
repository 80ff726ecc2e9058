"""The training plugin: the only part of the package that imports ``megatron.training``.

``install()`` hooks it into Megatron-LM; ``WSM(model, optimizer, WSMConfig(...))`` is the object
behind it, for training loops of one's own on megatron-core.
"""

from wsm_megatron.plugin.config import WSMConfig
from wsm_megatron.plugin.hooks import install, uninstall
from wsm_megatron.plugin.wsm import WSM

__all__ = ["WSM", "WSMConfig", "install", "uninstall"]
