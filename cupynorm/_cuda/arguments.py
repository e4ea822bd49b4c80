"""What each kernel entry is given: one table, for its C text and for its launches."""

from dataclasses import dataclass, replace

# By name and in order, as the structs in `kernels/` have them; a star is on what is written to.
ROWS = "x *y weight bias *mean *rstd rows M x_outer x_row y_outer y_row N eps"
COLUMN = (
    "x *y weight bias *mean *rstd rows M x_outer x_row x_col y_outer y_row y_col "
    "stats_outer stats_row N eps"
)
GRADIENT = (
    "dy x mean rstd weight *dx *partials rows M dy_outer dy_row x_outer x_row dx_outer dx_row N"
)
COLUMN_GRADIENT = (
    "dy x mean rstd weight *dx *partials rows M dy_outer dy_row dy_col x_outer x_row x_col "
    "dx_outer dx_row dx_col stats_outer stats_row slots N"
)

# Of what addresses point to: X, W and B are the types of x, weight and bias, A is the accumulator.
# Any other name is a 64-bit integer and eps a double, because CuPy passes Python's numbers so.
POINTERS = {
    **dict.fromkeys(("x", "y", "dy", "dx", "residual", "sum", "dsum"), "X"),
    **dict.fromkeys(("weight", "dweight"), "W"),
    **dict.fromkeys(("bias", "dbias"), "B"),
    **dict.fromkeys(("mean", "rstd", "partials", "moments", "stats", "sums", "gradients"), "A"),
    "table": "ColumnSource",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What one kernel is given."""

    types: str  # its template's, of which the struct has the same
    given: str
    more: str = ""  # beside the struct
    struct: str = ""  # that what is given goes into; none: it is passed as it is

    @property
    def names(self) -> tuple[str, ...]:
        """Of all arguments, in order."""
        return tuple(f"{self.given} {self.more}".replace("*", "").split())

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of what is given, but for `more`."""
        return tuple(self.given.replace("*", "").split())

    @property
    def parameters(self) -> str:
        """As C declares them, with X, W, B and A in braces."""
        return ", ".join(_declared(name) for name in f"{self.given} {self.more}".split())


def _declared(name: str) -> str:
    kind = POINTERS.get(name.lstrip("*"))
    if kind is None:
        return f"double {name}" if name == "eps" else f"i64 {name}"
    kind = f"{{{kind}}}" if len(kind) == 1 else kind
    return f"{kind}* {name[1:]}" if name[0] == "*" else f"const {kind}* {name}"


def _rows(more: str = "") -> Entry:
    return Entry("X W B", ROWS, more, "RowArguments")


def _gradient(more: str = "") -> Entry:
    return Entry("X W", GRADIENT, more, "GradientArguments")


# By what follows `norm_` in the name of a template of `kernels/`.
ENTRIES = {
    "fwd_warp": _rows(),
    "fwd_block": _rows(),
    "fwd_shared": _rows(),
    "fwd_split_stats": _rows("*moments sections chunks_per_section"),
    "fwd_split_merge": _rows("*moments *stats sections chunks_per_section"),
    "fwd_split_normalize": _rows("stats parts"),
    "fwd_column": Entry("X W B", COLUMN, "panel", "ColumnArguments"),
    "fwd_lanes": Entry("X W B", COLUMN, "", "ColumnArguments"),
    "fwd_columns": Entry("X W B", "table *y weight bias M y_row y_col N eps panel"),
    "bwd_warp": _gradient(),
    "bwd_block": _gradient(),
    "bwd_shared": _gradient(),
    "bwd_split_sums": _gradient("*sums sections chunks_per_section"),
    "bwd_split_merge": Entry("A", "sums *gradients rows sections N"),
    "bwd_split_apply": _gradient("gradients parts"),
    "bwd_column": Entry("X W", COLUMN_GRADIENT, "panel", "ColumnGradientArguments"),
    "column_totals": Entry("A W B", "partials count pitch N *dweight *dbias"),
}
# What the structs have at their ends for operations with a residual.
_RESIDUAL = {
    "RowArguments": "residual *sum residual_outer residual_row sum_outer sum_row",
    "GradientArguments": "dsum dsum_outer dsum_row",
}


def entry_of(template: str, residual: bool) -> Entry:
    """What a kernel is given, with the residual where an operation has one."""
    entry = ENTRIES[template]
    if residual and entry.struct in _RESIDUAL:
        return replace(entry, given=f"{entry.given} {_RESIDUAL[entry.struct]}")
    return entry
