"""RawKernel and Function of the CuPy stand-in, as strict as CuPy's own."""

from __future__ import annotations

from typing import Any

from .fault import PtxFault
from .launch import launch, load
from .simulated_array import Array
from .simulated_device import current_stream
from .simulator import Launch, Simulator


def _wrong_type(what: str, wanted: type, value: Any) -> TypeError:
    got = type(value).__name__
    return TypeError(
        f"Argument '{what}' has incorrect type (expected {wanted.__name__}, got {got})"
    )


class Function:
    """`cupy.cuda.function.Function`: an entry loaded on one device."""

    __slots__ = ("_code", "_device", "_name", "_opt_in", "_sim")

    def __init__(self, sim: Simulator, code: str, name: str) -> None:
        load(code, name, sim.limits.compute_capability)
        self._sim, self._code, self._name = sim, code, name
        self._device = sim.current_device
        self._opt_in = sim.limits.shared
        sim.compilations.append((name, self._device))

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Any,
        shared_mem: int = 0,
        stream: Any = None,
    ) -> None:
        for what, value in (("grid", grid), ("block", block)):
            if type(value) is not tuple:
                raise _wrong_type(what, tuple, value)
        sim = self._sim
        pointer = current_stream(sim).ptr if stream is None else stream.ptr
        if sim.current_device != self._device:
            msg = f"{self._name} was loaded on device {self._device}, not on {sim.current_device}"
            raise PtxFault("wrong-device", msg)
        if sim.streams.get(pointer, self._device) != self._device:
            msg = f"{self._name}: the stream belongs to device {sim.streams[pointer]}"
            raise PtxFault("wrong-device", msg)
        # CuPy: missing lengths are 1, and so are lengths below 1.
        full_grid = tuple(max(1, int(n)) for n in (*grid, 1, 1)[:3])
        full_block = tuple(max(1, int(n)) for n in (*block, 1, 1)[:3])
        passed = tuple(a.data.ptr if isinstance(a, Array) else a for a in args)
        cluster, *_ = load(self._code, self._name, sim.limits.compute_capability).cluster

        def run() -> None:
            traffic = launch(
                self._code, self._name, full_grid, full_block, shared_mem, passed,
                buffers=sim.buffers(), seed=sim.seed, limits=sim.limits,
                opt_in_shared=self._opt_in, device=self._device, count=sim.count,
            )  # fmt: skip
            about = self._name, full_grid, full_block, shared_mem, pointer, self._device, passed
            sim.launches.append(Launch(*about, traffic, cluster))

        run() if sim.captured is None else sim.captured.append(run)


class RawKernel:
    """`cupy.RawKernel`: compiled on first use on each device."""

    _sim: Simulator

    def __init__(
        self, code: str, name: str, options: tuple[str, ...] = (), backend: str = "nvrtc"
    ) -> None:
        for what, value, wanted in (
            ("code", code, str), ("name", name, str), ("options", options, tuple),
            ("backend", backend, str),
        ):  # fmt: skip
            if type(value) is not wanted:
                raise _wrong_type(what, wanted, value)
        self.code, self.name, self.options, self.backend = code, name, options, backend
        self._loaded: dict[int, Function] = {}

    @property
    def kernel(self) -> Function:
        """The entry on the current device."""
        device = self._sim.current_device
        if device not in self._loaded:
            self._loaded[device] = Function(self._sim, self.code, self.name)
        return self._loaded[device]

    def __call__(self, grid: Any, block: Any, args: Any, **kwargs: Any) -> None:
        self.kernel(grid, block, args, **kwargs)

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        """Of the entry on the current device; 48 KiB until set."""
        return self.kernel._opt_in

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        most = self._sim.limits.opt_in_shared
        if not 0 <= nbytes <= most:
            msg = f"{self.name}: {nbytes} bytes of dynamic shared memory; the device takes {most}"
            raise PtxFault("limits", msg)
        self.kernel._opt_in = int(nbytes)
