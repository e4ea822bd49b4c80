"""Plain tensors that nobody watches: what they look like, memory for results, calls by address."""

import importlib.util
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import torch

from cupynorm import _memo
from cupynorm._layout import Facts, row_major_strides
from cupynorm._libraries import check_overlap
from cupynorm._ops import LAYER_NORM
from cupynorm._rules import ITEMSIZE, dtype_name

Three = tuple[Any, Any, Any]
Run = Callable[..., None]


def stats_dtype(dtype: Any) -> Any:
    """Torch dtype in which statistics are computed and returned."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def new_y(x: Any, keep: bool) -> Any:
    """Memory for a result, with x's strides or row-major."""
    if keep or x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Machine:
    """What computes on one kind of device, from tensors into tensors; nothing is empty.

    This one is for the meta device, where shape and dtype are all there is.
    """

    def forward(self, facts: Facts) -> Run:
        """``run(x, y, weight, bias, mean, rstd)``, where all but x and y may be None."""
        return _nothing

    def backward(self, facts: Facts) -> Run:
        """``run(dy, x, mean, rstd, weight, dx, dweight, dbias)``; None: absent, not wanted."""
        return _nothing


class _OfNothing(Machine):
    """Of an empty x: the mean of nothing is NaN, the sum over no rows zero."""

    def forward(self, facts: Facts) -> Run:
        return lambda *arrays: _fill(arrays[4:], math.nan)

    def backward(self, facts: Facts) -> Run:
        return lambda *arrays: _fill(arrays[6:], 0.0)


def _fill(totals: tuple[Any, ...], value: float) -> None:
    for total in totals:
        if total is not None:
            total.fill_(value)


def _nothing(*_: Any) -> None:
    """Compute nothing, and make no memory for it."""


_machines: dict[Any, Machine] = {}  # by device


def machine_on(device: Any) -> Machine:
    """What computes on a device, imported when its first tensor arrives."""
    return _machines.get(device) or _machines.setdefault(device, _machine(device))


def _machine(device: Any) -> Machine:
    if device.type == "meta":
        return Machine()
    from cupynorm._torch import cpu

    if device.type == "cpu":
        return cpu.Loops()
    if device.type != "cuda" or importlib.util.find_spec("cupy") is None:
        return cpu.Functions()
    try:
        from cupynorm._torch.cuda import Kernels
    except ImportError as error:
        _refuse_without_cupy(error)
    return Kernels(device.index)


def check_device(device: Any) -> None:
    """Refuse a device on which neither loops nor kernels compute."""
    if device.type == "cuda":
        try:
            import_module("cupynorm._cuda.arrays")
        except ImportError as error:
            _refuse_without_cupy(error)
    elif device.type not in ("cpu", "meta"):
        msg = (
            f"x is on device type {device.type}, which has no layer_norm here; move it to 'cpu' or "
            "'cuda', or call torch.nn.functional.layer_norm"
        )
        raise ValueError(msg)


def _refuse_without_cupy(error: ImportError) -> NoReturn:
    msg = (
        "x is on a GPU, and CuPy, which compiles and launches the kernels, cannot be "
        f"imported ({error}); pip install 'cupynorm[cuda12]' or 'cupynorm[cuda13]'"
    )
    raise ImportError(msg) from error


class Tensors:
    """The door of plain tensors that nobody watches.

    What is settled for a look is settled for one device, which is a part of it; which machine that
    is shows at the first call.
    """

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
    def device(a: Any) -> int | None:
        """Index of a GPU."""
        return a.device.index if a.is_cuda else None

    def normalizer(self, facts: Facts) -> Callable[..., Any]:
        """The settled forward."""
        run: Any = None if facts.size else _OfNothing().forward(facts)
        new, shape, stats = _maker(facts, "y"), facts.stats_shape, facts.stats
        clash = _overlap(facts) if facts.out and facts.size else None

        def call(x: Any, weight: Any, bias: Any, out: Any) -> Any:
            nonlocal run
            if run is None:
                run = machine_on(x.device).forward(facts)
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
            return call

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
        run: Any = None if facts.size else _OfNothing().backward(facts)
        new, shape = _maker(facts, "dx"), facts.affine_shape
        to_weight, to_bias = (
            getattr(torch, facts.dtypes[k]) if k in facts.dtypes else None
            for k in ("dweight", "dbias")
        )
        negatable = _negatable(facts)
        if "dx" not in facts.strides and to_weight is None and to_bias is None:
            run = _nothing

        def call(dy: Any, x: Any, mean: Any, rstd: Any, weight: Any) -> Three:
            nonlocal run
            if negatable and (dy.is_neg() or x.is_neg()):
                dy, x = dy.resolve_neg(), x.resolve_neg()
                met = {**facts.strides, "dy": self.strides(dy), "x": self.strides(x)}
                again = self.differentiator(facts._replace(strides=met))
                found: Three = again(dy, x, mean, rstd, weight)
                return found
            if run is None:
                run = machine_on(x.device).backward(facts)
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
        return _nothing
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


def bytes_of(facts: Facts, name: str) -> int:
    """Bytes that an array takes from its first element on; the small ones may take more."""
    strides = facts.strides.get(name)
    if strides is None:
        return ITEMSIZE[facts.dtypes.get(name, "float16")] * facts.N
    steps = zip(strides, facts.shape, strict=True)
    return ITEMSIZE[facts.dtypes["x"]] * (1 + sum(s * (n - 1) for s, n in steps))


# Where storage was released, its first byte is at 0 and a view lies at its offset. Few live tensors
# lie as low, so it is seldom due to ask one for its storage, at twice the cost of its address.
LOW = 1 << 32


def check_memory(label: str, tensor: Any, nbytes: int) -> None:
    """Refuse a tensor without the memory that it takes; due where its address is below LOW."""
    held = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.itemsize
    if held < nbytes:
        msg = (
            f"{label} takes {nbytes} bytes, but its storage holds {max(held, 0)} of them: it "
            "was released, as FSDP does outside of forward. Restore its memory before the call"
        )
        raise ValueError(msg)


def address_of(label: str, tensor: Any, nbytes: int) -> int:
    """Where a tensor begins, if there is memory behind it."""
    at: int = tensor.data_ptr()
    if at < LOW:
        check_memory(label, tensor, nbytes)
    return at


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
        facts = Facts(LAYER_NORM, False, tuple(x.shape), axes, dtypes, strides, eps)
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
        facts = Facts(LAYER_NORM, True, tuple(x.shape), axes, names, strides)
        settled = _memo.keep(key, _PLAIN.differentiator(facts))
    found: Three = settled(dy, x, *stats, weight)
    return found


def _look(tensor: Any) -> Any:
    return None if tensor is None else Tensors.look(tensor)


def _names(tensors: dict[str, Any]) -> dict[str, str]:
    return {name: dtype_name(t.dtype) for name, t in tensors.items() if t is not None}
