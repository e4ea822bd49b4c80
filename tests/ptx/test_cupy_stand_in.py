"""The CuPy stand-in: as strict as CuPy where a launcher could go wrong, and leaving no trace."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.ptx.cupy_stand_in import simulated_cupy
from tests.ptx.launch import PtxFault

SCALE = """
extern "C" __global__ void scale(const float* x, float* y, long long n, double factor) {
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  if (i < n) y[i] = (float)(factor * x[i]);
}
"""


@pytest.fixture
def cupy():
    with simulated_cupy(devices=2) as module:
        yield module


@pytest.fixture
def scale(cupy):
    return cupy.RawKernel(SCALE, "scale", ("-std=c++17",))


def test_module_comes_and_goes(monkeypatch):
    """With the lazy cupyx of the real one: it loads itself when looked at, and fails here."""
    lazy = object()
    monkeypatch.setitem(sys.modules, "cupyx", lazy)
    before = {n for n in sys.modules if n.split(".")[0] == "cupy"}
    with simulated_cupy() as made:
        import cupy
        import cupy.cuda.runtime

        assert cupy is made and cupy.cuda.runtime.getDeviceCount() == 1
        assert "cupyx" not in sys.modules
    assert {n for n in sys.modules if n.split(".")[0] == "cupy"} == before
    assert sys.modules["cupyx"] is lazy


def test_kernel_runs_on_arrays_and_is_logged(cupy, scale):
    x = cupy.asarray(np.arange(100, dtype=np.float32))
    y = cupy.empty_like(x)
    scale((2,), (64,), (x, y, x.size, 2.5))
    assert (y.get() == np.arange(100) * np.float32(2.5)).all()
    (launch,) = cupy.simulator.launches
    assert (launch.name, launch.grid, launch.block) == ("scale", (2, 1, 1), (64, 1, 1))
    assert (launch.shared_bytes, launch.stream, launch.device) == (0, 0, 0)
    assert launch.args == (x.data.ptr, y.data.ptr, 100, 2.5)
    assert launch.traffic[x].read_bytes == launch.traffic[y].written_bytes == 400
    assert cupy.simulator.compilations == [("scale", 0)]


def test_function_is_strict(cupy, scale):
    x, y = cupy.ones(4, "f4"), cupy.empty(4, "f4")
    function = scale.kernel
    for grid, block in (([1], (4,)), (1, (4,)), ((1,), [4])):
        with pytest.raises(TypeError, match="expected tuple"):
            function(grid, block, (x, y, 4, 1.0))
    with pytest.raises(TypeError, match="Unsupported type"):
        function((1,), (4,), (x, y, "4", 1.0))
    with pytest.raises(TypeError, match="Unsupported type"):
        function((1,), (4,), (np.ones(4, np.float32), y, 4, 1.0))
    with pytest.raises(AttributeError):  # CuPy sets it through RawKernel only
        function.max_dynamic_shared_size_bytes = 1
    with pytest.raises(TypeError, match="expected tuple"):
        cupy.RawKernel(SCALE, "scale", ["-std=c++17"])
    with pytest.raises(PtxFault) as info:
        function((1,), (4,), (x, y, 4, 1))
    assert info.value.kind == "argument"
    function((0,), (4,), (x, y, 4, 1.0))  # a length below 1 is 1, as in CuPy
    assert cupy.simulator.launches[-1].grid == (1, 1, 1)


def test_opt_in_shared_memory(cupy, scale):
    x, y = cupy.ones(4, "f4"), cupy.empty(4, "f4")
    big = 100 * 1024
    with pytest.raises(PtxFault, match="max_dynamic_shared_size_bytes, which is 49152"):
        scale((1,), (4,), (x, y, 4, 1.0), shared_mem=big)
    scale.max_dynamic_shared_size_bytes = big
    scale((1,), (4,), (x, y, 4, 1.0), shared_mem=big)
    with pytest.raises(PtxFault, match="the device takes 232448"):
        scale.max_dynamic_shared_size_bytes = 228 * 1024
    with cupy.cuda.Device(1), pytest.raises(PtxFault):  # set per device
        scale((1,), (4,), (cupy.ones(4, "f4"), cupy.empty(4, "f4"), 4, 1.0), shared_mem=big)


def test_no_implicit_conversion(cupy):
    x = cupy.ones(3)
    for convert in (np.asarray, np.array, lambda a: np.add(a, 1), lambda a: np.ones(3) + a):
        with pytest.raises(TypeError):
            convert(x)
    with pytest.raises(TypeError):
        x[...] = np.ones(3)


def test_what_nobody_wrote_stays_so_through_a_copy(cupy, scale):
    x = cupy.empty(8, "f4")
    x[:4] = 1
    y = cupy.empty(8, "f4")
    copied = x.astype("f8").astype("f4")
    scale((1,), (8,), (copied, y, 4, 1.0))
    with pytest.raises(PtxFault) as info:
        scale((1,), (8,), (copied, y, 5, 1.0))
    assert info.value.kind == "uninitialized"


def test_devices_are_apart(cupy, scale):
    with cupy.cuda.Device(1) as device:
        assert cupy.cuda.runtime.getDevice() == 1
        far = cupy.ones(8, "f4")
        y = cupy.empty(8, "f4")
        assert far.device == device and far.__dlpack_device__() == (2, 1)
        scale((1,), (8,), (far, y, 8, 3.0))
        function = scale.kernel
    assert cupy.cuda.runtime.getDevice() == 0
    assert (y.get() == 3).all()
    for call in (scale, function):
        with pytest.raises(PtxFault) as info:
            call((1,), (8,), (far, y, 8, 3.0))
        assert info.value.kind == "wrong-device"
    assert cupy.simulator.compilations == [("scale", 1), ("scale", 0)]


def test_streams(cupy, scale):
    x, y = cupy.ones(8, "f4"), cupy.empty(8, "f4")
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        assert cupy.cuda.get_current_stream() is stream
        scale.kernel((1,), (8,), (x, y, 8, 1.0))
    assert cupy.cuda.get_current_stream().ptr == 0
    scale.kernel((1,), (8,), (x, y, 8, 1.0), stream=cupy.cuda.ExternalStream(0x77))
    assert [launch.stream for launch in cupy.simulator.launches] == [stream.ptr, 0x77]
    with cupy.cuda.Device(1), pytest.raises(PtxFault, match="stream belongs to device 0"):
        scale.kernel((1,), (8,), (x, y, 8, 1.0), stream=stream)


def test_misaligned_place_and_interface(cupy, scale):
    x = cupy.place(np.ones(8, np.float32), offset=36, name="x")
    assert x.data.ptr % 256 == 36

    class Foreign:
        __cuda_array_interface__ = x[2:].__cuda_array_interface__

    seen = cupy.asarray(Foreign())
    assert seen.data.ptr == x.data.ptr + 8 and seen.shape == (6,)
    y = cupy.empty(8, "f4")
    with pytest.raises(PtxFault, match="ends 4 bytes after x"):
        scale((1,), (8,), (seen, y, 7, 1.0))
    assert cupy.from_dlpack(x).data.ptr == x.data.ptr


def test_freed_memory_is_out_of_reach(cupy, scale):
    y = cupy.empty(8, "f4")
    gone = cupy.ones(8, "f4").data.ptr  # the array dies here
    with pytest.raises(PtxFault) as info:
        scale((1,), (8,), (gone, y, 8, 1.0))
    assert info.value.kind == "out-of-bounds"
