"""Tables and plots of the committed result files, and of nothing else."""

import csv
from pathlib import Path

from docs._generate.bars import bars

__all__ = ["parts"]

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "results"
# A case of each kind: an offset, small numbers, large ones, a long row.
SHOWN = (
    "float16|0e+00|1e+00|1000",
    "bfloat16|1e+02|1e+00|1000",
    "float32|0e+00|1e+00|1000",
    "float32|1e+04|1e+00|1000",
    "float32|1e+06|1e+00|1000",
    "float32|0e+00|1e-20|1000",
    "float32|0e+00|1e+18|1000",
    "float32|1e+06|1e+00|20000",
    "float64|1e+06|1e+00|1000",
)

OPS = {
    "layer_norm_fwd": "forward",
    "layer_norm_bwd": "backward",
    "layer_norm_fwd_bwd": "both",
}


def parts() -> dict[str, str]:
    """File name to contents."""
    return {"accuracy.md": _accuracy(), "performance.md": _performance()}


def _accuracy() -> str:
    """The rows of accuracy.md that show a case of each kind."""
    lines = (FOLDER / "accuracy.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("|")]
    chosen = [line for line in table[2:] if "|".join(_cells(line)[:4]) in SHOWN]
    if len(chosen) != len(SHOWN):
        msg = f"bench/results/accuracy.md has {len(chosen)} of the rows of SHOWN; choose others"
        raise ValueError(msg)
    return "\n".join([*table[:2], *chosen]) + "\n"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _rows(name: str) -> list[dict[str, str]]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _performance() -> str:
    """A section per kind of result file; a kind of which there is no file has none."""
    sections = [
        _beside_torch("NumPy arrays", "cupynorm"),
        _beside_torch("torch tensors on the CPU", "cupynorm.torch"),
        _frames(),
    ]
    return "\n".join(section for section in sections if section)


def _files(pattern: str, column: str) -> dict[str, list[dict[str, str]]]:
    """Files of one kind that have a column, by name, in the order of their names."""
    found = {path.name: _rows(path.name) for path in sorted(FOLDER.glob(pattern))}
    return {name: rows for name, rows in found.items() if rows and column in rows[0]}


def _machine(row: dict[str, str]) -> str:
    versions = ", ".join(f"{lib} {row[lib]}" for lib in ("torch", "numpy", "numba") if row.get(lib))
    return f"{row['cpu']}, {row['cpus']} cores, {row['threads']} threads; {versions}"


def _sources(names: list[str]) -> str:
    return ", ".join(f"[{name}](../bench/results/{name})" for name in names)


def _beside_torch(title: str, peer: str) -> str:
    """Time of a way of ours over torch's, by shape and direction, in every run that is kept."""
    files = _files("cpu-*.csv", "over_torch")
    if not files:
        return ""
    lines: dict[tuple[str, str], list[float]] = {}
    for rows in files.values():
        for row in rows:
            if (row["peer"], row["group"]) == (peer, "shapes") and row["over_torch"]:
                key = f"{row['M']}×{row['N']}", OPS[row["op"]]
                lines.setdefault(key, []).append(float(row["over_torch"]))
    drawing = bars(
        f"{title}, float32",
        f"Time of {peer} over torch's own in the same run, medians; below 1 is faster than torch. "
        f"A mark is a run of {len(files)}, a bar goes to the worst. "
        f"{_machine(next(iter(files.values()))[0])}.",
        [(*key, values) for key, values in lines.items()],
    )
    return (
        f"## {title} beside torch\n\n```{{raw}} html\n{drawing.figure()}```\n\n"
        f"From {_sources(list(files))}. torch's small cases stalled in these runs, which flatters "
        "the ratios; what to make of that: [notes](generated/bench-notes.md).\n"
    )


def _frames() -> str:
    files = _files("frames-*.csv", "frame ms")
    if not files:
        return ""
    text = "## Tables\n\n"
    for name, rows in files.items():
        text += "| pandas frame | rows × columns | result | ms | NumPy after `to_numpy`, ms | "
        text += "peak memory over frame and result |\n|---|---|---|---|---|---|\n"
        for r in rows:
            text += (
                f"| {r['frame']} | {r['M']}×{r['N']} | {r['dtype']} | {r['frame ms']} | "
                f"{r['numpy ms']} | {r['frame peak']} |\n"
            )
        text += f"\nFrom {_sources([name])}; {_machine(rows[0])}, on a busy machine.\n\n"
    return text
