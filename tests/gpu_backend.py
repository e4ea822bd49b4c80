"""Where tests run a plan's stages: in the simulator, or by `cupy.RawKernel` on a GPU."""

import functools
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cupynorm._cuda.plan import Device, Stage
from cupynorm._cuda.source import source_of
from tests.conftest import Backend, why_not
from tests.ptx.launch import Buffer, launch
from tests.ptx.limits import DeviceLimits

SM90 = Device(compute_capability=90, sm_count=132, shared_bytes=227 * 1024)


class SimulatedMachine:
    """The engine of `tests/ptx`."""

    name = "simulated"

    def __init__(self, device: Device = SM90) -> None:
        self.device = device
        self.limits = DeviceLimits.of(str(device.compute_capability))

    def memory(self, nbytes: int, name: str, offset: int = 0, itemsize: int = 4) -> Any:
        return Buffer(nbytes, name=name, offset=offset, granule=itemsize)

    def put(self, memory: Any, values: np.ndarray, start: int = 0) -> None:
        memory.write(values, start)

    def get(self, memory: Any) -> np.ndarray:
        return memory.bytes().copy()

    def written(self, memory: Any) -> np.ndarray:
        """For each byte, whether the host or a kernel wrote it."""
        return memory.defined().copy()

    def hole(self, nbytes: int) -> Any:
        """Addresses that are taken, without memory behind them."""
        return mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)

    def run(self, stage: Stage, args: Sequence[Any], memories: Sequence[Any], seed: Any) -> Any:
        return launch(
            source_of(stage), stage.name, stage.grid, stage.block, stage.shared_bytes, args,
            buffers=memories, seed=seed, opt_in_shared=stage.shared_bytes, limits=self.limits,
        )  # fmt: skip


class GpuMachine:
    """A GPU, through CuPy; memory starts as NaN, with margins that must stay as they are."""

    name = "gpu"
    FILL = 0xFF
    MARGIN = 512

    @functools.cached_property
    def device(self) -> Device:
        import cupy

        gpu = cupy.cuda.Device()
        return Device(
            int(gpu.compute_capability),
            gpu.attributes["MultiProcessorCount"],
            gpu.attributes["MaxSharedMemoryPerBlockOptin"],
        )

    def memory(self, nbytes: int, name: str, offset: int = 0, itemsize: int = 4) -> Any:
        import cupy

        whole = cupy.full(nbytes + 2 * self.MARGIN + 256, self.FILL, dtype=cupy.uint8)
        boundary = self.MARGIN + -(whole.data.ptr + self.MARGIN) % 256
        return _GpuMemory(whole, boundary + offset, nbytes)

    def put(self, memory: Any, values: np.ndarray, start: int = 0) -> None:
        raw = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
        first = memory.first + start
        memory.whole[first : first + raw.size].set(raw)
        memory.host[start : start + raw.size] = True

    def get(self, memory: Any) -> np.ndarray:
        whole = memory.whole.get()
        end = memory.first + memory.nbytes
        margins = np.concatenate([whole[: memory.first], whole[end:]])
        assert (margins == self.FILL).all(), "a kernel wrote outside its memory"
        return whole[memory.first : end]

    def written(self, memory: Any) -> np.ndarray:
        """For each byte, whether it changed: a stored 0xFF goes unseen."""
        return memory.host | (self.get(memory) != self.FILL)

    def hole(self, nbytes: int) -> Any:
        import cupy

        return cupy.empty(nbytes, dtype=cupy.uint8)

    def run(self, stage: Stage, args: Sequence[Any], memories: Sequence[Any], seed: Any) -> Any:
        kernel = _raw_kernel(stage.name, source_of(stage))
        if stage.shared_bytes > 48 * 1024:
            kernel.max_dynamic_shared_size_bytes = self.device.shared_bytes
        kernel(stage.grid, stage.block, tuple(args), shared_mem=stage.shared_bytes)


class _GpuMemory:
    def __init__(self, whole: Any, first: int, nbytes: int) -> None:
        self.whole, self.first, self.nbytes = whole, first, nbytes
        self.ptr = whole.data.ptr + first
        self.host = np.zeros(nbytes, bool)


@functools.cache
def _raw_kernel(name: str, source: str) -> Any:
    import cupy

    return cupy.RawKernel(source, name)


Machine = SimulatedMachine | GpuMachine
SIMULATED = SimulatedMachine()
MACHINES = [SIMULATED] if why_not(Backend.CUPY) else [SIMULATED, GpuMachine()]

# On a module's `pytestmark`: each of its tests takes a `machine`.
ON_EACH_MACHINE = pytest.mark.parametrize(
    "machine",
    [pytest.param(m, marks=[pytest.mark.gpu] * (m.name == "gpu"), id=m.name) for m in MACHINES],
)
