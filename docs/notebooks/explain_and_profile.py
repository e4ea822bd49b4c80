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
# # Reading `cn.explain`, and profiling on a GPU
#
# What you learn here:
#
# 1. to ask what a call would run, on this machine or on a GPU that is not at hand;
# 2. to read the answer: kernel, launch, bytes moved against the least possible, copies;
# 3. to time a kernel properly, and to tell from bytes and bandwidth how good the time is.
#
# Needs `pip install 'cupynorm[notebook]'`, and `'cupynorm[cuda12]'` or `[cuda13]` with a GPU. The
# cells that need a GPU say so and do nothing without one.

# %%
import numpy as np

import cupynorm as cn

on_gpu = cn.show_config().path("cuda").available
{path.name: path.available for path in cn.show_config().paths}

# %% [markdown]
# `cn.show_config()` alone, as the last line of a cell, shows a table: versions, driver, GPUs, and
# for each path that is not available the reason and the way out.
#
# ## What would run
#
# `cn.explain` takes the arguments of `cn.layer_norm` and runs nothing. With `device="sm_90"` it
# plans for an H100, whether there is one or not.

# %%
x = np.ones((4096, 768), np.float16)
told = cn.explain(x, 768, device="sm_90")
told

# %% [markdown]
# - **kernel**: the family. Short rows are held by one warp, longer ones by a block, then in shared
#   memory, and few rows of huge length are split over blocks.
# - **launch**: the entry, whose name states what it was compiled for (`f16`: half precision,
#   `t32`: threads per row, `v3`: 16-byte vectors per thread); then grid, block and shared memory.
#   It is the name that a profiler shows.
# - **floor** and **moved**: x read once and y written once is the least that any kernel can do. A
#   kernel at 1.00 of the floor can only be as fast as the memory.
# - **copy**: layouts that no kernel reads directly are copied first, which costs two more passes.
# - **plan from**: the measurement that set the thresholds, or "predicted".
#
# Everything is an attribute too:

# %%
print(told.path, told.threads_per_row, told.rows_per_block, told.bytes_moved)
told.launches

# %% [markdown]
# ## Layouts
#
# What a table on the GPU hands over is column-major; images are channels-first; a slice has padded
# rows. None needs a copy. A mixed set of axes does, and the answer says why.

# %%
f32 = np.float32
cases = {
    "row-major": (np.ones((1000, 256), f32), {}),
    "column-major": (np.ones((1000, 256), f32, order="F"), {}),
    "every other row": (np.ones((2000, 256), f32)[::2], {}),
    "NCHW over channels": (np.ones((8, 64, 14, 14), f32), {"axis": 1}),
    "backwards": (np.ones((1000, 256), f32)[:, ::-1], {}),
    "two axes apart": (np.ones((8, 64, 14, 14), f32), {"axis": (0, 2)}),
}
for name, (a, options) in cases.items():
    e = cn.explain(a, device="sm_90", **options)
    moved = f"{e.bytes_moved / e.bytes_floor:.2f} of the floor"
    print(f"{name:20} {e.kernel.partition(':')[0]:10} {moved}; copies: {len(e.copies)}")
e.copies

# %% [markdown]
# ## Long rows, and the backward

# %%
for shape in ((100_000, 64), (10_000, 4096), (1000, 20_000), (2, 3_000_000)):
    e = cn.explain(np.empty(shape, f32), device="sm_90")  # no values are read
    ratio = e.bytes_moved / e.bytes_floor
    print(f"{shape!s:18} {e.kernel.partition(':')[0]:13} {ratio:.2f} of the floor")
cn.explain(x, 768, device="sm_90", backward=True)

# %% [markdown]
# ## How fast that can be
#
# Bytes divided by bandwidth is the shortest time. From data sheets, not measured: about 3.35 TB/s
# for an H100 SXM, 0.3 TB/s for a T4.

# %%
for gpu, bandwidth in (("H100", 3.35e12), ("T4", 0.3e12)):
    print(f"{gpu:5} no faster than {told.bytes_floor / bandwidth * 1e6:5.1f} µs")

# %% [markdown]
# ## Measuring on this machine's CPU
#
# The same idea without a GPU: a copy moves as many bytes as a layer norm, so it is what to compare
# with. Take the fastest of several runs, and let the first one, which may compile, go.

# %% tags=["varies"]
from timeit import repeat

big = np.random.default_rng(0).normal(size=(4096, 1024)).astype(np.float32)
y = np.empty_like(big)
cn.layer_norm(big, out=y)
copy = min(repeat(lambda: np.copyto(y, big), number=1, repeat=5))
norm = min(repeat(lambda: cn.layer_norm(big, out=y), number=1, repeat=5))
print(f"copy {copy * 1e3:.2f} ms, layer_norm {norm * 1e3:.2f} ms: {norm / copy:.1f} copies")

# %% [markdown]
# ## Measuring on a GPU
#
# A launch returns before the kernel has run, so a stopwatch around the call measures the launch.
# `cupyx.profiler.benchmark` puts events on the stream and gives both times. Compile ahead with
# `cn.warmup`, and let the array be larger than the L2 cache, or the memory is not what you measure.

# %%
if on_gpu:
    import cupy
    from cupyx.profiler import benchmark

    cn.warmup(4096, ["float16"])
    big = cupy.ones((32768, 4096), dtype="float16")  # the values make no difference to the time
    y = cupy.empty_like(big)
    told = cn.explain(big, 4096, out=y)
    times = benchmark(cn.layer_norm, (big, 4096), kwargs={"out": y}, n_repeat=50, n_warmup=5)
    gpu_s = float(np.median(times.gpu_times))
    print(told, f"\nGPU {gpu_s * 1e6:.0f} µs, launch {np.median(times.cpu_times) * 1e6:.0f} µs")
    print(f"{told.bytes_moved / gpu_s / 1e12:.2f} TB/s moved")
else:
    print("no GPU here: this cell does nothing")

# %% [markdown]
# The same in a profiler, from a terminal. The kernel stands there under the name that
# `told.launches` gives:
#
#     nsys profile --stats=true python my_script.py
#     ncu --kernel-name regex:layer_norm_fwd --set full python my_script.py
#
# In `ncu`'s report compare "DRAM bytes read and written" with `told.bytes_moved`, and "DRAM
# throughput" with what a copy of the same array reaches.
#
# ## A layer in training
#
# The layer tells what it holds for the backward, which is memory that a batch occupies:

# %%
layer = cn.LayerNorm(768, device="cuda" if on_gpu else "cpu")
layer(x if not on_gpu else cupy.asarray(x))
print(layer)
