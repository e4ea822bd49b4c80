"""Joins the texts of `kernels/` into the source of one specialization."""

import functools
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from cupynorm._cuda.plan import Stage

__all__ = ["kernels_folder", "source_of"]

_SHARED = ("types", "segment", "reduce", "moments", "rows")
_STAGED = (*_SHARED, "chunk", "stage", "staged_chunks")
_TILED = (*_SHARED, "chunk", "stage", "tile", "tile_store")
_TILED_BWD = (*_SHARED, "gradient", "stage", "tile")
_FAMILIES = {
    "warp": (*_SHARED, "layer_norm_warp"),
    "block": (*_SHARED, "layer_norm_block"),
    "shared": (*_STAGED, "layer_norm_shared"),
    "cluster": (*_STAGED, "cluster", "layer_norm_cluster"),
    "split": (*_SHARED, "chunk", "layer_norm_split"),
    "column": (*_TILED, "layer_norm_column"),
    "lanes": (*_TILED, "layer_norm_column", "layer_norm_lanes"),
    "columns": (*_TILED, "layer_norm_columns"),
    "column_bwd": (*_TILED_BWD, "layer_norm_column_bwd"),
    "panels_bwd": (*_TILED_BWD, "layer_norm_column_bwd", "layer_norm_column_bwd_panels"),
    "warp_bwd": (*_SHARED, "gradient", "layer_norm_warp_bwd"),
    "block_bwd": (*_SHARED, "gradient", "layer_norm_block_bwd"),
    "shared_bwd": (*_SHARED, "gradient", "stage", "shared_totals", "layer_norm_shared_bwd"),
    "cluster_bwd": (
        *(*_SHARED, "chunk", "cluster"),
        *("gradient", "shared_totals", "layer_norm_cluster_bwd"),
    ),
    "split_bwd": (*_SHARED, "chunk", "gradient", "layer_norm_split_bwd"),
    "totals_bwd": ("types", "reduce", "column_totals"),
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

_GRADIENT_PARAMETERS = (
    "const {X}* dy, const {X}* x, const {A}* mean, const {A}* rstd, const {W}* weight, {X}* dx, "
    "{A}* partials, i64 rows, i64 M, i64 dy_outer, i64 dy_row, i64 x_outer, i64 x_row, "
    "i64 dx_outer, i64 dx_row, i64 N"
)
_GRADIENT_BODY = (
    "const GradientArguments<{X}, {W}> a = {{dy, x, mean, rstd, weight, dx, partials, rows, M, "
    "dy_outer, dy_row, x_outer, x_row, dx_outer, dx_row, N}};\n"
    "    {kernel}<{constants}{X}, {W}, {has_weight}>(a{more});"
)
_COLUMN_PARAMETERS = (
    "const {X}* x, {X}* y, const {W}* weight, const {B}* bias, {A}* mean, {A}* rstd, i64 rows, "
    "i64 M, i64 x_outer, i64 x_row, i64 x_col, i64 y_outer, i64 y_row, i64 y_col, "
    "i64 stats_outer, i64 stats_row, i64 N, double eps"
)
_COLUMN_BODY = (
    "const ColumnArguments<{X}, {W}, {B}> a = {{x, y, weight, bias, mean, rstd, rows, M, x_outer, "
    "x_row, x_col, y_outer, y_row, y_col, stats_outer, stats_row, N, eps}};\n"
    "    {kernel}<{constants}{X}, {W}, {B}, {has_weight}, {has_bias}>(a{more});"
)
_COLUMN_GRADIENT = (
    "const {X}* dy, const {X}* x, const {A}* mean, const {A}* rstd, const {W}* weight, "
    "{X}* dx, {A}* partials, i64 rows, i64 M, i64 dy_outer, i64 dy_row, i64 dy_col, "
    "i64 x_outer, i64 x_row, i64 x_col, i64 dx_outer, i64 dx_row, i64 dx_col, "
    "i64 stats_outer, i64 stats_row, i64 slots, i64 N",
    "const ColumnGradientArguments<{X}, {W}> a = {{dy, x, mean, rstd, weight, dx, partials, "
    "rows, M, dy_outer, dy_row, dy_col, x_outer, x_row, x_col, dx_outer, dx_row, dx_col, "
    "stats_outer, stats_row, slots, N}};\n"
    "    {kernel}<{constants}{X}, {W}, {has_weight}>(a);",
)
_GRADIENT = (_GRADIENT_PARAMETERS, _GRADIENT_BODY)

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
    "layer_norm_fwd_column": (_COLUMN_PARAMETERS + ", i64 panel", _COLUMN_BODY),
    "layer_norm_fwd_lanes": (_COLUMN_PARAMETERS, _COLUMN_BODY),
    "layer_norm_fwd_columns": (
        "const ColumnSource* table, {X}* y, const {W}* weight, const {B}* bias, i64 M, i64 y_row, "
        "i64 y_col, i64 N, double eps, i64 panel",
        "{kernel}<{constants}{X}, {W}, {B}, {has_weight}, {has_bias}>"
        "(table, y, weight, bias, M, y_row, y_col, N, eps, panel);",
    ),
    "layer_norm_bwd_column": _COLUMN_GRADIENT,
    "layer_norm_bwd_column_panels": _COLUMN_GRADIENT,
    "layer_norm_bwd_warp": _GRADIENT,
    "layer_norm_bwd_block": _GRADIENT,
    "layer_norm_bwd_shared": _GRADIENT,
    "layer_norm_bwd_cluster": _GRADIENT,
    "layer_norm_bwd_split_sums": (
        _GRADIENT_PARAMETERS + ", {A}* sums, i64 sections, i64 chunks_per_section",
        _GRADIENT_BODY,
    ),
    "layer_norm_bwd_split_merge": (
        "const {A}* sums, {A}* gradients, i64 rows, i64 sections, i64 N",
        "{kernel}<{constants}{A}>(sums, gradients, rows, sections, N);",
    ),
    "layer_norm_bwd_split_apply": (
        _GRADIENT_PARAMETERS + ", const {A}* gradients, i64 parts",
        _GRADIENT_BODY,
    ),
    "column_totals": (
        "const {A}* partials, i64 count, i64 pitch, i64 N, {W}* dweight, {B}* dbias",
        "{kernel}<{A}, {W}, {B}, {has_weight}, {has_bias}>"
        "(partials, count, pitch, N, dweight, dbias);",
    ),
}
# What an entry passes on besides the structure of its arguments.
_MORE = {
    "layer_norm_fwd_column": ", panel",
    "layer_norm_fwd_split_normalize": ", moments, sections, chunks_per_section, parts",
    "layer_norm_bwd_split_sums": ", sums, sections, chunks_per_section",
    "layer_norm_bwd_split_apply": ", gradients, parts",
}


def kernels_folder() -> Traversable:
    """Where the kernel texts are: inside an installed package, beside it in a checkout."""
    inside = files("cupynorm") / "kernels"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "kernels"


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
    names = {
        "kernel": stage.kernel,
        "constants": "".join(f"{c}, " for c in stage.constants),
        "X": X,
        "W": _TYPES[stage.weight_dtype] if stage.weight_dtype else X,
        "B": _TYPES[stage.bias_dtype] if stage.bias_dtype else X,
        "A": "double" if X == "double" else "float",
        "has_weight": str(stage.weight_dtype is not None).lower(),
        "has_bias": str(stage.bias_dtype is not None).lower(),
        "more": _MORE.get(stage.kernel, ""),
    }
    bounds = f"__launch_bounds__({stage.block[0]}, {stage.blocks_per_sm})"
    if stage.cluster > 1:  # stated here, so that a plain launch makes clusters: CuPy has no other
        bounds = f"__cluster_dims__({stage.cluster}, 1, 1) {bounds}"
    entry = (
        f'extern "C" __global__ void {bounds}\n'
        f"{stage.name}({parameters.format(**names)}) {{\n    {body.format(**names)}\n}}\n"
    )
    return "\n".join([*(_text(name) for name in _FAMILIES[stage.family]), entry])
