"""From a Parquet file to a torch model: table, layer norm, tensor, without a copy in between.

The script writes scikit-learn's handwritten digits to a Parquet file, one column per pixel, and
reads it back as a pipeline would: with cuDF where that is installed and there is a GPU, else with
pandas. `cupynorm.layer_norm_columns` makes one normalized matrix of the columns, which torch takes
over by DLPack. A small classifier is trained on it, and on the same table without normalization.
It takes a few seconds and downloads nothing:

    pip install 'cupynorm[cpu,torch]' pandas pyarrow scikit-learn     # tqdm draws a progress bar
    python examples/parquet_to_torch.py
    python examples/parquet_to_torch.py --device cuda     # and: pip install 'cupynorm[cuda12]'

Each hand-off is looked up by address, and the script prints what it finds:

    Parquet    -> table      decoded into memory of its own, one buffer per column
    table      -> cupynorm   read where it lies: the columns are not joined or converted first
    cupynorm   -> torch      the same memory: DLPack hands over its address
    torch      -> batch      the same memory: rows one after another are a view
    logits     -> NumPy      the same memory again (CuPy on a GPU)

So the table is read once and the matrix written once, and that is all.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits

import cupynorm as cn
import cupynorm.torch

PIXELS, HIDDEN, CLASSES = 64, 128, 10


def main(arguments=None):
    """Write the file, read it, train with and without the layer norm of the table."""
    options = read_options(arguments)
    device = pick_device() if options.device == "auto" else options.device
    with tempfile.TemporaryDirectory() as folder:
        path = Path(options.file or Path(folder) / "digits.parquet")
        write_parquet(path, options.seed)
        table, labels = read_parquet(path, device)
    cut = len(table) * 4 // 5  # the rows were shuffled when they were written
    print(
        f"{len(table)} rows, {table.shape[1]} columns of {table.dtypes.iloc[0]} in a "
        f"{type(table).__module__.partition('.')[0]} table; torch on {device}"
    )

    train_table, test_table = table.iloc[:cut], table.iloc[cut:]
    # The same images from another scanner: half the contrast, and a gray background.
    other_table = test_table * 0.5 + 4
    for normalize in (True, False):
        name = "with layer norm" if normalize else "without"
        sets = [to_torch(part, device, normalize) for part in (train_table, test_table)]
        other = to_torch(other_table, device, normalize)
        if normalize:
            print_hand_offs(train_table, labels[:cut], device, options)
        model = new_model(device, options.seed)  # the same start for both
        train(name, model, sets[0], labels[:cut], options)
        right = accuracy(model, sets[1], labels[cut:])
        right_of_other = accuracy(model, other, labels[cut:])
        print(f"{name}: test accuracy {right:.4f}, from another scanner {right_of_other:.4f}")


# --- Parquet to table ---------------------------------------------------------------------------


def write_parquet(path, seed):
    """Digits as a table: 64 columns of gray values from 0 to 16, and the label."""
    bunch = load_digits()
    table = pd.DataFrame(bunch.data.astype(np.uint8), columns=bunch.feature_names)
    table["label"] = bunch.target
    # The data goes writer by writer. Shuffled once here, batches can be rows one after another.
    table.sample(frac=1, random_state=seed).to_parquet(path, index=False)


def read_parquet(path, device):
    """Read the pixels as a table on the device, and the labels as a tensor."""
    if has_cudf(device):
        import cudf

        table = cudf.read_parquet(path)  # decoded on the GPU, where the columns stay
        labels = torch.from_dlpack(table.pop("label").values)
    else:
        # pandas over Arrow's own buffers. Without dtype_backend they would be copied.
        table = pd.read_parquet(path, dtype_backend="pyarrow")
        labels = torch.from_numpy(table.pop("label").to_numpy(dtype="int64", copy=True))
    return table, labels.to(device)


# --- table to torch -----------------------------------------------------------------------------


def to_torch(table, device, normalize):
    """Table of pixels to a tensor of float32, one row per image."""
    return torch.from_dlpack(matrix_of(table, device, normalize))


def matrix_of(table, device, normalize):
    """Table to a row-major matrix of float32: NumPy's, CuPy's on a GPU.

    The matrix is the one new block of memory on the way. `cupynorm.layer_norm(table)` computes the
    same numbers and gives a table again, with its index and names; a model wants no names, but its
    rows in one piece.
    """
    if normalize:
        # Each column is read once, in its own dtype, and each row written once.
        return cn.layer_norm_columns(columns_of(table, device), dtype="float32")
    # As one does it by hand: join the columns, convert them, scale them. Each is a pass or two.
    if device == "cpu":
        return np.ascontiguousarray(table.to_numpy(dtype="float32")) / np.float32(16)
    import cupy

    columns = [cupy.asarray(column) for column in columns_of(table, device, as_list=True)]
    return cupy.stack(columns, axis=1).astype("float32") / cupy.float32(16)


def columns_of(table, device, as_list=False):
    """What layer_norm_columns takes: the table itself, or columns brought to the GPU."""
    if device == "cpu":
        return table
    if has_cudf(device):
        return [table[name] for name in table] if as_list else table
    import cupy

    # pandas has its columns on the host: here, and only here, data crosses the bus, as bytes.
    return [cupy.asarray(table[name].to_numpy()) for name in table]


def print_hand_offs(table, labels, device, options):
    """Tell which steps share memory, by comparing addresses."""
    x = matrix_of(table, device, normalize=True)
    t = torch.from_dlpack(x)
    batch, _ = next(iter(batches(t, labels, options)))
    row_bytes = PIXELS * t.element_size()
    offset = batch.data_ptr() - t.data_ptr()
    logits = new_model(device, options.seed)(batch).detach()
    back = np.from_dlpack(logits) if device == "cpu" else from_dlpack_on_gpu(logits)
    checks = {
        "table -> cupynorm": read_in_place(table, device),
        "cupynorm -> torch": t.data_ptr() == address(x),
        "torch -> batch": offset % row_bytes == 0 and 0 <= offset < len(t) * row_bytes,
        "logits -> " + ("NumPy" if device == "cpu" else "CuPy"): address(back) == logits.data_ptr(),
    }
    for step, shared in checks.items():
        print(f"  {step}: memory shared: {shared}")


def read_in_place(table, device):
    """Whether cupynorm sees the first column where the reader of Parquet has put it."""
    first = table[table.columns[0]]
    if device == "cpu":  # an Arrow array: buffers of validity (here none) and of values
        (chunk,) = first.array.__arrow_array__().chunks
        return address(chunk.to_numpy()) == chunk.buffers()[1].address + chunk.offset
    if not has_cudf(device):
        return False  # copied from the host to the GPU
    import cupy

    return address(cupy.asarray(first)) == first.__cuda_array_interface__["data"][0]


def address(array):
    """Where a NumPy or CuPy array begins."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


def from_dlpack_on_gpu(tensor):
    """CuPy array over a tensor's memory.

    torch and CuPy both begin on CUDA's default stream, so what one of them launches waits for the
    other. On a stream of your own, DLPack lets the taker's stream wait for the giver's.
    """
    import cupy

    return cupy.from_dlpack(tensor)


# --- the model ----------------------------------------------------------------------------------


def new_model(device, seed):
    """Two dense layers, with cupynorm's kernels in the norm between them."""
    torch.manual_seed(seed)  # on the host: a GPU starts from the same numbers
    model = torch.nn.Sequential(
        torch.nn.Linear(PIXELS, HIDDEN),
        cupynorm.torch.LayerNorm(HIDDEN),
        torch.nn.ReLU(),
        torch.nn.Linear(HIDDEN, CLASSES),
    )
    return model.to(device)


def batches(x, labels, options, generator=None):
    """Batches of rows one after another, in random order: views, where a shuffle would copy."""
    starts = torch.arange(0, len(x), options.batch)
    for i in torch.randperm(len(starts), generator=generator).tolist():
        rows = slice(int(starts[i]), int(starts[i]) + options.batch)
        yield x[rows], labels[rows]


def train(name, model, x, labels, options):
    """SGD with momentum over all batches, `epochs` times."""
    rule = torch.optim.SGD(model.parameters(), lr=options.rate, momentum=options.momentum)
    generator = torch.Generator().manual_seed(options.seed + 1)
    epochs = (
        pair for _ in range(options.epochs) for pair in batches(x, labels, options, generator)
    )
    count = -(-len(x) // options.batch) * options.epochs
    for rows, targets in progress(name, epochs, count):
        loss = torch.nn.functional.cross_entropy(model(rows), targets)
        rule.zero_grad()
        loss.backward()
        rule.step()


@torch.no_grad()
def accuracy(model, x, labels):
    """Share of the rows whose largest logit is the right one."""
    return float((model(x).argmax(dim=1) == labels).float().mean())


# --- around it ----------------------------------------------------------------------------------


def read_options(arguments):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32, help="rows per step (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.02, help="learning rate (%(default)s)")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", metavar="PATH", help="keep the Parquet file there")
    return parser.parse_args(arguments)


def pick_device():
    """Take the GPU if both torch and CuPy can use it."""
    if not torch.cuda.is_available():
        return "cpu"
    try:
        import cupy

        cupy.empty(1)
    except Exception:  # no CuPy, or one for another version of CUDA
        return "cpu"
    return "cuda"


def has_cudf(device):
    """Whether tables can live on the GPU."""
    if device == "cpu":
        return False
    try:
        import cudf  # noqa: F401
    except ImportError:
        return False
    return True


def progress(name, steps, count):
    """Count batches: behind a bar where tqdm is installed, with a line now and then where not."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return plain_progress(name, steps, count)
    return tqdm(steps, desc=name, total=count, unit="batch", leave=False)


def plain_progress(name, steps, count):
    """Pass the batches on, and print a line at every tenth of them."""
    every = max(count // 10, 1)
    for i, step in enumerate(steps):
        if i % every == 0:
            print(f"{name}: batch {i + 1} of {count}", flush=True)
        yield step


if __name__ == "__main__":
    torch.set_num_threads(1)  # batches this small are done before other threads have woken up
    main()
