"""Predicts what each plan takes on GPUs that are not at hand, and holds it to what was measured.

python -m bench.model                      # claims, and each case over the copy
python -m bench.model --csv                # every prediction
python -m bench.model --markdown           # writes model.md, model.csv and PENDING.md's part
python -m bench.model --measured FOLDER    # a run of `make gpu` beside the predictions
"""

import argparse
import sys
from pathlib import Path

from bench.model_cases import predictions
from bench.model_checks import RESULTS, geometric_error, measured, tables
from bench.model_report import BEGIN, END, csv_text, page, pending_text

__all__ = ["files", "main"]


def files() -> dict[Path, str]:
    """Paths and what they must hold."""
    rows = predictions()
    pending = RESULTS / "PENDING.md"
    before, _, rest = pending.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return {
        RESULTS / "model.csv": csv_text(rows),
        RESULTS / "model.md": page(rows, list(measured(tables()))),
        pending: before + pending_text() + after,
    }


def compare(folder: Path) -> str:
    """A run's cases, measured and predicted."""
    paths = [p for p in sorted(folder.glob("*.csv")) if p in tables(folder.parent)]
    found = list(measured(paths))
    lines = [
        f"{m.case.op:18} {m.case.dtype:9} {m.case.rows:>9} x {m.case.N:<9} {m.case.layout:7} "
        f"{m.measured_us:10.2f} us, predicted {m.predicted_us:10.2f} ({m.error:+.0%})"
        for m in found
    ]
    if not found:
        return f"{folder} has no timed row of ours on a GPU that the model knows"
    error = geometric_error(1 + m.error for m in found)
    return "\n".join([*lines, f"{len(found)} cases, off by {error:.0%} in the geometric mean"])


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--csv", action="store_true", help="print every prediction")
    parser.add_argument("--markdown", action="store_true", help="write the committed files")
    parser.add_argument("--measured", type=Path, metavar="FOLDER", help="of a run on a GPU")
    given = parser.parse_args(argv)
    if given.markdown:
        for path, text in files().items():
            path.write_text(text, encoding="utf-8")
            print(path)
    elif given.measured:
        print(compare(given.measured))
    elif given.csv:
        sys.stdout.write(csv_text(predictions()))
    else:
        print(page(predictions(), []).partition("## The plan tables")[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
