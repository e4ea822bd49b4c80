"""Joins the texts of `kernels/` into the source of one specialization."""

import functools
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from cupynorm._plan import Stage

__all__ = ["kernels_folder", "source_of"]

_SHARED = ("types", "segment", "reduce", "moments", "rows")
_FAMILIES = {
    "warp": (*_SHARED, "layer_norm_warp"),
    "block": (*_SHARED, "layer_norm_block"),
    "shared": (*_SHARED, "chunk", "layer_norm_shared"),
    "split": (*_SHARED, "chunk", "layer_norm_split"),
}

_TYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "float", "float64": "double"}

_ROW_PARAMETERS = (
    "const {X}* x, {X}* y, const {W}* weight, const {B}* bias, {A}* mean, {A}* rstd, i64 rows, "
    "i64 M, i64 x_outer, i64 x_row, i64 y_outer, i64 y_row, i64 N, double eps"
)
_ROW_ARGUMENTS = (
    "{{x, y, weight, bias, mean, rstd, rows, M, x_outer, x_row, y_outer, y_row, N, eps}}"
)

_ROW_BODY = (
    "const RowArguments<{X}, {W}, {B}> a = " + _ROW_ARGUMENTS + ";\n"
    "    {kernel}<{constants}{X}, {W}, {B}, {has_weight}, {has_bias}>(a{more});"
)

# Parameters and body of an entry, by kernel. Integers are all 64-bit and eps is a double, because
# that is how CuPy passes Python numbers.
_ENTRIES = {
    "layer_norm_fwd_split_stats": (
        "const {X}* x, {A}* moments, i64 rows, i64 M, i64 x_outer, i64 x_row, i64 N, "
        "i64 sections, i64 chunks_per_section",
        "{kernel}<{X}, {A}>(x, moments, rows, M, x_outer, x_row, N, sections, chunks_per_section);",
    ),
    "layer_norm_fwd_split_normalize": (
        _ROW_PARAMETERS + ", const {A}* moments, i64 sections, i64 chunks_per_section, i64 parts",
        _ROW_BODY,
    ),
}


def kernels_folder() -> Traversable:
    """Where the kernel texts are: inside an installed package, beside it in a checkout."""
    inside = files("cupynorm") / "kernels"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[1] / "kernels"


@functools.cache
def _text(name: str) -> str:
    return (kernels_folder() / f"{name}.cuh").read_text(encoding="utf-8")


@functools.lru_cache(maxsize=1024)
def source_of(stage: Stage) -> str:
    """CUDA text of a stage: the shared headers, its family, and one `extern "C"` entry.

    Everything is in one string, because CuPy's disk cache does not see the contents of included
    headers and would run a stale binary after an upgrade.
    """
    parameters, body = _ENTRIES.get(stage.kernel, (_ROW_PARAMETERS, _ROW_BODY))
    X = _TYPES[stage.x_dtype]
    split = stage.kernel == "layer_norm_fwd_split_normalize"
    names = {
        "kernel": stage.kernel,
        "constants": "".join(f"{c}, " for c in stage.constants),
        "X": X,
        "W": _TYPES[stage.weight_dtype] if stage.weight_dtype else X,
        "B": _TYPES[stage.bias_dtype] if stage.bias_dtype else X,
        "A": "double" if X == "double" else "float",
        "has_weight": str(stage.weight_dtype is not None).lower(),
        "has_bias": str(stage.bias_dtype is not None).lower(),
        "more": ", moments, sections, chunks_per_section, parts" if split else "",
    }
    bounds = f"__launch_bounds__({stage.block[0]}, {stage.blocks_per_sm})"
    entry = (
        f'extern "C" __global__ void {bounds}\n'
        f"{stage.name}({parameters.format(**names)}) {{\n    {body.format(**names)}\n}}\n"
    )
    return "\n".join([*(_text(name) for name in _FAMILIES[stage.family]), entry])
