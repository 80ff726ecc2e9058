"""WSM for Megatron: the effect of learning-rate decay by merging checkpoints (arXiv 2507.17634)."""

__version__ = "0.1.0"

from wsm_megatron.config import MergeConfig
from wsm_megatron.decay import coefficients, effective_lr
from wsm_megatron.engine.merge import MergeReport, merge
from wsm_megatron.engine.verify import VerifyReport, verify
from wsm_megatron.errors import MergeError
from wsm_megatron.plugin import WSM, WSMConfig, install, uninstall

__all__ = [
    "WSM",
    "WSMConfig",
    "MergeConfig",
    "MergeError",
    "MergeReport",
    "VerifyReport",
    "coefficients",
    "effective_lr",
    "install",
    "merge",
    "uninstall",
    "verify",
]
