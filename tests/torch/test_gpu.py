"""`cupynorm.torch` on a GPU: values, torch's streams, allocator, graphs, compiler and autocast."""

import contextlib

import numpy as np
import pytest

import cupynorm as cn
from tests.conftest import Backend, why_not

torch = pytest.importorskip("torch")

import cupynorm.torch as cn_torch  # noqa: E402
from tests.cpu.in_threads import in_threads  # noqa: E402
from tests.torch.cases import (  # noqa: E402
    DTYPES,
    TORCHSCRIPT,
    affine,
    check,
    check_gradients,
    name_of,
    numbers,
)

DEVICE = "cuda"
NO_GPU = why_not(Backend.TORCH_CUDA) or why_not(Backend.CUPY)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU)),
    pytest.mark.filterwarnings(TORCHSCRIPT),
]
# One N per kernel: K1, K2, K3 or K4, K4 of more blocks, K5; forward and backward take the same.
FAMILIES = {"warp": 77, "block": 3001, "long": 9001, "longer": 36_001, "split": 500_001}
each_family = pytest.mark.parametrize("N", FAMILIES.values(), ids=FAMILIES)
SLEEP = 50_000_000  # cycles: 25 ms or more, against microseconds for the calls behind it


def on_device(*tensors, grad=False):
    moved = [t.detach().to(DEVICE).requires_grad_(grad) for t in tensors]
    return moved if len(moved) > 1 else moved[0]


def cpu(*tensors):
    return [None if t is None else t.detach().cpu() for t in tensors]


def problem(N, rows=5, dtype=torch.float32, grad=True):
    """x, weight, bias and dy on the device."""
    x, dy = numbers(rows, N, dtype=dtype), numbers(rows, N, dtype=dtype, seed=7) - 3
    weight, bias = affine(N, dtype=dtype)
    return *on_device(x, weight, bias, grad=grad), on_device(dy.to(dtype))


def forward_and_backward(x, weight, bias, dy):
    y = cn_torch.layer_norm(x, weight.shape, weight, bias)
    return y, *torch.autograd.grad(y, (x, weight, bias), dy)


def check_all(results, x, weight, bias, dy):
    """y, dx, dweight and dbias against float64."""
    y, *grads = cpu(*results)
    x, weight, bias, dy = cpu(x, weight, bias, dy)
    check(y, x, 1, weight, bias)
    check_gradients(grads, dy, x, 1, weight)


# --- values -------------------------------------------------------------------------------------


def test_sums_over_200000_rows_are_no_worse_than_torchs():
    x, dy = (torch.randn(200_000, 64, device=DEVICE) for _ in range(2))
    weight, bias = on_device(*affine(64), grad=True)
    mine, theirs = (
        torch.autograd.grad(norm(x, (64,), weight, bias), (weight, bias), dy)
        for norm in (cn_torch.layer_norm, torch.nn.functional.layer_norm)
    )
    wide = [x.double(), weight.detach().double().requires_grad_()]
    wide.append(bias.detach().double().requires_grad_())
    y = torch.nn.functional.layer_norm(wide[0], (64,), *wide[1:])
    exact = torch.autograd.grad(y, wide[1:], dy.double())
    for got, other, want in zip(mine, theirs, exact, strict=True):
        error, noise = ((g - want).abs().max().item() for g in (got, other))
        assert error <= max(noise, 2**-23 * want.abs().max().item())


@each_family
def test_the_same_bits_every_time(N):
    given = problem(N, rows=300 if N < 9000 else 40)
    first = forward_and_backward(*given)
    for _ in range(3):
        assert all(map(torch.equal, first, forward_and_backward(*given)))


@each_family
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_the_bits_of_cupy(dtype, N):
    """The same kernels on the same memory, whichever library the array comes from."""
    import cupy

    x, weight, bias, dy = given = problem(N, dtype=dtype)
    y, *grads = results = forward_and_backward(*given)
    assert [(r.dtype, r.device) for r in results] == [(dtype, x.device)] * 4
    check_all(results, *given)
    torch.cuda.synchronize()
    arrays = [cupy.from_dlpack(t.detach()) for t in (x, weight, bias, dy)]
    assert [a.data.ptr for a in arrays] == [t.data_ptr() for t in (x, weight, bias, dy)]
    cx, cw, cb, cdy = arrays
    result = cn.layer_norm(cx, N, cw, cb, return_stats=True)
    made = cn.layer_norm_backward(cdy, cx, N, result.mean, result.rstd, cw)
    cupy.cuda.runtime.deviceSynchronize()
    for mine, its in zip((result.y, *made), (y, *grads), strict=True):
        assert torch.equal(torch.from_dlpack(mine), its.detach())


# --- streams and devices ------------------------------------------------------------------------


def on_stream(stream, *given):
    """Compile, and have torch take memory for the stream: both may wait for the device."""
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        forward_and_backward(*given)
    stream.synchronize()


@each_family
def test_the_current_stream(N):
    """What is late on a side stream is waited for, and nothing waits for the side stream."""
    late, weight, bias, dy = problem(N)
    side = torch.cuda.Stream()
    on_stream(side, late, weight, bias, dy)
    x = torch.full_like(late, torch.nan).requires_grad_()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        with torch.no_grad():
            x.copy_(late)
        results = forward_and_backward(x, weight, bias, dy)
        done = torch.cuda.Event()
        done.record()
    assert not done.query(), "a call waited for the device"
    torch.cuda.current_stream().wait_event(done)
    check_all(results, late, weight, bias, dy)


def test_many_threads_with_a_stream_each():
    given = [problem(N, rows=64) for N in (77, 77, 3001, 9001)]
    results = [None] * len(given)
    torch.cuda.synchronize()

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                results[i] = forward_and_backward(*given[i])
            torch.cuda.current_stream().synchronize()

    in_threads(len(given), work)
    for made, of in zip(results, given, strict=True):
        check_all(made, *of)


@each_family
def test_the_device_of_x(N):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    given = [t.detach().to("cuda:1") for t in problem(N)]
    x, weight, bias, dy = (*(t.requires_grad_() for t in given[:3]), given[3])
    for _ in range(2):  # compiled, then from the cache
        results = forward_and_backward(x, weight, bias, dy)
        assert torch.cuda.current_device() == 0
        assert all(r.device == torch.device("cuda", 1) for r in results)
        check_all(results, x, weight, bias, dy)
    check_all(forward_and_backward(*(here := problem(N))), *here)
    side = torch.cuda.Stream(device=1)
    on_stream(side, x, weight, bias, dy)
    with torch.cuda.stream(side):
        torch.cuda._sleep(SLEEP)
        forward_and_backward(x, weight, bias, dy)
        assert not side.query()
    side.synchronize()


# --- graphs -------------------------------------------------------------------------------------


@each_family
def test_capture_and_replay_through_torch(N):
    given = problem(N)
    x, dy = given[0], given[-1]
    on_stream(torch.cuda.Stream(), *given)  # as torch's notes on CUDA graphs ask
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_and_backward(*given)
    between = [torch.full_like(x, torch.nan) for _ in range(8)]  # outside the graph's memory
    for seed in (11, 12):
        fresh, slope = on_device(numbers(*x.shape, seed=seed), numbers(*x.shape, seed=seed + 9))
        with torch.no_grad():
            x.copy_(fresh)
            dy.copy_(slope)
            for r in results:
                r.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        check_all(results, *given)
        eager = forward_and_backward(*given)
        assert all(map(torch.equal, results, eager))
    assert all(t.isnan().all() for t in between)


def test_a_graphed_module():
    norm = cn_torch.LayerNorm(768, device=DEVICE)
    x = on_device(numbers(33, 768), grad=True)
    graphed = torch.cuda.make_graphed_callables(norm, (x.detach().clone().requires_grad_(),))
    dy = on_device(numbers(33, 768, seed=3) - 3)
    y = graphed(x)
    grads = torch.autograd.grad(y, (x, norm.weight, norm.bias), dy)
    check_all((y, *grads), x, norm.weight, norm.bias, dy)


@each_family
def test_capture_and_replay_through_cupy(N):
    import cupy

    given = [cupy.from_dlpack(t.detach()) for t in problem(N)]
    x, weight, bias, dy = given

    def run():
        y, mean, rstd = cn.layer_norm(x, N, weight, bias, return_stats=True)
        return y, *cn.layer_norm_backward(dy, x, N, mean, rstd, weight)

    run()
    cupy.cuda.runtime.deviceSynchronize()
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        try:
            results = run()
        finally:
            graph = stream.end_capture()
    for seed in (11, 12):
        x.set(numbers(*x.shape, seed=seed).numpy())
        for r in results:
            r.fill(np.nan)
        cupy.cuda.runtime.deviceSynchronize()
        graph.launch(stream)
        stream.synchronize()
        check_all(map(torch.from_dlpack, results), *map(torch.from_dlpack, given))


@pytest.mark.parametrize("N", [96, 65536], ids=["one kernel", "workspace"])
@pytest.mark.parametrize("prepared", [False, True], ids=["out=", "prepared"])
def test_captured_by_torch_into_out(N, prepared):
    x, weight, bias = (on_device(numbers(*s, seed=i)) for i, s in enumerate([(3, N), (N,), (N,)]))
    y = torch.empty_like(x)
    f = cn.prepare(x, N, weight, bias)
    call = f if prepared else lambda x, out: cn.layer_norm(x, N, weight, bias, out=out)
    call(x, out=y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(x, out=y)
    for seed in (11, 12):
        x.copy_(numbers(3, N, seed=seed))
        weight.mul_(1.5)  # held by reference
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, cn.layer_norm(x, N, weight, bias))


@pytest.mark.parametrize("N", [96, 65536], ids=["one kernel", "workspace"])
@pytest.mark.parametrize("prepared", [False, True], ids=["out=", "prepared"])
def test_captured_by_cupy_into_out(N, prepared):
    import cupy

    x, weight = (cupy.asarray(numbers(*s, seed=i).numpy()) for i, s in enumerate([(3, N), (N,)]))
    y = cupy.empty_like(x)
    f = cn.prepare(x, N, weight)
    call = f if prepared else lambda x, out: cn.layer_norm(x, N, weight, out=out)
    call(x, out=y)
    cupy.cuda.runtime.deviceSynchronize()
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        try:
            call(x, out=y)
        finally:
            graph = stream.end_capture()
    assert (pool.total_bytes() > 0) == (N == 65536)  # the workspace, and nothing else
    for seed in (11, 12):
        x.set(numbers(3, N, seed=seed).numpy())
        y.fill(cupy.nan)
        cupy.cuda.runtime.deviceSynchronize()
        graph.launch(stream)
        stream.synchronize()
        assert (y == cn.layer_norm(x, N, weight)).all()


def test_a_prepared_call_allocates_nothing():
    x, weight, bias, _ = problem(1024, rows=128)
    x, weight, bias = (t.detach() for t in (x, weight, bias))
    y, f = torch.empty_like(x), cn.prepare(x, 1024, weight, bias)
    f(x, out=y)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.cuda.stream(torch.cuda.Stream()):
        f(x, out=y)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    torch.cuda.synchronize()
    assert torch.equal(y, cn.layer_norm(x, 1024, weight, bias))


# --- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1024, 65536], ids=["one kernel", "workspace"])
def test_results_come_from_torchs_allocator(N):
    import cupy

    x, weight, bias, dy = problem(N, rows=128)
    forward_and_backward(x, weight, bias, dy)
    torch.cuda.synchronize()

    def requested():  # memory_allocated() counts whole blocks, which may be larger
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    def grown(function):
        pool = cupy.get_default_memory_pool()
        torchs, cupys = requested(), pool.used_bytes()
        made = function()
        assert pool.used_bytes() == cupys
        grown = requested() - torchs
        del made
        assert requested() == torchs
        return grown

    with torch.no_grad():
        assert grown(lambda: cn_torch.layer_norm(x, (N,), weight, bias)) == x.nbytes
    statistics = 2 * 128 * 4
    assert grown(lambda: cn_torch.layer_norm(x, (N,), weight, bias)) == x.nbytes + statistics
    y = cn_torch.layer_norm(x, (N,), weight, bias)
    leaves = (x, weight, bias)
    backward = grown(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))
    assert backward == x.nbytes + 2 * weight.nbytes


def test_an_exporter_that_requires_grad_is_refused_by_torch():
    from cupynorm._cuda import arrays as _cuda

    x = torch.ones(3, 4, device=DEVICE, requires_grad=True)
    with pytest.raises((BufferError, RuntimeError), match="detach"):  # as the version has it
        _cuda.from_exporter(x)
    assert _cuda.from_exporter(x.detach()).data.ptr == x.data_ptr()


# --- compiler -----------------------------------------------------------------------------------


def block(x, weight, bias):
    """A norm between operations that a compiler would like to fuse."""
    return torch.relu(cn_torch.layer_norm(x + 1, weight.shape, weight, bias)) * 2


def eager_block(x, weight, bias):
    return torch.relu(torch.nn.functional.layer_norm(x + 1, weight.shape, weight, bias)) * 2


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about the machine and itself
@pytest.mark.parametrize(
    ("dtype", "mode"),
    [(torch.bfloat16, None), (torch.float32, "reduce-overhead")],
    ids=["default", "CUDA graphs"],
)
def test_compiled_in_one_graph(dtype, mode):
    pytest.importorskip("triton")
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for rows in (33, 33, 33, 50):  # CUDA graphs are recorded at the second, replayed at the third
        x, weight, bias, dy = problem(768, rows=rows, dtype=dtype)
        y = compiled(x, weight, bias)
        grads = torch.autograd.grad(y, (x, weight, bias), dy)
        want = eager_block(x, weight, bias)
        theirs = torch.autograd.grad(want, (x, weight, bias), dy)
        bound = 20 * torch.finfo(dtype).eps
        for mine, other in zip((y, *grads), (want, *theirs), strict=True):
            assert mine.dtype == other.dtype
            scale = other.detach().abs().max().item()
            torch.testing.assert_close(mine, other, rtol=bound, atol=bound * max(1.0, scale))


# --- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("under", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_autocast_gives_torchs_dtypes(dtype, under):
    x, weight, bias, dy = problem(96, rows=17, dtype=dtype)
    if dtype != torch.float64:
        weight, bias = (p.detach().float().requires_grad_() for p in (weight, bias))
    if under is None and weight.dtype != dtype:
        pytest.skip("torch refuses a half x with float32 parameters outside autocast")
    made = []
    for norm in (cn_torch.layer_norm, torch.nn.functional.layer_norm):
        cast = torch.autocast("cuda", under) if under else contextlib.nullcontext()
        with cast:
            y = norm(x, (96,), weight, bias)
        made.append((y, *torch.autograd.grad(y, (x, weight, bias), dy.to(y.dtype))))
    for mine, theirs in zip(*made, strict=True):
        assert mine.dtype == theirs.dtype
        bound = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=bound * 16)
