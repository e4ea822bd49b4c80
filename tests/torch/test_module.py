"""`cupynorm.torch.LayerNorm` and `convert`: torch's module in all but its arithmetic."""

import copy
import logging

import pytest
import torch
from torch.nn.utils import parametrize

import cupynorm.torch as cn_torch
from tests.torch.cases import Scaled, affine, check, check_gradients, numbers

TorchNorm, Norm = torch.nn.LayerNorm, cn_torch.LayerNorm


def filled(Norm, *args, **kwargs):
    """A norm whose parameters are not those it begins with."""
    norm = Norm(*args, **kwargs)
    with torch.no_grad():
        for value, parameter in zip(
            affine(*norm.normalized_shape), norm.parameters(), strict=False
        ):
            parameter.copy_(value)
    return norm


def test_parameters_that_are_views_of_one_flat_parameter():
    """What FSDP does: the module's weight and bias become slices of a tensor that it owns."""
    norm = filled(Norm, 8)
    flat = torch.nn.Parameter(torch.cat([norm.weight, norm.bias]).detach())
    weight, bias = norm.weight.detach(), norm.bias.detach()
    del norm.weight, norm.bias
    norm.weight, norm.bias = flat[:8], flat[8:]
    x, dy = numbers(3, 8), numbers(3, 8, seed=4) - 3
    lent = {"weight": flat[:8], "bias": flat[8:]}
    y = torch.func.functional_call(filled(Norm, 8), lent, (x,))
    check(y, x, 1, weight, bias)
    y = norm(x)
    check(y, x, 1, weight, bias)
    y.backward(dy)
    check_gradients((None, flat.grad[:8], flat.grad[8:]), dy, x, 1, weight)


def test_casts_and_moves():
    norm = filled(Norm, 8).to(torch.float64)
    assert norm(numbers(3, 8, dtype=torch.float64)).dtype == torch.float64
    assert norm.half().weight.dtype == torch.float16
    assert norm.to("meta")(torch.empty(3, 8, device="meta")).shape == (3, 8)


class OtherNorm(TorchNorm):
    """A subclass with arithmetic of its own."""

    def forward(self, x):
        return super().forward(x) * 0


def model():
    shared = filled(TorchNorm, 8)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 8),
        shared,
        torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        torch.nn.ModuleDict({"again": shared, "other": OtherNorm(8)})["again"],
        torch.nn.Sequential(OtherNorm(8)),
    )


def kinds(module):
    return [type(m) for m in module.modules() if isinstance(m, TorchNorm)]


def test_a_model_keeps_everything_but_the_class_of_its_norms(caplog):
    """More of it in test_transformers."""
    net, calls = model(), []
    net[1].eval()
    net[1].weight.requires_grad_(False)
    before = net(numbers(2, 3, 8))
    net[1].register_forward_hook(lambda *_: calls.append("hook"))
    with caplog.at_level(logging.INFO, "cupynorm.torch"):
        assert cn_torch.convert(net) is net
    assert kinds(net) == [Norm, Norm, Norm, OtherNorm]  # one is met twice and counted once
    assert "converted 3 LayerNorm modules of Sequential" in caplog.text
    assert "left 1 of a subclass" in caplog.text
    assert net[1] is net[3]
    assert not net[1].training
    assert not net[1].weight.requires_grad
    torch.testing.assert_close(net(numbers(2, 3, 8)), before)
    assert calls == ["hook", "hook"]


def test_a_copy_is_converted_and_the_original_is_not():
    net = model()
    parametrize.register_parametrization(net[2].norm1, "weight", torch.nn.Identity())
    before = kinds(net)
    converted = cn_torch.convert(net, inplace=False)
    assert kinds(net) == before
    assert sum(issubclass(k, Norm) for k in kinds(converted)) == 3
    assert isinstance(converted[2].norm1, Norm)
    x = numbers(2, 3, 8)
    torch.testing.assert_close(converted(x), net(x))


def test_a_parametrized_norm_stays_parametrized():
    norm = filled(TorchNorm, 8)
    parametrize.register_parametrization(norm, "weight", torch.nn.Identity())
    original = norm.parametrizations.weight.original
    cn_torch.convert(norm)
    assert isinstance(norm, Norm)
    assert parametrize.is_parametrized(norm, "weight")
    assert norm.parametrizations.weight.original is original
    check(norm(numbers(3, 8)), numbers(3, 8), 1, norm.weight, norm.bias)
    copy.deepcopy(norm)
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is Norm
    # one whose class is ours at the root is not converted again
    assert kinds(cn_torch.convert(norm)) == [Norm]


def test_nothing_to_convert_is_said_aloud(caplog):
    with caplog.at_level(logging.WARNING, "cupynorm.torch"):
        cn_torch.convert(torch.nn.Sequential(torch.nn.Linear(2, 2), OtherNorm(2)))
    assert "found no norm to convert in Sequential; left 1" in caplog.text


@pytest.mark.parametrize("way", [cn_torch.convert, cn_torch.revert])
def test_an_error_on_the_way_leaves_every_module_as_it_was(way, monkeypatch):
    class Fixed(Scaled):
        pass

    model = torch.nn.Sequential(TorchNorm(8), torch.nn.RMSNorm(8), Fixed(8), TorchNorm(8))
    if way is cn_torch.revert:
        cn_torch.convert(model, also={Fixed: "rms_norm"})
    before = [type(m) for m in model]

    def refuse(self, name, value):
        if name == "__class__":
            raise RuntimeError("is what it is")
        torch.nn.Module.__setattr__(self, name, value)

    monkeypatch.setattr(Fixed, "__setattr__", refuse)
    with pytest.raises(RuntimeError, match="is what it is"):
        way(model, **({"also": {Fixed: "rms_norm"}} if way is cn_torch.convert else {}))
    assert [type(m) for m in model] == before
