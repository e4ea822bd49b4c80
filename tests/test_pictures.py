"""The pictures of the documentation: each thread reads what its picture says, and none is cut off.

An element is taken away before a launch: it counts as never written, so that whoever reads it is a
fault of the simulator, which names block and thread.
"""

import dataclasses
import re
import xml.etree.ElementTree as ET
from unittest import mock

import numpy as np
import pytest

from cupynorm._cuda.launch import choose_plan
from docs._generate import images, kernels, plans, results
from docs._generate.lanes import columns_per_vec, holder, tile_holder
from tests.cuda.rows import At, Rows, execute
from tests.gpu_backend import SIMULATED
from tests.ptx.fault import PtxFault

PICTURES = kernels.pictures() | results.parts()
DRAWN = sorted(name for name, text in PICTURES.items() if "<svg" in text)
EVERY = {"k1.md", "k2.md", "k3.md", "k4.md", "k5.md", "k6.md", "k7.md", "layouts.md"}


def reader(memory, at, nbytes, launch):
    """Block and thread that read some bytes."""
    memory.defined()[at : at + nbytes] = 0
    try:
        with pytest.raises(PtxFault, match="uninitialized") as caught:
            launch()
    finally:
        memory.defined()[at : at + nbytes] = 1
    found = re.search(r"block \((\d+), 0, 0\), thread \((\d+), 0, 0\)", str(caught.value))
    return int(found[1]), int(found[2])


def places(rows, N, some=5):
    """The corners, and some elements in between."""
    rng = np.random.default_rng(N)
    inside = zip(rng.integers(0, rows, some), rng.integers(0, N, some), strict=True)
    return [(0, 0), (rows - 1, N - 1), *((int(r), int(c)) for r, c in inside)]


@pytest.mark.parametrize("family", plans.ROWS)
def test_rows_are_read_by_whom_the_picture_says(family):
    plan, N = plans.row_plan(family)
    _, _, dtype, _ = plans.ROWS[family]
    rows = 20 if family == "warp" else 2
    # Rows begin at 16 bytes: elsewhere a lane reads beside what it holds, and shuffles.
    at = At(gap=-N % (16 // np.dtype(dtype).itemsize))
    x, y = (Rows(SIMULATED, name, dtype, (1, rows, N), at) for name in "xy")
    x.put(np.ones((rows, N), dtype))
    problem = plans.problem_of(rows, N, dtype, x=x.strides, y=x.strides)
    if family != "split":  # the plan of many rows, launched for a few
        blocks = plan.stages[0].grid[0] * rows // plans.ROWS[family][0]
        stage = dataclasses.replace(plan.stages[0], grid=(max(blocks, 2), 1, 1))
        plan = dataclasses.replace(plan, stages=(stage,))
    pointers = {"x": x.ptr, "y": y.ptr}

    def launch():
        with mock.patch("cupynorm._cuda.launch.choose_plan", lambda *_: plan):
            execute(SIMULATED, problem, plans.H100, pointers, [x.memory, y.memory])

    size, per_vec = x.dtype.itemsize, columns_per_vec(plan)
    for row, col in places(rows, N):
        vec = col // per_vec * per_vec
        nbytes = min(16, (N - vec) * size)
        said = holder(plan, row, col, N)
        got = reader(x.memory, (row * x.strides[1] + vec) * size, nbytes, launch)
        # Of K3 and K4 the picture tells the blocks: other threads issue the copies.
        assert got[0] == said.block, (row, col)
        assert family in ("shared", "cluster") or got[1] == said.thread, (row, col)


def test_a_tile_is_read_by_whom_the_picture_says():
    M, N = 130, 12
    strides = {"x": (M * N, 1, M), "y": (M * N, N, 1)}
    problem = plans.problem_of(M, N, "float32", **strides)
    plan = choose_plan(problem, plans.H100)
    x, y = (SIMULATED.memory(4 * M * N, name) for name in "xy")
    SIMULATED.put(x, np.ones(M * N, np.float32))
    steps = (*strides["x"], *strides["y"], *problem.stats_strides)
    call = (x.ptr, y.ptr, 0, 0, 0, 0, M, M, *steps, N, 1e-5, plan.panel)

    def launch():
        SIMULATED.run(plan.stages[0], call, [x, y], 0)

    for row, col in places(M, N):
        said = tile_holder(plan, row, col)
        got = reader(x, 4 * (col * M + row), 4, launch)
        assert got == (said.block, said.thread), (row, col)


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_is_cut_off(name):
    assert set(DRAWN) >= EVERY
    space = "{http://www.w3.org/2000/svg}"
    for found in re.findall(r"<svg.*?</svg>", PICTURES[name], re.S):
        svg = ET.fromstring(found)
        _, _, width, height = map(float, svg.get("viewBox").split())
        boxes = list(svg.iter(f"{space}rect"))
        assert len(boxes) >= 8
        for box in boxes:
            x, y, w, h = (float(box.get(key)) for key in ("x", "y", "width", "height"))
            assert min(x, y, w, h) >= 0 and x + w <= width + 1 and y + h <= height
        for label in svg.iter(f"{space}text"):
            length = 0.55 * float(label.get("font-size")) * len(label.text)  # in common fonts
            share = {"start": 0, "middle": 0.5, "end": 1}[label.get("text-anchor")]
            begin = float(label.get("x")) - share * length
            assert begin > -4 and begin + length < width + 4, label.text


def test_the_readmes_picture_is_what_would_be_drawn():
    """Else run `python -m docs._generate.images`."""
    for name, text in images.images().items():
        assert (images.FOLDER / name).read_text(encoding="utf-8") == text, name
