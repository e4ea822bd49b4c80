"""Plain tensors that nobody watches: what they look like, memory for results, calls by address."""

import math
from collections.abc import Callable
from typing import Any

import torch

from cupynorm import _memo
from cupynorm._layout import Facts, row_major_strides
from cupynorm._libraries import bytes_of, check_apart, check_layout, check_memory, check_overlap
from cupynorm._rules import ITEMSIZE, dtype_name
from cupynorm._torch import machines
from cupynorm._torch.machines import LOW, nothing

Three = tuple[Any, Any, Any]


def stats_dtype(dtype: Any) -> Any:
    """Torch dtype in which statistics are computed and returned."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def new_y(x: Any, keep: bool) -> Any:
    """Memory for a result, with x's strides or row-major."""
    if keep or x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Tensors:
    """The door of plain tensors that nobody watches."""

    select: Any = None
    types = (torch.Tensor, torch.nn.Parameter)
    refuses_prepared = ""

    @staticmethod
    def look(a: Any) -> Any:
        """All of one tensor that a settled call may depend on; a Parameter is a tensor."""
        return a.shape, a.dtype, a.is_contiguous() or a.stride(), a.is_cpu or a.device

    @staticmethod
    def strides(a: Any) -> tuple[int, ...]:
        """Element strides."""
        return tuple(a.stride())

    @staticmethod
    def device(a: Any) -> Any:
        """Where it is."""
        return a.device

    def normalizer(self, facts: Facts) -> Callable[..., Any]:
        """The settled forward, which takes residual and sum_out, where there are these, last."""
        run, new, new_sum = machines.run_of(facts), _maker(facts, "y"), _maker(facts, "sum")
        held = _held(("x", "weight", "bias", "out", "residual", "sum_out"))
        shape, stats, op = facts.stats_shape, facts.stats, facts.op
        clash: Any = _overlap(facts) if facts.out and facts.size else None
        if op.residual:
            clash = check_apart

        def call(x: Any, weight: Any, bias: Any, out: Any, *added: Any) -> Any:
            held(x, weight, bias, out, *added)
            if clash is not None:
                clash(x, weight, bias, out, *added)
            y = new(x) if out is None else out
            if added and added[1] is None:
                added = added[0], new_sum(added[0])
            if not stats:
                run(x, y, weight, bias, None, None, *added)
                return (y, added[1]) if added else y
            kind = stats_dtype(x.dtype)
            mean = x.new_empty(shape, dtype=kind) if op.center else None
            rstd = x.new_empty(shape, dtype=kind)
            run(x, y, weight, bias, mean, rstd, *added)
            return (y, *added[1:], mean, rstd) if op.center else (y, *added[1:], rstd)

        if not _negatable(facts):
            in_place = None if facts.out or stats or op.residual else machines.in_place(facts)
            return call if in_place is None else _directly(facts, in_place, new, call)

        def resolving(x: Any, weight: Any, bias: Any, out: Any, *added: Any) -> Any:
            given, targets = (x, *added[:1]), (out, *added[1:])
            if not any(t is not None and t.is_neg() for t in (*given, *targets)):
                return call(x, weight, bias, out, *added)
            held(x, weight, bias, out, *added)
            x, *residual = (t.resolve_neg() for t in given)
            y, *total = (t if t is None else t.resolve_neg() for t in targets)
            met = zip(("x", "y", "residual", "sum"), (x, y, *residual, *total), strict=False)
            strides = {name: self.strides(t) for name, t in met if t is not None}
            again = Tensors.normalizer(self, facts._replace(strides={**facts.strides, **strides}))
            made = again(x, weight, bias, y, *residual, *total)
            found = list(made) if stats or residual else [made]
            for i, target in enumerate(targets):
                if target is not None:
                    found[i] = target.copy_(found[i])
            return tuple(found) if len(found) > 1 else found[0]

        return resolving

    def differentiator(self, facts: Facts) -> Callable[..., Any]:
        """The settled backward, which takes dsum, where there is one, last."""
        new, shape = _maker(facts, "dx"), facts.affine_shape
        to_weight, to_bias = (
            getattr(torch, facts.dtypes[k]) if k in facts.dtypes else None
            for k in ("dweight", "dbias")
        )
        negatable, held = _negatable(facts), _held(("dy", "x", "mean", "rstd", "weight", "dsum"))
        wanted = "dx" in facts.strides or to_weight is not None or to_bias is not None
        run = machines.run_of(facts) if wanted else nothing

        def call(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any, *dsum: Any) -> Three:
            held(dy, x, mean, rstd, weight, *dsum)
            if negatable and any(t.is_neg() for t in (dy, x, *dsum)):
                told = [t.resolve_neg() for t in (dy, x, *dsum)]
                met = zip(("dy", "x", "dsum"), map(self.strides, told), strict=False)
                again = self.differentiator(facts._replace(strides={**facts.strides, **dict(met)}))
                found: Three = again(*told[:2], mean, rstd, weight, *told[2:])
                return found
            dx = new(x)
            dweight = None if to_weight is None else _for_sum(x, weight, shape, to_weight)
            dbias = None if to_bias is None else _for_sum(x, weight, shape, to_bias)
            run(dy, x, mean, rstd, weight, dx, dweight, dbias, *dsum)
            return dx, dweight, dbias

        return call


def _held(names: tuple[str, ...]) -> Callable[..., list[int]]:
    """A look whether the storage of each tensor holds the bytes it takes, which it gives.

    All their strides are settled.
    """
    needs: Any = None

    def look(*tensors: Any) -> list[int]:
        nonlocal needs
        if needs is None:
            needs = [0 if t is None else bytes_of(t) for t in tensors]
        for name, t, need in zip(names, tensors, needs, strict=False):
            try:
                if need and len(t.untyped_storage()) - t.storage_offset() * t.itemsize < need:
                    check_memory(name, t, need)
            except RuntimeError:  # a sparse tensor may look like a dense one, but has no storage
                check_layout(name, t)
                raise
        return needs  # type: ignore[no-any-return]

    return look


def _directly(facts: Facts, in_place: Any, new: Any, general: Any) -> Callable[..., Any]:
    """y alone, by compiled loops on the tensors as they lie: what `general` does, in less time."""
    loops, lie = in_place
    held, need, fits = _held(("x", "weight", "bias")), math.inf, False  # show at the first call
    size, w_size, b_size = (
        ITEMSIZE[facts.dtypes.get(k, "float16")] for k in ("x", "weight", "bias")
    )
    w, b = (int(k in facts.dtypes) for k in ("weight", "bias"))  # bytes; 0: absent

    def call(x: Any, weight: Any, bias: Any, out: None) -> Any:
        nonlocal need, w, b, fits
        try:  # as `held` has it, in a third of the time
            there = fits and (
                len(x.untyped_storage()) - size * x.storage_offset() >= need
                and (not w or len(weight.untyped_storage()) - w_size * weight.storage_offset() >= w)
                and (not b or len(bias.untyped_storage()) - b_size * bias.storage_offset() >= b)
            )
        except RuntimeError:  # which `held` tells of
            there = False
        if there:
            at = x.data_ptr()
            w_at, b_at = weight.data_ptr() if w else LOW, bias.data_ptr() if b else LOW
            if at >= LOW and w_at >= LOW and b_at >= LOW:
                y = new(x)
                loops(at, y.data_ptr(), w and w_at, b and b_at, 0, 0, 0, 0)
                return y
        need, w, b = held(x, weight, bias)
        fits = lie(weight, bias)
        return general(x, weight, bias, out)

    return call


def _for_sum(x: Any, weight: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Memory for dweight or dbias, row-major; made like weight it costs half."""
    if weight is not None and weight.dtype is dtype and weight.is_contiguous():
        return torch.empty_like(weight)
    return x.new_empty(shape, dtype=dtype)


def _negatable(facts: Facts) -> bool:
    """Whether a tensor of x's shape may be one whose memory holds the negative of what it does.

    z.conj().imag is one: a view by steps of 2, which is not row-major unless it has one element.
    """
    dense = row_major_strides(facts.shape, ())
    return facts.size == 1 or any(strides != dense for strides in facts.strides.values())


def _maker(facts: Facts, name: str) -> Callable[[Any], Any]:
    """What makes memory for a result like x, or for a sum like residual; nothing, if unwanted."""
    strides = facts.strides.get(name)
    if strides is None:
        return nothing
    like = facts.strides["residual" if name == "sum" else "x"]
    if strides == like == row_major_strides(facts.shape, ()):
        return torch.empty_like  # type: ignore[no-any-return]
    return lambda x: torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _overlap(facts: Facts) -> Callable[..., None]:
    """A look by address whether `out` shares memory with an input; where it may, the exact rule."""
    reach: Any = None
    same = facts.strides["x"] == facts.strides["y"]

    def look(x: Any, weight: Any, bias: Any, out: Any) -> None:
        nonlocal reach
        if reach is None:
            reach = bytes_of(x), bytes_of(out)
        at, to, (x_reach, y_reach) = x.data_ptr(), out.data_ptr(), reach
        if not (same and at == to) and at < to + y_reach and to < at + x_reach:
            check_overlap("x", x, out, same_allowed=True)
        for label, row in (("weight", weight), ("bias", bias)):
            if row is not None:
                at = row.data_ptr()
                if not row.is_contiguous() or (at < to + y_reach and to < at + row.nbytes):
                    check_overlap(label, row, out, same_allowed=False)

    return look


# --- settled by what is there, for autograd and the operators -------------------------------------

_PLAIN = Tensors()


def forward(x: Any, weight: Any, bias: Any, call: tuple[Any, ...], *residual: Any) -> Any:
    """y, the sum if there is one, and the statistics, of arguments that fit.

    `call` is op, axes, eps and whether y keeps x's strides. Nobody watches, or whoever does has
    been told.
    """
    op, axes, eps, keep = call
    key = ("tensors forward", op.name, *call[1:], *map(_look, (x, weight, bias, *residual)))
    settled = _memo.settled().get(key)
    if settled is None:
        added = dict(zip(("residual",), residual, strict=False))
        dtypes = _names({"x": x, "weight": weight, "bias": bias, **added})
        made = new_y(x.detach().to("meta"), keep)
        arrays = {"x": x, "y": made, **added, **dict.fromkeys(("sum",)[: len(added)], made)}
        strides: dict[str, Any] = {name: _PLAIN.strides(a) for name, a in arrays.items()}
        facts = Facts(op, False, tuple(x.shape), axes, dtypes, strides, eps, device=x.device)
        settled = _memo.keep(key, _PLAIN.normalizer(facts._replace(stats=True)))
    return settled(x, weight, bias, None, *residual, *(None for _ in residual))


def backward(dy: Any, x: Any, stats: Any, weight: Any, call: tuple[Any, ...], *dsum: Any) -> Three:
    """dx, dweight and dbias of arguments that fit, None where not wanted.

    `stats` are mean and rstd, `call` is op, axes, what is wanted, and the dtypes of dweight and
    dbias.
    """
    op, axes, wanted, dtypes = call
    key = ("tensors backward", op.name, *call[1:], *map(_look, (dy, x, *stats, weight, *dsum)))
    settled = _memo.settled().get(key)
    if settled is None:
        names = _names({"x": x, "weight": weight})
        for name, want, dtype in zip(("dweight", "dbias"), wanted[1:], dtypes, strict=True):
            if want:
                names[name] = dtype_name(dtype)
        met = zip(("x", "dy", "dsum"), (x, dy, *dsum), strict=False)
        strides: dict[str, Any] = {name: _PLAIN.strides(a) for name, a in met}
        if wanted[0]:
            strides["dx"] = tuple(torch.empty_like(x, device="meta").stride())
        facts = Facts(op, True, tuple(x.shape), axes, names, strides, device=x.device)
        settled = _memo.keep(key, _PLAIN.differentiator(facts))
    found: Three = settled(dy, x, *stats, weight, *dsum)
    return found


def _look(tensor: Any) -> Any:
    return None if tensor is None else (Tensors.look(tensor), tensor.is_neg())


def _names(tensors: dict[str, Any]) -> dict[str, str]:
    return {name: dtype_name(t.dtype) for name, t in tensors.items() if t is not None}
