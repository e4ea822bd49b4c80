"""Layer and RMS norm, 1 + weight and the fused adds on tensors: one body over the operations."""

import copy
import itertools
import pickle

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import cupynorm as cn
import cupynorm.torch as ct
from cupynorm._ops import OPS
from cupynorm._torch import operators
from tests.torch.cases import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    TORCHSCRIPT,
    Scaled,
    affine,
    check,
    check_gradients,
    name_of,
    numbers,
)
from tests.torch.test_compile import TREESPEC, operators_of

pytestmark = [pytest.mark.filterwarnings(TORCHSCRIPT), pytest.mark.filterwarnings(TREESPEC)]

double, functional = torch.float64, torch.nn.functional
WHOLE = ["layer_norm", "rms_norm", "zero_centered_rms_norm"]
ADDING = ["add_layer_norm", "add_rms_norm", "zero_centered_add_rms_norm"]
EACH = [*WHOLE, *ADDING]
whole, adding, each = (pytest.mark.parametrize("op", ops) for ops in (WHOLE, ADDING, EACH))


def ours(op, x, weight=None, *more, n=1, eps=1e-5):
    """One result, of a weight and layer norm's bias; or (y, sum), of a weight and residual."""
    how = {"zero_centered_weight": True} if OPS[op].unit_weight else {}
    residual, bias = (more, ()) if OPS[op].residual else ((), more)
    function = getattr(ct, OPS[op].function)
    return function(x, *residual, x.shape[x.ndim - n :], weight, *bias, eps=eps, **how)


def written_out(op, x, weight, *more, eps=1e-5):
    """The formula; torch 2.13's layer_norm has other mixed derivatives, which are wrong."""
    total = x.to(more[0].dtype) + more[0] if OPS[op].residual else x
    d = total - total.mean(-1, keepdim=True) if OPS[op].center else total
    y = d / (d.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    y = y * (1 + weight if OPS[op].unit_weight else weight)
    y = y + more[0] if op == "layer_norm" else y
    return (y.to(x.dtype), total) if OPS[op].residual else y


def two_calls(op, x, weight, residual, n=1):
    """The calls that a fused add replaces."""
    total = x.to(residual.dtype) + residual
    if not OPS[op].center:
        return ours(OPS[op].alone.name, total, weight, n=n).to(x.dtype), total
    return ct.layer_norm(total, x.shape[x.ndim - n :], weight).to(x.dtype), total


def given(op, *shape, n=1, dtype=torch.float32, wide=None, of_weight=None):
    """x, weight, and what else the operation takes, bias or residual; all require grad."""
    parameters = affine(*shape[len(shape) - n :], dtype=of_weight or dtype)
    arrays = [numbers(*shape, dtype=dtype), *parameters[: 1 + (op == "layer_norm")]]
    arrays += [numbers(*shape, dtype=wide or dtype, seed=5)] * OPS[op].residual
    return [a.requires_grad_() for a in arrays]


def check_whole(op, y, grads, dy, x, n, weight, *bias):
    """Values and gradients against the oracle, which has a bias alone where there is a centre."""
    scale, center = weight.to(double) + 1 if OPS[op].unit_weight else weight, OPS[op].center
    check(y, x, n, scale, *bias, center=center)
    check_gradients((*grads, None)[:3], dy, x, n, scale, center=center)


def slopes(result, i=0):
    """A gradient of a result, made so that transforms and compilers follow."""
    steps = torch.linspace(-1.0 - i, 2.0, result.numel(), dtype=double)
    return (4 * steps.sin()).to(result.dtype).reshape(result.shape)


def total(found):
    """A number that both results flow into, each with slopes of its own."""
    results = found if isinstance(found, tuple) else (found,)
    return sum((r * slopes(r, i)).double().sum() for i, r in enumerate(results))


# --- values and first derivatives ---------------------------------------------------------------


@whole
@pytest.mark.parametrize("of_weight", DTYPES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_pair_of_dtypes(engine, op, dtype, of_weight):
    x, *parameters = given(op, 40, 33, dtype=dtype, of_weight=of_weight)
    dy, y = (numbers(40, 33, seed=9) - 3).to(dtype), ours(op, x, *parameters)
    y.backward(dy)
    grads = [t.grad for t in (x, *parameters)]
    assert [t.dtype for t in (y, *grads)] == [dtype] * 2 + [of_weight] * len(parameters)
    check_whole(op, y, grads, dy, x, 1, *parameters)


@each
@pytest.mark.parametrize("layout", [*LAYOUTS, "multi-axis"])
def test_every_layout(engine, op, layout):
    """Of x, weight and dy; y lies as torch's, so that a view(-1) that follows it works."""
    x, n = (numbers(3, 4, 5), 2) if layout == "multi-axis" else (LAYOUTS[layout](), 1)
    shape = x.shape[x.ndim - n :]
    _, *more = given(op, *x.shape[: x.ndim - n], *shape[::-1], n=n)
    turned = [t.detach().permute(*range(t.ndim - 1, -1, -1)) for t in more if t.ndim == n]
    if OPS[op].residual:
        turned.append(numbers(*x.shape, seed=5))
    leaves = [t.requires_grad_() for t in (x, *turned)]
    found = ours(op, *leaves, n=n)
    if OPS[op].residual:
        assert all(r.is_contiguous() for r in found)
        want = two_calls(op, *leaves, n=n)
        assert all(map(torch.equal, found, want))
        got, exact = (torch.autograd.grad(total(results), leaves) for results in (found, want))
        torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5)
        return
    assert found.stride() == functional.layer_norm(x, shape).stride()
    backwards = (numbers(*x.shape[::-1], seed=9) - 3).permute(*range(x.ndim - 1, -1, -1))
    for dy in (slopes(found.detach()), backwards, torch.ones(()).expand(x.shape)):
        got = torch.autograd.grad(found, leaves, dy, retain_graph=True)
        check_whole(op, found, got, dy, x, n, *turned)


@adding
@pytest.mark.parametrize("wide", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=name_of)
def test_the_fused_add_has_the_bits_of_two_calls(engine, op, dtype, wide):
    x, weight, residual = given(op, 20, 700, dtype=dtype, wide=wide)
    found, want = ours(op, x, weight, residual), two_calls(op, x, weight, residual)
    assert all(map(torch.equal, found, want))
    assert [r.dtype for r in found] == [dtype, wide or dtype]
    for parts in (slice(2), slice(1), slice(1, 2)):  # both results, and each alone
        loss = total(found[parts])
        leaves = x, residual, *([weight] if parts.start is None else [])
        got = torch.autograd.grad(loss, leaves, retain_graph=True)
        exact = torch.autograd.grad(total(want[parts]), leaves, retain_graph=True)
        assert [g.dtype for g in got] == [a.dtype for a in leaves]
        # dsum is added before dx is rounded, where two calls round twice
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got, exact, rtol=4 * eps, atol=16 * eps)


@whole
def test_negated_memory(engine, op):
    """A contiguous view of it looks like any other, for which the backward may be settled."""
    plain = [a[..., ::2] for a in (numbers(3, 16), numbers(16), numbers(3, 16, seed=9) - 3)]

    def found(*negated):
        x, weight, dy = (torch._neg_view(a) if i in negated else -a for i, a in enumerate(plain))
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = ours(op, x, weight)
        return y, *torch.autograd.grad(y, (x, weight), dy)

    want = found()
    for negated in ((0,), (1,), (2,), (0, 1, 2)):
        torch.testing.assert_close(found(*negated), want, rtol=0, atol=0)
    plain = [a.contiguous() for a in plain]
    assert torch.equal(found(1)[1], want[1])


def test_results_that_are_given():
    x, residual = numbers(4, 9), numbers(4, 9, seed=5)
    want, negated = cn.add_rms_norm(x, residual), torch.complex(x, residual).conj()
    found = cn.add_rms_norm(negated.real, -negated.imag, sum_out=negated.imag)
    assert torch.equal(found.y, want.y)
    assert torch.equal(negated.imag, want.sum)
    memory = numbers(5, 9)
    with pytest.raises(ValueError, match="sum_out shares memory with x in part"):
        cn.add_rms_norm(memory[1:], residual, sum_out=memory[:-1])
    with pytest.raises(ValueError, match="autograd cannot follow"):
        cn.add_rms_norm(x.requires_grad_(), residual, sum_out=residual)


# --- further derivatives and transforms ---------------------------------------------------------


CHECKED = [(op, (3, 5), 1) for op in EACH]
CHECKED += [("layer_norm", *case) for case in SHAPES if 1 < torch.Size(case[0]).numel() < 100]


@pytest.mark.parametrize(("op", "shape", "n"), CHECKED)
def test_gradcheck(op, shape, n):
    x, *more = given(op, *shape, n=n, dtype=double)
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    some = op == "layer_norm" and shape == (3, 5)  # one that lacks weight or bias
    for there in itertools.product((1, 0), repeat=2) if some else [(1, 1)]:
        leaves = [x, *(t if wanted else None for t, wanted in zip(more, there, strict=False))]

        def function(*tensors):
            return ours(op, *tensors, n=n, eps=0.5)

        assert gradcheck(function, leaves, check_forward_ad=True, **batched)
        assert gradgradcheck(function, leaves, check_fwd_over_rev=True, check_rev_over_rev=True)


@each
def test_transforms(op):
    x, *others = (a.detach() for a in given(op, 3, 5, dtype=double))

    def scalar(f):
        return lambda x, *others: total(f(op, x, *others)) ** 2

    every = tuple(range(1 + len(others)))
    for transform in (jacrev, jacfwd, hessian):
        got, want = (transform(scalar(f), every)(x, *others) for f in (ours, written_out))
        torch.testing.assert_close(got, want)
    for dims in ((0, 0, 0), (0, None, 0), (None, 0, None), (1, 1, None), (2, None, 1)):
        dims = dims[: len(every)]
        pairs = zip((x, *others), dims, strict=True)
        args = [a if d is None else torch.stack([a, a * 2 + 1], d) for a, d in pairs]
        got, want = (vmap(grad(scalar(f), every), dims)(*args) for f in (ours, written_out))
        torch.testing.assert_close(got, want)


@each
def test_the_statistics_are_differentiable(op):
    """Over axes in any order, and without y."""
    x = numbers(2, 3, 2, dtype=double, grad=True)
    weight = affine(2, 2, dtype=double, grad=True)[0]
    more = [numbers(2, 3, 2, dtype=double, seed=5, grad=True)] * OPS[op].residual
    more += [affine(2, 2, dtype=double, grad=True)[1]] * (op == "layer_norm")
    how = {"zero_centered_weight": True} if OPS[op].unit_weight else {}

    def function(x, weight, *more):
        residual, bias = (more, ()) if OPS[op].residual else ((), more)
        named = {"axis": (2, 0), "return_stats": True, **how}
        return getattr(cn, OPS[op].function)(x, *residual, None, weight, *bias, **named)

    assert gradcheck(function, [x, weight, *more], check_forward_ad=True)
    assert gradcheck(lambda *a: function(*a)[1:], [x, weight, *more], check_forward_ad=True)
    assert gradgradcheck(function, [x, weight, *more])


# --- compilers and tracers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "dtype"), [*zip(EACH, [torch.float32, torch.bfloat16] * 3, strict=True)]
)
def test_the_graph_holds_one_operator_each_way(op, dtype):
    torch._dynamo.reset()  # of one text it compiles eight variants
    wide = torch.float32 if OPS[op].residual else None
    tensors = given(op, 4, 8, dtype=dtype, wide=wide)
    _, graphs = operators_of(lambda *t: total(ours(op, *t)), *tensors)
    named = [[name for name in graph if "cupynorm" in name] for graph in graphs]
    alone = OPS[op].alone.name
    assert named == [[f"cupynorm.{op}_fwd.default"], [f"cupynorm.{alone}_bwd.default"]]
    got = [t.grad for t in tensors]
    want = torch.autograd.grad(total(ours(op, *tensors)), tensors)
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("op", EACH[1:])  # layer norm's, and without a gradient, in test_compile
def test_opcheck(op):
    x, weight, *residual = (t.detach() for t in given(op, 4, 3, 8))
    others = (r.transpose(0, 1).contiguous() for r in residual)
    tensors = [t.requires_grad_() for t in (x.transpose(0, 1), weight, *others)]
    args = tensors[0], [2], tensors[1], None, 0.5, True, *tensors[2:]
    torch.library.opcheck(operators.FORWARD[op], args)


@each
def test_export(op):
    x, weight, *residual = (t.detach() for t in given(op, 4, 8))

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return tuple(ours(op, *tensors)) if residual else ours(op, *tensors)

    program = torch.export.export(Module(), (x, weight, *residual))
    assert sum("cupynorm" in str(node.target) for node in program.graph.nodes) == 1
    got = program.module()(x, weight, *residual)
    torch.testing.assert_close(got, Module()(x, weight, *residual), rtol=0, atol=0)


# --- modules ------------------------------------------------------------------------------------


class WithEpsOutside(Scaled):
    def forward(self, x):
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


def test_a_class_that_is_none_is_refused_with_the_numbers():
    for kind, name, sentence in (
        (Scaled, "zero_centered", r"in torch\.float32 its result is .*, where ours is .*9.5e-07"),
        (WithEpsOutside, "rms_norm", "is not what also= says"),
    ):
        net = torch.nn.Sequential(torch.nn.RMSNorm(8), kind(8))
        with pytest.raises(ValueError, match=sentence):
            ct.convert(net, also={kind: name})
        assert [type(m) for m in net] == [torch.nn.RMSNorm, kind]


def test_converted_and_reverted():
    net = torch.nn.Sequential(torch.nn.RMSNorm(8), Scaled(8), torch.nn.LayerNorm(8))
    torch.nn.utils.parametrize.register_parametrization(net[1], "weight", torch.nn.Identity())
    net.append(Scaled(8))
    kinds, parameters = [type(m) for m in net], list(net.parameters())
    x = numbers(3, 8)
    before = net(x)
    ct.convert(ct.convert(net, also={Scaled: "rms_norm"}), also={Scaled: "rms_norm"})
    assert isinstance(net[0], ct.RMSNorm)
    assert repr(net[3]) == "Scaled()"
    assert all(isinstance(net[i], kinds[i]) for i in (0, 2, 3))
    assert not {type(m) for m in net} & {*kinds}
    torch.testing.assert_close(net(x), before)
    half, wide = x.bfloat16(), net[3](x.bfloat16())
    assert wide.dtype == Scaled(8)(half).dtype == torch.float32  # as its library promotes
    copied = copy.deepcopy(net[3]), pickle.loads(pickle.dumps(net[3]))
    assert {type(c) for c in copied} == {type(net[3])}
    ct.revert(net)
    assert [k.__bases__ if i == 1 else k for i, k in enumerate(map(type, net))] == [
        k.__bases__ if i == 1 else k for i, k in enumerate(kinds)
    ]
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert torch.equal(net(x), before)


@each
def test_a_subclass_whose_method_calls_torchs(op):
    """Torch makes a tuple of results anew, with each of them of the subclass."""
    called = []

    class Told(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, kinds, args=(), kwargs=None):
            called.append(function)
            return super().__torch_function__(function, kinds, args, kwargs or {})

    x, weight, *more = numbers(3, 8), numbers(8), numbers(3, 8)
    more = more if OPS[op].residual else []
    want = ours(op, x, weight, *more)
    found = ours(op, x.as_subclass(Told), weight, *more)
    assert getattr(ct, OPS[op].function) in called
    assert type(found) is (type(want) if more else Told)
    for a, b in zip(found if more else [found], want if more else [want], strict=True):
        assert type(a) is Told
        assert torch.equal(a.as_subclass(torch.Tensor), b)
    copies = copy.deepcopy(want), pickle.loads(pickle.dumps(want))
    assert all(type(c) is type(want) for c in copies)
