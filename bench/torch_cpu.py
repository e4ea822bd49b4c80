"""`cupynorm.torch.layer_norm` on CPU tensors against torch's own: two threads each, interleaved.

    python bench/torch_cpu.py [--seconds 3] [--to bench/results]

Forward and backward (`torch.autograd.grad` for x, weight and bias), and forward without gradients,
where 8x64 shows what a call costs before any arithmetic. Bytes of a case, the least that can move:
forward M*N read + M*N written, backward 2*M*N read + M*N written, and what weight, bias and their
gradients hold. Results are checked against float64 before anything is timed. Turns and pauses as in
bench/cpu.py; times are medians with the quartiles beside them, and the fastest turn: where others
use the cores, torch's threads wait milliseconds for each other in most calls, and the medians
flatter ours. CUPYNORM_NUM_THREADS=1 compares one thread each, which nothing makes wait.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import cpu  # sets the number of threads before numpy and torch are imported  # isort: skip

import numpy as np
import torch

from tests import oracle

CASES = [
    ("fwd+bwd", 512, 768),
    ("fwd+bwd", 4096, 768),
    ("fwd+bwd", 4096, 4096),
    ("fwd+bwd", 200000, 64),
    ("fwd", 8, 64),
    ("fwd", 512, 768),
    ("fwd", 4096, 768),
    ("fwd", 4096, 4096),
    ("fwd", 200000, 64),
]
EPS = 1e-5
_BLOCK = 1 << 20  # elements that the oracle takes at once: in longdouble 16 MiB a temporary

LayerNorm = Callable[..., torch.Tensor]


def layer_norms() -> dict[str, LayerNorm]:
    import cupynorm.torch

    return {"torch": torch.nn.functional.layer_norm, "cupynorm": cupynorm.torch.layer_norm}


def arrays(M: int, N: int) -> list[np.ndarray]:  # x (M, N), weight (N,), bias (N,), dy (M, N)
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape, np.float32) for shape in ((M, N), (N,), (N,), (M, N))]


def calls_of(op: str, given: list[np.ndarray], norms: dict[str, LayerNorm]) -> dict[str, Any]:
    """Name a call for each contender, all on tensors of one memory."""
    x, w, b, dy = (torch.from_numpy(a) for a in given)
    leaves = [w.requires_grad_(), b.requires_grad_()]
    if op == "fwd+bwd":
        leaves.insert(0, x.requires_grad_())

    def call(layer_norm: LayerNorm) -> Callable[[], Any]:
        shape = (x.shape[-1],)
        if op == "fwd":
            return lambda: layer_norm(x, shape, w, b, EPS)
        return lambda: torch.autograd.grad(layer_norm(x, shape, w, b, EPS), leaves, dy)

    return {name: call(layer_norm) for name, layer_norm in norms.items()}


def check(op: str, given: list[np.ndarray], calls: dict[str, Any]) -> None:
    """Refuse to time what is wrong."""
    if op == "fwd":
        cpu.check(calls, *given[:3])
        return
    exact, scale = exact_gradients(*given)
    bound = 4 * oracle.tolerance(np.float32, given[0].shape[1])
    for name, call in calls.items():
        for label, got, want, size in zip(("dx", "dw", "db"), call(), exact, scale, strict=True):
            worst = float((np.abs(got.numpy() - want) / size).max())
            if not worst < bound:
                sys.exit(f"{name}: {label} of {given[0].shape} is wrong: {worst:.3g} > {bound:.3g}")


def exact_gradients(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, dy: np.ndarray
) -> tuple[list[np.ndarray], list[Any]]:
    """dx, dweight, dbias in float64, and the size of the terms that each is a sum of."""
    M, N = x.shape
    rows = max(1, _BLOCK // N)
    parts, sizes = [], []
    for lo in range(0, M, rows):
        part, slope = x[lo : lo + rows], dy[lo : lo + rows]
        parts.append(oracle.layer_norm_backward(slope, part, (1,), w, EPS))
        x_hat = oracle.layer_norm(part, (1,), None, None, EPS)[0]
        sizes.append((np.abs(slope * x_hat).sum(0), np.abs(slope.astype(np.float64)).sum(0)))
    dx = np.concatenate([p[0] for p in parts])
    sums = [np.sum([p[i] for p in parts], axis=0) for i in (1, 2)]
    return [dx, *sums], [1 + np.abs(dx), *(np.sum([s[i] for s in sizes], axis=0) for i in (0, 1))]


def moved(op: str, M: int, N: int) -> int:
    """Bytes of float32 that a case cannot do without."""
    return 4 * (2 * M * N + 2 * N + (3 * M * N + 3 * N if op == "fwd+bwd" else 0))


def run(op: str, M: int, N: int, norms: dict[str, LayerNorm], seconds: float) -> dict[str, Any]:
    """Check, time, and make a row of the table of one case."""
    given = arrays(M, N)
    with torch.set_grad_enabled(op == "fwd+bwd"):
        calls = calls_of(op, given, norms)
        check(op, given, calls)
        times = cpu.measure(calls, seconds)
    row: dict[str, Any] = {"op": op, "dtype": "float32", "M": M, "N": N, "bytes": moved(op, M, N)}
    for name, values in times.items():
        low, middle, high = (1e6 * q for q in statistics.quantiles(values, n=4))
        row |= {f"{name} us": middle, f"{name} q1 us": low, f"{name} q3 us": high}
        row[f"{name} best us"] = 1e6 * min(values)
    row["cupynorm/torch"] = row["cupynorm us"] / row["torch us"]
    row["best cupynorm/torch"] = row["cupynorm best us"] / row["torch best us"]
    row["load"] = os.getloadavg()[0]  # torch's threads wait for each other at every call
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def line(row: dict[str, Any]) -> str:
    def spread(name: str) -> str:
        middle, low, high = (row[f"{name}{q} us"] for q in ("", " q1", " q3"))
        return f"{middle:12.1f} ({low:.1f} to {high:.1f})".ljust(36)

    speed = row["bytes"] / row["cupynorm us"] / 1e3
    where = f"{row['op']:9}{row['M']:7}{row['N']:6}"
    ratios = f"{row['cupynorm/torch']:8.2f}{row['best cupynorm/torch']:8.2f}"
    return f"{where}{spread('torch')}{spread('cupynorm')}{ratios}{speed:8.1f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per case")
    parser.add_argument("--to", type=Path, help="folder for the CSV; none is written without it")
    args = parser.parse_args(argv)
    host = cpu.machine()
    torch.set_num_threads(int(host["threads"]))
    print(", ".join(f"{k} {v}" for k, v in host.items()))
    print("times in us: median (quartiles); GB/s of the bytes that cannot be avoided")
    print(
        f"{'op':9}{'M':>7}{'N':>6}{'torch':>12}{'':24}{'cupynorm':>12}{'':24}{'ratio':>8}{'best':>8}{'GB/s':>8}"
    )
    rows = []
    norms = layer_norms()
    for op, M, N in CASES:
        rows.append(run(op, M, N, norms, args.seconds) | host)
        print(line(rows[-1]), flush=True)
    for op in dict.fromkeys(row["op"] for row in rows):
        for best in ("", "best "):
            mine = [row for row in rows if row["op"] == op and row["M"] > 8]
            ratios = [row[f"{best}cupynorm/torch"] for row in mine]
            mean = cpu.geometric_mean(ratios)
            print(f"{op}: {best}geometric mean {mean:.2f}, worst {max(ratios):.2f}")
    if args.to:
        print(cpu.write(rows, args.to, "torch-cpu"))


if __name__ == "__main__":
    main()
