"""`python -m cupynorm`: what is available here, and whether every available path is right."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from cupynorm._report import picture as _picture
from cupynorm._report import selfcheck as _selfcheck
from cupynorm._report.config import short, show_config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the self-check on these arguments, the command line's where they are left out.

    Gives the exit status: 0 if every available path is right, 1 if one is wrong, 2 if the picture
    cannot be drawn.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cupynorm",
        description="Show the configuration and check every available path on real data; "
        "exit status 1 if one of them is wrong.",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="PATH", help="save a PNG of digits before and after"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options = parser.parse_args(argv)
    config = show_config()
    data, remark = _selfcheck.datasets()
    there, absent = _selfcheck.find(config)
    checks = [check for backend in there for check in _selfcheck.check_backend(backend, data)]
    status = int(not all(check.ok for check in checks))
    picture = fault = None
    if options.picture is not None:
        try:
            picture = _picture.draw(data[0], options.picture)
        except ImportError as error:
            fault = f"cannot draw ({short(error)}): pip install 'cupynorm[demo]'"
        except Exception as error:  # a path that the checks found wrong, or a folder not writable
            fault = f"cannot draw to {options.picture} ({short(error)})"
    if fault:
        print(fault, file=sys.stderr)
        status = status or 2
    if options.json:
        report = {
            "ok": all(check.ok for check in checks),
            "config": asdict(config),
            "data_remark": remark,
            "checks": [asdict(check) for check in checks],
            "unavailable": [path._asdict() for path in absent],
            "picture": None if picture is None else str(picture),
        }
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print(config, _selfcheck.as_text(checks, absent, remark), sep="\n\n")
        if picture is not None:
            print(f"\npicture: {picture}")
    return status


if __name__ == "__main__":
    sys.exit(main())
