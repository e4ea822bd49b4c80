"""summary.md: what each step did, what was wrong, and the claims against their targets."""

import math
from pathlib import Path
from typing import Any

from bench.gpu_proofs import Outcome
from bench.gpu_session import Session

__all__ = ["claims", "verdict", "write_summary"]

SHOWN = (
    "gpu",
    "driver",
    "cuda",
    "nvrtc",
    "cupy",
    "numpy",
    "torch",
    "triton",
    "commit",
    "tree",
    "date",
)
TARGET_SHARE = 0.95  # of the copy of the same bytes, from N = 256 up, at 1 GB moved


def verdict(rows: list[dict[str, Any]], sentence: str) -> Outcome:
    """Failed if one of our own results was wrong or missing; a peer's fault is only a remark."""
    bad = [r for r in rows if _is_fault(r)]
    if bad:
        r = bad[0]
        what = f"{r.get('peer')} on {r.get('dtype')} {r.get('rows')}x{r.get('N')}: {r.get('note')}"
        return "failed", f"{len(bad)} wrong or in error, the first {what}. {sentence}"
    return "ok", ". ".join([sentence, *claims(rows)])


def _is_fault(row: dict[str, Any]) -> bool:
    """A candidate plan may be refused by the device (error), but never be wrong."""
    peer = str(row.get("peer", ""))
    ours, candidate = peer.startswith("cupynorm"), "/" in peer
    wrong, error = row["status"] == "wrong", row["status"] == "error"
    return (wrong and (ours or candidate)) or (error and ours)


def claims(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences on the two targets; none where nothing was timed."""
    timed = [r for r in rows if r.get("op") == "layer_norm_fwd" and r.get("median_us")]
    said = []
    ours = [r for r in timed if r["peer"] == "cupynorm" and r.get("fraction_of_copy")]
    big = [r for r in ours if r["group"] == "1GB" and r["N"] >= 256 and r["dtype"] != "float64"]
    if big:
        least = min(big, key=lambda r: r["fraction_of_copy"])
        reached = sum(r["fraction_of_copy"] >= TARGET_SHARE for r in big)
        said.append(
            f"share of the copy at 1 GB, N >= 256: {reached} of {len(big)} "
            f"reach {TARGET_SHARE:.0%}, "
            f"least {least['fraction_of_copy']:.1%} ({least['dtype']}, N = {least['N']})"
        )
    for peer in ("torch-eager", "torch-compile", "liger", "quack", "cupy"):
        ratios = [
            (r["ratio_to_peer"], r) for r in timed if r["peer"] == peer and r["ratio_to_peer"]
        ]
        if ratios:
            mean = math.exp(sum(math.log(q) for q, _ in ratios) / len(ratios))
            worst, row = max(ratios, key=lambda pair: pair[0])
            said.append(
                f"time over {peer}'s: {mean:.3f} in the geometric mean of {len(ratios)}, "
                f"worst {worst:.3f} ({row['dtype']}, {row['rows']}x{row['N']})"
            )
    return said


def write_summary(folder: Path, session: Session, outcomes: list[tuple[str, str, str]]) -> None:
    """Write it anew after every step, so that a run that is cut short leaves one."""
    lines = ["# GPU run", ""]
    if session.simulated:
        lines += [
            "**Simulated device: this proves the benchmark's logic, and says nothing about time.**",
            "",
        ]
    lines += [f"- {name}: {session.machine.get(name) or 'unknown'}" for name in SHOWN]
    lines += ["", "| step | status | |", "|---|---|---|"]
    lines += [f"| {name} | {status} | {_cell(sentence)} |" for name, status, sentence in outcomes]
    if session.notes:
        lines += ["", "Notes:", "", *(f"- {_cell(note)}" for note in dict.fromkeys(session.notes))]
    (folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
