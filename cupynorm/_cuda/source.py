"""Joins the texts of `kernels/` into the source of one specialization."""

import functools
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from cupynorm._cuda.arguments import ENTRIES
from cupynorm._cuda.plan import Stage

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


def kernels_folder() -> Traversable:
    """Where the kernel texts are: inside an installed package, beside it in a checkout."""
    inside = files("cupynorm") / "kernels"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "kernels"


@functools.cache
def _text(name: str) -> str:
    return (kernels_folder() / f"{name}.cuh").read_text(encoding="utf-8")


def source_of(stage: Stage) -> str:
    """CUDA text of a stage: the shared headers, its family, and one `extern "C"` entry.

    Everything is in one string, because CuPy's disk cache does not see the contents of included
    headers and would run a stale binary after an upgrade.
    """
    return "\n".join([*(_text(name) for name in _FAMILIES[stage.family]), _entry_of(stage)])


def _entry_of(stage: Stage) -> str:
    entry, X = ENTRIES[stage.kernel], _TYPES[stage.x_dtype]
    names = {
        "X": X,
        "W": _TYPES[stage.weight_dtype] if stage.weight_dtype else X,
        "B": _TYPES[stage.bias_dtype] if stage.bias_dtype else X,
        "A": "double" if X == "double" else "float",
    }
    kinds = entry.types.split()
    has = (("W", stage.weight_dtype), ("B", stage.bias_dtype))
    template = [str(c) for c in stage.constants] + [names[kind] for kind in kinds]
    template += [str(dtype is not None).lower() for kind, dtype in has if kind in kinds]
    passed, body = list(entry.fields), ""
    if entry.struct:
        types = ", ".join(names[kind] for kind in kinds)
        body = f"const {entry.struct}<{types}> a = {{{', '.join(passed)}}};\n    "
        passed = ["a", *entry.names[len(passed) :]]
    body += f"{stage.kernel}<{', '.join(template)}>({', '.join(passed)});"
    bounds = f"__launch_bounds__({stage.block[0]}, {stage.blocks_per_sm})"
    if stage.cluster > 1:  # stated here, so that a plain launch makes clusters: CuPy has no other
        bounds = f"__cluster_dims__({stage.cluster}, 1, 1) {bounds}"
    parameters = entry.parameters.format(**names)
    return f'extern "C" __global__ void {bounds}\n{stage.name}({parameters}) {{\n    {body}\n}}\n'
