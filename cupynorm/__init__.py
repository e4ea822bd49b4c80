"""Layer normalization for arrays that live outside a deep-learning framework."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cupynorm._ops import LayerNormResult
from cupynorm.functional import layer_norm

if TYPE_CHECKING:
    from cupynorm import plot
    from cupynorm._ops import LayerNormGradients
    from cupynorm._report.config import show_config
    from cupynorm._report.explain import Explanation, explain
    from cupynorm._report.warmup import warmup
    from cupynorm.frames.columns import layer_norm_columns, rms_norm_columns
    from cupynorm.functional import (
        add_layer_norm,
        add_rms_norm,
        layer_norm_backward,
        rms_norm,
        rms_norm_backward,
    )
    from cupynorm.modules import LayerNorm, RMSNorm
    from cupynorm.prepared import PreparedLayerNorm, prepare

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "LayerNorm",
    "LayerNormGradients",
    "LayerNormResult",
    "PreparedLayerNorm",
    "RMSNorm",
    "__version__",
    "add_layer_norm",
    "add_rms_norm",
    "explain",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_columns",
    "plot",
    "prepare",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_columns",
    "show_config",
    "warmup",
]

_LAZY = {
    "Explanation": "cupynorm._report.explain",
    "LayerNorm": "cupynorm.modules",
    "LayerNormGradients": "cupynorm._ops",
    "PreparedLayerNorm": "cupynorm.prepared",
    "RMSNorm": "cupynorm.modules",
    "add_layer_norm": "cupynorm.functional",
    "add_rms_norm": "cupynorm.functional",
    "explain": "cupynorm._report.explain",
    "layer_norm_backward": "cupynorm.functional",
    "layer_norm_columns": "cupynorm.frames.columns",
    "prepare": "cupynorm.prepared",
    "rms_norm": "cupynorm.functional",
    "rms_norm_backward": "cupynorm.functional",
    "rms_norm_columns": "cupynorm.frames.columns",
    "show_config": "cupynorm._report.config",
    "warmup": "cupynorm._report.warmup",
}


def __getattr__(name: str) -> Any:
    """Import the parts that a plain `layer_norm` call does not need when they are first named."""
    if name == "plot":  # a module, which the import system itself binds here
        return import_module("cupynorm.plot")
    if name not in _LAZY:
        msg = f"module 'cupynorm' has no attribute {name!r}; use one of {', '.join(__all__)}"
        raise AttributeError(msg)
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
