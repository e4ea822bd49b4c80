"""`cupynorm.torch.layer_norm` as a function: values, dtypes, layouts, refusals, cost."""

import statistics
import subprocess
import sys
import time
import timeit

import numpy as np
import pytest
import torch

import cupynorm as cn
import cupynorm.torch as cn_torch
from tests.torch.cases import DTYPES, SHAPES, affine, check, name_of, numbers

reference = torch.nn.functional.layer_norm


# --- values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 0.5, -0.5])
@pytest.mark.parametrize("affines", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize(("shape", "n"), SHAPES)
def test_values(loops, shape, n, affines, eps):
    x = numbers(*shape)
    weight, bias = affine(*shape[-n:])
    weight = weight if affines in ("both", "weight") else None
    bias = bias if affines in ("both", "bias") else None
    y = cn_torch.layer_norm(x, shape[-n:], weight, bias, eps)
    check(y, x, n, weight, bias, eps)
    assert torch.equal(y.isnan(), reference(x, shape[-n:], weight, bias, eps).isnan())


def test_negated_memory():
    """The imaginary part of a conjugate holds the negative of what its memory says."""
    z = torch.complex(numbers(4, 8), numbers(4, 8, seed=5))
    for x in (z.conj().imag, z[:1, :1].conj().imag):
        assert x.is_neg()
        N = x.shape[-1]
        weight = z[1].conj().imag[:N]
        check(cn_torch.layer_norm(x, (N,), weight), x.resolve_neg(), 1, weight.resolve_neg())


def test_spellings_of_normalized_shape():
    x = numbers(3, 4, 5)
    for spelling, n in ((5, 1), ([5], 1), (torch.Size([4, 5]), 2), (np.int64(5), 1)):
        check(cn_torch.layer_norm(x, spelling), x, n)
    for eps in (1, np.float32(0.5)):
        check(cn_torch.layer_norm(x, (5,), eps=eps), x, 1, eps=float(eps))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (2, 0, 8)])
def test_nothing(shape):
    x = numbers(*shape, grad=True)
    weight, bias = affine(shape[-1], grad=True)
    y = cn_torch.layer_norm(x, shape[-1:], weight, bias)
    assert y.shape == x.shape
    y.sum().backward()
    for tensor in (x, weight, bias):
        assert tensor.grad.shape == tensor.shape
        assert not tensor.grad.count_nonzero()


def test_where_no_gradient_is_kept():
    x = numbers(3, 8, grad=True)
    with torch.no_grad():
        assert not cn_torch.layer_norm(x, (8,)).requires_grad
    with torch.inference_mode():
        y = cn_torch.layer_norm(x, (8,))
    assert y.is_inference()
    check(y, x, 1)
    assert not cn_torch.layer_norm(x.detach(), (8,)).requires_grad


# --- tensors that are not memory ----------------------------------------------------------------


def test_meta_and_fake_tensors():
    from torch._subclasses import FakeTensorMode

    for dtype in DTYPES:
        x = torch.empty(6, 4, 8, dtype=dtype, device="meta").permute(1, 0, 2).requires_grad_()
        y = cn_torch.layer_norm(x, (8,))
        assert (y.shape, y.dtype, y.device) == (x.shape, dtype, x.device)
        assert y.is_contiguous()
        y.sum().backward()
        assert x.grad.shape == x.shape
    with FakeTensorMode() as mode:
        x = mode.from_tensor(numbers(3, 8))
        y = cn_torch.layer_norm(x, (8,))
        assert type(y) is type(x)
        assert y.shape == (3, 8)


def test_a_subclass_without_operators_of_its_own_is_computed_and_kept():
    class Tagged(torch.Tensor):
        pass

    x = numbers(3, 8)
    y = cn_torch.layer_norm(x.as_subclass(Tagged), (8,), *affine(8))
    assert type(y) is Tagged
    check(y.as_subclass(torch.Tensor), x, 1, *affine(8))


class Wrapped(torch.Tensor):
    """A tensor around a tensor, which decides about every operator."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            msg = f"{func} is unknown"
            raise NotImplementedError(msg)

        def inner(a):
            return a.inner if isinstance(a, cls) else a

        result = func(*map(inner, args), **(kwargs or {}))
        return cls(result) if isinstance(result, torch.Tensor) else result


def test_a_subclass_that_knows_torchs_operators_alone_gets_them():
    x = numbers(3, 8)
    y = cn_torch.layer_norm(Wrapped(x), (8,), *affine(8))
    assert type(y) is Wrapped
    check(y.inner, x, 1, *affine(8))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_go_to_torch():
    rows = [numbers(2, 8), numbers(3, 8)]
    for layout in (torch.strided, torch.jagged):
        y = cn_torch.layer_norm(torch.nested.nested_tensor(rows, layout=layout), (8,), *affine(8))
        for got, x in zip(y.unbind(), rows, strict=True):
            check(got, x, 1, *affine(8))


def test_modes_see_an_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        seen: tuple = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += (str(func),)
            return func(*args, **(kwargs or {}))

    x = numbers(3, 8)
    with Names() as names:
        y = cn_torch.layer_norm(x, (8,))
    assert "cupynorm.layer_norm_fwd.default" in names.seen
    check(y, x, 1)


# --- refusals -----------------------------------------------------------------------------------


# --- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast_on_the_cpu_gives_torchs_dtype(dtype, cast):
    x = numbers(3, 8, dtype=dtype)
    weight, bias = affine(8, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype=cast):
        y = cn_torch.layer_norm(x, (8,), weight, bias)
        assert y.dtype == reference(x, (8,), weight, bias).dtype
    check(y, x, 1, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_autocast_on_cuda_gives_torchs_dtype(dtype):
    """Fake tensors have a device and a dtype, which is all that the rule looks at."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(3, 8, dtype=dtype, device="cuda")
        weight = torch.empty(8, dtype=dtype, device="cuda")
        assert cn_torch.layer_norm(x, (8,), weight).dtype == dtype
        torch.set_autocast_enabled("cuda", True)
        try:
            y = cn_torch.layer_norm(x, (8,), weight)
            assert y.dtype == reference(x, (8,), weight).dtype
        finally:
            torch.set_autocast_enabled("cuda", False)
    assert y.device.type == "cuda"


def test_autocast_on_cuda_leaves_the_cpu_alone():
    torch.set_autocast_enabled("cuda", True)
    try:
        y = cn_torch.layer_norm(numbers(2, 8, dtype=torch.bfloat16), (8,))
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert y.dtype == torch.bfloat16


# --- import and cost ----------------------------------------------------------------------------


def test_the_module_named_torch_finds_torch_and_no_library_that_is_not_needed_yet():
    program = "import runpy, sys; runpy.run_module('cupynorm.torch', run_name='__main__')\n"
    program += "print('cupy' in sys.modules, 'numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_small_call_costs_at_most_1_8_times_what_torchs_does():
    x, (weight, bias) = numbers(8, 64), affine(64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = []
        for _ in range(8):  # a busy machine gets further tries
            for _ in range(15):
                # time of this thread, in turns: what else runs here is no part of either
                torchs, ours = (
                    timeit.timeit(
                        lambda f=f: f(x, (64,), weight, bias), number=1000, timer=time.thread_time
                    )
                    for f in (reference, cn_torch.layer_norm)
                )
                ratios.append(ours / torchs)
            if statistics.median(ratios[-15:]) <= 1.8:
                return
        pytest.fail(f"{statistics.median(ratios):.2f} times torch's time")
    finally:
        torch.set_num_threads(threads)


def test_threads_are_torchs_unless_ours_are_set(monkeypatch):
    from cupynorm._torch import machines

    monkeypatch.delenv("CUPYNORM_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert machines.num_threads() == 1
        torch.set_num_threads(5)
        assert machines.num_threads() == 5
        monkeypatch.setenv("CUPYNORM_NUM_THREADS", "3")
        assert machines.num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    asked = []
    monkeypatch.delenv("CUPYNORM_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked.append(1) or 2)
    x = numbers(4000, 300, grad=True)
    cn_torch.layer_norm(x, (300,)).sum().backward()
    assert len(asked) == 2


def test_functional_and_adapter_agree():
    x, (weight, bias) = numbers(5, 70), affine(70)
    y = cn_torch.layer_norm(x, (70,), weight, bias)
    assert torch.equal(y, cn.layer_norm(x, 70, weight, bias))
