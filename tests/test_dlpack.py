"""DLPack as the interchange: results pass between libraries as the same memory, both ways."""

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.conftest import Backend, np_dtype, why_not

torch = pytest.importorskip("torch")

RNG = np.random.default_rng(20260411)
NUMPYS = ("float16", "float32", "float64")  # what NumPy's DLPack knows of the four
ORDERS = ("C", "F")
NO_GPU = why_not(Backend.TORCH_CUDA) or why_not(Backend.CUPY)
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]


class Exporter:
    """Speaks DLPack and nothing else."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


def numbers(*shape, dtype="float32"):
    return (RNG.standard_normal(shape) * 2 + 3).astype(np_dtype(dtype))


def check(y, x, dtype="float32"):
    want = oracle.layer_norm(x, (x.ndim - 1,), None, None, 1e-5)[0]
    bound = oracle.tolerance(dtype, x.shape[-1])
    np.testing.assert_allclose(np.asarray(y, dtype=np.float64), want, rtol=bound, atol=bound)


def address(array):
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data_ptr()


def strides(array):
    """In elements, of NumPy's arrays and torch's tensors alike."""
    if isinstance(array, np.ndarray):
        return tuple(s // array.itemsize for s in array.strides)
    return tuple(array.stride())


def assert_shared(a, b):
    assert address(a) == address(b)
    assert tuple(a.shape) == tuple(b.shape)
    assert strides(a) == strides(b)
    a[0, 0] = 17.0
    assert b[0, 0] == 17.0
    b[-1, -1] = 19.0
    assert a[-1, -1] == 19.0


# --- NumPy and torch on the CPU -----------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", NUMPYS)
def test_a_numpy_result_is_a_tensor(dtype, order):
    x = numbers(5, 33, dtype=dtype)
    y = cn.layer_norm(x, order=order)
    t = torch.from_dlpack(y)
    assert str(t.dtype) == f"torch.{dtype}"
    check(t, x, dtype)
    assert_shared(y, t)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", NUMPYS)
def test_a_torch_result_is_a_numpy_array(dtype, order):
    x = numbers(5, 33, dtype=dtype)
    t = cn.layer_norm(torch.from_dlpack(x), order=order)
    y = np.from_dlpack(t)
    assert y.dtype == dtype
    check(y, x, dtype)
    assert_shared(y, t)


@pytest.mark.parametrize("dtype", NUMPYS)
def test_the_same_bits_under_either_name(dtype):
    x, w, b = numbers(7, 40, dtype=dtype), numbers(40), numbers(40)
    as_torch = [torch.from_dlpack(a) for a in (x, w, b)]
    for mine, its in zip(
        cn.layer_norm(x, 40, w, b, return_stats=True),
        cn.layer_norm(as_torch[0], 40, *as_torch[1:], return_stats=True),
        strict=True,
    ):
        assert mine.tobytes() == np.from_dlpack(its).tobytes()
        assert address(torch.from_dlpack(mine)) == address(mine)


@pytest.mark.parametrize("dtype", NUMPYS)
def test_gradients_pass_too(dtype):
    x, dy = numbers(6, 20, dtype=dtype), numbers(6, 20, dtype=dtype)
    _, mean, rstd = cn.layer_norm(x, return_stats=True)
    got = cn.layer_norm_backward(dy, x, 20, mean, rstd, numbers(20))
    for gradient in got:
        t = torch.from_dlpack(gradient)
        assert address(t) == address(gradient)
        assert address(np.from_dlpack(t)) == address(gradient)


def test_bfloat16_passes_as_its_bits():
    """NumPy's DLPack does not know bfloat16; two bytes are two bytes."""
    x = numbers(5, 33, dtype="bfloat16")
    y = cn.layer_norm(x)
    with pytest.raises(BufferError):
        torch.from_dlpack(y)
    t = torch.from_dlpack(y.view(np.uint16)).view(torch.bfloat16)
    assert_shared(y, t)

    t = cn.layer_norm(torch.from_dlpack(x.view(np.uint16)).view(torch.bfloat16))
    with pytest.raises((BufferError, RuntimeError)):
        np.from_dlpack(t)
    y = np.from_dlpack(t.view(torch.uint16)).view(ml_dtypes.bfloat16)
    check(y.astype(np.float64), x, "bfloat16")
    assert_shared(y, t)


def test_the_memory_lives_as_long_as_the_last_view():
    y = cn.layer_norm(numbers(50, 64))
    before, alive = y.copy(), weakref.ref(y)
    t = torch.from_dlpack(y)
    del y
    gc.collect()
    assert alive() is not None
    view = np.from_dlpack(t[10:20])
    del t
    gc.collect()
    assert np.array_equal(view, before[10:20])
    del view
    gc.collect()
    assert alive() is None


def test_what_requires_grad_is_detached_first():
    x = torch.from_dlpack(numbers(3, 8)).requires_grad_()
    y = cn.layer_norm(x)
    with pytest.raises(BufferError, match=r"detach\(\)"):
        np.from_dlpack(y)
    assert address(np.from_dlpack(y.detach())) == address(y)
    with pytest.raises(TypeError, match=r"use tensor.detach\(\)"):
        cn.layer_norm(Exporter(y))


def test_jax_to_torch():
    jnp = pytest.importorskip("jax.numpy")
    y = cn.layer_norm(jnp.asarray(numbers(5, 33)))
    t = torch.from_dlpack(y)
    assert t.data_ptr() == y.unsafe_buffer_pointer()


# --- mere exporters -----------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", NUMPYS)
def test_an_exporter_comes_back_as_numpy(dtype, of):
    x, w = numbers(5, 33, dtype=dtype), numbers(33)
    source, weight = (torch.from_dlpack(a) if of == "torch" else a for a in (x, w))
    y = cn.layer_norm(Exporter(source), weight=Exporter(weight))
    assert type(y) is np.ndarray
    assert y.tobytes() == cn.layer_norm(x, weight=w).tobytes()


@pytest.mark.parametrize("view", [np.s_[1:4], np.s_[:, 3:20], np.s_[::2, ::3]], ids=str)
def test_an_exporter_of_a_view(view):
    t = torch.from_dlpack(numbers(5, 33))[view]
    y = cn.layer_norm(Exporter(t))
    check(y, t.numpy())


def test_an_exporter_of_bfloat16_is_refused_with_the_way_out():
    t = torch.ones(2, 8, dtype=torch.bfloat16)
    with pytest.raises(
        TypeError, match=r"knows no bfloat16, for example. Pass x in its own library"
    ):
        cn.layer_norm(Exporter(t))
    assert cn.layer_norm(t).dtype is torch.bfloat16


# --- out= on memory of another library ----------------------------------------------------------


def test_a_numpy_call_writes_into_a_tensor():
    x, t = numbers(5, 33), torch.empty(5, 33)
    out = np.from_dlpack(t)
    assert cn.layer_norm(x, out=out) is out
    check(t, x)
    t.zero_()
    cn.layer_norm(x, out=Exporter(t))
    check(t, x)


def test_a_torch_call_writes_into_a_numpy_array():
    x, a = numbers(5, 33), np.zeros((5, 33), np.float32)
    out = torch.from_dlpack(a)
    assert cn.layer_norm(torch.from_dlpack(x), out=out) is out
    check(a, x)


def test_a_tensor_is_no_out_for_numpy():
    with pytest.raises(ValueError, match="out is a torch array but x is a numpy array"):
        cn.layer_norm(numbers(5, 33), out=torch.empty(5, 33))


def test_in_place_through_a_view():
    x = numbers(5, 33)
    before = x.copy()
    cn.layer_norm(x, out=np.from_dlpack(torch.from_dlpack(x)))
    check(x, before)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_partial_overlap_is_seen_through_a_view(library):
    base = numbers(6, 33)
    before = base.copy()
    if library == "numpy":
        x, out = base[:5], np.from_dlpack(torch.from_dlpack(base)[1:])
    else:
        x, out = torch.from_dlpack(base[:5]), torch.from_dlpack(base[1:])
    with pytest.raises(ValueError, match="out shares memory with x in part"):
        cn.layer_norm(x, out=out)
    assert np.array_equal(base, before)


# --- CuPy, simulated or real --------------------------------------------------------------------


def test_a_cupy_result_keeps_its_memory(cupy_lib):
    import cupy

    x = numbers(5, 77)
    y = cn.layer_norm(cupy_lib.from_numpy(x))
    assert cupy.from_dlpack(y).data.ptr == y.data.ptr
    check(cupy_lib.to_numpy(y), x)


def test_an_exporter_on_a_gpu_comes_back_as_cupy(cupy_lib):
    import cupy

    x, w = numbers(5, 77), numbers(77)
    source, out = cupy_lib.from_numpy(x), cupy.empty((5, 77), dtype="float32")
    y = cn.layer_norm(Exporter(source), weight=Exporter(cupy_lib.from_numpy(w)))
    assert type(y) is cupy.ndarray
    plain = cn.layer_norm(source, weight=cupy_lib.from_numpy(w))
    assert cupy_lib.to_numpy(y).tobytes() == cupy_lib.to_numpy(plain).tobytes()
    cn.layer_norm(source, out=Exporter(out))
    check(cupy_lib.to_numpy(out), x)


# --- CuPy and torch on a GPU --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=on_gpu) for d in (*NUMPYS, "bfloat16")])
def test_a_cupy_result_is_a_cuda_tensor(dtype):
    import cupy

    x = numbers(64, 768, dtype=dtype)
    y = cn.layer_norm(cupy.asarray(x))
    t = torch.from_dlpack(y)
    assert t.data_ptr() == y.data.ptr
    assert str(t.dtype) == f"torch.{dtype}"
    assert t.is_cuda
    check(t.double().cpu(), x.astype(np.float64), dtype)
    t.fill_(3.0)
    torch.cuda.synchronize()
    assert (y.get().astype(np.float64) == 3.0).all()


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=on_gpu) for d in (*NUMPYS, "bfloat16")])
def test_a_cuda_tensor_goes_to_cupy_and_back(dtype):
    import cupy

    x = numbers(64, 768, dtype=dtype)
    bits = torch.from_numpy(x.view(np.uint8))
    t = bits.cuda().view(getattr(torch, dtype))
    c = cupy.from_dlpack(t)
    assert c.data.ptr == t.data_ptr()
    assert c.dtype == x.dtype
    back = torch.from_dlpack(cn.layer_norm(c, out=c))  # in place: torch's memory
    assert back.data_ptr() == t.data_ptr()
    check(t.double().cpu(), x.astype(np.float64), dtype)


@pytest.mark.parametrize("dtype", [pytest.param(d, marks=on_gpu) for d in ("float32", "bfloat16")])
def test_an_exporter_of_a_cuda_tensor_comes_back_as_cupy(dtype):
    import cupy

    t = torch.randn(64, 768, device="cuda").to(getattr(torch, dtype))
    y = cn.layer_norm(Exporter(t))
    assert type(y) is cupy.ndarray
    check(torch.from_dlpack(y).double().cpu(), t.double().cpu().numpy(), dtype)


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
