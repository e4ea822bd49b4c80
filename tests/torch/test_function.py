"""`cupynorm.torch.layer_norm` as a function: values, dtypes, layouts, refusals, cost."""

import contextlib
import statistics
import time
import timeit

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import cupynorm as cn
import cupynorm.torch as cn_torch
from tests.cpu.programs import run_python
from tests.cpu.test_threads import threads_asked_for
from tests.torch.cases import DTYPES, affine, check, name_of, numbers

reference = torch.nn.functional.layer_norm


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
