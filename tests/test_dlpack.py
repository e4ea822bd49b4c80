"""Exchange protocols: results pass between libraries as the same memory, exporters are taken."""

import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.conftest import Backend, Exporter, np_dtype, why_not

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(20260411)
NUMPYS = ("float16", "float32", "float64")  # what NumPy's DLPack knows of the four
NO_GPU = why_not(Backend.TORCH_CUDA) or why_not(Backend.CUPY)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]
each_dtype = pytest.mark.parametrize("dtype", NUMPYS)
each_dtype_on_gpu = pytest.mark.parametrize(
    "dtype", [pytest.param(d, marks=on_gpu) for d in (*NUMPYS, "bfloat16")]
)


class CudaExporter:
    """What numba, cuDF columns and RMM-backed buffers offer."""

    def __init__(self, array):
        self.__cuda_array_interface__ = array.__cuda_array_interface__
        self._owner = array


def numbers(*shape, dtype="float32"):
    return (RNG.standard_normal(shape) * 2 + 3).astype(np_dtype(dtype))


def check(y, x, dtype="float32", weight=None, axis=-1):
    want = oracle.layer_norm(x, (axis,), weight, None, 1e-5)[0]
    oracle.assert_close(np.asarray(y), want, x.shape[axis], dtype, np.abs(want).max())


def address(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def assert_shared(a, b):
    assert address(a) == address(b)
    assert tuple(a.shape) == tuple(b.shape)
    for place, value in (((0, 0), 17.0), ((0, -1), 18.0), ((-1, 0), 19.0)):
        a[place] = value
        assert b[place] == value
    b[-1, -1] = 20.0
    assert a[-1, -1] == 20.0


@pytest.mark.parametrize("order", ["C", "F"])
@each_dtype
def test_results_pass_between_numpy_and_torch(dtype, order):
    x = numbers(5, 33, dtype=dtype)
    y = cn.layer_norm(x, order=order)
    t = torch.from_dlpack(y)
    assert str(t.dtype) == f"torch.{dtype}"
    check(t, x, dtype)
    assert_shared(y, t)
    t = cn.layer_norm(torch.from_dlpack(x), order=order)
    y = np.from_dlpack(t)
    assert y.dtype == dtype
    check(y, x, dtype)
    assert_shared(y, t)


def test_bfloat16_passes_as_its_bits():
    """NumPy's DLPack does not know bfloat16; two bytes are two bytes."""
    x = numbers(5, 33, dtype="bfloat16")
    y = cn.layer_norm(x)
    assert_shared(y, torch.from_dlpack(y.view(np.uint16)).view(torch.bfloat16))
    t = cn.layer_norm(torch.from_dlpack(x.view(np.uint16)).view(torch.bfloat16))
    y = np.from_dlpack(t.view(torch.uint16)).view(ml_dtypes.bfloat16)
    check(y.astype(np.float64), x, "bfloat16")
    assert_shared(y, t)


def test_what_requires_grad_is_detached_first():
    x = torch.from_dlpack(numbers(3, 8)).requires_grad_()
    y = cn.layer_norm(x)
    with pytest.raises(TypeError, match=r"use tensor.detach\(\)"):
        cn.layer_norm(Exporter(y))


@pytest.mark.parametrize("of", ["numpy", "torch"])
@each_dtype
def test_an_exporter_comes_back_as_numpy(dtype, of):
    """As x, as weight and as bias, beside NumPy's own arrays or not."""
    x, w = numbers(5, 33, dtype=dtype), numbers(33)
    source, weight = (torch.from_dlpack(a) if of == "torch" else a for a in (x, w))
    want = cn.layer_norm(x, 33, w, w)
    pairs = (Exporter(source), w), (x, Exporter(weight)), (Exporter(source), Exporter(weight))
    for a, affine in pairs:
        y, mean, rstd = cn.layer_norm(a, 33, affine, affine, return_stats=True)
        assert all(type(a) is np.ndarray for a in (y, mean, rstd))
        assert y.tobytes() == want.tobytes()
    check(cn.layer_norm(Exporter(source), weight=Exporter(weight)), x, dtype, w)


@pytest.mark.parametrize("view", [np.s_[1:4], np.s_[:, 3:20], np.s_[::2, ::3], "turned"], ids=str)
def test_an_exporter_of_a_view(view):
    t = torch.from_dlpack(numbers(5, 33))
    t = t.T if view == "turned" else t[view]
    for axis in (0, 1):
        y = cn.layer_norm(Exporter(t), axis=axis)
        assert type(y) is np.ndarray
        check(y, t.numpy(), axis=axis)


def test_an_exporter_of_bfloat16_is_taken_or_refused_with_the_way_out():
    t = torch.from_dlpack(numbers(2, 8)).bfloat16()
    try:
        y = cn.layer_norm(Exporter(t))
    except TypeError as error:
        assert "knows no bfloat16, for example. Pass x in its own library" in str(error)
    else:
        check(y.astype(np.float64), t.float().numpy(), "bfloat16")


def test_rules_hold_for_exporters():
    with pytest.raises(ValueError, match="normalized_shape"):
        cn.layer_norm(Exporter(numbers(5, 8)), 5)
    for device_type in (4, 7, 8, 10, 14):  # of another kind than CPU and CUDA
        elsewhere = Exporter(numbers(5, 8), (device_type, 0))
        with pytest.raises(TypeError, match=r"Exporter.*pass an array"):
            cn.layer_norm(elsewhere)


def test_a_call_writes_into_memory_of_another_library():
    x, t = numbers(5, 33), torch.empty(5, 33)
    out = np.from_dlpack(t)
    assert cn.layer_norm(x, out=out) is out
    check(t, x)
    t.zero_()
    cn.layer_norm(x, out=Exporter(t))
    check(t, x)
    a = np.zeros((5, 33), np.float32)
    out = torch.from_dlpack(a)
    assert cn.layer_norm(torch.from_dlpack(x), out=out) is out
    check(a, x)
    before = x.copy()
    cn.layer_norm(x, out=np.from_dlpack(torch.from_dlpack(x)))  # in place, through a view
    check(x, before)


@pytest.mark.parametrize("exporter", [Exporter, CudaExporter])
def test_an_exporter_on_a_gpu_comes_back_as_cupy(cupy_lib, exporter):
    """And nothing is copied between devices in silence."""
    import cupy

    x, w = numbers(5, 77), numbers(77)
    source, weight = cupy_lib.from_numpy(x), cupy_lib.from_numpy(w)
    y, mean, rstd = cn.layer_norm(exporter(source), 77, exporter(weight), return_stats=True)
    assert all(type(a) is cupy.ndarray for a in (y, mean, rstd))
    check(cupy_lib.to_numpy(y), x, weight=w)
    plain = cn.layer_norm(source, weight=weight)
    assert cupy_lib.to_numpy(y).tobytes() == cupy_lib.to_numpy(plain).tobytes()
    out = cupy.empty((5, 77), dtype="float32")
    cn.layer_norm(source, out=exporter(out))
    check(cupy_lib.to_numpy(out), x)
    with pytest.raises(ValueError, match=r"weight is a cupy array but x is a numpy array"):
        cn.layer_norm(x, 77, exporter(weight))
    with pytest.raises(ValueError, match=r"weight is a numpy array but x is a cupy array"):
        cn.layer_norm(exporter(source), 77, w)


def test_a_gpu_exporter_without_cupy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "cupynorm._cuda.arrays", raising=False)
    monkeypatch.delattr("cupynorm._cuda.arrays", raising=False)
    interface = {"shape": (4,), "typestr": "<f4", "data": (4096, False), "version": 3}
    with pytest.raises(ImportError, match=r"cupynorm\[cuda12\]"):
        cn.layer_norm(CudaExporter(SimpleNamespace(__cuda_array_interface__=interface)))


@each_dtype_on_gpu
def test_a_cuda_tensor_goes_to_cupy_and_back(dtype):
    import cupy

    x = numbers(64, 768, dtype=dtype)
    t = torch.from_numpy(x.view(np.uint8)).cuda().view(getattr(torch, dtype))
    exported = cn.layer_norm(Exporter(t))
    assert type(exported) is cupy.ndarray
    c = cupy.from_dlpack(t)
    assert c.data.ptr == t.data_ptr()
    assert c.dtype == x.dtype
    back = torch.from_dlpack(cn.layer_norm(c, out=c))  # in place: torch's memory
    assert back.data_ptr() == t.data_ptr()
    for result in (t, torch.from_dlpack(exported)):
        check(result.double().cpu(), x.astype(np.float64), dtype)


@pytest.mark.parametrize("side", [pytest.param(s, marks=on_gpu) for s in (False, True)])
def test_on_torchs_stream(side):
    """The recipe of docs/torch.md; the delay lets a missing dependency show."""
    import cupy

    stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
    x = torch.randn(4096, 1024, device="cuda")
    cn.layer_norm(cupy.from_dlpack(x))  # compiled ahead
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        t = x + 1
        with cupy.cuda.Stream.from_external(stream):
            y = torch.from_dlpack(cn.layer_norm(cupy.from_dlpack(t)))
        doubled = 2 * y
    stream.synchronize()
    check(doubled.cpu().numpy() / 2, t.cpu().numpy())
