"""Modules change class: to one whose forward is ours, after a probe, and back."""

import collections
import functools
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch.nn.utils import parametrize

Kinds = dict[type, type]  # the class that a module of a class is to have

# What libraries call eps.
_EPS = ("eps", "variance_epsilon", "epsilon")
# Epsilons by which two results that round alike may differ: of x_hat, its product with the weight,
# and a mean of squares.
_ROUNDING = 8
# Of the rows of a probe: the second shows where eps is added.
_SCALES = (1.0, 1e-3, 30.0)


def check_module(model: Any) -> None:
    """Refuse what is no module."""
    if not isinstance(model, torch.nn.Module):
        msg = f"model is a {type(model).__qualname__}, not a torch.nn.Module; pass the module"
        raise TypeError(msg)


def change(model: Any, kinds: Kinds) -> str:
    """Give each module its new class, or none of them, and say how many had which."""
    counts: collections.Counter[str] = collections.Counter()
    met = [(m, kind) for m in model.modules() if (kind := _base(type(m), m)) in kinds]
    classes = [(module, type(module), _new_class(module, kinds[kind])) for module, kind in met]
    try:
        for module, _, target in classes:
            module.__class__ = target
    except BaseException:
        for module, former, _ in classes:
            object.__setattr__(module, "__class__", former)
        raise
    counts.update(kind.__name__ for _, kind in met)
    return " and ".join(f"{n} {name}" for name, n in counts.items()) or "0"


def _base(kind: type, module: Any) -> type:
    """The class that a module was made as; a parametrized one has a subclass of its own."""
    return kind.__bases__[0] if parametrize.is_parametrized(module) else kind


def _new_class(module: Any, target: type) -> type:
    """What a module becomes.

    Each parametrized one has a class of its own, with properties for its parameters; a deep copy
    shares it with its original, which is to stay as it is.
    """
    kind = type(module)
    if not parametrize.is_parametrized(module):
        return target
    return type(kind.__name__, (target,), dict(vars(kind)))


class Replaced:
    """An RMS norm of another library, but for its forward; `made_of` mixes it in."""

    _made_of: tuple[Any, ...]
    _norm: Any
    weight: Any

    def forward(self, x: Any) -> Any:
        """Normalize the trailing dimensions of x."""
        _, zero_centered, eps, promotes = self._made_of
        weight = self.weight
        if promotes:  # its result has the dtype of x * weight
            x = x.to(torch.promote_types(x.dtype, weight.dtype))
        how = {"zero_centered_weight": zero_centered}
        return self._norm(x, tuple(weight.shape), weight, getattr(self, eps), **how)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """No module has the class under its name: copies and pickles make it anew."""
        told: Any = super().__reduce_ex__(protocol)
        return _renewed, (self._norm, *self._made_of), *told[2:]


@functools.cache
def made_of(norm: Any, kind: type, *how: Any) -> type:
    """The subclass of another library's class that runs `norm`, which is `torch.rms_norm`.

    `how` is whether the weight is told from one, the name of eps, and whether y is promoted.
    """
    told = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    named = {"_norm": staticmethod(norm), "_made_of": (kind, *how)}
    return type(kind.__name__, (Replaced, kind), {**told, **named, "__doc__": kind.__doc__})


def _renewed(*how: Any) -> Any:
    kind: Any = made_of(*how)
    return kind.__new__(kind)


def originals(model: Any) -> Kinds:
    """The classes that modules had before they were replaced."""
    kinds = {_base(type(m), m) for m in model.modules()}
    return {k: k._made_of[0] for k in kinds if issubclass(k, Replaced)}


def replacements(model: Any, also: Mapping[type, str], norm: Callable[..., Any]) -> Kinds:
    """What the classes in `also` become in this model, each of whose modules is probed."""
    found: Kinds = {}
    for module in model.modules():
        kind = _base(type(module), module)
        if kind not in also:
            continue
        if also[kind] not in ("rms_norm", "zero_centered"):
            msg = f"also={{{kind.__name__}: {also[kind]!r}}}; pass 'rms_norm' or 'zero_centered'"
            raise ValueError(msg)
        eps = next((n for n in _EPS if isinstance(getattr(module, n, None), Real)), None)
        if eps is None or not isinstance(getattr(module, "weight", None), torch.Tensor):
            msg = (
                f"a {kind.__name__} has no tensor named weight, or none of {', '.join(_EPS)} that "
                "is a number, so it cannot be converted; leave it out of also="
            )
            raise ValueError(msg)
        wide, narrow = _stand_in(module, torch.float32), torch.bfloat16
        with torch.no_grad():
            promotes = kind.forward(wide, _rows(wide, narrow)).dtype != narrow  # type: ignore[attr-defined]
        target = made_of(norm, kind, also[kind] == "zero_centered", eps, promotes)
        dtype = module.weight.dtype
        for probed, x_dtype in ((_stand_in(module, dtype), dtype), (wide, narrow)):
            _probe(kind, target, probed, _rows(probed, x_dtype))
        found[kind] = target
    return found


def _stand_in(module: Any, dtype: Any) -> Any:
    """A shallow copy with parameters of its own near 1, which show what is done to them."""
    other = object.__new__(type(module))
    vars(other).update(vars(module))
    other._parameters = {
        name: None if p is None else torch.nn.Parameter(1 + _normal(p, p.shape, dtype) / 4)
        for name, p in module._parameters.items()
    }
    return other


def _normal(like: Any, shape: Any, dtype: Any) -> Any:
    """Normal deviates, the same at each call, on a tensor's device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return values.to("cpu" if like.is_meta else like.device, dtype)


def _rows(module: Any, dtype: Any) -> Any:
    weight = module.weight
    rows = [_normal(weight, weight.shape, dtype) * scale for scale in _SCALES]
    return torch.stack(rows)


def _probe(kind: Any, target: Any, probed: Any, x: Any) -> None:
    """Refuse a module whose own forward gives other results than ours."""
    with torch.no_grad():
        theirs, ours = kind.forward(probed, x), _as(probed, target).forward(x)
    bound = _ROUNDING * torch.finfo(x.dtype).eps
    alike = theirs.shape == ours.shape and theirs.dtype == ours.dtype
    error = (ours.double() - theirs.double()).abs() / theirs.double().abs() if alike else x[:0]
    if alike and bool((error <= bound).all()):
        return
    said = f"{theirs.dtype} {tuple(theirs.shape)}, not {ours.dtype} {tuple(ours.shape)}"
    if alike:
        at = int(error.argmax())
        said = f"{float(theirs.flatten()[at]):.6g}, where ours is {float(ours.flatten()[at]):.6g}"
    msg = (
        f"{kind.__name__} is not what also= says: on a probe in {x.dtype} its result is {said}, "
        f"and rounding alone allows {bound:.2g} of the value; leave it out, or name another norm"
    )
    raise ValueError(msg)


def _as(probed: Any, target: type) -> Any:
    other: Any = object.__new__(_new_class(probed, target))
    vars(other).update(vars(probed))
    return other
