"""summary.md: what each step did, what was wrong, and the claims against their targets."""

import math
from pathlib import Path
from typing import Any

from bench.gpu_grid import BOTH, BWD, FWD
from bench.gpu_grid_layouts import LAYOUTS
from bench.gpu_proofs import Outcome
from bench.gpu_session import Session
from bench.peers import PEERS
from bench.peers_layouts import LAYOUT_PEERS

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
# Of the copy of the same bytes, at 1 GB moved: share, and from which N up.
TARGETS = {FWD: (0.95, 256), BWD: (0.90, 64)}
OPS = {FWD: "forward", BWD: "backward", BOTH: "forward and backward"}
LAYOUT_TARGET = 0.85  # of the copy, column-major and columns of their own to row-major


def verdict(rows: list[dict[str, Any]], sentence: str) -> Outcome:
    """Failed if one of our own results was wrong or missing; a peer's fault is only a remark."""
    bad = [r for r in rows if _is_fault(r)]
    if bad:
        r = bad[0]
        what = f"{r.get('peer')} on {r.get('dtype')} {r.get('rows')}x{r.get('N')}: {r.get('note')}"
        return "failed", f"{len(bad)} wrong or in error, the first {what}. {sentence}"
    return "ok", "; ".join([sentence, *claims(rows)])


def _is_fault(row: dict[str, Any]) -> bool:
    """A candidate plan may be refused by the device (error), but never be wrong."""
    peer = str(row.get("peer", ""))
    ours, candidate = peer.startswith("cupynorm"), "/" in peer
    wrong, error = row["status"] == "wrong", row["status"] == "error"
    return (wrong and (ours or candidate)) or (error and ours)


def claims(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences on the targets; none where nothing was timed."""
    timed = [r for r in rows if r.get("op") in OPS and r.get("median_us")]
    said = []
    for op, name in OPS.items():
        of_op = [r for r in timed if r["op"] == op]
        parts = [
            *_shares(op, of_op),
            *_layout_shares(of_op),
            *(_ratios(peer, of_op) for peer in ("cupynorm.torch", *PEERS, *LAYOUT_PEERS)),
        ]
        said += [f"{name}: {part}" for part in parts if part]
    return said


def _shares(op: str, rows: list[dict[str, Any]]) -> list[str]:
    """Our share of the copy; rows beyond what a multiprocessor holds stand apart in the backward.

    There they take five passes where three are counted, so no more than 60 % can be expected.
    """
    target, least_N = TARGETS.get(op, (None, 0))
    ours = [r for r in rows if r["peer"] == "cupynorm" and r.get("fraction_of_copy")]
    big = [r for r in ours if r["group"] == "1GB" and r["N"] >= least_N and r["dtype"] != "float64"]
    long = [r for r in big if op != FWD and "split" in r["kernel"]]
    named = ((f"at 1 GB, N >= {least_N}", [r for r in big if r not in long]), ("of K5", long))
    said = []
    for what, cases in named:
        if cases:
            least = min(cases, key=lambda r: r["fraction_of_copy"])
            goal = target if cases is not long else None
            reached = sum(r["fraction_of_copy"] >= goal for r in cases) if goal else 0
            counted = f"{reached} of {len(cases)} reach {goal:.0%}, " if goal else ""
            said.append(
                f"share of the copy {what}: {counted}"
                f"least {least['fraction_of_copy']:.1%} ({least['dtype']}, N = {least['N']})"
            )
    return said


def _layout_shares(rows: list[dict[str, Any]]) -> list[str]:
    """Our share of the copy by layout."""
    mine = [r for r in rows if r["peer"] == "cupynorm" and r["group"] == LAYOUTS]
    said = []
    for layout in dict.fromkeys(r["layout"] for r in mine):
        shares = [(r["fraction_of_copy"], r) for r in mine if r["layout"] == layout]
        least, row = min(shares, key=lambda pair: pair[0])
        counted = ""
        if layout in ("F-C", "columns"):
            reached = sum(share >= LAYOUT_TARGET for share, _ in shares)
            counted = f"{reached} of {len(shares)} reach {LAYOUT_TARGET:.0%}, "
        where = f"{row['dtype']}, N = {row['N']}"
        said.append(f"share of the copy, {layout}: {counted}least {least:.1%} ({where})")
    return said


def _ratios(peer: str, rows: list[dict[str, Any]]) -> str:
    """Our time over a peer's, whichever way it turned out."""
    ratios = [(r["ratio_to_peer"], r) for r in rows if r["peer"] == peer and r["ratio_to_peer"]]
    if not ratios:
        return ""
    mean = math.exp(sum(math.log(q) for q, _ in ratios) / len(ratios))
    worst, row = max(ratios, key=lambda pair: pair[0])
    return (
        f"time over {peer}'s: {mean:.3f} in the geometric mean of {len(ratios)}, "
        f"worst {worst:.3f} ({row['dtype']}, {row['rows']}x{row['N']})"
    )


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
