"""`cupynorm.torch` under torch.compile, torch.export, tracers, and torch's own operator checks."""

import pytest
import torch

import cupynorm as cn
import cupynorm.torch as cn_torch
from tests.torch.cases import TORCHSCRIPT, affine, check, check_gradients, numbers

# torch's own export code compares tree specs in the way that it deprecates.
TREESPEC = "ignore:.isinstance.treespec, LeafSpec.*:FutureWarning"
pytestmark = [pytest.mark.filterwarnings(TORCHSCRIPT), pytest.mark.filterwarnings(TREESPEC)]

reference = torch.nn.functional.layer_norm
FORWARD = torch.ops.cupynorm.layer_norm_fwd.default
BACKWARD = torch.ops.cupynorm.layer_norm_bwd.default


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operators_of(function, *args, **options):
    """Compile and call; what came out, and the operators in the forward and backward graphs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        function,
        backend=aot_autograd(fw_compiler=keep, bw_compiler=keep),
        fullgraph=True,
        **options,
    )
    y = compiled(*args)
    if y.requires_grad:
        y.sum().backward()
    return y, graphs


def test_inductor():
    """Its code hands the operators strides of its own choice and reuses buffers between them.

    Products are calls to it, where C++ for anything else takes twenty seconds.
    """
    x, weight, by = numbers(4, 8, grad=True), affine(8, grad=True)[0], numbers(8, 8) - 3

    def block(x, norm):
        return norm(x @ by, (8,), weight) @ by.T

    compiled = torch.compile(block, fullgraph=True, backend="inductor")
    dy = numbers(4, 8, seed=4)
    got = torch.autograd.grad(compiled(x, cn_torch.layer_norm), (x, weight), dy)
    want = torch.autograd.grad(block(x, reference), (x, weight), dy)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Dynamo detected:UserWarning")
@pytest.mark.parametrize("norm", [cn.layer_norm, cn_torch.layer_norm], ids=lambda f: f.__module__)
def test_dynamic_rows_compile_once(norm):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: norm(x, (8,)), backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for rows in (3, 5, 700):
        x, dy = numbers(rows, 8, grad=True), numbers(rows, 8, seed=4) - 3
        y = compiled(x)
        check(y, x, 1)
        check_gradients((*torch.autograd.grad(y, x, dy), None, None), dy, x, 1)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_eps_as_an_argument():
    compiled = torch.compile(
        lambda x, eps: cn_torch.layer_norm(x, (8,), None, None, eps),
        backend="aot_eager",
        fullgraph=True,
    )
    for eps in (1e-5, 0.5, 0.25):
        check(compiled(numbers(3, 8), eps), numbers(3, 8), 1, eps=eps)


def test_errors_come_out_of_a_compiled_function():
    compiled = torch.compile(lambda x: cn_torch.layer_norm(x, (7,)), backend="aot_eager")
    with pytest.raises(ValueError, match="trailing dimensions"):
        compiled(numbers(3, 8))


def test_transforms_in_a_compiled_function():
    from torch.func import grad, vmap

    weight, bias = affine(8, dtype=torch.float64)
    x = numbers(5, 3, 8, dtype=torch.float64)

    def per_sample(f):
        return lambda x: vmap(grad(lambda x: f(x, (8,), weight, bias).sin().sum()))(x)

    compiled = torch.compile(per_sample(cn_torch.layer_norm), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), per_sample(reference)(x))


def test_a_second_derivative_through_a_compiled_graph_is_refused():
    x = numbers(3, 8, grad=True)
    compiled = torch.compile(lambda x: cn_torch.layer_norm(x, (8,)).sin(), backend="aot_eager")
    (first,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, tmp_path):
    module = torch.nn.Sequential(cn_torch.LayerNorm(16), torch.nn.Linear(16, 16)).eval()
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(
        module, (numbers(4, 16),), dynamic_shapes=[{0: rows}], strict=strict
    )
    assert any("cupynorm" in str(node.target) for node in program.graph.nodes)
    x = numbers(9, 16)
    torch.testing.assert_close(program.module()(x), module(x))
    inference = program.run_decompositions()
    torch.testing.assert_close(inference.module()(x), module(x))
    torch.export.save(program, tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2")
    torch.testing.assert_close(loaded.module()(x), module(x))


def test_tracers_keep_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    weight, bias = affine(8)
    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(lambda x, w, b: cn_torch.layer_norm(x, (8,), w, b), tracing_mode=mode)(
            numbers(3, 8), weight, bias
        )
        assert FORWARD in [node.target for node in graph.graph.nodes]
        check(graph(numbers(3, 8, seed=7), weight, bias), numbers(3, 8, seed=7), 1, weight, bias)
    symbolic = torch.fx.symbolic_trace(cn_torch.LayerNorm(8))
    check(symbolic(numbers(5, 8)), numbers(5, 8), 1)


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, numbers(3, 8))])
def test_torchscript_holds_torchs_operator(make):
    program = make(cn_torch.LayerNorm(8))
    assert "aten::layer_norm" in str(program.inlined_graph)
    check(program(numbers(5, 8)), numbers(5, 8), 1)


PERMUTED = numbers(6, 4, 8).permute(1, 0, 2)
OPERATOR_CASES = [  # x, axes, parameters, eps, whether y lies as x
    (numbers(4, 8), [1], affine(8), 1e-5, True),
    (numbers(4, 3, 8), [1, 2], (None, affine(3, 8)[1]), 0.5, False),
    (PERMUTED, [0], (None, None), 1e-5, True),
    (PERMUTED, [2], affine(8), 1e-5, False),
    (numbers(4, 8, dtype=torch.bfloat16), [1], affine(8), 1e-5, True),
    (numbers(0, 8), [1], affine(8), 1e-5, True),
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("x", "axes", "affine", "eps", "keep"), OPERATOR_CASES)
def test_opcheck_of_the_forward_operator(x, axes, affine, eps, keep, grad):
    leaves = [t if t is None else t.clone().requires_grad_(grad) for t in (x, *affine)]
    torch.library.opcheck(FORWARD, (leaves[0], axes, *leaves[1:], eps, keep))


@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize(("x", "axis"), [(numbers(4, 6, 8), 2), (PERMUTED, 0)])
def test_opcheck_of_the_backward_operator(wanted, x, axis):
    weight, _ = affine(x.shape[axis])
    _, mean, rstd = cn.layer_norm(x, axis=axis, return_stats=True)
    args = (x * 2, x, [axis], mean, rstd, weight, wanted, torch.float32, torch.float64)
    torch.library.opcheck(BACKWARD, args)


def test_operators_refuse_a_weight_of_another_shape():
    """A saved program can be run with any tensors, and addresses would not tell."""
    x, short = numbers(4, 8), numbers(7)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\)"):
        FORWARD(x, [1], short, None, 1e-5, True)
    with pytest.raises(ValueError, match=r"bias has shape \(7,\)"):
        FORWARD(x, [1], None, short, 1e-5, True)
    stats = torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"weight has shape \(7,\)"):
        BACKWARD(x, x, [1], stats, stats, short, (True,) * 3, torch.float32, torch.float32)


def test_the_backward_operator_has_no_derivative_and_says_so():
    x = numbers(4, 8, grad=True)
    mean, rstd = torch.zeros(4, 1), torch.ones(4, 1)
    args = (x, x, [1], mean, rstd, None, (True, False, False), torch.float32, torch.float32)
    with pytest.raises(NotImplementedError, match=r"outside torch\.compile"):
        BACKWARD(*args)[0].sum().backward()
