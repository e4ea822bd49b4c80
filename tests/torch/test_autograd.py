"""Derivatives of `cupynorm.torch.layer_norm` beside those that every operation has."""

import pytest
import torch
from torch.func import grad, jvp, vmap

import cupynorm.torch as cn_torch
from cupynorm._torch import tensors
from tests.torch.cases import TORCHSCRIPT, affine, check, check_gradients, numbers

pytestmark = pytest.mark.filterwarnings(TORCHSCRIPT)

reference = torch.nn.functional.layer_norm
double = torch.float64


def ours(x, weight=None, bias=None):
    return cn_torch.layer_norm(x, (x.shape[-1],), weight, bias)


def theirs(x, weight=None, bias=None):
    return reference(x, (x.shape[-1],), weight, bias)


def dy_of(shape, dtype=torch.float32):
    return (numbers(*shape, seed=9) - 3).to(dtype)


@pytest.mark.parametrize("wanted", [(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
def test_only_what_is_asked_for_is_computed(engine, monkeypatch, wanted):
    asked = []
    backward = tensors.backward

    def spy(dy, x, stats, weight, call):
        asked.append(tuple(call[2]))
        return backward(dy, x, stats, weight, call)

    monkeypatch.setattr(tensors, "backward", spy)
    leaves = [
        t.requires_grad_(bool(w)) for t, w in zip((numbers(4, 9), *affine(9)), wanted, strict=True)
    ]
    y = ours(*leaves)
    assert y.requires_grad == any(wanted)
    if not any(wanted):
        return
    dy = dy_of((4, 9))
    y.backward(dy)
    assert asked == [tuple(map(bool, wanted))]
    check_gradients([t.grad for t in leaves], dy, leaves[0], 1, leaves[1])


def test_a_graph_of_the_gradient_costs_one_kernel(monkeypatch):
    calls = []
    backward = tensors.backward
    monkeypatch.setattr(tensors, "backward", lambda *a: calls.append(a) or backward(*a))
    x, (weight, _) = numbers(3, 8, dtype=double, grad=True), affine(8, dtype=double, grad=True)

    def penalty(f):
        inner = f(x.sin(), weight * x.mean(), None)  # weight depends on x too
        (first,) = torch.autograd.grad(inner.pow(2).sum(), x, create_graph=True)
        assert len(calls) == (f is ours)
        return torch.autograd.grad(first.pow(2).sum(), (x, weight))

    got = penalty(ours)
    calls.clear()
    torch.testing.assert_close(got, penalty(theirs))


def test_a_large_common_offset():
    """float32's mean of numbers near 1e6 is off by 0.03; every derivative repairs that."""
    x, dy = numbers(4, 90) + 1e6, dy_of((4, 90))
    wide = x.double().requires_grad_()
    exact = torch.autograd.grad(theirs(wide), wide, dy.double())[0].float()
    x.requires_grad_()
    for create in (False, True):  # by the engine, by torch's functions
        (dx,) = torch.autograd.grad(ours(x), x, dy, create_graph=create)
        torch.testing.assert_close(dx.detach(), exact, rtol=1e-5, atol=1e-6)
    tangent = jvp(ours, (x.detach(),), (dy,))[1]
    torch.testing.assert_close(
        tangent, jvp(theirs, (x.detach().double(),), (dy.double(),))[1].float()
    )


def test_third_derivative():
    x = numbers(2, 4, dtype=double, grad=True)

    def third(f):
        value = f(x).pow(2).sum() + f(x).sin().sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value, x, create_graph=True)
            value = (value * torch.linspace(-1, 2, 8, dtype=double).view(2, 4)).sum()
        return value

    def spelled_out(x):  # torch 2.13's layer_norm has a wrong third derivative
        d = x - x.mean(-1, keepdim=True)
        return d / (d.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    torch.testing.assert_close(third(ours), third(spelled_out))


def test_vmap_of_vmap_and_grad_of_vmap():
    x, (weight, bias) = numbers(2, 3, 4, 8, dtype=double), affine(8, dtype=double)
    weights = torch.stack([weight, weight + 1])

    def twice(f):
        return vmap(vmap(f, (0, None, None)), (0, 0, None))(x, weights, bias)

    torch.testing.assert_close(twice(ours), twice(theirs))

    def through(f):
        return grad(lambda x: vmap(f, (0, None, None))(x, weight, bias).sin().sum())(x[0])

    torch.testing.assert_close(through(ours), through(theirs))
    assert vmap(ours)(x.bfloat16()).dtype == torch.bfloat16


def test_functionalize():
    x, (weight, bias) = numbers(3, 8), affine(8)
    check(torch.func.functionalize(ours)(x, weight, bias), x, 1, weight, bias)


def test_checkpointing_and_saved_tensor_hooks():
    from torch.utils.checkpoint import checkpoint

    x, dy = numbers(3, 8, grad=True), dy_of((3, 8))
    for reentrant in (False, True):
        checkpoint(ours, x, use_reentrant=reentrant).backward(dy)
        check_gradients((x.grad, None, None), dy, x, 1)
        x.grad = None
    with torch.autograd.graph.save_on_cpu():
        y = ours(x)
    y.backward(dy)
    check_gradients((x.grad, None, None), dy, x, 1)


def test_what_was_kept_is_freed_and_watched():
    x = numbers(3, 8, grad=True)
    y = ours(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()
    y = ours(x)
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
