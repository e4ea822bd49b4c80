"""Norms for torch: functions, modules, and the conversion of a whole model."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from cupynorm import _calls, _rules
from cupynorm._libraries import cast_of, check_layout
from cupynorm._ops import OPS, Op, named
from cupynorm._torch import conversion
from cupynorm._torch.doors import DOOR
from cupynorm._torch.machines import check_device
from cupynorm._torch.watch import autocast, is_for_torch, refuse_no_tensor, tracing

__all__ = [
    "LayerNorm",
    "RMSNorm",
    "add_layer_norm",
    "add_rms_norm",
    "convert",
    "layer_norm",
    "revert",
    "rms_norm",
]

_log = logging.getLogger(__name__)

_calls.doors |= dict.fromkeys(DOOR.types, DOOR)  # not first within torch.compile

_LAYER_NORM = OPS["layer_norm"]


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
    return _normalize(_LAYER_NORM, input, weight, bias, (normalized_shape, eps))


def rms_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    eps: float | None = None,
    *,
    zero_centered_weight: bool = False,
) -> Any:
    """Divide by the root mean square, as ``torch.nn.functional.rms_norm`` does, then scale.

    ``y = x / sqrt(mean(x * x) + eps) * weight`` over the trailing dimensions.

    Parameters
    ----------
    input, normalized_shape, weight : optional
        As for `layer_norm`.
    eps : float, optional
        Added to the mean square; by default as torch has it, 2**-23, or 2**-52 for float64 input.
    zero_centered_weight : bool, default False
        Multiply by ``1 + weight``, as Gemma does.

    Returns
    -------
    Tensor
        As of `layer_norm`, which tells of gradients, compilers, devices and errors, too.

    Notes
    -----
    The formula is that of Zhang and Sennrich (2019), "Root Mean Square Layer Normalization",
    arXiv:1910.07467.

    Examples
    --------
    >>> import torch
    >>> import cupynorm.torch
    >>> cupynorm.torch.rms_norm(torch.tensor([[1.0, 1.0, 2.0]]), (3,))
    tensor([[0.7071, 0.7071, 1.4142]])
    """
    if has_torch_function_variadic(input, weight):
        told = {"zero_centered_weight": zero_centered_weight}
        given = input, normalized_shape, weight, eps
        return handle_torch_function(rms_norm, (input, weight), *given, **told)
    op = OPS["zero_centered_rms_norm" if zero_centered_weight else "rms_norm"]
    return _normalize(op, input, weight, None, (normalized_shape, eps))


def add_layer_norm(
    input: Any,
    residual: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
) -> Any:
    """Add residual to input and normalize the sum, in one pass over memory.

    The bits of ``sum = input + residual``, rounded to residual's dtype, and `layer_norm` of it.

    Parameters
    ----------
    input, residual : Tensor
        As for `layer_norm`, of one shape and device; residual of `input`'s dtype, or float32 beside
        16 bits.
    normalized_shape, weight, bias, eps : optional
        As for `layer_norm`.

    Returns
    -------
    named tuple
        (y, sum), both differentiable: y of `input`'s dtype, the sum of residual's, with autocast
        as without.

    Notes
    -----
    Of gradients, compilers, devices and errors `layer_norm` tells. The formula is that of Ba, Kiros
    and Hinton (2016), arXiv:1607.06450.

    Examples
    --------
    >>> import torch
    >>> import cupynorm.torch
    >>> x = torch.tensor([[1.0, 2.0, 3.0]])
    >>> cupynorm.torch.add_layer_norm(x, x, (3,)).sum
    tensor([[2., 4., 6.]])
    """
    if has_torch_function_variadic(input, residual, weight, bias):
        given = input, residual, normalized_shape, weight, bias, eps
        return handle_torch_function(add_layer_norm, (input, residual, weight, bias), *given)
    return _normalize(OPS["add_layer_norm"], input, weight, bias, (normalized_shape, eps), residual)


def add_rms_norm(
    input: Any,
    residual: Any,
    normalized_shape: Any,
    weight: Any = None,
    eps: float | None = None,
    *,
    zero_centered_weight: bool = False,
) -> Any:
    """Add residual to input and divide the sum by its root mean square, in one pass over memory.

    The bits of ``sum = input + residual``, rounded to residual's dtype, and `rms_norm` of it.

    Parameters
    ----------
    input, residual, normalized_shape, weight : optional
        As for `add_layer_norm`.
    eps, zero_centered_weight : optional
        As for `rms_norm`.

    Returns
    -------
    named tuple
        (y, sum), as of `add_layer_norm`.

    Notes
    -----
    The formula is that of Zhang and Sennrich (2019), arXiv:1910.07467.

    Examples
    --------
    >>> import torch
    >>> import cupynorm.torch
    >>> x = torch.tensor([[1.0, 1.0, 2.0]])
    >>> cupynorm.torch.add_rms_norm(x, x, (3,)).y
    tensor([[0.7071, 0.7071, 1.4142]])
    """
    if has_torch_function_variadic(input, residual, weight):
        given = input, residual, normalized_shape, weight, eps
        told = {"zero_centered_weight": zero_centered_weight}
        return handle_torch_function(add_rms_norm, (input, residual, weight), *given, **told)
    op = OPS["zero_centered_add_rms_norm" if zero_centered_weight else "add_rms_norm"]
    return _normalize(op, input, weight, None, (normalized_shape, eps), residual)


def _normalize(
    op: Op, input: Any, weight: Any, bias: Any, how: tuple[Any, Any], residual: Any = None
) -> Any:
    """By our rules, or by torch's own functions what only these know; `how`: shape and eps."""
    if (type(input) is not Tensor or tracing() is not None) and is_for_torch(input):
        return _by_torch(op, input, weight, bias, how, residual)
    if not input.is_cpu:
        if type(input) in DOOR.types and not torch.compiler.is_compiling():
            check_device(input.device)
        if not op.residual:
            input, weight, bias = autocast(input, weight, bias)
    settled = tuple(how[0]) if type(how[0]) is Size else how[0], None, how[1], "C", False
    try:
        if not op.residual:
            return _calls.normalize(op, input, weight, bias, None, settled)
        found = _calls.normalize(op, input, weight, bias, None, settled, residual, None)
        return named(op, False, found)
    except RuntimeError:  # of a tensor without shape or address
        if not is_for_torch(input):
            raise
    except (TypeError, ValueError):
        if input.layout is not torch.jagged and is_for_torch(input):
            return _by_torch(op, input, weight, bias, how, residual)
        for label, value in (("weight", weight), ("bias", bias), ("residual", residual)):
            if label != "residual" or op.residual:
                refuse_no_tensor(label, value)
        if (name := _rules.dtype_name(input.dtype)) not in _rules.ITEMSIZE:  # the rules call it x
            _rules.check_x_dtype(name, cast_of("input", input), op.function)
        raise
    return _by_torch(op, input, weight, bias, how, residual)


def _by_torch(op: Op, input: Any, weight: Any, bias: Any, how: Any, residual: Any) -> Any:
    """The same by torch's own functions, of which only layer norm knows nested rows as they lie."""
    shape, eps = how
    if tracing() is None and not (input.is_nested and weight is not None and bias is not None):
        check_layout("input", input)
    x = input.to(residual.dtype) + residual if op.residual else input
    if weight is not None and op.unit_weight:
        weight = weight + 1
    if op.center:
        y = torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
    else:
        y = torch.nn.functional.rms_norm(x, shape, weight, eps)
    return named(op, False, (y.to(input.dtype), x)) if op.residual else y


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


class RMSNorm(torch.nn.RMSNorm):  # type: ignore[misc]
    """``torch.nn.RMSNorm`` whose forward and backward are cupynorm's.

    As `LayerNorm` is to ``torch.nn.LayerNorm``; `cupynorm.torch.rms_norm` computes it.

    Parameters
    ----------
    normalized_shape, eps, elementwise_affine, device, dtype : optional
        As for `LayerNorm`, without a bias; eps as for `cupynorm.torch.rms_norm`.

    Notes
    -----
    The formula is that of Zhang and Sennrich (2019), arXiv:1910.07467.

    Examples
    --------
    >>> import torch
    >>> import cupynorm.torch
    >>> cupynorm.torch.RMSNorm(3)(torch.tensor([[1.0, 1.0, 2.0]])).detach()
    tensor([[0.7071, 0.7071, 1.4142]])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize the trailing dimensions of x, as `cupynorm.torch.rms_norm`.

        Parameters
        ----------
        x : Tensor of shape ``(..., *normalized_shape)``
            As for `LayerNorm.forward`.

        Returns
        -------
        Tensor
            As `cupynorm.torch.rms_norm` gives it.

        Examples
        --------
        >>> import torch
        >>> import cupynorm.torch
        >>> cupynorm.torch.RMSNorm(4).forward(torch.ones(2, 4)).shape
        torch.Size([2, 4])
        """
        if torch.jit.is_scripting():  # TorchScript can run torch's operators alone
            return torch.nn.functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


_OF_TORCH = {torch.nn.LayerNorm: LayerNorm, torch.nn.RMSNorm: RMSNorm}


def convert(model: Any, inplace: bool = True, *, also: Mapping[type, str] | None = None) -> Any:
    """Let every ``torch.nn.LayerNorm`` and ``torch.nn.RMSNorm`` of a model run on cupynorm.

    The modules stay the objects they are and change class only, so parameters, optimizers, hooks,
    parametrizations, devices and shared modules stay as they were. Subclasses are left alone, as
    their ``forward`` may be another. Convert before ``torch.compile``, FSDP or other wrappers.

    Parameters
    ----------
    model : torch.nn.Module
        Any module; it may itself be a norm.
    inplace : bool, default True
        Whether to change `model` itself; otherwise a deep copy.
    also : mapping of class to str, optional
        Classes of other libraries that are RMS norms, with 'rms_norm', or 'zero_centered' where
        they multiply by ``1 + weight``: ``{LlamaRMSNorm: "rms_norm", GemmaRMSNorm:
        "zero_centered"}`` of transformers. They become subclasses of these. Each module is first
        held against its own ``forward``, on values of few rows and other weights.

    Returns
    -------
    torch.nn.Module
        The model. How many were converted goes to the logger ``cupynorm.torch`` at level INFO,
        and at level WARNING, which Python prints by default, where there is no norm at all.

    Raises
    ------
    TypeError
        If `model` is not a module.
    ValueError
        If a module of a class in `also` gives other results than said, by more than rounding, or
        has no weight or eps that can be found. Then nothing is converted.

    Examples
    --------
    >>> import torch
    >>> import cupynorm.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
    >>> model = cupynorm.torch.convert(model)
    >>> sum(isinstance(m, cupynorm.torch.LayerNorm) for m in model.modules())
    1
    """
    conversion.check_module(model)
    if not inplace:
        model = copy.deepcopy(model)
    kinds = conversion.replacements(model, also or {}, rms_norm) | _OF_TORCH
    said = conversion.change(model, kinds)
    norms = [m for m in model.modules() if isinstance(m, (*_OF_TORCH, conversion.Replaced))]
    others = sum(not isinstance(m, (*kinds.values(), conversion.Replaced)) for m in norms)
    aside = f"; left {others} of a subclass of torch's norms as they are" if others else ""
    if len(norms) > others:
        _log.info("converted %s modules of %s%s", said, type(model).__name__, aside)
    else:
        _log.warning("found no norm to convert in %s%s", type(model).__name__, aside)
    return model


def revert(model: Any) -> Any:
    """Undo `convert`, in place: every module has its former class, and gives its former bits.

    A `LayerNorm` or `RMSNorm` that was made as one becomes torch's, too.

    Parameters
    ----------
    model : torch.nn.Module
        Converted or not.

    Returns
    -------
    torch.nn.Module
        The model; how many were changed goes to the logger, as for `convert`.

    Raises
    ------
    TypeError
        If `model` is not a module.

    Examples
    --------
    >>> import torch
    >>> import cupynorm.torch
    >>> cupynorm.torch.revert(cupynorm.torch.LayerNorm(8)).__module__
    'torch.nn.modules.normalization'
    """
    conversion.check_module(model)
    former = {ours: theirs for theirs, ours in _OF_TORCH.items()}
    said = conversion.change(model, former | conversion.originals(model))
    _log.info("reverted %s modules of %s", said, type(model).__name__)
    return model
