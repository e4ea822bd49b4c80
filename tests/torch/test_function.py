"""`cupynorm.torch.layer_norm` as a function: kinds of tensors, cost, and derivatives of its own."""

import contextlib
import statistics
import time
import timeit

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import grad, jvp, vmap

import cupynorm as cn
import cupynorm.torch as cn_torch
from cupynorm._torch import tensors as _tensors
from tests.cpu.programs import run_python
from tests.cpu.test_threads import threads_asked_for
from tests.torch.cases import (
    DTYPES,
    TORCHSCRIPT,
    affine,
    check,
    check_gradients,
    name_of,
    numbers,
)

pytestmark = pytest.mark.filterwarnings(TORCHSCRIPT)

reference = torch.nn.functional.layer_norm
double = torch.float64


def test_spellings_of_normalized_shape():
    x = numbers(3, 4, 5)
    for spelling, n in ((5, 1), ([5], 1), (torch.Size([4, 5]), 2), (np.int64(5), 1)):
        check(cn_torch.layer_norm(x, spelling), x, n)
    for eps in (1, np.float32(0.5)):
        check(cn_torch.layer_norm(x, (5,), eps=eps), x, 1, eps=float(eps))


def test_where_no_gradient_is_kept():
    x = numbers(3, 8, grad=True)
    with torch.no_grad():
        assert not cn_torch.layer_norm(x, (8,)).requires_grad
    with torch.inference_mode():
        y = cn_torch.layer_norm(x, (8,))
    assert y.is_inference()
    check(y, x, 1)
    assert torch.equal(y, cn.layer_norm(x.detach(), 8))
    for norm in (cn.layer_norm, cn_torch.layer_norm):  # one after the other: both are settled
        assert [norm(a, (8,)).requires_grad for a in (x.detach(), x, x.detach())] == [0, 1, 0]


def test_meta_and_fake_tensors():
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


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_gives_torchs_dtype(device, dtype, cast):
    """Of one device, which leaves the other alone; on CUDA fakes do, of which dtypes are asked."""
    fake, of_weight = device == "cuda", torch.promote_types(dtype, torch.float32)
    with FakeTensorMode() if fake else contextlib.nullcontext():
        x = (torch.empty(3, 8, device=device) if fake else numbers(3, 8)).to(dtype)
        weight = torch.ones(8, device=device, dtype=dtype if fake else of_weight)
        for of in ("cpu", "cuda"):
            before = torch.get_autocast_dtype(of)
            torch.set_autocast_dtype(of, cast)
            torch.set_autocast_enabled(of, True)
            try:
                y = cn_torch.layer_norm(x, (8,), weight)
                assert (y.dtype, y.device) == (reference(x, (8,), weight).dtype, x.device)
            finally:
                torch.set_autocast_enabled(of, False)
                torch.set_autocast_dtype(of, before)
            assert fake or check(y, x, 1, weight) is None


def test_the_module_named_torch_finds_torch_and_no_library_that_is_not_needed_yet():
    program = "import runpy, sys; runpy.run_module('cupynorm.torch', run_name='__main__')\n"
    program += "print('cupy' in sys.modules, 'numba' in sys.modules)"
    assert run_python(program).split() == ["False", "False"]


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
    asked, before = threads_asked_for(monkeypatch), torch.get_num_threads()
    x = numbers(6000, 300, grad=True)
    try:
        for torchs, own, count in ((1, "", 1), (5, "", 5), (5, "3", 3)):
            monkeypatch.setenv("CUPYNORM_NUM_THREADS", own)
            torch.set_num_threads(torchs)
            y = cn_torch.layer_norm(x, (300,))
            assert max(asked) == count
            asked.clear()
            y.sum().backward()
            assert max(asked) == count
            asked.clear()
    finally:
        torch.set_num_threads(before)


# --- derivatives ---------------------------------------------------------------------------------


def ours(x, weight=None, bias=None):
    return cn_torch.layer_norm(x, (x.shape[-1],), weight, bias)


def theirs(x, weight=None, bias=None):
    return reference(x, (x.shape[-1],), weight, bias)


def dy_of(shape, dtype=torch.float32):
    return (numbers(*shape, seed=9) - 3).to(dtype)


@pytest.mark.parametrize("wanted", [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
def test_only_what_is_asked_for_is_computed(engine, monkeypatch, wanted):
    asked = []
    backward = _tensors.backward

    def spy(dy, x, stats, weight, call):
        asked.append(tuple(call[2]))
        return backward(dy, x, stats, weight, call)

    monkeypatch.setattr(_tensors, "backward", spy)
    leaves = [
        t.requires_grad_(bool(w)) for t, w in zip((numbers(4, 9), *affine(9)), wanted, strict=True)
    ]
    y = ours(*leaves)
    assert y.requires_grad == any(wanted)
    if not any(wanted):
        return
    dy = dy_of((4, 9))
    y.backward(dy)
    assert asked == [tuple(map(bool, wanted))]
    check_gradients([t.grad for t in leaves], dy, leaves[0], 1, leaves[1])


def test_a_graph_of_the_gradient_costs_one_kernel(monkeypatch):
    calls = []
    backward = _tensors.backward
    monkeypatch.setattr(_tensors, "backward", lambda *a: calls.append(a) or backward(*a))
    x, (weight, _) = numbers(3, 8, dtype=double, grad=True), affine(8, dtype=double, grad=True)

    def penalty(f):
        inner = f(x.sin(), weight * x.mean(), None)  # weight depends on x too
        (first,) = torch.autograd.grad(inner.pow(2).sum(), x, create_graph=True)
        assert len(calls) == (f is ours)
        return torch.autograd.grad(first.pow(2).sum(), (x, weight))

    got = penalty(ours)
    calls.clear()
    torch.testing.assert_close(got, penalty(theirs))


def test_a_large_common_offset():
    """float32's mean of numbers near 1e6 is off by 0.03; every derivative repairs that."""
    x, dy = numbers(4, 90) + 1e6, dy_of((4, 90))
    wide = x.double().requires_grad_()
    exact = torch.autograd.grad(theirs(wide), wide, dy.double())[0].float()
    x.requires_grad_()
    for create in (False, True):  # by the engine, by torch's functions
        (dx,) = torch.autograd.grad(ours(x), x, dy, create_graph=create)
        torch.testing.assert_close(dx.detach(), exact, rtol=1e-5, atol=1e-6)
    tangent = jvp(ours, (x.detach(),), (dy,))[1]
    torch.testing.assert_close(
        tangent, jvp(theirs, (x.detach().double(),), (dy.double(),))[1].float()
    )


def test_third_derivative():
    x = numbers(2, 4, dtype=double, grad=True)

    def third(f):
        value = f(x).pow(2).sum() + f(x).sin().sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value, x, create_graph=True)
            value = (value * torch.linspace(-1, 2, 8, dtype=double).view(2, 4)).sum()
        return value

    def spelled_out(x):  # torch 2.13's layer_norm has a wrong third derivative
        d = x - x.mean(-1, keepdim=True)
        return d / (d.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    torch.testing.assert_close(third(ours), third(spelled_out))


def test_vmap_of_vmap_and_grad_of_vmap():
    x, (weight, bias) = numbers(2, 3, 4, 8, dtype=double), affine(8, dtype=double)
    weights = torch.stack([weight, weight + 1])

    def twice(f):
        return vmap(vmap(f, (0, None, None)), (0, 0, None))(x, weights, bias)

    torch.testing.assert_close(twice(ours), twice(theirs))

    def through(f):
        return grad(lambda x: vmap(f, (0, None, None))(x, weight, bias).sin().sum())(x[0])

    torch.testing.assert_close(through(ours), through(theirs))
    assert vmap(ours)(x.bfloat16()).dtype == torch.bfloat16


def test_functionalize():
    x, (weight, bias) = numbers(3, 8), affine(8)
    check(torch.func.functionalize(ours)(x, weight, bias), x, 1, weight, bias)


def test_checkpointing_and_saved_tensor_hooks():
    from torch.utils.checkpoint import checkpoint

    x, dy = numbers(3, 8, grad=True), dy_of((3, 8))
    for reentrant in (False, True):
        checkpoint(ours, x, use_reentrant=reentrant).backward(dy)
        check_gradients((x.grad, None, None), dy, x, 1)
        x.grad = None
    with torch.autograd.graph.save_on_cpu():
        y = ours(x)
    y.backward(dy)
    check_gradients((x.grad, None, None), dy, x, 1)


def test_what_was_kept_is_freed_and_watched():
    x = numbers(3, 8, grad=True)
    y = ours(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    y = ours(x)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
