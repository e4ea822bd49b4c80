"""`python -m cupynorm`: what is available here, and whether every available path is right."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cupynorm._report import backends as _backends
from cupynorm._report import picture as _picture
from cupynorm._report import probe as _probe
from cupynorm._report import selfcheck as _selfcheck
from cupynorm._report.config import show_config

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the self-check; 0 if every available path is right, 1 if one is wrong.

    Parameters
    ----------
    argv : sequence of str, optional
        Command-line arguments; `sys.argv` where left out.

    Returns
    -------
    int
        Exit status; 2 if the picture cannot be drawn.
    """
    options = _parser().parse_args(argv)
    config = show_config()
    data, remark = _selfcheck.datasets()
    there, absent = _backends.find(config)
    checks = [check for backend in there for check in _selfcheck.check_backend(backend, data)]
    wrong = [check for check in checks if not check.ok]
    status = 1 if wrong else 0
    picture = None
    if options.picture is not None:
        try:
            picture = _picture.draw(data[0], options.picture)
        except ImportError as error:
            _complain(f"cannot draw ({_probe.short(error)}): pip install 'cupynorm[demo]'")
        except Exception as error:  # a path that the checks found wrong, or a folder not writable
            _complain(f"cannot draw to {options.picture} ({_probe.short(error)})")
        status = status or (2 if picture is None else 0)
    if options.json:
        report = {
            "ok": not wrong,
            "config": asdict(config),
            "data_remark": remark,
            "checks": [asdict(check) for check in checks],
            "unavailable": [asdict(path) for path in absent],
            "picture": None if picture is None else str(picture),
        }
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print(config, _report(checks, absent, remark), sep="\n\n")
        if picture is not None:
            print(f"\npicture: {picture}")
    return status


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cupynorm",
        description="Show the configuration and check every available path on real data; "
        "exit status 1 if one of them is wrong.",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="PATH", help="save a PNG of digits before and after"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def _report(
    checks: list[_selfcheck.Check], absent: list[_backends.Unavailable], remark: str
) -> str:
    rows = [("path", "arrays", "data", "shape", "dtype", "error", "allowed", "time", "x torch", "")]
    for c in checks:
        rows.append(
            (
                c.path,
                c.library,
                c.data,
                f"{c.shape[0]}x{c.shape[1]}",
                c.dtype,
                _number(c.error, "{:.2f}"),
                _number(c.allowed, "{:.2f}"),
                _number(c.seconds and c.seconds * 1e3, "{:.3f} ms"),
                _number(c.torch_ratio, "{:.2f}"),
                "ok" if c.ok else f"WRONG: {c.note}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["self-check against float64 or wider, two passes", *([remark] if remark else [])]
    for row in rows:
        left = [f"{cell:{w}}" for cell, w in zip(row[:5], widths[:5], strict=True)]
        right = [f"{cell:>{w}}" for cell, w in zip(row[5:9], widths[5:9], strict=True)]
        lines.append("  " + "  ".join([*left, *right, row[9]]).rstrip())
    lines.append("  error: largest |y - exact| in units of epsilon(dtype) * max(1, |exact|)")
    lines.append("  time: median of a call; x torch: fastest call over that of torch's layer_norm")
    for path in absent:
        lines.append(f"not checked: {path.path} with {path.library}: {path.why}")
    wrong = sum(not c.ok for c in checks)
    lines.append(f"{len(checks) - wrong} of {len(checks)} checks right")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
