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
# # From a Parquet table to a torch model
#
# What you learn here:
#
# 1. how the columns of a table become one normalized matrix in a single pass over memory;
# 2. how torch takes that matrix over without a copy, and how to check that it did;
# 3. how a model trains with cupynorm's layer norm inside.
#
# Needs `pip install 'cupynorm[notebook,torch]' pandas pyarrow`. On a machine with a GPU, CuPy and
# cuDF the table is decoded on the GPU and never leaves it; without them the same cells run on the
# CPU. The long version, with options: `examples/parquet_to_torch.py` in the repository.

# %%
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits

import cupynorm as cn
import cupynorm.torch

on_gpu = cn.show_config().path("cuda").available and torch.cuda.is_available()
device = "cuda" if on_gpu and find_spec("cudf") else "cpu"

# %% [markdown]
# ## A table in a file
#
# 1797 handwritten digits: a column of bytes per pixel, and the label.

# %%
bunch = load_digits()
table = pd.DataFrame(bunch.data.astype(np.uint8), columns=bunch.feature_names)
table["label"] = bunch.target
path = Path(tempfile.mkdtemp()) / "digits.parquet"
table.sample(frac=1, random_state=0).to_parquet(path, index=False)
table.iloc[:3, 2:8]

# %% [markdown]
# ## Table to matrix
#
# cuDF decodes on the GPU; pandas keeps Arrow's own buffers, one per column. Either way
# `cn.layer_norm_columns` reads each column once where it lies, in its own dtype, and writes each
# normalized row once, as a row-major matrix of float32.

# %%
if device == "cuda":
    import cudf

    table = cudf.read_parquet(path)
    labels = torch.from_dlpack(table.pop("label").values)
else:
    table = pd.read_parquet(path, dtype_backend="pyarrow")
    labels = torch.from_numpy(table.pop("label").to_numpy(dtype="int64", copy=True))

x = cn.layer_norm_columns(table, dtype="float32")
print(x.shape, x.dtype, "row-major:", x.flags.c_contiguous)
mean, deviation = float(x[0].mean()), float(x[0].std())
print(f"first row: mean 0: {abs(mean) < 1e-6}, deviation {deviation:.3f}")

# %% [markdown]
# ## Matrix to torch
#
# `torch.from_dlpack` hands over the address, not the numbers.

# %%
t = torch.from_dlpack(x)
address = x.ctypes.data if device == "cpu" else x.data.ptr
print("the same memory:", t.data_ptr() == address)
assert t.data_ptr() == address

# %% [markdown]
# ## A model
#
# Two dense layers with a layer norm between them. `cupynorm.torch.LayerNorm` is a
# `torch.nn.LayerNorm`: same parameters, same checkpoints; `cupynorm.torch.convert(model)` swaps
# those of a model that is already there.

# %%
torch.set_num_threads(1)  # batches this small are done before other threads have woken up
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 64),
    cupynorm.torch.LayerNorm(64),
    torch.nn.ReLU(),
    torch.nn.Linear(64, 10),
).to(device)
model

# %%
rule = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
cut = 1437  # rows were shuffled when the file was written
for _ in range(6):
    for start in range(0, cut, 32):
        rows = slice(start, min(start + 32, cut))
        loss = torch.nn.functional.cross_entropy(model(t[rows]), labels[rows])
        rule.zero_grad()
        loss.backward()
        rule.step()
with torch.no_grad():
    right = (model(t[cut:]).argmax(dim=1) == labels[cut:]).float().mean()
print(f"test accuracy {float(right):.2f}")

# %% [markdown]
# The layer norm inside the model has learned a weight and a bias. What they do to its columns:

# %%
with torch.no_grad():
    h = model[0](t[cut:])
norm = model[1]
_ = cn.plot.affine(h, 64, norm.weight, norm.bias, norm.eps)
