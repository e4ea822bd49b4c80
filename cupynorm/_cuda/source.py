"""Joins the texts of `kernels/` into the source of one specialization."""

import functools
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from cupynorm._cuda.arguments import entry_of
from cupynorm._cuda.plan import Stage

_ROWS = ("types", "ops", "segment", "statistics", "rows", "gradient")
_TILES = (*_ROWS, "stage", "tile")
_TEXTS = {
    "warp": (*_ROWS, "registers"),
    "block": (*_ROWS, "registers"),
    "shared": (*_ROWS, "stage", "cluster", "shared"),
    "cluster": (*_ROWS, "stage", "cluster", "shared"),
    "split": (*_ROWS, "split"),
    "column": (*_TILES, "column"),
    "lanes": (*_TILES, "column", "lanes"),
    "columns": (*_TILES, "columns"),
    "totals": (*_ROWS[:4], "totals"),
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
    texts = _TEXTS[stage.family.removesuffix("_bwd")]
    return "\n".join([*map(_text, texts), _entry_of(stage)])


def _entry_of(stage: Stage) -> str:
    entry, X = entry_of(stage.template, stage.op.residual), _TYPES[stage.x_dtype]
    names = {
        "X": X,
        "W": _TYPES[stage.weight_dtype] if stage.weight_dtype else X,
        "B": _TYPES[stage.bias_dtype] if stage.bias_dtype else X,
        "A": "double" if X == "double" else "float",
    }
    kinds = entry.types.split()
    has = (("W", stage.weight_dtype), ("B", stage.bias_dtype))
    function, template = stage.template, [str(c) for c in stage.constants]
    if stage.aligned is not None:
        template.insert(0, _flag(stage.aligned))
    if function != "column_totals":
        function = f"norm_{function}"
        traits = stage.op.center, stage.op.unit_weight, stage.op.residual
        template.insert(0, f"Op<{', '.join(map(_flag, traits))}>")
    template += [names[kind] for kind in kinds]
    template += [_flag(dtype is not None) for kind, dtype in has if kind in kinds]
    passed, body = list(entry.fields), ""
    if entry.struct:
        types = ", ".join(names[kind] for kind in kinds)
        body = f"const {entry.struct}<{types}> a = {{{', '.join(passed)}}};\n    "
        passed = ["a", *entry.names[len(passed) :]]
    body += f"{function}<{', '.join(template)}>({', '.join(passed)});"
    bounds = f"__launch_bounds__({stage.block[0]}, {stage.blocks_per_sm})"
    if stage.cluster > 1:  # stated here, so that a plain launch makes clusters: CuPy has no other
        bounds = f"__cluster_dims__({stage.cluster}, 1, 1) {bounds}"
    parameters = entry.parameters.format(**names)
    return f'extern "C" __global__ void {bounds}\n{stage.name}({parameters}) {{\n    {body}\n}}\n'


def _flag(value: bool) -> str:
    return str(value).lower()
