"""The result of `explain`: facts of a call beside what a path makes of them, and how it prints."""

from dataclasses import dataclass

from cupynorm import _problem
from cupynorm._cuda.plan import Plan, Stage
from cupynorm._display import Sections, Table

__all__ = ["Explanation", "Facts"]


@dataclass(frozen=True, slots=True, repr=False)
class Explanation(Table):
    """What `layer_norm` or its backward would run; prints as aligned text, a table in a notebook.

    Attributes
    ----------
    path : str
        'cuda', 'cpu' or 'reference'.
    kernel : str
        What does the work.
    rows, cols : int
        Rows that are normalized and elements in each.
    dtype, stats_dtype : str
        Of x and y, and of the statistics.
    launches : tuple of str
        Each kernel launch: entry, grid (and cluster), block, shared memory; empty off the GPU.
    threads_per_row, rows_per_block : int or None
        Of the plan; None off the GPU.
    bytes_floor : int
        x read once and y written once (of a backward: x and dy read, dx written), with weight,
        bias, statistics and sums, in bytes of memory.
    bytes_moved : int or None
        What this plan moves; None where a library decides.
    copies : tuple of str
        Every copy of x, y, dy or dx that the call makes, with its reason.
    source : str
        What set the plan's thresholds.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> plan = cn.explain(np.ones((64, 1000), np.float32), device="sm_90")
    >>> plan.kernel
    'K1 warp: lanes of one warp hold a row in registers'
    >>> plan.bytes_moved == plan.bytes_floor == 2 * 64 * 1000 * 4
    True
    """

    path: str
    kernel: str
    rows: int
    cols: int
    dtype: str
    stats_dtype: str
    launches: tuple[str, ...]
    threads_per_row: int | None
    rows_per_block: int | None
    bytes_floor: int
    bytes_moved: int | None
    copies: tuple[str, ...]
    source: str

    def _sections(self) -> Sections:
        moved = "decided by the library" if self.bytes_moved is None else _bytes(self.bytes_moved)
        if self.bytes_moved:
            moved += f", {self.bytes_moved / self.bytes_floor:.2f} of the floor"
        rows = [
            ("path", self.path),
            ("kernel", self.kernel),
            ("problem", f"{self.rows} rows of {self.cols}, {self.dtype}"),
            ("statistics", f"{self.stats_dtype}, corrected two-pass"),
        ]
        rows += [("launch", text) for text in self.launches]
        if self.threads_per_row is not None:
            rows.append(("threads per row", str(self.threads_per_row)))
            rows.append(("rows per block", str(self.rows_per_block)))
        rows += [("floor", _bytes(self.bytes_floor)), ("moved", moved)]
        rows += [("copy", text) for text in self.copies or ("none",)]
        return [("", rows + ([("plan from", self.source)] if self.source else []))]


def _launch(stage: Stage) -> str:
    grid = f"grid {stage.grid[0]}"
    if stage.cluster > 1:
        grid += f" in clusters of {stage.cluster}"
    return f"{stage.name}, {grid}, block {stage.block[0]}, shared {stage.shared_bytes} bytes"


def _bytes(n: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n} bytes"


@dataclass(frozen=True, slots=True)
class Facts:
    """What every path's explanation states."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    rows: int
    cols: int
    dtypes: tuple[str | None, ...]  # of x, weight, bias
    stats: bool
    backward: bool

    @property
    def x_bytes(self) -> int:
        """Bytes of x, and of y, dy and dx."""
        return self.rows * self.cols * _problem.ITEMSIZE[str(self.dtypes[0])]

    @property
    def stats_dtype(self) -> str:
        """Of mean, rstd and every sum."""
        return _problem.stats_dtype(str(self.dtypes[0]))

    @property
    def totals(self) -> tuple[str | None, str]:
        """Dtypes of dweight and dbias; without a weight there is no dweight."""
        return self.dtypes[1], self.dtypes[1] or self.stats_dtype

    def floor(self) -> int:
        """Bytes that any way of doing it moves."""
        small = (*self.dtypes[1:2], *self.totals) if self.backward else self.dtypes[1:]
        vectors = sum(self.cols * _problem.ITEMSIZE[d] for d in small if d)
        stats = 2 * _problem.ITEMSIZE[self.stats_dtype] * self.rows
        passes = 2 + self.backward
        return passes * self.x_bytes + vectors + stats * (self.stats or self.backward)

    def explanation(
        self,
        path: str,
        kernel: str,
        moved: int | None,
        plan: Plan | None = None,
        copies: tuple[str, ...] = (),
    ) -> Explanation:
        """Put the facts beside what a path makes of them."""
        return Explanation(
            path=path,
            kernel=kernel,
            rows=self.rows,
            cols=self.cols,
            dtype=str(self.dtypes[0]),
            stats_dtype=self.stats_dtype,
            launches=tuple(_launch(stage) for stage in (plan.stages if plan else ())),
            threads_per_row=plan.threads_per_row if plan else None,
            rows_per_block=plan.rows_per_block if plan else None,
            bytes_floor=self.floor(),
            bytes_moved=moved,
            copies=copies,
            source=plan.source if plan else "",
        )
