# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Choosing eps and dtype, and where float16 breaks
#
# What you learn here:
#
# 1. what eps does to quiet rows, and which eps the libraries use;
# 2. where float16 breaks: squares that overflow, an eps that is zero, offsets that eat the digits;
# 3. what cupynorm computes in, so which of these can still happen to you.
#
# Needs `pip install 'cupynorm[notebook]'`. It runs on the CPU, and on the GPU where CuPy finds one.

# %%
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
from sklearn.datasets import load_wine

import cupynorm as cn

xp = np
if cn.show_config().path("cuda").available:
    import cupy as xp


def normalized(x, **options):
    y = cn.layer_norm(xp.asarray(x), **options)
    return (y if xp is np else y.get()).astype(np.float64)


def exact(x, eps=1e-5):  # float64, two passes
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


# %% [markdown]
# ## What eps does
#
# y = (x − mean) / sqrt(variance + eps). While the variance is far above eps, y has deviation 1.
# Around sqrt(eps) it falls off, and a quieter row comes out quieter: eps is a threshold for what
# counts as silence. A constant row gives zeros, not 0/0.

# %%
noise = np.random.default_rng(0).normal(size=256)
deviations = np.logspace(-7, 1, 60)
x = (deviations[:, None] * noise / noise.std()).astype(np.float32)
fig, ax = plt.subplots(figsize=(6, 2.6), layout="constrained")
looks = (("-", 1e-3), ("--", 1e-5), ("-.", 1e-6), (":", 1e-12))
for style, eps in looks:  # line styles, so that nobody needs to tell colors apart
    ax.plot(deviations, normalized(x, eps=eps).std(axis=1), style, label=f"eps={eps:g}")
ax.set(xscale="log", xlabel="deviation of a row of x", ylabel="deviation of y")
_ = ax.legend(frameon=False)
# %% [markdown]
# torch, ONNX and this library have eps=1e-5 unless told otherwise, Keras has 1e-3, BERT in
# transformers 1e-12. **Use the eps that the model was trained with.** For data of your own, put it
# well below the square of the smallest deviation that is still a signal.

# %%
quiet = np.float32(1e-3) * np.random.default_rng(1).normal(size=(1, 64)).astype(np.float32)
for eps in (1e-3, 1e-5, 1e-12):
    print(f"eps={eps:<6g} deviation of y {normalized(quiet, eps=eps).std():.3f}")

# %% [markdown]
# ## Where float16 breaks
#
# Layer norm written by hand in float16, on rows of the wine table. Proline goes up to 1680, whose
# square is far beyond 65504, the largest float16: the variance is infinite, and y is zero.

# %%
wine = load_wine().data[:4]


def by_hand(x, eps):  # everything in x's dtype
    eps = x.dtype.type(eps)
    with np.errstate(all="ignore"):
        d = x - x.mean(-1, keepdims=True, dtype=x.dtype)
        variance = (d * d).mean(-1, keepdims=True, dtype=x.dtype)
        return d / np.sqrt(variance + eps)


half = wine.astype(np.float16)
print("by hand ", by_hand(half, 1e-5)[0, -3:])
print("cupynorm", normalized(half)[0, -3:].round(3))
print("exact   ", exact(half)[0, -3:].round(3))

# %% [markdown]
# An eps below 6e-8 is zero in float16, and a constant row becomes 0/0:

# %%
flat = np.full((1, 8), 3.0, np.float16)
print("by hand, eps=1e-12 ", by_hand(flat, 1e-12)[0, :3])
print("cupynorm, eps=1e-12", normalized(flat, eps=1e-12)[0, :3])

# %% [markdown]
# cupynorm takes the statistics of float16 and bfloat16 in float32, and eps too, so neither can
# happen. x itself, though, is what you hand over. An offset eats its digits before any norm sees
# them: float16 keeps 11 bits, bfloat16 8. Below, the error of y in units of y's deviation, when x
# with deviation 1 is stored at an offset.

# %% tags=["varies"]
signal = np.random.default_rng(2).normal(size=(64, 768))
dtypes = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
print("offset  " + "".join(f"{name:>10}" for name in dtypes))
for offset in (0, 10, 100, 1000, 10000):
    errors = []
    for dtype in dtypes.values():
        y = normalized((signal + offset).astype(dtype))
        errors.append(np.sqrt(np.mean((y - exact(signal)) ** 2)))
    print(f"{offset:<8}" + "".join(f"{e:10.1e}" for e in errors))

# %% [markdown]
# The loss is in the storing, not in the norm: against the exact result *of the stored x*, y is
# right to its own rounding at every offset.

# %% tags=["varies"]
for name, dtype in dtypes.items():
    x = (signal + 1000).astype(dtype)
    rounding = float(ml_dtypes.finfo(dtype).eps)
    y, want = normalized(x), exact(x)
    worst = float((abs(y - want) / np.maximum(1, abs(want))).max() / rounding)
    print(f"{name:9} largest error {worst:.2f} roundings of y")
    assert worst < 2

# %% [markdown]
# ## The variance in one pass
#
# E[x²] − E[x]² needs one pass and looks cheaper. In float32 it loses all digits at an offset of a
# few thousand deviations. cupynorm takes two passes over data that are still on the chip.

# %% tags=["varies"]
print("offset  one pass: error of the deviation   cupynorm")
for offset in (10, 1000, 100_000):
    x = (signal + offset).astype(np.float32)
    one_pass = (x * x).mean(-1, dtype=np.float32) - x.mean(-1, dtype=np.float32) ** 2
    true = x.astype(np.float64).std(-1)
    rstd = cn.layer_norm(xp.asarray(x), eps=0.0, return_stats=True).rstd
    ours = 1 / np.ravel(rstd if xp is np else rstd.get()).astype(np.float64)
    wrong = abs(np.sqrt(np.maximum(one_pass, 0)) / true - 1).max()
    print(f"{offset:<8}{wrong:30.0e} {abs(ours / true - 1).max():10.0e}")

# %% [markdown]
# ## In short
#
# | you have | take |
# |---|---|
# | a trained model | its eps and its dtypes |
# | activations of deviation around 1 | float16 or bfloat16 for x, weight and bias in float32 |
# | values beyond 65504, or of unknown scale | bfloat16 or float32: float16 x is already infinite |
# | raw measurements with an offset | float32; subtract the offset before you store 16 bits |
# | rows that may be constant | eps > 0 |
#
# weight and bias may have another dtype than x, with no cast in between:

# %%
x = xp.asarray(signal.astype(np.float16))
weight = xp.ones(768, dtype="float32")
cn.layer_norm(x, 768, weight).dtype
