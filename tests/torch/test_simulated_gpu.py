"""The GPU branch of the torch adapter: its own launches, run on the simulated device.

Tensors are on the CPU here. Where the door of tensors hands them to what computes on a GPU they are
copied into memory of the simulator, and what the kernels wrote is handed on as tensors over that
memory; the rest, autograd and `_torch.machines` itself, runs as it does on a GPU.
"""

import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import cupynorm as cn
import cupynorm.torch as cn_torch
from cupynorm import _memo
from cupynorm._torch import machines
from tests.torch.cases import LAYOUTS, affine, check, check_gradients, expected, numbers, numpy_of

# One N per kernel: K1, K2 and K4, and K5 with few rows, which are K4's where it is. K3 is launched
# as K2 is, and by CuPy's arrays in cuda/test_arrays.py.
FAMILIES = {"warp": 77, "block": 3001, "cluster": 9001, "split": 36_001}
STREAM = 0x7000  # torch's current stream, as the simulator sees it


class _InSimulatedMemory(TorchDispatchMode):
    """What torch allocates, as its CUDA allocator would: workspaces and contiguous copies."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(r.alias_info for r in func._schema.returns):
            return result
        self.gpu.allocated.append(str(func))
        return self.gpu.moved(result, written="empty" not in str(func))


class Gpu:
    """Stands at the seam, in the place of what computes on the CPU."""

    def __init__(self, sim):
        self.sim, self.allocated = sim, []

    def moved(self, tensor, *, written=True):
        """A tensor with the same strides over simulated memory."""
        if tensor is None:
            return None
        storage = tensor.detach()
        flat = torch.as_strided(
            storage, (storage.untyped_storage().nbytes() // storage.itemsize,), (1,), 0
        )
        with self.sim.cuda.Device(1):
            if written:
                placed = self.sim.place(numpy_of(flat))
            else:
                placed = self.sim.empty(tuple(flat.shape), numpy_of(flat).dtype)
        host = placed._host().view(np.uint8).reshape(-1)
        memory = torch.from_numpy(host).view(tensor.dtype)
        memory.owner = placed  # keeps the simulator's buffer alive
        moved = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        moved.owner = placed
        return moved

    def run_of(self, facts):
        """What runs on copies of its arguments, of which some are written."""
        launch = machines.kernels(facts, 1)
        written = (5, 6, 7) if facts.backward else (1, 4, 5, 7)[: 3 + facts.op.residual]

        def run(*arrays):
            moved = [self.moved(t, written=i not in written) for i, t in enumerate(arrays)]
            with _InSimulatedMemory(self):
                launch(*moved)
            for i in written:
                if arrays[i] is not None:
                    arrays[i].copy_(moved[i])

        return run

    @property
    def launches(self):
        return self.sim.simulator.launches

    @property
    def names(self):
        return [launch.name for launch in self.launches]


@pytest.fixture
def gpu(monkeypatch, sim):
    """The adapter with a simulated GPU of index 1, of two, in the place of the CPU."""
    gpu = Gpu(sim)
    sim.simulator.current_device = 1
    sim.simulator.streams[STREAM] = 1

    class Torch:
        """torch, with the CUDA build's functions that `_torch.machines` calls."""

        class cuda:
            current_device = staticmethod(lambda: sim.simulator.current_device)
            device = sim.cuda.Device

        def __getattr__(self, name):
            return getattr(torch, name)

    monkeypatch.setattr(machines, "torch", Torch())
    monkeypatch.setattr(machines, "_stream", lambda index: machines._Stream(STREAM))
    monkeypatch.setattr(machines, "run_of", gpu.run_of)
    monkeypatch.setattr(machines, "in_place", lambda facts: None)  # no loops beside it
    _memo.settled().clear()  # of calls that are bound to the loops
    yield gpu
    _memo.settled().clear()
    sim.simulator.current_device = 0


CASES = [(family, torch.float32) for family in FAMILIES]
CASES += [("warp", dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)]


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=str)
def test_each_kernel_forward_and_backward(gpu, family, dtype):
    """On torch's stream and on the tensors' device, which need not be the current one."""
    gpu.sim.simulator.current_device = 0  # as after torch.cuda.set_device(0)
    N = FAMILIES[family]
    x, (weight, bias) = numbers(3, N, dtype=dtype, grad=True), affine(N, grad=True)
    dy = (numbers(3, N, seed=4) - 3).to(dtype)
    y = cn_torch.layer_norm(x, (N,), weight, bias)
    check(y, x, 1, weight, bias)
    forward = len(gpu.launches)
    assert all(name.startswith(f"layer_norm_fwd_{family}") for name in gpu.names)
    assert forward == (3 if family == "split" else 1)
    y.backward(dy)
    check_gradients((x.grad, weight.grad, bias.grad), dy, x, 1, weight)
    assert any(name.startswith("layer_norm_bwd") for name in gpu.names[forward:])
    assert {(launch.stream, launch.device) for launch in gpu.launches} == {(STREAM, 1)}
    assert gpu.sim.simulator.current_device == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_in_float32(gpu, dtype):
    """Beside x of its dtype one launch; beside 16 bits a copy of x is normalized."""
    given = [numbers(3, 77, dtype=dtype), numbers(3, 77, seed=5), affine(77)[0]]
    flow = numbers(3, 77, seed=4) - 3, numbers(3, 77, seed=6) - 3
    found = []
    for norm in (cn_torch.add_rms_norm, None):
        x, residual, weight = (t.clone().requires_grad_() for t in given)
        if norm is None:
            total = x + residual
            y = torch.nn.functional.rms_norm(total, (77,), weight, 1e-5).to(dtype)
        else:
            y, total = norm(x, residual, (77,), weight, 1e-5)
        torch.autograd.backward((y, total), (flow[0].to(dtype), flow[1]))
        found.append((y, total, x.grad, residual.grad, weight.grad))
    assert gpu.names[0].startswith("add_rms_norm_fwd_warp_f32")
    assert any("bwd_warp_f32" in name and "dsum" in name for name in gpu.names)
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(found[0][1], found[1][1])


def test_nothing_is_allocated_but_through_torch(gpu):
    """The simulator would count memory that CuPy hands out."""
    N = FAMILIES["split"]
    x, weight, dy = numbers(2, N, grad=True), affine(N, grad=True)[0], numbers(2, N)
    cn_torch.layer_norm(x, x.shape[1:], weight).backward(dy)
    gpu.allocated.clear()
    allocated = gpu.sim.simulator.allocations
    compiled = len(gpu.sim.simulator.compilations)
    cn_torch.layer_norm(x, x.shape[1:], weight).backward(dy)
    # x, weight, y, mean, rstd; dy, x, mean, rstd, weight, dx, dweight: the test's own copies
    own = 5 + 7 + len(gpu.allocated)
    assert gpu.sim.simulator.allocations - allocated == own
    assert len(gpu.sim.simulator.compilations) == compiled
    assert set(gpu.allocated) == {"aten.empty.memory_format"}  # K5's and the partials' workspaces


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 1)])
def test_only_what_is_asked_for_is_written(gpu, wanted):
    tensors = numbers(4, 77), *affine(77)
    for tensor, want in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(bool(want))
    dy = numbers(4, 77, seed=4) - 3
    cn_torch.layer_norm(tensors[0], (77,), *tensors[1:]).backward(dy)
    check_gradients([t.grad for t in tensors], dy, tensors[0], 1, tensors[1])


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(gpu, layout, keep):
    """What the kernels cannot walk is copied, by torch."""
    x = LAYOUTS[layout]()
    weight, bias = (t[::2] for t in affine(2 * x.shape[-1], grad=True))
    x.requires_grad_()
    norm = cn.layer_norm if keep else cn_torch.layer_norm
    y = norm(x, x.shape[-1:], weight, bias)
    check(y, x, 1, weight, bias)
    for dy in (numbers(*x.shape, seed=4) - 3, torch.ones(()).expand(x.shape)):
        grads = torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True)
        check_gradients(grads, dy, x, 1, weight)


@pytest.mark.parametrize("axes", [(1,), (0, 2), (0, 1)])
def test_other_axes(gpu, axes):
    """Also such as fold into no one stride, so that y and dx are copies that are copied back."""
    x = numbers(4, 30, 5, grad=True)
    weight, bias = affine(*(x.shape[a] for a in axes), grad=True)
    y, mean, _ = cn.layer_norm(x, None, weight, bias, axis=axes, return_stats=True)
    rest = tuple(a for a in range(3) if a not in axes)
    rows = x.detach().permute(*rest, *axes)
    n, dy = len(axes), numbers(*x.shape, seed=4) - 3
    check(y.permute(*rest, *axes), rows, n, weight, bias)
    want = expected(rows, n)[1]
    np.testing.assert_allclose(mean.permute(*rest, *axes).detach().numpy(), want, rtol=1e-6)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    turned = dx.permute(*rest, *axes), dweight, dbias
    check_gradients(turned, dy.permute(*rest, *axes), rows, n, weight)


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, "cupynorm._cuda.arrays", raising=False)
    monkeypatch.delattr("cupynorm._cuda.arrays", raising=False)
    with pytest.raises(ImportError, match=r"cupynorm\[cuda12\]"):
        machines.check_device(torch.device("cuda", 0))
    with pytest.raises(ValueError, match="device type xpu"):
        machines.check_device(torch.device("xpu"))
