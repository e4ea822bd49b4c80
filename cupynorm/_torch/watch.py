"""Who is to hear of a call on torch tensors: autograd, transforms, modes, tracers, compilers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd import forward_ad

from cupynorm._libraries import kind_of

# Who watches:
ARITHMETIC = 0  # nobody
GRADIENT = 1  # reverse-mode autograd
WATCHED = 2  # something that must see an operator, or a function of torch's, not an address
COMPILED = 3  # torch.compile or torch.export

_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))

# Private names of torch, each with a public one that costs ten times as much or none at all.
_transforms_active = torch._C._are_functorch_transforms_active
_modes_active = torch._C._len_torch_dispatch_stack
tracing = torch._C._get_tracing_state
_of_batched_grads = torch._C._functorch.is_legacy_batchedtensor
_is_compiling = torch.compiler.is_dynamo_compiling  # what else traces shows by types and modes
_is_grad_enabled = torch.is_grad_enabled


def answer(
    answers: Sequence[Any],
    x: Any,
    a: Any = None,
    b: Any = None,
    c: Any = None,
    d: Any = None,
    *more: Any,
) -> Any:
    """What goes with who is to hear of a call on these tensors, of which all but x may be None.

    `answers` are those for nobody, reverse-mode autograd, other watchers, and the compiler.
    """
    if _is_compiling():
        return answers[COMPILED]
    if (
        _transforms_active()
        or forward_ad._current_level >= 0
        or _modes_active()
        or tracing() is not None
        or type(x) not in _PLAIN
        or (a is not None and type(a) not in _PLAIN)
        or (b is not None and type(b) not in _PLAIN)
        or (c is not None and type(c) not in _PLAIN)
        or (d is not None and type(d) not in _PLAIN)
        or (more and any(e is not None and type(e) not in _PLAIN for e in more))
    ):
        return answers[WATCHED]
    if _is_grad_enabled() and (
        x.requires_grad
        or (a is not None and a.requires_grad)
        or (b is not None and b.requires_grad)
        or (c is not None and c.requires_grad)
        or (d is not None and d.requires_grad)
        or (more and any(e is not None and e.requires_grad for e in more))
    ):
        return answers[GRADIENT]
    return answers[ARITHMETIC]


def watch_on(x: Any, a: Any = None, b: Any = None, c: Any = None) -> int:
    """Who is to hear of a call on these tensors, of which all but x may be None."""
    watch: int = answer((ARITHMETIC, GRADIENT, WATCHED, COMPILED), x, a, b, c)
    return watch


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation watches what is computed."""
    return bool(_transforms_active()) or forward_ad._current_level >= 0


def functionalized() -> bool:
    """Whether the innermost transform is functionalize, which takes operators but no Function."""
    top = torch._C._functorch.peek_interpreter_stack()
    return top is not None and top.key() == torch._C._functorch.TransformType.Functionalize


def has_own_dispatch(tensor: Any) -> bool:
    """Whether a subclass decides about operators and may know torch's only, as DTensor does.

    Torch's own fake and functional tensors know any operator that has a fake.
    """
    kind = type(tensor)
    if tensor is None or kind in _PLAIN:
        return False
    own = getattr(kind, "__torch_dispatch__", None)
    inherited = own is None or own is torch.Tensor.__torch_dispatch__
    return not inherited and not kind.__module__.startswith("torch._subclasses.")


def differentiable_only(dy: Any) -> bool:
    """Whether a gradient is one that torch's own functions alone can take further.

    It is watched by a transform, or a batch in disguise: autograd.grad(is_grads_batched=True) has
    a vmap of its own.
    """
    return transformed() or bool(_of_batched_grads(dy))


# --- what is torch's own affair -------------------------------------------------------------------


def is_for_torch(x: Any) -> bool:
    """Whether torch's own functions are to be called: x is nested, sparse, or being scripted."""
    refuse_no_tensor("input", x, "torch.as_tensor(input), or call cupynorm.layer_norm")
    return x.layout is not torch.strided or x.is_nested or tracing() is not None


def refuse_no_tensor(label: str, value: Any, way_out: str = "") -> None:
    """Refuse what is neither a tensor nor None; where there must be one, the rules say so."""
    if (value is None and label != "input") or isinstance(value, torch.Tensor):
        return
    way_out = way_out or f"torch.as_tensor({label})"
    msg = f"{label} is a {kind_of(value)}, not a torch.Tensor; pass {way_out}"
    raise TypeError(msg)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """What torch's list of autocast operators says of norms: float32 on CUDA, nothing else.

    On the CPU they are on neither list, and the input keeps its dtype.
    """
    device = tensors[0].device.type
    if device != "cuda" or not torch.is_autocast_enabled("cuda"):
        return tensors
    half = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t is not None and t.dtype in half else t for t in tensors)
