"""What a run works on, with its inputs: the host, a GPU, or a simulated device without one."""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np

from bench.cases import BWD, EPS, FWD, Case
from bench.check import Given, judge, statistics
from bench.contender import Batch, Contender, host_batch, host_rounds, host_turn

SAMPLE, SAMPLED = 16, 2**24  # rows at each end and between that a check on the host looks at
MOST_BUFFERS = 64
L2_MULTIPLE = 4  # what is rotated is at least this many times the L2 cache
TARGET_SECONDS = 2e-3  # of one batch: a thousand times the resolution of an event
ROUNDS, SLOW_SECONDS = 15, 0.4  # a contender gets fewer rounds if all of them would take longer


class Device:
    kind = "cpu"
    simulated = False
    fresh = True  # results are memory that was not there before; a graph's own pool was
    lib: Any = np  # whose arrays are normalized
    xp: Any = np  # in which the check computes

    def __init__(self, seconds: float = math.inf) -> None:
        self.deadline = time.monotonic() + seconds
        self.notes: list[str] = []

    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def plain(self, a: Any) -> Any:
        """The array where `xp` can compute with it."""
        return a

    def buffers(self, case: Case) -> int:
        """How many sets of inputs to rotate through."""
        return 1

    def sample(self, case: Case) -> Any:
        """Rows of y and dx that are compared: both ends, and some between."""
        M, N = case.M, case.N
        some = np.random.default_rng(3).integers(0, M, SAMPLE)
        ends = np.r_[: min(M, SAMPLE), max(0, M - SAMPLE) : M]
        return np.unique(np.r_[ends, some])[: max(1, SAMPLED // N)]

    def synchronize(self) -> None:
        """Wait for everything on the device."""

    def recover(self) -> None:
        """After a failure."""

    def batch(self, contender: Contender, inputs: Any) -> Batch:

        def left() -> dict[int, Any]:
            inputs.poison()
            with contender.scope():
                made = {0: contender.call(0)}
            self.synchronize()
            return made

        batch = host_batch(lambda: contender.call(0), contender.scope)
        batch.left = left
        return batch

    turn = staticmethod(host_turn)  # seconds of a batch
    rounds = staticmethod(host_rounds)  # how many turns of so many seconds


class Gpu(Device):
    """A CUDA GPU through CuPy; calls are captured in graphs and timed between events."""

    kind, fresh = "cuda", False

    def __init__(self, cupy: Any, seconds: float = math.inf, simulated: bool = False) -> None:
        super().__init__(seconds)
        self.lib, self.simulated = cupy, simulated
        # The reference is computed by plain array operations, which the simulated device has not.
        self.xp = np if simulated else cupy
        # Graphs are captured from a stream that is not the null stream.
        self.stream = cupy.cuda.Stream(non_blocking=True)
        attributes = cupy.cuda.Device().attributes
        self.l2_bytes = attributes["L2CacheSize"]
        self.sm_count = attributes["MultiProcessorCount"]

    def plain(self, a: Any) -> Any:
        return self.lib.asnumpy(a) if self.simulated else a

    def buffers(self, case: Case) -> int:
        if self.simulated:
            return 2
        return min(MOST_BUFFERS, max(2, -(-L2_MULTIPLE * self.l2_bytes // case.copy_bytes)))

    def sample(self, case: Case) -> Any:
        return slice(None)

    def synchronize(self) -> None:
        self.lib.cuda.runtime.deviceSynchronize()

    def recover(self) -> None:
        """Give memory back and see whether the device still answers."""
        with contextlib.suppress(AttributeError):  # the simulated device has no pool
            self.lib.get_default_memory_pool().free_all_blocks()
        self.synchronize()

    def batch(self, contender: Contender, inputs: Any) -> Batch:
        """Calls over all buffers, as often as makes a batch long enough; the same for everybody."""
        count = len(inputs)
        guess = count * (3e-6 + inputs.case.moved_bytes / 3e12)
        passes = 1 if self.simulated else max(1, math.ceil(TARGET_SECONDS / guess))
        kept: list[Any] = [None] * count  # no result may be reused while its batch runs

        def body() -> None:
            for _ in range(passes):
                for i in range(count):
                    kept[i] = contender.call(i)

        def left() -> dict[int, Any]:
            inputs.poison()
            for made in map(contender.arrays, kept):  # of which views are the inputs' own
                arrays = made if isinstance(made, tuple) else (made,)
                poison([a for a in arrays if a is not None and a.flags.c_contiguous])
            self.synchronize()
            batch.replay()
            self.synchronize()
            return {i: kept[i] for i in (0, count - 1)}

        self.synchronize()
        with self.stream, contender.scope():
            contender.call(0)  # compiles
        self.synchronize()
        batch = (contender.capture or captured)(self, body, passes * count)
        batch.keep += [contender, kept]  # a graph knows addresses, and does not hold the memory
        batch.left = left
        return batch

    def turn(self, batch: Batch) -> float:
        cuda = self.lib.cuda
        begin, end = cuda.Event(), cuda.Event()
        begin.record(self.stream)
        batch.replay()
        end.record(self.stream)
        end.synchronize()
        return cuda.get_elapsed_time(begin, end) / 1e3

    def rounds(self, once: float, share: float) -> int:
        return 1 if self.simulated else max(3, min(ROUNDS, int(SLOW_SECONDS / once)))


def captured(device: Any, body: Callable[[], None], calls: int) -> Batch:
    """Graph of what `body` launches through CuPy; plain launches where it cannot be captured."""
    cuda, stream = device.lib.cuda, device.stream
    # A pool of its own: memory that a captured call frees is written again by every replay.
    pool = cuda.MemoryPool()
    with stream, cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        try:
            body()
        except Exception as error:
            with contextlib.suppress(Exception):
                stream.end_capture()
            device.notes.append(f"not captured, timed as launches: {error}")
            batch = launched(device, body, calls)
        else:
            graph = stream.end_capture()
            batch = Batch(lambda: graph.launch(stream), calls, "graph", [graph])
    batch.keep.append(pool)
    return batch


def launched(device: Any, body: Callable[[], None], calls: int) -> Batch:
    """Plain launches, of what a graph cannot hold: host time may show."""

    def replay() -> None:
        with device.stream:
            body()

    return _ready(replay, calls, "launches")


def blocking(device: Any, body: Callable[[], None], calls: int) -> Batch:
    """For libraries with streams of their own: their work is over when the device is idle."""
    return _ready(lambda: (body(), device.synchronize()), calls, "blocking")


def _ready(replay: Callable[[], Any], calls: int, method: str) -> Batch:
    replay()  # so that there are results to look at
    return Batch(replay, calls, method)


def ahead(device: Device, calls: Iterable[Callable[[], Any]]) -> None:
    """Run calls in threads, for what they compile: NVRTC holds no lock. Failures show later."""

    def quiet(call: Callable[[], Any]) -> None:
        with contextlib.suppress(Exception):
            call()

    if device.kind == "cuda" and not device.simulated:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(quiet, calls))
        device.synchronize()


# -- inputs of a case, in as many buffers as it takes to get past the L2 cache of a GPU ------------

BLOCK = 4_194_301  # a prime: neighbouring rows and buffers never hold the same numbers in step


@dataclass
class Inputs:
    """Buffers of one case; call number i uses those of index i."""

    device: Any
    case: Case
    x: list[Any]  # each of `case.shape`
    y: list[Any] = field(default_factory=list)  # of a forward alone; NaN, so what is left out shows
    dy: list[Any] = field(default_factory=list)
    mean: list[Any] = field(default_factory=list)  # of a backward alone: as x with N = 1
    rstd: list[Any] = field(default_factory=list)
    weight: Any = None  # (N,)
    bias: Any = None
    columns: list[list[Any]] = field(default_factory=list)  # of each x, where it is a list of them
    copy_from: list[Any] = field(default_factory=list)  # flat, half of `case.copy_bytes` or more
    copy_to: list[Any] = field(default_factory=list)
    _given: dict[int, Given] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, a: Any) -> Any:
        """(M, N) of an array of x's shape: a view where its layout allows one."""
        if a.ndim > 2 or self.case.axis not in (-1, 1):
            axes = [k for k in range(a.ndim) if k != self.case.axis % a.ndim]
            a = a.transpose(*axes, self.case.axis % a.ndim)
        return a.reshape(-1, a.shape[-1])

    def poison(self) -> None:
        poison(self.copy_to)

    def judge(self, i: int, result: tuple[Any, ...], ours: bool, eps: float) -> tuple[float, float]:
        plain = self.device.plain
        if i not in self._given:
            dy = self.rows(plain(self.dy[i])) if self.dy else None
            affine = (None if a is None else plain(a) for a in (self.weight, self.bias))
            self._given[i] = Given(self.device.xp, self.rows(plain(self.x[i])), dy, *affine)
        given, left = self._given[i], [None if a is None else plain(a) for a in result]
        whole = [a is not None and a.shape == self.case.shape for a in left]
        left = [self.rows(a) if all_of_it else a for a, all_of_it in zip(left, whole, strict=True)]
        given = given if eps == EPS else replace(given, eps=eps)
        return judge(self.case, given, tuple(left), ours, self.device.sample(self.case))


def make_inputs(device: Any, case: Case) -> Inputs:
    """Random numbers, the same in every run; dy has mean zero: its sums stay within float16."""
    count, length = device.buffers(case), case.M * case.pitch + (case.layout in ("offset", "apart"))
    y_length = length + 2 * (case.layout == "apart")
    flat_x = [random_flat(device, case.dtype, length, i) for i in range(count)]
    x_by_column, y_by_column = case.layout[0] in "Fc", case.layout[-1] == "F"
    made = Inputs(device, case, [placed(case, flat, x_by_column) for flat in flat_x])
    if case.affine_dtype:
        affine = (random_flat(device, case.affine_dtype, case.N, seed) for seed in (101, 102))
        made.weight, made.bias = affine
    if case.layout == "columns":
        made.columns = [list(flat.reshape(case.N, case.M)) for flat in flat_x]
    if case.op == FWD:
        made.copy_from = flat_x
        made.copy_to = [device.lib.empty(y_length, dtype=flat_x[0].dtype) for _ in range(count)]
        made.y = [placed(case, flat, y_by_column) for flat in made.copy_to]
    else:
        flat_dy = [random_flat(device, case.dtype, y_length, i + 2, 0.0) for i in range(count)]
        made.dy = [placed(case, flat, y_by_column) for flat in flat_dy]
        half = case.copy_bytes // 2 // case.itemsize  # a copy reads one half, writes the other
        made.copy_from = [random_flat(device, case.dtype, half, i) for i in range(count)]
        made.copy_to = [device.lib.empty(half, dtype=flat_x[0].dtype) for _ in range(count)]
    made.poison()
    if case.op == BWD:  # statistics as x is, with the axis of length 1, rounded from float64
        shape = list(case.shape)
        shape[case.axis] = 1
        pairs = [statistics(device.xp, made.rows(device.plain(x))) for x in made.x]
        for k, left in enumerate((made.mean, made.rstd)):
            left += [device.lib.asarray(pair[k].reshape(shape)) for pair in pairs]
    return made


def placed(case: Case, flat: Any, by_column: bool) -> Any:
    """An array of the case's shape over the end of flat memory."""
    if by_column and case.layout != "NCHW":
        return flat.reshape(case.N, case.M).transpose(1, 0)
    if len(case.shape) > 2:
        return flat.reshape(case.shape)
    return flat[len(flat) - case.M * case.pitch :].reshape(case.M, case.pitch)[:, : case.N]


def poison(arrays: list[Any]) -> None:
    """Fill with ones in every bit: NaN in each floating dtype."""
    for a in arrays:
        a.view("uint8").fill(0xFF)


def random_flat(device: Any, dtype: str, length: int, seed: int, center: float = 0.5) -> Any:
    """Normal numbers, never all zeros: zeros draw less power and hide wrong addresses.

    One block is made on the host and laid out again and again; cuRAND may not be installed.
    """
    host = random_block(dtype, min(length, BLOCK), seed % 4, center)
    bits = f"u{host.itemsize}"  # copying bits needs no arithmetic in the dtype
    block = device.lib.asarray(host.view(bits))
    flat = device.lib.empty(length, dtype=host.dtype)
    target = flat.view(bits)
    for begin in range(0, length, len(block)):
        part = min(len(block), length - begin)
        target[begin : begin + part] = block[:part]
    return flat


@functools.lru_cache(maxsize=16)
def random_block(dtype: str, length: int, seed: int, center: float) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(length, dtype=np.float32) * 1.5 + center
    return values.astype(numpy_dtype(dtype))


def numpy_dtype(name: str) -> Any:
    """NumPy's dtype of that name; bfloat16 comes from ml_dtypes."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


# -- without a GPU: tests/ptx's stand-in ----------------------------------------------------------


@contextlib.contextmanager
def simulated_cupy() -> Iterator[Any]:
    """`import cupy` and the package's own CuPy file speak of a simulated device inside."""
    from tests.ptx import cupy_stand_in

    with cupy_stand_in.simulated_cupy(reload=("cupynorm._cuda.arrays",), count=False) as cupy:
        cuda, plain, pool = cupy.cuda, cupy.simulator.alloc, []

        def alloc(*args: Any, **kwargs: Any) -> Any:
            pool.append(plain(*args, **kwargs))  # memory of a graph's own pool stays
            return pool[-1]

        cuda.Event = cuda.MemoryPool = cuda.set_allocator = mock.Mock()
        cuda.using_allocator = lambda _: mock.patch.object(cupy.simulator, "alloc", alloc)
        cuda.get_elapsed_time = lambda begin, end: 1.0
        yield cupy
