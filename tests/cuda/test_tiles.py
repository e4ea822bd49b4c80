"""K6, the kernel of strided columns: values, bits under every plan, bytes and banks."""

import dataclasses
import itertools

import numpy as np
import pytest

from cupynorm._cuda.plan import Device
from cupynorm._cuda.tiles import TILE_CHUNK, plan_of
from cupynorm._layout import Facts, kernel_problem_of
from cupynorm._ops import LAYER_NORM
from cupynorm._rules import stats_dtype
from tests import oracle
from tests.conftest import ALL_DTYPES, np_dtype
from tests.cuda.rows import affine, problem_of
from tests.gpu_backend import ON_EACH_MACHINE, SIMULATED, SM90

pytestmark = ON_EACH_MACHINE

LONG = 2 * 256 + 9  # columns: three chunks, the last in part
LONGER = 3 * 256
WAYS = ("FF", "FC", "CF")  # how x and y lie: F has neighbouring rows next to each other


@dataclasses.dataclass(frozen=True)
class Lie:
    """Where the elements of (outer, M, N) are, from the first one's place; in elements."""

    way: str
    gap: int = 0  # between the columns of F, the rows of C
    offset: int = 0

    def strides(self, outer, M, N):
        if self.way == "F":
            return N * (M + self.gap), 1, M + self.gap
        return M * (N + self.gap), N + self.gap, 1


def values(outer, M, N, dtype):
    rng = np.random.default_rng((outer, M, N))
    return (rng.standard_normal((outer, M, N)) * 3 + 5).astype(np_dtype(dtype))


def places(strides, shape):
    steps = (np.arange(n) * s for n, s in zip(shape, strides, strict=True))
    return np.add.outer(np.add.outer(*itertools.islice(steps, 2)), next(steps))


def normalize(machine, x, ways, weight=None, bias=None, *, device=SM90, seed=0, in_place=False):
    """y, mean and rstd, what was planned, and what the launch moved."""
    lies = [w if isinstance(w, Lie) else Lie(w) for w in ways]
    (outer, M, N), size = x.shape, x.dtype.itemsize
    strides = [lie.strides(outer, M, N) for lie in lies]
    where = [places(s, x.shape) for s in strides]
    source, target = (
        machine.memory((int(at.max()) + 1) * size, name, lie.offset * size, size)
        for name, at, lie in zip("xy", where, lies, strict=True)
    )
    flat = np.zeros(source.nbytes // size, x.dtype)
    flat[where[0]] = x
    machine.put(source, flat)
    target = source if in_place else target
    source.writable = in_place
    kind = np.dtype(stats_dtype(x.dtype.name))
    stats = [
        machine.memory(outer * M * kind.itemsize, n, 0, kind.itemsize) for n in ("mean", "rstd")
    ]
    vectors = []
    for name, values_ in (("weight", weight), ("bias", bias)):
        vector = None
        if values_ is not None:
            vector = machine.memory(values_.nbytes, name, 0, values_.itemsize)
            machine.put(vector, values_)
        vectors.append(vector)
    named = {"x": x, "weight": weight, "bias": bias}
    dtypes = {name: None if a is None else a.dtype.name for name, a in named.items()}
    problem = problem_of(dtypes, x.shape, dict(zip("xy", strides, strict=True)))
    plan = plan_of(problem, device)  # of one row, too, whose columns are neighbours
    arrays = [source, target, *vectors, *stats]
    pointers = [0 if a is None else a.ptr for a in arrays]
    memories = list({a.ptr: a for a in arrays if a is not None}.values())
    steps = (*strides[0], *strides[1], M, 1)
    (stage,) = plan.stages
    call = (*pointers, problem.rows, M, *steps, N, 1e-5, *([plan.panel] if plan.panel else []))
    traffic = machine.run(stage, call, memories, seed)
    y = machine.get(target).view(x.dtype)[where[1]]
    mean, rstd = (machine.get(s).view(kind).reshape(outer, M) for s in stats)
    return y, mean, rstd, plan, traffic


def check(result, x, weight=None, bias=None):
    y, mean, rstd = oracle.layer_norm(x, (2,), weight, bias, 1e-5)
    kind = stats_dtype(x.dtype.name)
    for got, want, dtype, scale in (
        (result[0], y, x.dtype.name, 1.0),
        (result[1], mean[..., 0], kind, float(np.abs(x.astype(np.float64)).max())),
        (result[2], rstd[..., 0], kind, 1.0),
    ):
        bound = oracle.tolerance(dtype, x.shape[2])
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=bound, atol=bound * scale)


def bits(result):
    return [a.tobytes() for a in result[:3]]


SMALL = Device(compute_capability=75, sm_count=4, shared_bytes=64 * 1024)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_shapes(machine, dtype, way):
    """Rows past the tile's edge, one column and many, several batches, every span of lanes."""
    for outer, M, N in ((1, 1, 2), (1, 70, 3), (3, 77, 8), (2, 33, 13), (1, 130, 40), (1, 65, 300)):
        x, (weight, bias) = values(outer, M, N, dtype), affine(N)
        check(normalize(machine, x, way, weight, bias), x, weight, bias)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_no_plan_moves_a_bit(machine, dtype, way):
    """Tiles of other widths, one panel or several, odd addresses and pitches, thread orders."""
    x, (weight, bias) = values(1, 300, LONG, dtype), affine(LONG)
    seen = {}
    expected = None
    for shared, sm_count in ((227, 1), (227, 132), (99, 1), (64, 1)):
        device = dataclasses.replace(SM90, shared_bytes=shared * 1024, sm_count=sm_count)
        for lies in (way, [Lie(w, gap=3, offset=1) for w in way]):
            result = normalize(machine, x, lies, weight, bias, device=device, seed=shared)
            expected = expected or bits(result)
            assert bits(result) == expected
            seen[result[3].panels, result[3].rows_per_block] = True
    check(result, x, weight, bias)
    panels = [panels for panels, _ in seen]
    assert min(panels) < max(panels)
    assert len({rows for _, rows in seen}) > (dtype != "float64")


@pytest.mark.parametrize("way", ["FC", "CF"])
def test_two_columns_at_once(machine, way):
    """16-bit rows that begin on four bytes; the last column of an odd number goes alone."""
    for N in (13, 40, 301):
        x, (weight, bias) = values(2, 77, N, "bfloat16"), affine(N)
        expected = bits(normalize(machine, x, "FF", weight, bias))
        lies = [Lie(w, gap=N % 2 if w == "C" else 1, offset=2) for w in way]
        result = normalize(machine, x, lies, weight, bias)
        assert bits(result) == expected
        if machine is SIMULATED:
            widths = result[4]["y"].write_widths if way == "FC" else result[4]["x"].read_widths
            assert widths == {4: 2 * 77 * (N // 2)} | ({2: 2 * 77} if N % 2 else {})


def test_bits_of_a_row_are_its_own(machine):
    """Whichever batch it stands in, and whichever way it is read and written."""
    x, (weight, bias) = values(2, 90, 50, "float32"), affine(50)
    whole = normalize(machine, x, "FC", weight, bias)[0]
    for way in WAYS:
        part = normalize(machine, x[1:, 37:48], way, weight, bias)[0]
        assert (part == whole[1:, 37:48]).all()


def test_nan_and_infinity_stay_in_their_row(machine):
    x = values(1, 80, 30, "float32")
    clean = normalize(machine, x, "FC")[0]
    x[0, 5, 3], x[0, 41, 29] = np.nan, np.inf
    y = normalize(machine, x, "FC")[0]
    assert np.isnan(y[0, [5, 41]]).all()
    others = np.delete(np.arange(80), [5, 41])
    assert (y[0, others] == clean[0, others]).all()


def test_large_offset(machine):
    x = (values(1, 64, 100, "float32") * np.float32(0.3) + np.float32(1e6)).astype(np.float32)
    check(normalize(machine, x, "FF"), x)


@pytest.mark.parametrize("N", [40, LONG])
def test_in_place(machine, N):
    """Also in two sweeps, the second of which reads again what the first did."""
    x, device = values(1, 100, N, "float16"), dataclasses.replace(SMALL, sm_count=1)
    expected = bits(normalize(machine, x, "FF", device=device))
    assert bits(normalize(machine, x, "FF", device=device, in_place=True)) == expected


@pytest.mark.parametrize(("weight", "bias"), [("float64", None), (None, "float16"), (None, None)])
def test_weight_and_bias_of_their_own(machine, weight, bias):
    x, (w, b) = values(1, 40, 20, "float16"), affine(20, weight, bias)
    check(normalize(machine, x, "FC", w, b), x, w, b)


# --- counted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_bytes_sectors_and_banks(machine, dtype, way):
    """Up to one tile every byte is read and written once, and no bank meets more than two lanes."""
    if machine is not SIMULATED:
        pytest.skip("nothing is counted on a GPU")
    for N in (8, 16, 64, 200):
        x, (weight, bias) = values(1, 512, N, dtype), affine(N)
        *_, plan, traffic = normalize(machine, x, way, weight, bias)
        assert plan.panels == 1
        assert traffic["x"].read_bytes == traffic["y"].written_bytes == x.nbytes
        assert traffic["x"].written_bytes == traffic["y"].read_bytes == 0
        assert traffic["x"].merged_read_sector_use == traffic["y"].merged_write_sector_use == 1
        # Rows of 400 bytes begin in the middle of a sector, which the next access fills.
        least = 0.78 if N * x.itemsize == 400 and "C" in way else 1
        assert min(traffic["x"].read_sector_use, traffic["y"].write_sector_use) >= least
        if way == "FC":
            assert set(traffic["y"].write_widths) == {max(4, x.itemsize)}
        assert traffic.shared.max_ways <= 2


@pytest.mark.parametrize(
    ("dtype", "least"), [("float16", 0.66), ("float32", 0.8), ("float64", 0.9)]
)
def test_sector_use_at_odd_pitches(machine, dtype, least):
    """Columns that begin anywhere: a warp's 128 bytes touch 5 sectors where they fill 4.

    Of a 16-bit type 64 bytes touch 3, where they fill 2. The block's accesses together leave only
    the two ends of each segment: 9 sectors for 256 bytes.
    """
    if machine is not SIMULATED:
        pytest.skip("nothing is counted on a GPU")
    lies = [Lie("F", gap=3, offset=1)] * 2
    *_, plan, traffic = normalize(machine, values(1, 512, 70, dtype), lies)
    assert plan.family == "column" and plan.rows_per_block * np.dtype(dtype).itemsize >= 256
    assert least <= traffic["x"].read_sector_use < 1
    assert least <= traffic["y"].write_sector_use < 1
    assert traffic["x"].merged_read_sector_use >= 0.89
    assert traffic["y"].merged_write_sector_use >= 0.89


def test_two_sweeps_read_all_but_the_last_panel_again(machine):
    if machine is not SIMULATED:
        pytest.skip("nothing is counted on a GPU")
    N = LONGER
    x = values(1, 64, N, "float32")
    *_, plan, traffic = normalize(machine, x, "FF", device=SMALL)
    assert plan.panels == 3
    assert traffic["x"].read_bytes * 3 == x.nbytes * 5
    assert traffic["y"].written_bytes == x.nbytes


# --- what folds, and the plan -------------------------------------------------------------------


def strides_of(array):
    return tuple(s // array.itemsize for s in array.strides)


@pytest.mark.parametrize(
    ("shape", "axes", "orders", "folded"),
    [
        ((6, 9), (1,), "FF", (1, 6, 9)),
        ((6, 9), (0,), "CC", (1, 9, 6)),
        ((2, 5, 3, 4), (1,), "CC", (2, 12, 5)),  # channels first
        ((3, 5, 7), (1,), "FF", (7, 3, 5)),  # the rows that lie together come first
        ((3, 5, 7), (1,), "CF", None),  # neighbours in x are not neighbours in y
        ((2, 3, 4, 5), (0, 2), "CC", None),
    ],
)
def test_what_folds(machine, shape, axes, orders, folded):
    x, y = (np.empty(shape, np.float32, order=o) for o in orders)
    strides = {"x": strides_of(x), "y": strides_of(y)}
    facts = Facts(LAYER_NORM, False, shape, axes, {"x": "float32"}, strides)
    problem = kernel_problem_of(facts)
    assert bool(problem.copies) == (folded is None)
    if folded is not None:
        assert (problem.outer, problem.M, problem.N) == folded
        assert not problem.row_major


def test_the_plan_stays_within_the_device(machine):
    for dtype, N, M, shared in itertools.product(
        ALL_DTYPES, (1, 7, 64, 255, 700, 1801, 5000), (1, 100, 10**6), (64, 99, 163, 227)
    ):
        device = dataclasses.replace(SM90, shared_bytes=shared * 1024)
        strides = dict.fromkeys("xy", (0, 1, M))
        dtypes = dict.fromkeys(("x", "weight", "bias"), dtype)
        plan = plan_of(problem_of(dtypes, (1, M, N), strides), device)
        (stage,) = plan.stages
        assert stage.shared_bytes <= device.shared_bytes
        assert stage.grid[0] * plan.rows_per_block >= M
        if plan.family == "lanes":
            continue
        assert plan.panels == 1 or plan.panel % TILE_CHUNK[dtype] == 0
        assert (plan.panels - 1) * plan.panel < N <= plan.panels * plan.panel
