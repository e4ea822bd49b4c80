"""Machine instructions that small calls execute in Python, counted by callgrind, against budgets.

    python bench/instructions.py [--update]

They are calls up to the launch: on NumPy arrays in place of the compiled loops, and on CuPy arrays
in place of the driver, something stands that does nothing (numba under valgrind takes minutes to
start). One process does all: valgrind writes its counts down, and begins anew, whenever the process
asks for its parent's id, so start-up is in no count. The counts depend on the Python, on NumPy and
on the C library: bench/budgets.json holds those of one machine, and the check allows for
HEADROOM. They are no times: a cache miss costs more than a hundred instructions.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

__all__ = ["HEADROOM", "measure"]

BUDGETS = Path(__file__).with_name("budgets.json")
HEADROOM = 1.25  # other builds of one Python version differ by some percent, 3.11 to 3.13 by 15
CALLS = 200


def calls(cupy: Any) -> dict[str, Callable[[], Any]]:
    """The calls by name, with nothing behind them."""
    import numpy as np

    import cupynorm as cn
    from cupynorm._cpu import at_once as _cpu_at_once

    def ready_for(shape: Any, dtype: Any, axes: Any, eps: float) -> Any:
        none = np.empty(0, np.float32)
        shapes = None, None, none.dtype, shape[-1:], none, ()
        return _cpu_at_once.Ready(lambda *_: 0, lambda *_: 0, np.empty, *shapes, (eps,))

    _cpu_at_once.ready_for = ready_for
    hosts = [np.ones(shape, np.float32) for shape in ((8, 64), 64, 64, (8, 64))]
    found: dict[str, Callable[[], Any]] = {}
    for library, arrays in (("NumPy", hosts), ("CuPy", [cupy.from_numpy(a) for a in hosts])):
        x, w, b, y = arrays
        f = cn.prepare(x, 64, w, b)
        found[f"{library} layer_norm(x, out=y)"] = _layer_norm(x, w, b, y)
        found[f"{library} prepared f(x, out=y)"] = _prepared(f, x, y)
    return found


def _layer_norm(x: Any, w: Any, b: Any, y: Any) -> Callable[[], Any]:
    import cupynorm as cn

    return lambda: cn.layer_norm(x, 64, w, b, out=y)


def _prepared(f: Any, x: Any, y: Any) -> Callable[[], Any]:
    return lambda: f(x, out=y)


def child() -> None:
    """Run each call some times between two marks."""
    from bench.launch_device import counting_cupy

    with counting_cupy() as cupy:
        for name, call in calls(cupy).items():
            for _ in range(20):
                call()
            os.getppid()  # ends what came before
            for _ in range(CALLS):
                call()
            os.getppid()
            print("counted", name)


def measure() -> dict[str, int]:
    """Instructions of one call, by name."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["valgrind", "--tool=callgrind", "--dump-before=getppid"]
        command += [f"--callgrind-out-file={folder}/out", sys.executable, __file__, "--child"]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "CUPYNORM_NUMBA": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
        names = re.findall("^counted (.*)$", done.stdout, re.MULTILINE)
        files = sorted(Path(folder).glob("out*"), key=lambda p: _part(p))
        parts = [_total(path) for path in files]
    return {name: parts[2 * i + 1] // CALLS for i, name in enumerate(names)}


def _part(path: Path) -> int:
    """Number of a dump; the file without one is what came last."""
    number = path.suffix.lstrip(".")
    return int(number) if number.isdigit() else sys.maxsize


def _total(path: Path) -> int:
    found = re.search(r"^(?:totals|summary): (\d+)", path.read_text(), re.MULTILINE)
    return int(found.group(1)) if found else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the counts as new budgets")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child()
        return
    if not shutil.which("valgrind"):
        sys.exit("valgrind is needed to count instructions. On Debian: apt-get install valgrind")
    counts = measure()
    version = ".".join(platform.python_version_tuple()[:2])
    kept = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    if args.update:
        kept.setdefault("instructions", {})[version] = counts
        BUDGETS.write_text(json.dumps(kept, indent=2) + "\n")
    budgets = kept.get("instructions", {}).get(version)
    if budgets is None:
        print(f"no budgets for Python {version}; --update writes them")
    over = []
    for name, count in counts.items():
        budget = budgets[name] if budgets else 0
        print(f"{name:32}{count:8} instructions, budget {budget} + {HEADROOM - 1:.0%}")
        if budgets and count > HEADROOM * budget:
            over.append(name)
    if over:
        sys.exit(f"over budget: {', '.join(over)}; find out why, or --update with the reason")


if __name__ == "__main__":
    main()
