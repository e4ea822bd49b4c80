"""Layers that keep their parameters: forward, backward, files, and the way from and to torch.

It calls the public functions and knows arrays; it imports no other adapter, nor a path.
"""

from typing import Any, Self

from cupynorm import _rules
from cupynorm._libraries import kind_of
from cupynorm.functional import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from cupynorm.modules import _parameters
from cupynorm.modules._parameters import Stateful

__all__ = ["LayerNorm", "RMSNorm"]


class _Norm(Stateful):
    """What layers have in common: all but which function they call."""

    _torch_name: str  # of the class in torch.nn
    _names: tuple[str, ...]  # of the parameters, in the order of the functions below
    _function: Any
    _gradients: Any

    def _begin(
        self,
        normalized_shape: Any,
        eps: Any,
        affine: bool,
        where: tuple[Any, Any],
        bias: Any = None,
    ) -> None:
        """Make the parameters, on a device and in a dtype, and keep nothing."""
        self.normalized_shape = _rules.read_shape(normalized_shape)
        self.eps = eps  # as it was given: torch prints 1 for 1
        self.elementwise_affine = affine
        device, kind = _parameters.read_device(where[0]), _parameters.read_dtype(where[1])
        self.weight = None
        if affine:
            self.weight = _parameters.new_array(self.normalized_shape, kind, device, 1.0)
        if bias is not None:
            self.bias = None
        if affine and bias:
            self.bias = _parameters.new_array(self.normalized_shape, kind, device, 0.0)
        self._kept = None
        self.zero_grad()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # a copy or a pickle must not carry the batch

    def __call__(self, x: Any, *, keep: bool = True) -> Any:
        """Normalize x, as `forward` does."""
        return self.forward(x, keep=keep)

    def forward(self, x: Any, *, keep: bool = True) -> Any:
        """Normalize x, and keep what `backward` needs.

        Parameters
        ----------
        x : array of shape ``(..., *normalized_shape)``
            As for `layer_norm`, of the library and device of the parameters, if there are any.
        keep : bool, default True
            Hold x, mean and rstd until `backward`, or until the next `forward`. With False
            nothing is held, what an earlier call kept included.

        Returns
        -------
        array
            y, in x's shape, dtype, library and device.

        Examples
        --------
        >>> import numpy as np
        >>> import cupynorm as cn
        >>> layer = cn.LayerNorm(3, eps=0.0)
        >>> layer.forward(np.array([[1.0, 2.0, 3.0]]), keep=False).round(3)
        array([[-1.225,  0.   ,  1.225]])
        """
        self._kept = None  # before y is allocated, so that two batches are never held at once
        affine = (getattr(self, name) for name in self._names)
        given = x, self.normalized_shape, *affine, self.eps
        if not keep:
            return self._function(*given)
        y, *stats = self._function(*given, return_stats=True)
        self._kept = x, *stats
        return y

    def backward(self, dy: Any) -> Any:
        """Gradient of x; those of weight and bias are added to `grad`.

        Parameters
        ----------
        dy : array
            Gradient with respect to y of the last `forward`.

        Returns
        -------
        array
            dx, in x's shape and dtype.

        Raises
        ------
        RuntimeError
            If nothing is kept. What is wrong with dy is the error of `layer_norm_backward` or
            `rms_norm_backward`, after which the call can be mended.

        Examples
        --------
        >>> import numpy as np
        >>> import cupynorm as cn
        >>> layer = cn.LayerNorm(3)
        >>> y = layer(np.array([[1.0, 2.0, 4.0]], dtype=np.float32))
        >>> layer.backward(np.array([[1.0, 0.0, 0.0]], dtype=np.float32)).round(3)
        array([[ 0.229, -0.344,  0.115]], dtype=float32)
        """
        if self._kept is None:
            msg = (
                "backward() has nothing to go back through: each forward(x) serves one "
                "backward(dy), which releases x. Call forward(x) first, without keep=False"
            )
            raise RuntimeError(msg)
        x, *stats = self._kept
        mask = True, *(getattr(self, name) is not None for name in self._names)
        given = dy, x, self.normalized_shape, *stats, self.weight
        dx, *sums = self._gradients(*given, output_mask=mask)
        terms = dict(zip(self._names, sums, strict=True))
        for name, term in terms.items():
            _parameters.check_total(name, self.grad.get(name), term)
        self._kept = None
        for name, term in terms.items():
            if term is not None:
                self.grad[name] = _parameters.accumulate(self.grad.get(name), term)
        return dx

    # ---- torch ----

    @classmethod
    def from_torch(cls, module: Any) -> Self:
        """Layer over the parameters of the torch module of its name, whose memory it shares.

        Parameters
        ----------
        module : torch.nn.LayerNorm or torch.nn.RMSNorm
            On the CPU (the layer holds NumPy arrays) or a CUDA device (CuPy arrays).

        Returns
        -------
        LayerNorm or RMSNorm
            Each side sees the other's training, until one of them replaces its arrays, as
            ``module.to(...)`` does. Gradients are not shared, and autograd does not notice what
            this side writes, so write between torch's backward and its next forward.

        Raises
        ------
        TypeError, ValueError
            If it is no such module, of another dtype, or on a device that neither library reaches.

        Examples
        --------
        >>> import torch
        >>> import cupynorm as cn
        >>> module = torch.nn.LayerNorm(3)
        >>> layer = cn.LayerNorm.from_torch(module)
        >>> layer.weight[:] = 2.0  # written here,
        >>> module.weight.tolist()  # seen there
        [2.0, 2.0, 2.0]
        """
        import torch

        if not isinstance(module, getattr(torch.nn, cls._torch_name)):
            wanted = f"torch.nn.{cls._torch_name}"
            msg = f"from_torch takes a {wanted}, not a {kind_of(module)}; pass the layer itself"
            raise TypeError(msg)
        make: Any = cls
        layer = make(module.normalized_shape, module.eps, elementwise_affine=False)
        layer.elementwise_affine = module.elementwise_affine
        for name in ("weight", "bias"):
            tensor = getattr(module, name, None)
            if tensor is not None:
                setattr(layer, name, _parameters.from_tensor(name, tensor))
        layer.zero_grad()
        return layer  # type: ignore[no-any-return]

    def to_torch(self) -> Any:
        """The torch module of its name over the same memory; on the CPU or on the layer's GPU.

        Returns
        -------
        torch.nn.LayerNorm or torch.nn.RMSNorm
            Its parameters require grad. `cupynorm.torch.convert` makes it run this library.

        Raises
        ------
        ValueError
            If a parameter is read-only, or has a negative stride.

        Examples
        --------
        >>> import cupynorm as cn
        >>> cn.LayerNorm(3, bias=False).to_torch()
        LayerNorm((3,), eps=1e-05, elementwise_affine=True, bias=False)
        """
        import torch

        kind = getattr(torch.nn, self._torch_name)
        module = kind(self.normalized_shape, self.eps, elementwise_affine=False)
        module.elementwise_affine = self.elementwise_affine
        for name, array in self.state_dict().items():
            setattr(module, name, torch.nn.Parameter(_parameters.to_tensor(name, array)))
        return module


class LayerNorm(_Norm):
    """Layer normalization that holds its weight and bias, for training without a framework.

    As ``torch.nn.LayerNorm``, but the parameters are NumPy or CuPy arrays, and the gradients come
    from `backward`, called by hand.

    Parameters
    ----------
    normalized_shape, eps : optional
        As for `cupynorm.layer_norm`; the shape must be given.
    elementwise_affine, bias : bool, default True
        Whether there are a weight and a bias at all, and a bias beside the weight.
    device : str or device, optional
        Where the parameters live: 'cpu' (the default) for NumPy; 'cuda' for CuPy on its current
        GPU, 'cuda:1' on that one. A ``torch.device`` or ``cupy.cuda.Device`` does as well.
    dtype : dtype, optional
        Of the parameters, float32 by default: a name, or a NumPy or torch dtype. x may have
        another.

    Attributes
    ----------
    normalized_shape, eps, elementwise_affine : tuple of int, float, bool
        As given.
    weight, bias : array or None
        Parameters, of shape `normalized_shape`: ones and zeros at first. Change them in place, or
        assign new arrays.
    grad : dict
        Gradient of each parameter by its name, None before the first `backward`. Each `backward`
        adds to it until `zero_grad`, as in torch.

    Raises
    ------
    TypeError, ValueError
        If a parameter is none of what is said above.
    ImportError
        If `device` is a GPU and CuPy is not installed.

    Notes
    -----
    `forward` keeps x itself (no copy), its mean and its rstd for `backward`, one batch at a time:
    the next `forward` replaces them and `backward` releases them, so write to x in place only
    after `backward`. ``forward(x, keep=False)`` keeps nothing and is what inference should call.
    So a layer in training belongs to one thread, and stands at one place of a network. The formula
    is that of Ba, Kiros and Hinton (2016), "Layer Normalization", arXiv:1607.06450.

    A layer equals itself only, as torch's. Copies and pickles of it have parameters and gradients
    of their own, and nothing of the batch. ``print`` tells of parameters and what is kept.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> layer = cn.LayerNorm(3)
    >>> y = layer(np.array([[1.0, 2.0, 3.0]], dtype=np.float32))
    >>> dx = layer.backward(np.ones_like(y))
    >>> for name, parameter in layer.state_dict().items():
    ...     parameter -= 0.1 * layer.grad[name]
    >>> layer.bias
    array([-0.1, -0.1, -0.1], dtype=float32)
    >>> layer.zero_grad()
    """

    _torch_name, _names = "LayerNorm", ("weight", "bias")
    _function, _gradients = staticmethod(layer_norm), staticmethod(layer_norm_backward)

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        _rules.check_eps(eps)
        self._begin(normalized_shape, eps, elementwise_affine, (device, dtype), bias)

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, bias={self.bias is not None})"


class RMSNorm(_Norm):
    """RMS normalization that holds its weight, for training without a framework.

    As ``torch.nn.RMSNorm``, and otherwise as `LayerNorm`, of which all that is said holds.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        As for `LayerNorm`.
    eps : float, optional
        As for `cupynorm.rms_norm`.
    elementwise_affine : bool, default True
        Whether there is a weight.
    device, dtype : optional
        As for `LayerNorm`.

    Notes
    -----
    The formula is that of Zhang and Sennrich (2019), arXiv:1910.07467.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> layer = cn.RMSNorm(3)
    >>> layer(np.array([[1.0, 1.0, 2.0]], dtype=np.float32)).round(3)
    array([[0.707, 0.707, 1.414]], dtype=float32)
    """

    bias = None
    _torch_name, _names = "RMSNorm", ("weight",)
    _function, _gradients = staticmethod(rms_norm), staticmethod(rms_norm_backward)

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if eps is not None:
            _rules.check_eps(eps)
        self._begin(normalized_shape, eps, elementwise_affine, (device, dtype))
