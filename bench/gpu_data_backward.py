"""Inputs of a backward case, in as many buffers as it takes to get past the L2 cache."""

from dataclasses import dataclass
from typing import Any

from bench.gpu_check import largest_error
from bench.gpu_check_backward import gradient_errors, statistics, worst_of
from bench.gpu_data import buffers_for, make_affine, offset_of, placed_rows, poison, random_flat
from bench.gpu_grid import BOTH, Case
from bench.gpu_session import Session

__all__ = ["GradientInputs", "make_gradient_inputs"]


@dataclass(frozen=True)
class GradientInputs:
    """Buffers of one case; call number i uses x[i], dy[i], mean[i] and rstd[i].

    Results are allocated by whoever computes them: y where the case has a forward, then dx, dweight
    and dbias, the latter two where there is a weight.
    """

    case: Case
    x: list[Any]  # each (rows, N)
    dy: list[Any]
    mean: list[Any]  # (rows, 1), rounded from float64
    rstd: list[Any]
    weight: Any  # (N,) or None
    bias: Any
    copy_from: list[Any]
    copy_to: list[Any]

    def __len__(self) -> int:
        return len(self.x)

    @property
    def wanted(self) -> tuple[bool, bool, bool]:
        """Of dx, dweight and dbias."""
        affine = self.weight is not None
        return True, affine, affine

    def poison(self) -> None:
        """Spoil what the copies write before a check."""
        poison(self.copy_to)

    def judge(
        self, session: Session, i: int, result: tuple[Any, ...], ours: bool
    ) -> tuple[float, float]:
        """Error of the result of call i, and the largest that passes."""
        xp = session.xp
        x, dy, weight, bias, *arrays = (
            None if a is None else session.plain(a)
            for a in (self.x[i], self.dy[i], self.weight, self.bias, *result)
        )
        *y, dx, dweight, dbias = arrays
        _refuse_missing(self.wanted, (dx, dweight, dbias))
        errors = gradient_errors(xp, dy, x, weight, (dx, dweight, dbias))
        dtypes = {"dx": x.dtype}
        if weight is not None:
            dtypes |= {"dweight": weight.dtype, "dbias": weight.dtype}
        if self.case.op == BOTH:
            errors["y"], dtypes["y"] = largest_error(xp, x, weight, bias, y[0]), x.dtype
        names = {label: str(dtype) for label, dtype in dtypes.items()}
        return worst_of(errors, names, x.shape, ours)


def _refuse_missing(wanted: tuple[bool, ...], gradients: tuple[Any, ...]) -> None:
    """Whoever leaves a gradient out has not done the work that the others are timed on."""
    missing = [
        label
        for label, want, got in zip(("dx", "dweight", "dbias"), wanted, gradients, strict=True)
        if want and got is None
    ]
    if missing:
        msg = f"no {' and no '.join(missing)} came back"
        raise ValueError(msg)


def make_gradient_inputs(session: Session, case: Case) -> GradientInputs:
    """Random rows; dy has mean zero, so that the sums over a million rows stay within float16."""
    count = buffers_for(session, case)
    length = offset_of(case) + case.rows * case.pitch
    x, dy = (
        [
            placed_rows(case, random_flat(session, case.dtype, length, i + seed, center))
            for i in range(count)
        ]
        for seed, center in ((0, 0.5), (2, 0.0))  # by four they repeat: x and dy never agree
    )
    made = [statistics(session.xp, session.plain(a)) for a in x]
    mean, rstd = ([session.cupy.asarray(pair[k]) for pair in made] for k in (0, 1))
    half = case.copy_bytes // 2 // case.itemsize  # a copy reads one half and writes the other
    copy_from = [random_flat(session, case.dtype, half, i) for i in range(count)]
    copy_to = [session.cupy.empty(half, dtype=x[0].dtype) for _ in range(count)]
    affine = make_affine(session, case)
    return GradientInputs(case, x, dy, mean, rstd, *affine, copy_from, copy_to)
