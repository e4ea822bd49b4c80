"""The table of arguments beside the kernel texts: structs, signatures, and what a launch passes."""

import re

import pytest

from cupynorm._cuda.arguments import ENTRIES, entry_of
from cupynorm._cuda.source import kernels_folder

TEXT = "\n".join(
    path.read_text(encoding="utf-8") for path in sorted(kernels_folder().iterdir(), key=str)
)
KERNELS = sorted(ENTRIES)


def declared(text):
    """(type, name) of each C declaration; several may share a type."""
    found = []
    for line in re.sub(r"//.*", "", text).replace(",\n", ", ").split(";"):
        kind, names = re.fullmatch(r"\s*((?:const )?\w+\*?)\s+([\w, ]+?)\s*", line).groups()
        found += [(kind, name) for name in names.split(", ")]
    return found


def parameters(entry):
    return [tuple(p.replace("{", "").replace("}", "").rsplit(" ", 1)) for p in entry.split(", ")]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_fields_and_parameters_are_those_of_the_kernel(kernel, residual):
    """By name, order and type: the struct's, and what the kernel takes beside it or without one."""
    entry = entry_of(kernel, residual)
    mine = parameters(entry.parameters)
    signature = re.search(rf"void (?:norm_)?{kernel}\(([^)]*)\)", TEXT)[1]
    taken = [tuple(p.rsplit(" ", 1)) for p in re.split(r",\s+(?![^<]*>)", signature.strip())]
    if entry.struct:
        body = re.search(
            rf"struct {entry.struct} {{\n(?:    typedef[^\n]*\n)?(.*?)\n}};", TEXT, re.S
        )[1]
        fields = declared(body.rstrip().removesuffix(";"))[: len(entry.fields)]
        assert mine[: len(fields)] == fields
        types = ", ".join(entry.types.split())
        assert taken[0][0] == f"const {entry.struct}<{types}>&"
        mine, taken = mine[len(fields) :], taken[1:]
    assert len(mine) == len(taken)
    for (kind, name), (theirs, called) in zip(mine, taken, strict=True):
        there = theirs.replace(" __restrict__", "").replace("Y*", "X*")  # K7 calls y's type Y
        assert there in (kind, f"const {kind}"), name  # what is written to is not const
        assert name == called or "*" in kind  # an address may have a name of its own there
