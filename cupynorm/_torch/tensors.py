"""Plain tensors that nobody watches: what they look like, memory for results, calls by address."""

from collections.abc import Callable
from typing import Any

import torch

from cupynorm import _memo, _reference
from cupynorm._layout import Facts, row_major_strides
from cupynorm._libraries import check_overlap
from cupynorm._ops import LAYER_NORM
from cupynorm._rules import dtype_name
from cupynorm._torch import machines
from cupynorm._torch.machines import bytes_of, nothing

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
        """The settled forward."""
        if facts.op != LAYER_NORM:  # torch differentiates what array-API calls do
            return _reference.DOOR.normalizer(facts)
        run, new = machines.run_of(facts), _maker(facts, "y")
        shape, stats = facts.stats_shape, facts.stats
        clash = _overlap(facts) if facts.out and facts.size else None

        def plain(x: Any, weight: Any, bias: Any, out: None) -> Any:
            y = new(x)
            run(x, y, weight, bias, None, None)
            return y

        def call(x: Any, weight: Any, bias: Any, out: Any) -> Any:
            if clash is not None:
                clash(x, weight, bias, out)
            y = new(x) if out is None else out
            if not stats:
                run(x, y, weight, bias, None, None)
                return y
            kind = stats_dtype(x.dtype)
            mean, rstd = x.new_empty(shape, dtype=kind), x.new_empty(shape, dtype=kind)
            run(x, y, weight, bias, mean, rstd)
            return y, mean, rstd

        if not _negatable(facts):
            return call if facts.out or stats else plain

        def resolving(x: Any, weight: Any, bias: Any, out: Any) -> Any:
            if out is not None and out.is_neg():
                fresh = torch.empty_strided(out.shape, out.stride(), dtype=x.dtype, device=x.device)
                found = call(x, weight, bias, fresh)
                out.copy_(fresh)
                return (out, *found[1:]) if stats else out
            if not x.is_neg():
                return call(x, weight, bias, out)
            x = x.resolve_neg()
            given = facts._replace(strides={**facts.strides, "x": self.strides(x)})
            return self.normalizer(given)(x, weight, bias, out)

        return resolving

    def differentiator(self, facts: Facts) -> Callable[..., Any]:
        """The settled backward."""
        if facts.op != LAYER_NORM or "dsum" in facts.strides:
            return _reference.DOOR.differentiator(facts)
        new, shape = _maker(facts, "dx"), facts.affine_shape
        to_weight, to_bias = (
            getattr(torch, facts.dtypes[k]) if k in facts.dtypes else None
            for k in ("dweight", "dbias")
        )
        negatable = _negatable(facts)
        wanted = "dx" in facts.strides or to_weight is not None or to_bias is not None
        run = machines.run_of(facts) if wanted else nothing

        def call(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Three:
            if negatable and (dy.is_neg() or x.is_neg()):
                dy, x = dy.resolve_neg(), x.resolve_neg()
                met = {**facts.strides, "dy": self.strides(dy), "x": self.strides(x)}
                again = self.differentiator(facts._replace(strides=met))
                found: Three = again(dy, x, mean, rstd, weight)
                return found
            dx = new(x)
            dweight = None if to_weight is None else _for_sum(x, weight, shape, to_weight)
            dbias = None if to_bias is None else _for_sum(x, weight, shape, to_bias)
            run(dy, x, mean, rstd, weight, dx, dweight, dbias)
            return dx, dweight, dbias

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
    """What makes memory for a result of x's shape; nothing, if that is not wanted."""
    strides = facts.strides.get(name)
    if strides is None:
        return nothing
    if strides == facts.strides["x"] == row_major_strides(facts.shape, ()):
        return torch.empty_like  # type: ignore[no-any-return]
    return lambda x: torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)


def _overlap(facts: Facts) -> Callable[..., None]:
    """A look by address whether `out` shares memory with an input; where it may, the exact rule."""
    x_reach, y_reach = bytes_of(facts, "x"), bytes_of(facts, "y")
    same = facts.strides["x"] == facts.strides["y"]

    def look(x: Any, weight: Any, bias: Any, out: Any) -> None:
        at, to = x.data_ptr(), out.data_ptr()
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


def forward(x: Any, weight: Any, bias: Any, call: Three) -> Three:
    """y, mean and rstd of arguments that fit; `call` is axes, eps and whether y keeps x's strides.

    Nobody watches, or whoever does has been told.
    """
    axes, eps, keep = call
    y = new_y(x, keep)
    rows = {"weight": weight, "bias": bias}
    key = ("tensors forward", axes, eps, *(_look(t) for t in (x, y, weight, bias)))
    settled = _memo.settled.get(key)
    if settled is None:
        dtypes = _names({"x": x, **rows})
        strides: dict[str, Any] = {"x": _PLAIN.strides(x), "y": _PLAIN.strides(y)}
        facts = Facts(
            LAYER_NORM, False, tuple(x.shape), axes, dtypes, strides, eps, device=x.device
        )
        settled = _memo.keep(key, _PLAIN.normalizer(facts._replace(out=True, stats=True)))
    found: Three = settled(x, weight, bias, y)
    return found


def backward(dy: Any, x: Any, stats: Any, weight: Any, call: Three) -> Three:
    """dx, dweight and dbias of arguments that fit, None where not wanted.

    `stats` are mean and rstd, `call` is axes, what is wanted, and the dtypes of dweight and dbias.
    """
    axes, wanted, dtypes = call
    key = ("tensors backward", call, *(_look(t) for t in (dy, x, *stats, weight)))
    settled = _memo.settled.get(key)
    if settled is None:
        names = _names({"x": x, "weight": weight})
        for name, want, dtype in zip(("dweight", "dbias"), wanted[1:], dtypes, strict=True):
            if want:
                names[name] = dtype_name(dtype)
        strides: dict[str, Any] = {"x": _PLAIN.strides(x), "dy": _PLAIN.strides(dy)}
        if wanted[0]:
            strides["dx"] = tuple(torch.empty_like(x, device="meta").stride())
        facts = Facts(LAYER_NORM, True, tuple(x.shape), axes, names, strides, device=x.device)
        settled = _memo.keep(key, _PLAIN.differentiator(facts))
    found: Three = settled(dy, x, *stats, weight)
    return found


def _look(tensor: Any) -> Any:
    return None if tensor is None else Tensors.look(tensor)


def _names(tensors: dict[str, Any]) -> dict[str, str]:
    return {name: dtype_name(t.dtype) for name, t in tensors.items() if t is not None}
