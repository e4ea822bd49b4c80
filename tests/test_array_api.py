"""`cn.layer_norm` inside other libraries: the array API, autograd, tracing, exchange protocols."""

import subprocess
import sys
import textwrap
import warnings

import ml_dtypes
import numpy as np
import pytest

import cupynorm as cn
from tests import oracle

RNG = np.random.default_rng(20260103)
X = (RNG.standard_normal((5, 3, 8)) * 2 + 1).astype(np.float32)
WEIGHT, BIAS = RNG.standard_normal((2, 3, 8)).astype(np.float32)
WANT = oracle.layer_norm(X, (1, 2), WEIGHT, BIAS, 1e-5)

# --- array_api_strict ---------------------------------------------------------------------------


@pytest.fixture
def strict():
    module = pytest.importorskip("array_api_strict")
    yield module
    module.reset_array_api_strict_flags()


@pytest.mark.parametrize("version", ["2021.12", "2022.12", "2023.12", "2024.12", "2025.12"])
@pytest.mark.parametrize("device", ["CPU_DEVICE", "device1"])
def test_every_version_and_device_of_the_standard(strict, version, device, assert_close):
    if version not in strict._flags.supported_versions:
        pytest.skip(f"array_api_strict {strict.__version__} does not offer {version}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some releases announce the newest version as a draft
        strict.set_array_api_strict_flags(
            api_version=version, boolean_indexing=False, data_dependent_shapes=False
        )
    place = strict.Device(device)
    x, weight, bias = (strict.asarray(a, device=place) for a in (X, WEIGHT, BIAS))
    result = cn.layer_norm(x, (3, 8), weight, bias, return_stats=True)
    for got, want in zip(result, WANT, strict=True):
        assert got.device == place
        assert got.dtype == strict.float32
        host = np.asarray(got.to_device(strict.Device("CPU_DEVICE")))
        assert_close(host, want, "float32", 24)
    turned = strict.permute_dims(weight, (1, 0))
    y = cn.layer_norm(x, weight=turned, bias=strict.permute_dims(bias, (1, 0)), axis=(2, 1))
    assert bool(strict.all(y == result.y))


def test_every_version_that_strict_offers_is_in_the_list(strict):
    listed = {"2021.12", "2022.12", "2023.12", "2024.12", "2025.12"}
    assert set(strict._flags.supported_versions) <= listed


@pytest.mark.parametrize("device", ["no_float64", "no_x64"])
def test_devices_without_float64(strict, device):
    try:
        place = strict.Device(device)
    except ValueError:
        pytest.skip(f"array_api_strict {strict.__version__} has no device {device}")
    x = strict.asarray(X, device=place)
    for array in cn.layer_norm(x, return_stats=True):
        assert array.device == place
        assert array.dtype == strict.float32


# --- JAX ----------------------------------------------------------------------------------------


@pytest.fixture
def jax():
    return pytest.importorskip("jax")


def test_jax_jit(jax, assert_close):
    x, weight, bias = (jax.numpy.asarray(a) for a in (X, WEIGHT, BIAS))

    @jax.jit
    def traced(x, weight, bias):
        return cn.layer_norm(x, (3, 8), weight, bias, return_stats=True)

    result = traced(x, weight, bias)
    assert isinstance(result, cn.LayerNormResult)
    for got, want in zip(result, WANT, strict=True):
        assert isinstance(got, jax.Array)
        assert_close(np.asarray(got), want, "float32", 24)


def test_jax_rules_hold_while_tracing(jax):
    x = jax.numpy.asarray(X)
    with pytest.raises(ValueError, match=r"normalized_shape=\(7,\).*\(5, 3, 8\)"):
        jax.jit(lambda x: cn.layer_norm(x, 7))(x)
    with pytest.raises(ValueError, match="weight is a numpy array"):
        jax.jit(lambda x: cn.layer_norm(x, weight=np.ones(8, np.float32)))(x)


def test_jax_grad_and_vmap(jax):
    x = jax.numpy.asarray(X)

    def loss(x):
        return (cn.layer_norm(x, (3, 8)) ** 3).sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(x))
    x_hat, _, rstd = (a.reshape(5, -1) for a in oracle.layer_norm(X, (1, 2), None, None, 1e-5))
    dy = 3 * x_hat**2
    mean = [a.mean(axis=1, keepdims=True) for a in (dy, dy * x_hat)]
    want = rstd * (dy - mean[0] - x_hat * mean[1])
    np.testing.assert_allclose(gradient.reshape(5, -1), want, rtol=1e-4, atol=1e-4)
    mapped = jax.vmap(lambda sample: cn.layer_norm(sample, (3, 8)))(x)
    np.testing.assert_allclose(np.asarray(mapped), np.asarray(cn.layer_norm(x, (3, 8))), atol=1e-5)


def test_jax_closed_over_weight(jax):
    weight = jax.numpy.asarray(WEIGHT[0])
    y = jax.jit(lambda x: cn.layer_norm(x, 8, weight))(jax.numpy.asarray(X))
    np.testing.assert_allclose(np.asarray(y), cn.layer_norm(X, 8, WEIGHT[0]), atol=1e-5)


# --- torch --------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_torch_gradients_equal_torchs(torch):
    leaves = [torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (X, WEIGHT, BIAS)]
    dy = torch.tensor(RNG.standard_normal(X.shape))
    ours = torch.autograd.grad(cn.layer_norm(leaves[0], (3, 8), *leaves[1:]), leaves, dy)
    native = torch.nn.functional.layer_norm(leaves[0], (3, 8), *leaves[1:])
    for got, want in zip(ours, torch.autograd.grad(native, leaves, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_torch_gradients_through_unsorted_axes(torch):
    x = torch.tensor(X[:2, :, :3], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: cn.layer_norm(x, weight=weight, axis=(2, 0), return_stats=True),
        (x, weight),
    )


def test_torch_second_derivative(torch):
    x = torch.tensor(X[0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: cn.layer_norm(x), x)


def test_torch_parameters_and_modes(torch):
    module = torch.nn.LayerNorm(8)
    x = torch.tensor(X)
    y = cn.layer_norm(x, 8, module.weight, module.bias)
    assert y.requires_grad
    with torch.no_grad():
        assert not cn.layer_norm(x, 8, module.weight, module.bias).requires_grad
    with torch.inference_mode():
        assert cn.layer_norm(x, 8, module.weight, module.bias).is_inference()
    torch.testing.assert_close(y, module(x), rtol=1e-5, atol=1e-5)


def test_torch_out_may_be_x(torch):
    x = torch.tensor(X)
    want = cn.layer_norm(x)
    pointer = x.data_ptr()
    assert cn.layer_norm(x, out=x) is x
    assert x.data_ptr() == pointer
    torch.testing.assert_close(x, want, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning")
def test_torch_compile_finds_no_graph_break(torch):
    weight = torch.tensor(WEIGHT[0])
    compiled = torch.compile(lambda x: cn.layer_norm(x, 8, weight), fullgraph=True, backend="eager")
    x = torch.tensor(X)
    torch.testing.assert_close(compiled(x), cn.layer_norm(x, 8, weight))


def test_torch_channels_last_keeps_its_layout(torch):
    x = torch.randn(2, 5, 4, 3).to(memory_format=torch.channels_last)
    y = cn.layer_norm(x, axis=1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    native = torch.nn.functional.layer_norm(x.permute(0, 2, 3, 1), (5,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, native, rtol=1e-5, atol=1e-5)


# --- objects that only speak an exchange protocol -----------------------------------------------


class DLPackOnly:
    """The least that a producer of the standard offers."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class CudaArrayInterfaceOnly:
    """What numba, cuDF columns and RMM-backed buffers offer."""

    def __init__(self, array):
        self.__cuda_array_interface__ = array.__cuda_array_interface__
        self._owner = array


def test_dlpack_on_the_cpu_comes_back_as_numpy(assert_close):
    result = cn.layer_norm(
        DLPackOnly(X), (3, 8), DLPackOnly(WEIGHT), DLPackOnly(BIAS), return_stats=True
    )
    for got, want in zip(result, WANT, strict=True):
        assert type(got) is np.ndarray
        assert_close(got, want, "float32", 24)


def test_dlpack_on_the_cpu_mixes_with_numpy(assert_close):
    assert_close(cn.layer_norm(DLPackOnly(X), (3, 8), WEIGHT, BIAS), WANT[0], "float32", 24)
    assert_close(
        cn.layer_norm(X, (3, 8), DLPackOnly(WEIGHT), DLPackOnly(BIAS)), WANT[0], "float32", 24
    )


def test_dlpack_export_of_torch_memory(torch, assert_close):
    turned = torch.tensor(X).permute(2, 0, 1)
    y = cn.layer_norm(DLPackOnly(turned), axis=(2, 0))
    assert type(y) is np.ndarray
    want = oracle.layer_norm(X, (1, 2), None, None, 1e-5)[0]
    assert_close(y, want.transpose(2, 0, 1), "float32", 24)


def test_dlpack_rules_hold():
    with pytest.raises(TypeError, match=r"int64.*astype"):
        cn.layer_norm(DLPackOnly(np.ones((2, 3), dtype=np.int64)))
    with pytest.raises(ValueError, match="normalized_shape"):
        cn.layer_norm(DLPackOnly(X), 5)


def test_dlpack_bfloat16_is_taken_or_refused_with_a_way_out(torch):
    x = torch.tensor(X).bfloat16()
    try:
        y = cn.layer_norm(DLPackOnly(x))
    except TypeError as error:
        assert "bfloat16" in str(error)
    else:
        assert y.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(
            y.astype(np.float32), cn.layer_norm(x).to(torch.float32).numpy()
        )


@pytest.mark.parametrize("device_type", [4, 7, 8, 10, 14])
def test_dlpack_on_a_device_of_another_kind_is_refused(device_type):
    class Elsewhere(DLPackOnly):
        def __dlpack_device__(self):
            return (device_type, 0)

    with pytest.raises(TypeError, match=r"Elsewhere.*pass an array"):
        cn.layer_norm(Elsewhere(X))


@pytest.mark.parametrize("exporter", [DLPackOnly, CudaArrayInterfaceOnly])
def test_exporters_on_the_gpu_come_back_as_cupy(cupy_lib, exporter, assert_close):
    x, weight, bias = (cupy_lib.array(a) for a in (X, WEIGHT, BIAS))
    result = cn.layer_norm(exporter(x), (3, 8), exporter(weight), exporter(bias), return_stats=True)
    for got, want in zip(result, WANT, strict=True):
        assert type(got) is type(x)
        assert_close(cupy_lib.to_numpy(got), want, "float32", 24)


@pytest.mark.parametrize("exporter", [DLPackOnly, CudaArrayInterfaceOnly])
def test_no_copy_between_devices_for_exporters(cupy_lib, exporter):
    weight = exporter(cupy_lib.array(WEIGHT))
    with pytest.raises(ValueError, match=r"weight is a cupy array but x is a numpy array"):
        cn.layer_norm(X, (3, 8), weight)
    with pytest.raises(ValueError, match=r"weight is a numpy array but x is a cupy array"):
        cn.layer_norm(exporter(cupy_lib.array(X)), (3, 8), WEIGHT)


def test_a_gpu_exporter_without_cupy_says_what_to_install():
    program = """
        import sys
        import cupynorm as cn

        class NoCupy:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name.partition(".")[0] == "cupy":
                    raise ModuleNotFoundError("No module named 'cupy'", name="cupy")

        sys.meta_path.insert(0, NoCupy)

        class Exporter:
            __cuda_array_interface__ = {
                "shape": (4,), "typestr": "<f4", "data": (4096, False), "version": 3
            }

        try:
            cn.layer_norm(Exporter())
        except Exception as error:
            print(type(error).__name__, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True
    )
    assert "cupynorm[cuda12]" in done.stdout
    assert "cupy" in done.stdout
