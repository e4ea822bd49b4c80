"""LayerNorm for torch: a function, a module, and the conversion of a whole model."""

import copy
import logging
from typing import Any

import torch
from torch import Size, Tensor
from torch.nn.utils import parametrize
from torch.overrides import handle_torch_function, has_torch_function_variadic

from cupynorm import _calls, _rules
from cupynorm._ops import LAYER_NORM
from cupynorm._torch.doors import DOOR
from cupynorm._torch.machines import check_device

__all__ = ["LayerNorm", "convert", "layer_norm"]

_log = logging.getLogger(__name__)

_calls.doors |= dict.fromkeys(DOOR.types, DOOR)  # not first within torch.compile

_tracing = torch._C._get_tracing_state  # torch.jit.is_tracing() costs five times as much
_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    """Normalize the trailing dimensions of a tensor, as ``torch.nn.functional.layer_norm`` does.

    ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, with the biased variance.

    Parameters
    ----------
    input : Tensor
        float16, bfloat16, float32 or float64, on the CPU or a CUDA device, any strides.
    normalized_shape : int or sequence of int
        Trailing dimensions of `input`.
    weight, bias : Tensor, optional
        Scale and shift of shape `normalized_shape`, on `input`'s device, of any of the four
        dtypes: bfloat16 activations with float32 parameters need no cast.
    eps : float, default 1e-5
        Added to the variance; any finite real number.

    Returns
    -------
    Tensor
        Row-major, of `input`'s shape, dtype and device; float32 where CUDA autocast is on and
        `input` has 16 bits, as torch has it.

    Raises
    ------
    TypeError
        If a dtype is not one of the four, or an argument is no tensor.
    ValueError
        If shapes or devices do not fit, or `eps` is not finite.
    ImportError
        If `input` is on a GPU and CuPy is not installed.

    Notes
    -----
    Statistics are float32 (float64 for float64 input) by the corrected two-pass algorithm of Chan,
    Golub and LeVeque (1983). The formula is that of Ba, Kiros and Hinton (2016), "Layer
    Normalization", arXiv:1607.06450; the backward is that of `cupynorm.layer_norm_backward`, with
    the same bits in every run.

    Gradients of any order, forward-mode derivatives, ``torch.func`` transforms, ``torch.compile``
    (``fullgraph=True``) and ``torch.export`` work. Gradients run on our kernels, with
    ``create_graph=True`` too; what differentiates them in turn, forward mode, and gradients within
    ``torch.func`` run on torch's own functions. On a GPU, kernels run on torch's
    current stream in memory of torch's allocator, nothing is synchronized, and a CUDA graph can
    capture the call once a first call has compiled the kernel. Tensor subclasses that decide about
    operators themselves, nested and sparse tensors, and TorchScript get torch's own layer_norm.

    Examples
    --------
    >>> import torch
    >>> import cupynorm.torch
    >>> x = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    >>> cupynorm.torch.layer_norm(x, (3,))
    tensor([[-1.2247,  0.0000,  1.2247],
            [-1.2247,  0.0000,  1.2247]])
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            layer_norm, (input, weight, bias), input, normalized_shape, weight, bias, eps
        )
    if (type(input) is not Tensor or _tracing() is not None) and _is_for_torch(input):
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
    if not input.is_cpu:
        if type(input) in DOOR.types and not torch.compiler.is_compiling():
            check_device(input.device)
        input, weight, bias = _autocast(input, weight, bias)
    if type(normalized_shape) is Size:
        normalized_shape = tuple(normalized_shape)
    how = normalized_shape, None, eps, "C", False
    try:
        return _calls.normalize(LAYER_NORM, input, weight, bias, None, how)
    except RuntimeError:  # of a tensor without shape or address
        if not _is_for_torch(input):
            raise
    except (TypeError, ValueError):
        _refuse_no_tensor("weight", weight)
        _refuse_no_tensor("bias", bias)
        if input.dtype not in _DTYPES:  # the rules call it x
            _rules.check_x_dtype(_rules.dtype_name(input.dtype), "input.to(torch.float32)")
        raise
    return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)


def _is_for_torch(x: Any) -> bool:
    """Whether torch's own layer_norm is to be called: x is nested, sparse, or being scripted."""
    _refuse_no_tensor("input", x, "torch.as_tensor(input), or call cupynorm.layer_norm")
    return x.layout is not torch.strided or x.is_nested or _tracing() is not None


def _refuse_no_tensor(label: str, value: Any, way_out: str = "") -> None:
    """Refuse what is neither a tensor nor None."""
    if (value is None and label != "input") or isinstance(value, Tensor):
        return
    kind = type(value)
    way_out = way_out or f"torch.as_tensor({label})"
    msg = f"{label} is a {kind.__module__}.{kind.__qualname__}, not a torch.Tensor; pass {way_out}"
    raise TypeError(msg)


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    """What torch's list of autocast operators says of layer_norm: float32 on CUDA, nothing else.

    On the CPU it is on neither list, and the input keeps its dtype.
    """
    device = tensors[0].device.type
    if device != "cuda" or not torch.is_autocast_enabled("cuda"):
        return tensors
    half = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t is not None and t.dtype in half else t for t in tensors)


class LayerNorm(torch.nn.LayerNorm):  # type: ignore[misc]
    """``torch.nn.LayerNorm`` whose forward and backward are cupynorm's.

    ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, as `cupynorm.torch.layer_norm`
    computes it. Same constructor, parameters, ``state_dict`` and repr, so that checkpoints load
    either way; ``isinstance(module, torch.nn.LayerNorm)`` holds.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        Trailing dimensions of the input.
    eps : float, default 1e-5
        Added to the variance.
    elementwise_affine : bool, default True
        Whether there is a weight (ones), and with `bias` a bias (zeros).
    bias : bool, default True
        Whether there is a bias.
    device, dtype : optional
        Of the parameters, which have shape `normalized_shape`; float32 on the CPU by default. The
        input may have another of the four floating dtypes.

    Raises
    ------
    TypeError, ValueError
        When it is called, as `cupynorm.torch.layer_norm`.

    Notes
    -----
    The formula is that of Ba, Kiros and Hinton (2016), "Layer Normalization", arXiv:1607.06450.

    Examples
    --------
    >>> import torch
    >>> import cupynorm.torch
    >>> norm = cupynorm.torch.LayerNorm(3)
    >>> norm(torch.tensor([[1.0, 2.0, 3.0]])).detach()
    tensor([[-1.2247,  0.0000,  1.2247]])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize the trailing dimensions of `input`.

        Parameters
        ----------
        input : Tensor of shape ``(..., *normalized_shape)``
            float16, bfloat16, float32 or float64, on the parameters' device.

        Returns
        -------
        Tensor
            As `cupynorm.torch.layer_norm` gives it.

        Raises
        ------
        TypeError, ValueError
            As `cupynorm.torch.layer_norm`.

        Examples
        --------
        >>> import torch
        >>> import cupynorm.torch
        >>> cupynorm.torch.LayerNorm(4).forward(torch.ones(2, 4)).shape
        torch.Size([2, 4])
        """
        if torch.jit.is_scripting():  # TorchScript can run torch's operators alone
            return torch.nn.functional.layer_norm(
                input, self.normalized_shape, self.weight, self.bias, self.eps
            )
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def convert(model: Any, inplace: bool = True) -> Any:
    """Let every ``torch.nn.LayerNorm`` of a model run on cupynorm.

    The modules stay the objects they are and change class only, so parameters, optimizers, hooks,
    parametrizations, devices and shared modules stay as they were. Subclasses of
    ``torch.nn.LayerNorm`` are left alone, as their ``forward`` may be another. Convert before
    ``torch.compile``, FSDP or other wrappers.

    Parameters
    ----------
    model : torch.nn.Module
        Any module; it may itself be a LayerNorm.
    inplace : bool, default True
        Whether to change `model` itself; otherwise a deep copy.

    Returns
    -------
    torch.nn.Module
        The model. How many were converted goes to the logger ``cupynorm.torch`` at level INFO,
        and at level WARNING, which Python prints by default, where there is no LayerNorm at all.

    Raises
    ------
    TypeError
        If `model` is not a module.

    Examples
    --------
    >>> import torch
    >>> import cupynorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> model = cupynorm.torch.convert(model)
    >>> sum(isinstance(m, cupynorm.torch.LayerNorm) for m in model.modules())
    1
    """
    if not isinstance(model, torch.nn.Module):
        msg = f"model is a {type(model).__qualname__}, not a torch.nn.Module; pass the module"
        raise TypeError(msg)
    if not inplace:
        model = copy.deepcopy(model)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    count = 0
    for module in norms:
        target = _converted_class(module)
        if target is not None:
            module.__class__ = target
            count += 1
    others = sum(not isinstance(m, LayerNorm) for m in norms)
    aside = f"; left {others} of a subclass of torch.nn.LayerNorm as they are" if others else ""
    if len(norms) > others:
        _log.info("converted %d LayerNorm modules of %s%s", count, type(model).__name__, aside)
    else:
        _log.warning("found no torch.nn.LayerNorm to convert in %s%s", type(model).__name__, aside)
    return model


def _converted_class(module: Any) -> Any:
    """The class that a LayerNorm is to have; None for one that is to stay as it is."""
    kind = type(module)
    if kind is torch.nn.LayerNorm:
        return LayerNorm
    if parametrize.is_parametrized(module) and kind.__bases__ == (torch.nn.LayerNorm,):
        # Each parametrized module has a class of its own, with properties for its parameters; a
        # deep copy shares it with its original, which is to stay as it is.
        return type(kind.__name__, (LayerNorm,), dict(vars(kind)))
    return None
