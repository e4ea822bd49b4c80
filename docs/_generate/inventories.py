"""Links to other projects' documentation without a network: the names that we use, as text.

`python -m docs._generate.inventories` looks each name up again in the project's own inventory.
"""

import sys
from pathlib import Path

import sphobjinv

__all__ = ["main", "packed", "renew"]

HERE = Path(__file__).resolve().parents[1] / "inventories"
SITES = {
    "cupy": "https://docs.cupy.dev/en/stable/",
    "dask": "https://docs.dask.org/en/stable/",
    "numpy": "https://numpy.org/doc/stable/",
    "pandas": "https://pandas.pydata.org/docs/",
    "python": "https://docs.python.org/3/",
    "sklearn": "https://scikit-learn.org/stable/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}


def packed(source: Path, to: Path) -> dict[str, tuple[str, str]]:
    """Compress every list of names for Sphinx, which reads no plain ones; give its mapping."""
    to.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for name, site in SITES.items():
        text = (source / f"{name}.txt").read_bytes()
        file = to / f"{name}.inv"
        file.write_bytes(sphobjinv.compress(text))
        mapping[name] = (site, str(file))
    return mapping


def renew(file: Path, address: str) -> list[str]:
    """Take each name's entry from the inventory at `address`; give the names that it lacks."""
    mine = sphobjinv.Inventory(file)
    theirs = sphobjinv.Inventory(url=address)
    entry = {(o.domain, o.role, o.name): o for o in theirs.objects}
    wanted = [(o.domain, o.role, o.name) for o in mine.objects]
    mine.objects = [entry[key] for key in wanted if key in entry]
    mine.version = theirs.version
    file.write_bytes(mine.data_file())
    return [key[2] for key in wanted if key not in entry]


def main() -> int:
    """Renew all of them; 1 if a name is gone, which `make docs` would find as a broken link."""
    gone = {name: renew(HERE / f"{name}.txt", f"{site}objects.inv") for name, site in SITES.items()}
    for name, names in gone.items():
        print(f"{name}: {'gone: ' + ', '.join(names) if names else 'renewed'}")
    return int(any(gone.values()))


if __name__ == "__main__":
    sys.exit(main())
