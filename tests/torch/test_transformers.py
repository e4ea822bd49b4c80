"""Models of Hugging Face's transformers, built small and afresh: `convert` changes roundings only.

The oracle is the same model in float64. An output or gradient of the converted model may be as far
from it as that of torch's own LayerNorm, within the factors below: what the other layers round is
in both alike, and far more than what a norm does.
"""

import copy
import importlib
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.conftest import Backend, why_not

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is imported

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5")

import cupynorm.torch as ct  # noqa: E402
from cupynorm._torch.conversion import Replaced  # noqa: E402

# One tensor's error is chance, the more so the shorter it is. In four seeds of every model, and 17
# further architectures, the worst tensor was 2.23 times torch's and the worst geometric mean 1.04.
OF_ONE = 3.0
OF_ALL = 1.1

NO_GPU = why_not(Backend.TORCH_CUDA)
GPU = [pytest.mark.gpu, pytest.mark.skipif(NO_GPU is not None, reason=str(NO_GPU))]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small gain nothing by a second one, which waits by spinning."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {"vocab_size": 99, "hidden_size": 64, "max_position_embeddings": 64, **LAYERS}
GPT2 = {
    "vocab_size": 99, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VIT = {"hidden_size": 48, "image_size": 32, "patch_size": 8, **LAYERS, **NO_DROPOUT}
WHISPER = {
    "vocab_size": 99, "d_model": 64, "num_mel_bins": 16, "max_source_positions": 20,
    "max_target_positions": 20, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "dropout": 0.0, "decoder_start_token_id": 1, **SPECIAL,
}  # fmt: skip
MODERNBERT = {**TEXT, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2}
WAV2VEC2 = {
    **LAYERS, "hidden_size": 48, "num_hidden_layers": 1, "conv_dim": (16, 16),
    "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer",
    "do_stable_layer_norm": True, "mask_time_prob": 0.0, "mask_feature_prob": 0.0, "layerdrop": 0.0,
    "feat_proj_dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}  # fmt: skip
LLAMA = {**TEXT, **SPECIAL, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 16}
CONVNEXT = {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2}


def seeded(n=1):
    return torch.Generator().manual_seed(n)


def tokens(*shape):
    return torch.randint(3, 99, shape, generator=seeded())


def reals(*shape):
    return torch.randn(shape, generator=seeded())


def sentences():
    return {"input_ids": tokens(4, 24)}


@dataclass(frozen=True)
class Architecture:
    model: str
    options: dict  # of its config
    inputs: Callable[[], dict]
    converted: int  # torch.nn.LayerNorm modules, or those of `rms`
    left: int = 0  # modules of a subclass of it, with a forward of their own
    rms: tuple[str, str, str] | None = None  # module and class of an RMS norm, and what it is

    @property
    def also(self):
        """What `convert` is told of classes that torch does not have."""
        if self.rms is None:
            return {}
        module, name, told = self.rms
        return {getattr(importlib.import_module(f"transformers.models.{module}"), name): told}

    def convert(self, model, inplace=False):
        return ct.convert(model, inplace, also=self.also)

    def build(self, seed=0):
        """A model in training mode whose norms have parameters that are not ones and zeros."""
        torch.manual_seed(seed)
        kind = getattr(transformers, self.model)
        model = kind(kind.config_class(**self.options))
        for module in norms(model):
            torch.nn.init.normal_(module.weight, float(module.weight.detach().mean()), 0.2)
            if getattr(module, "bias", None) is not None:
                torch.nn.init.normal_(module.bias, 0.0, 0.2)
        return model.train()


ARCHITECTURES = {
    "bert": Architecture("BertModel", TEXT | NO_DROPOUT, sentences, 5),
    "gpt2": Architecture("GPT2LMHeadModel", GPT2, sentences, 5),
    "vit": Architecture("ViTModel", VIT, lambda: {"pixel_values": reals(4, 3, 32, 32)}, 5),
    "whisper": Architecture(
        "WhisperModel", WHISPER,
        lambda: {"input_features": reals(2, 16, 40), "decoder_input_ids": tokens(2, 12)}, 7,
    ),
    "modernbert": Architecture("ModernBertModel", MODERNBERT, sentences, 5),  # without a bias
    "wav2vec2": Architecture(  # norms of transposed tensors
        "Wav2Vec2Model", WAV2VEC2, lambda: {"input_values": reals(2, 600)}, 6
    ),
    "convnext": Architecture(
        "ConvNextModel", CONVNEXT, lambda: {"pixel_values": reals(2, 3, 32, 32)}, 1, left=4
    ),
    "llama": Architecture(
        "LlamaForCausalLM", LLAMA, sentences, 5,
        rms=("llama.modeling_llama", "LlamaRMSNorm", "rms_norm"),
    ),
    "gemma": Architecture(
        "GemmaForCausalLM", GEMMA, sentences, 5,
        rms=("gemma.modeling_gemma", "GemmaRMSNorm", "zero_centered"),
    ),
}  # fmt: skip
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)
OF_RMS = [name for name, of in ARCHITECTURES.items() if of.rms]


def norms(model):
    other = tuple(kind for name in OF_RMS for kind in ARCHITECTURES[name].also)
    return [m for m in model.modules() if isinstance(m, (torch.nn.LayerNorm, *other))]


def pair(name, seed=0):
    """A model and its converted copy."""
    model = ARCHITECTURES[name].build(seed)
    return model, ARCHITECTURES[name].convert(model)


def is_ours(module):
    return isinstance(module, (ct.LayerNorm, Replaced))


def to(values, dtype, device="cpu"):
    """The tensors of a dict on a device, the real ones in a dtype."""
    return {k: v.to(device, dtype if v.is_floating_point() else v.dtype) for k, v in values.items()}


def outputs(model, inputs):
    """Every real tensor that the model gives, by its name."""
    given = model(**inputs).items()
    return {k: v for k, v in given if isinstance(v, torch.Tensor) and v.is_floating_point()}


def results(model, inputs):
    """Outputs, and the gradient of each parameter for slopes that bfloat16 holds exactly."""
    model.zero_grad()
    found, generator, loss = outputs(model, inputs), seeded(5), 0.0
    for y in found.values():
        slope = torch.randn(y.shape, generator=generator).bfloat16()
        loss = loss + (y.double() * slope.to(y.device)).sum()
    loss.backward()
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return {k: v.detach().double().cpu() for k, v in (found | gradients).items()}


def check_errors(exact, by_torch, ours, dtype):
    """Compare errors, in the Euclidean norm of each tensor, with those of torch's layer norm."""
    assert set(exact) == set(by_torch) == set(ours)
    ratios = {}
    for key, want in exact.items():
        # An error below the rounding of the result itself is luck, which is not asked for. What
        # should be zero, as the gradient of a bias that softmax takes out again, is rounding only.
        floor = torch.finfo(dtype).eps / 4 * want.norm() + 1e-30
        allowed = torch.maximum((by_torch[key] - want).norm(), floor)
        ratios[key] = float((ours[key] - want).norm() / allowed)
    worst = max(ratios, key=ratios.get)
    assert ratios[worst] <= OF_ONE, f"{worst}: {ratios[worst]:.3g} times torch's error"
    mean = math.exp(sum(math.log(max(r, 1e-3)) for r in ratios.values()) / len(ratios))
    assert mean <= OF_ALL, f"{mean:.3g} times torch's error in the geometric mean"


def check_against_float64(model, converted, inputs, dtype):
    exact = results(copy.deepcopy(model).double(), to(inputs, torch.float64, model.device))
    x = to(inputs, model.dtype, model.device)
    by_torch, ours = results(model, x), results(converted, x)
    assert any(not torch.equal(ours[k], v) for k, v in by_torch.items()), "is it converted?"
    check_errors(exact, by_torch, ours, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 with float32 norms"])
@every_architecture
def test_outputs_and_gradients_are_as_near_to_float64_as_torchs(name, kind, device):
    if kind.endswith("norms") and name == "llama":
        pytest.skip("with float32 weights its norm gives float32, which its linear layers refuse")
    model = ARCHITECTURES[name].build()
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    model = model.to(device, dtype)
    for module in norms(model) if kind.endswith("norms") else ():
        module.float()
    converted = ARCHITECTURES[name].convert(model)
    check_against_float64(model, converted, ARCHITECTURES[name].inputs(), dtype)


@pytest.mark.parametrize("device", DEVICES)
@every_architecture
def test_autocast(name, device):
    model, converted = (m.to(device) for m in pair(name))
    inputs = to(ARCHITECTURES[name].inputs(), torch.float32, device)
    exact = results(copy.deepcopy(model).double(), to(inputs, torch.float64, device))
    dtypes = []

    def see(module, args, y):
        dtypes[-1].append(y.dtype)

    found = []
    for m in (model, converted):
        dtypes.append([])
        hooks = [module.register_forward_hook(see) for module in norms(m)]
        with torch.autocast(device, dtype=torch.bfloat16):
            found.append(results(m, inputs))
        for hook in hooks:
            hook.remove()
    assert dtypes[0] == dtypes[1]
    check_errors(exact, *found, torch.bfloat16)


def test_generated_tokens_are_torchs():
    model, converted = pair("gpt2")
    prompt = tokens(3, 8)
    said = [
        m.eval().generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False,
            pad_token_id=0,
        )
        for m in (model, converted)
    ]  # fmt: skip
    assert said[0].shape[1] > prompt.shape[1]
    assert torch.equal(*said)


@pytest.mark.parametrize("name", OF_RMS)
def test_models_of_rms_norms_train_export_and_revert(name):
    """The losses of torch's own training, an exported program's outputs, the bits from before."""
    model, converted = pair(name)
    inputs, losses = ARCHITECTURES[name].inputs(), []
    for m in (model, converted):
        optimizer = torch.optim.AdamW(m.parameters(), 3e-3)
        losses.append([])
        for _ in range(8):
            loss = m(**inputs, labels=inputs["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)

    inputs = {**inputs, "use_cache": False}
    exported = torch.export.export(converted.eval(), (), inputs).module()
    assert_same_outputs(exported, converted, inputs)
    after = ARCHITECTURES[name].build()
    after.load_state_dict(converted.state_dict())
    reverted = ct.revert(converted)
    assert not any(map(is_ours, reverted.modules()))
    assert [type(m) for m in reverted.modules()] == [type(m) for m in after.modules()]
    assert_same_outputs(reverted, after.eval(), inputs)


@every_architecture
def test_convert_counts_and_keeps_the_state(name, caplog):
    expected = ARCHITECTURES[name]
    model = expected.build()
    parameters = dict(model.named_parameters())
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    with caplog.at_level(logging.INFO, logger="cupynorm.torch"):
        assert expected.convert(model, inplace=True) is model
    (said,) = caplog.messages
    kind = expected.rms[1] if expected.rms else "LayerNorm"
    assert f"converted {expected.converted} {kind} modules of {expected.model}" in said
    assert ("left" in said) == bool(expected.left)
    assert f"left {expected.left} of a subclass" in said or not expected.left
    assert sum(map(is_ours, model.modules())) == expected.converted
    assert sum(not is_ours(m) for m in norms(model)) == expected.left
    changed = {torch.nn.LayerNorm, *expected.also}
    others = zip(model.modules(), kinds, strict=True)
    assert all(type(m) is kind for m, kind in others if kind not in changed)
    assert list(model.state_dict()) == keys
    assert all(p is parameters[k] for k, p in model.named_parameters())


def entries(folder):
    """Name, dtype and shape of what a folder's safetensors file holds."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118
        return {k: (s.get_dtype(), s.get_shape()) for k, s in slices.items()}


@every_architecture
def test_saved_and_loaded_either_way(name, tmp_path):
    model, converted = pair(name)
    inputs = ARCHITECTURES[name].inputs()
    for label, m in (("torch", model), ("ours", converted)):
        m.eval().save_pretrained(tmp_path / label)
    assert entries(tmp_path / "ours") == entries(tmp_path / "torch")
    kind = type(model)

    loaded = kind.from_pretrained(tmp_path / "ours")  # a file of ours, into torch's modules
    assert not any(map(is_ours, loaded.modules()))
    assert_same_outputs(loaded, model, inputs)

    loaded = kind.from_pretrained(tmp_path / "torch")  # and torch's file into ours
    assert_same_outputs(ARCHITECTURES[name].convert(loaded), converted, inputs)

    other = pair(name, seed=1)[1].eval()
    other.load_state_dict(kind.from_pretrained(tmp_path / "torch").state_dict())
    assert_same_outputs(other, converted, inputs)


def assert_same_outputs(a, b, inputs):
    with torch.no_grad():
        ours, theirs = outputs(a, inputs), outputs(b, inputs)
    assert ours
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key
