"""What the page about the kernels shows of the plans: its table and its pictures."""

from collections.abc import Callable

from cupynorm._cuda.plan import Plan
from cupynorm._cuda.rows import FORWARD
from cupynorm._report.explain import _FAMILIES
from docs._generate import chunk_pictures, row_pictures, tile_pictures
from docs._generate.plans import column_plan, columns_plan, row_plan
from docs._generate.svg import Drawing

__all__ = ["pictures"]

OF_ROWS: dict[str, tuple[str, Callable[[Plan, int], Drawing]]] = {
    "warp": ("k1", row_pictures.warp),
    "block": ("k2", row_pictures.block),
    "shared": ("k3", chunk_pictures.shared),
    "cluster": ("k4", chunk_pictures.cluster),
    "split": ("k5", chunk_pictures.split),
}
NOT_YET = "It is being built: no plan takes it yet, and there is no picture of it.\n"
TABLE_COLUMNS = ["float32", "int8", "bool", "float64", "int32, nulls", "float16"] * 2


def pictures() -> dict[str, str]:
    """File name to contents."""
    files = {}
    for family, (name, draw) in OF_ROWS.items():
        planned = row_plan(family)
        drawn = _raw(draw(*planned).figure()) if planned else NOT_YET
        files[f"{name}.md"] = drawn
    files["k6.md"] = _raw(_k6().figure())
    files["k7.md"] = _raw(_k7().figure())
    files["families.md"] = _families()
    files["layouts.md"] = _raw(tile_pictures.layouts().figure())
    return files


def _raw(text: str) -> str:
    return f"```{{raw}} html\n{text}```\n"


def _k6() -> Drawing:
    plan = column_plan(10_000, 12)
    return tile_pictures.tile(
        plan,
        [f"column {n}" for n in range(12)],
        "K6, a column-major matrix of 12 float32 columns to a row-major one: one block of "
        f"{plan.stages[0].name} takes {plan.rows_per_block} rows. A color is a warp.",
    )


def _k7() -> Drawing:
    plan = columns_plan(10_000, len(TABLE_COLUMNS))
    return tile_pictures.tile(
        plan,
        TABLE_COLUMNS,
        f"K7, a table of {len(TABLE_COLUMNS)} columns with addresses, types and validity bits of "
        f"their own: one block of {plan.stages[0].name} takes {plan.rows_per_block} rows, and "
        "converts each value on its way in. A color is a warp.",
    )


def _families() -> str:
    """The plan's table, as far as it concerns a reader."""
    lines = ["| family | row of x | threads per row |", "|---|---|---|"]
    alone = [row for row in FORWARD if row.cluster == 1]
    for family in dict.fromkeys(row.family for row in alone):
        rows = [row for row in alone if row.family == family]
        limit = rows[-1].max_vecs * 16
        to = f"up to {limit // 1024} KiB" if limit < 2**30 else "any length"
        to += ", as shared memory allows" if family == "shared" else ""
        threads = ", ".join(str(t) for t in sorted({row.threads_per_row for row in rows}))
        lines.append(f"| {_FAMILIES[family]} | {to} | {threads} |")
    if "cluster" in _FAMILIES:
        lines.insert(-1, f"| {_FAMILIES['cluster']} | long, on sm_90 and newer | 512 and more |")
    lines.append("| K6 column: neighbouring rows next to each other | any length | 1 to 8 |")
    lines.append("| K7 columns: columns with addresses of their own | any length | 1 to 8 |")
    return "\n".join(lines) + "\n"
