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
# # Layer norm against batch norm, on real data
#
# What you learn here:
#
# 1. which numbers share a mean: a row of the batch (layer norm) or a column (batch norm);
# 2. why batch norm changes with the batch, its size and its padding, and layer norm does not;
# 3. what that means between training and testing, and when layer norm is the wrong tool.
#
# Needs `pip install 'cupynorm[notebook]'`. It runs on the CPU, and on the GPU where CuPy finds one.

# %%
import numpy as np
from sklearn.datasets import load_digits, load_wine
from sklearn.linear_model import LogisticRegression

import cupynorm as cn

xp = np
if cn.show_config().path("cuda").available:  # the cells below are the same for both
    import cupy as xp


def on_host(a):
    return a if isinstance(a, np.ndarray) else a.get()


pixels, labels = load_digits(return_X_y=True)  # 1797 handwritten digits of 8 × 8 gray values
order = np.random.default_rng(0).permutation(len(pixels))  # the file goes writer by writer
pixels, labels = pixels[order].astype(np.float32), labels[order]
batch = xp.asarray(pixels[:32])
batch.shape

# %% [markdown]
# ## What each normalizes
#
# The formula is one: subtract a mean, divide by a standard deviation. The axis makes the
# difference. `cn.layer_norm(x)` takes the last axis, so every digit has a mean of its own. Over
# axis 0, the batch, the same call gives what batch norm computes in training: every pixel has one.

# %%
layer = cn.layer_norm(batch)
over_batch = cn.layer_norm(batch, axis=0)

print("largest |mean|  of a digit  of a pixel")
for name, y in (("before", batch), ("layer norm", layer), ("batch norm", over_batch)):
    y = on_host(y)
    print(f"{name:14} {abs(y.mean(axis=1)).max():11.2f} {abs(y.mean(axis=0)).max():11.2f}")

# %%
_ = cn.plot.distributions(batch, rows=5)
# %% [markdown]
# ## Small batches
#
# One digit, in batches of several sizes, with other digits beside it each time. How far does its
# result move? For layer norm not by one bit: the other rows are never looked at.

# %%
rng = np.random.default_rng(1)
one = pixels[:1]
alone = on_host(cn.layer_norm(xp.asarray(one)))
print("batch   layer norm: same bits   batch norm: moves by (std)")
for size in (2, 4, 16, 64, 256):
    moved, same = [], True
    for _ in range(20):
        others = pixels[rng.choice(np.arange(1, 1797), size - 1, replace=False)]
        x = xp.asarray(np.concatenate([one, others]))
        same &= np.array_equal(on_host(cn.layer_norm(x))[:1], alone)
        moved.append(on_host(cn.layer_norm(x, axis=0))[0])
    print(f"{size:5}   {same!s:21}   {np.std(moved, axis=0).mean():.2f}")
    assert same

# %% [markdown]
# ## Sequences of different lengths
#
# Read a digit as a sequence of 8 steps, one per line of pixels. Sequences of different lengths are
# padded with zeros to the longest one of the batch. Batch norm counts the padding as data. Layer
# norm has a mean for every step, so a real step never meets the padding.

# %%
steps = pixels[:32].reshape(32, 8, 8)
print("padded to   layer norm: same bits   batch norm: mean |change|")
first = [cn.layer_norm(xp.asarray(steps), axis=a) for a in (-1, (0, 1))]
for length in (8, 12, 16, 32):
    padded = np.zeros((32, length, 8), np.float32)
    padded[:, :8] = steps
    by_step, by_batch = (cn.layer_norm(xp.asarray(padded), axis=a)[:, :8] for a in (-1, (0, 1)))
    same = np.array_equal(on_host(by_step), on_host(first[0]))
    change = float(abs(by_batch - first[1]).mean())
    print(f"{length:9}   {same!s:21}   {change:.2f}")
    assert same

# %% [markdown]
# Mean and variance of all steps, as layer norm sees them: a digit per line of the map, its eight
# steps side by side.

# %%
_ = cn.plot.moments(xp.asarray(steps))
# %% [markdown]
# ## Training and testing
#
# A linear classifier learns from 1000 digits and is tested on the others. At test time batch norm
# has two choices: the statistics of the test batch, which fail for small batches, or *running
# statistics* kept from training, which fail when the test data come from elsewhere. Layer norm has
# nothing to keep. The last column is the same digits from another scanner: half the contrast, on a
# gray ground.

# %%
train, test = pixels[:1000], pixels[1000:]
other_scanner = test * np.float32(0.5) + 4


def by_layer(x):
    return on_host(cn.layer_norm(xp.asarray(x)))


def by_batches_of(size):
    def normalize(x):
        parts = [xp.asarray(x[i : i + size]) for i in range(0, len(x), size)]
        return np.concatenate([on_host(cn.layer_norm(part, axis=0)) for part in parts])

    return normalize


def by_running_statistics(x):  # those of the training set
    return (x - train.mean(axis=0)) / np.sqrt(train.var(axis=0) + 1e-5)


def accuracy(model, x):
    return model.score(x, labels[1000:])


print(f"{'normalized by':28} accuracy  other scanner")
at_test = {f"batch norm, batches of {n}": by_batches_of(n) for n in (1, 4, 16, 64)}
at_test["batch norm, running"] = by_running_statistics
on_batches = LogisticRegression(max_iter=300).fit(by_batches_of(50)(train), labels[:1000])
on_layers = LogisticRegression(max_iter=300).fit(by_layer(train), labels[:1000])
scores = {
    name: (accuracy(on_batches, f(test)), accuracy(on_batches, f(other_scanner)))
    for name, f in at_test.items()
}
scores["layer norm"] = (
    accuracy(on_layers, by_layer(test)),
    accuracy(on_layers, by_layer(other_scanner)),
)
for name, (right, elsewhere) in scores.items():
    print(f"{name:28} {right:8.2f}  {elsewhere:13.2f}")

# %% [markdown]
# ## When layer norm is the wrong tool
#
# A row must be made of numbers that can share a mean. The wine table has 13 columns in 13 units:
# one of them, proline, counts in hundreds and is all that a row's mean and deviation see. There
# statistics by column, as batch norm or a `StandardScaler` have them, are right.

# %%
wine, kinds = load_wine(return_X_y=True)
mean, variance = cn.plot.moments(xp.asarray(wine), axis=0)  # of each column
mean.set_yscale("log")

# %%
rows = np.random.default_rng(0).permutation(len(wine))
wine, kinds = wine[rows], kinds[rows]
for name, x in (
    ("layer norm", on_host(cn.layer_norm(xp.asarray(wine)))),
    ("by column", (wine - wine[:89].mean(axis=0)) / wine[:89].std(axis=0)),
):
    model = LogisticRegression(max_iter=300).fit(x[:89], kinds[:89])
    print(f"{name:10}  accuracy {model.score(x[89:], kinds[89:]):.2f}")
