"""The cost model against measurements: ours, where a run is committed, and what others publish."""

import csv
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.gpu_grid import BWD, FWD, Case
from bench.model_cases import predicted
from bench.model_gpus import GPUS, Gpu, gpu_named

__all__ = ["Measured", "Published", "geometric_error", "measured", "published", "tables"]

RESULTS = Path(__file__).resolve().parent / "results"
TABLES = ("forward.csv", "backward.csv", "layouts.csv")


@dataclass(frozen=True)
class Measured:
    """A timed row of ours, and what the model says of it."""

    table: str
    case: Case
    gpu: Gpu
    measured_us: float
    predicted_us: float
    measured_fraction: float | None  # of the copy in the same run
    predicted_fraction: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_us / self.measured_us - 1


def tables(results: Path = RESULTS) -> list[Path]:
    """Tables of GPU runs, committed or given."""
    return sorted(p for name in TABLES for p in results.glob(f"*/{name}"))


def measured(paths: Iterable[Path]) -> Iterator[Measured]:
    """Every row of ours that has a time and a GPU that the model knows."""
    for path in paths:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found = _measured(f"{path.parent.name}/{path.name}", row)
                if found:
                    yield found


def _measured(table: str, row: dict[str, str]) -> Measured | None:
    gpu = gpu_named(row["gpu"])
    timed = row["status"] == "ok" and row["median_us"] and row["op"].startswith("layer_norm")
    if not (timed and gpu and row["peer"] == "cupynorm"):
        return None
    numbers = int(row["rows"]), int(row["N"])
    weight, layout = row["weight_dtype"] or None, row["layout"]
    if "F" in layout:  # however it is written: x first, then y
        layout = "".join(letter for letter in layout if letter in "FC")
    case = Case(row["dtype"], *numbers, row["group"], weight, layout, row["op"])
    p = predicted(case, gpu)
    if p is None:
        return None
    share = float(row["fraction_of_copy"]) if row["fraction_of_copy"] else None
    us = float(row["median_us"])
    return Measured(table, case, gpu, us, p.time.us, share, p.fraction_of_copy)


def geometric_error(ratios: Iterable[float]) -> float:
    """exp(mean(abs(log(ratio)))) - 1: how far off, whichever way."""
    logs = [abs(math.log(r)) for r in ratios]
    return math.exp(sum(logs) / len(logs)) - 1


@dataclass(frozen=True)
class Published:
    """Another library's number, and what the model says of our plan for that shape."""

    what: str
    case: Case
    gpu: Gpu
    published: float  # GB/s of the floor's passes
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


def _of(what: str, gpu: str, rows: int, N: int, gb_per_s: float, op: str = FWD) -> Published:
    card = next(g for g in GPUS if g.name == gpu)
    case = Case("bfloat16", rows, N, "published", op=op)
    p = predicted(case, card)
    if p is None:
        raise ValueError(case)
    return Published(what, case, card, gb_per_s, case.copy_bytes / p.time.us / 1e3)


def published() -> list[Published]:
    """Bandwidths of bfloat16 kernels as their projects print them.

    Quack's blog and pull requests, oink's benchmarks (on a GB300, held here against B200), cuDNN
    frontend's benchmark/norms. RMSNorm has no mean and no bias; the bytes are the same.
    """
    rows = 32 * 1024
    quack = (1913, 2298, 2581, 2761, 2900, 2987, 2960, 2987, 3020, 2986, 2811)  # N = 256, 512, ...
    oink = ((8, 4779), (64, 6750), (256, 7099), (512, 7157))
    found = [_of("Quack RMSNorm", "H100", rows, 256 << i, gb) for i, gb in enumerate(quack)]
    found.append(_of("Quack LayerNorm", "H100", rows, 32768, 2988))
    found += [_of("oink LayerNorm", "B200", k * 1024, 4096, gb) for k, gb in oink]
    found += [
        _of("torch.compile RMSNorm", "H200", 8192, 8192, 4176),
        _of("cuDNN RMSNorm", "H200", 16384, 4096, 3708),
        _of("cuDNN LayerNorm", "H200", 1024, 12288, 3227),
        _of("cuDNN RMSNorm", "H200", 16384, 4096, 3801, BWD),
        _of("cuDNN RMSNorm", "H200", 4096, 16384, 3420, BWD),
        _of("cuDNN RMSNorm", "H200", 8192, 128, 729, BWD),
        _of("torch.compile LayerNorm", "H200", 1024, 12288, 1773, BWD),
        _of("oink LayerNorm", "B200", 4096, 6144, 2760, BWD),
        _of("oink LayerNorm", "B200", 16384, 8192, 3850, BWD),
        _of("oink LayerNorm", "B200", 65536, 8192, 4370, BWD),
    ]
    return found
