"""Pictures show the right numbers, of arrays of any library; matplotlib comes when one is drawn."""

import numpy as np
import pytest

import cupynorm as cn
from tests import oracle
from tests.conftest import Backend, np_dtype

# A device that is none: array_api_strict's second, of which there is no way to the host.
BACKENDS = tuple(b for b in Backend if b is not Backend.STRICT_DEVICE1)

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def agg(monkeypatch):
    """No window, and no figure left open."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


def data(shape=(6, 40), seed=0):
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(shape[0],) + (1,) * (len(shape) - 1)))
    return 3 + scale * rng.normal(size=shape)


def stairs(ax):
    return [patch.get_data() for patch in ax.patches]


def exact(x, axes=(-1,), weight=None, bias=None):
    return oracle.layer_norm(x, axes, weight, bias, 1e-5)[0]


def histogram(values, edges):
    return np.array([np.count_nonzero((values >= a) & (values < b)) for a, b in edges])


@pytest.mark.parametrize("rows", [[4, 0, -1], 3])
def test_histograms_are_those_of_the_rows(rows):
    x = data()
    axes = cn.plot.distributions(x, rows=rows)
    by_std = sorted(range(6), key=lambda i: x[i].std())
    picked = [4, 0, 5] if rows != 3 else [by_std[0], by_std[2], by_std[5]]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == [f"row {i}" for i in picked]
    for ax, table in zip(axes, (x, exact(x)), strict=True):
        drawn = stairs(ax)
        assert len(drawn) == 3
        for k, (i, (heights, edges, base)) in enumerate(zip(picked, drawn, strict=True)):
            np.testing.assert_allclose(edges[[0, -1]], (table[picked].min(), table[picked].max()))
            assert base == 2 - k  # the first on top
            assert ax.get_yticks()[k] == base
            counts = histogram(table[i], zip(edges, [*edges[1:-1], np.inf], strict=False))
            np.testing.assert_allclose((heights - base) / 0.85, counts / counts.max())


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "add_rms_norm"])
def test_dots_and_bars_are_means_and_deviations(op):
    x = data()
    axes, after = cn.plot.distributions(x, rows=[1, 3], op=op), exact(x)
    if "rms" in op:
        after = oracle.layer_norm(x, (-1,), None, None, np.finfo(x.dtype).eps, center=False)[0]
    assert axes[1].get_title() == f"after {op.removeprefix('add_')}"
    for ax, table in zip(axes, (x, after), strict=True):
        for bar, i in zip(ax.containers, (1, 3), strict=True):
            dot, _, (segments,) = bar.lines
            ((left, _), (right, _)) = segments.get_segments()[0]
            mean, std = table[i].mean(), table[i].std()
            np.testing.assert_allclose(dot.get_xdata(orig=False), [mean], atol=1e-12)
            np.testing.assert_allclose((left, right), (mean - std, mean + std), atol=1e-12)


def test_what_is_not_finite_is_left_out():
    x = data()
    x[0, 3], x[1, 5] = np.nan, np.inf
    before, after = cn.plot.distributions(x, rows=[0, 1, 2])
    drawn = stairs(before)
    assert len(drawn) == 3
    assert len(stairs(after)) == 1  # y of the first two rows is NaN
    np.testing.assert_allclose(drawn[0][1][-1], np.nanmax(x[:3][np.isfinite(x[:3])]))
    plain, _ = cn.plot.affine(x, weight=np.ones(40))
    want = exact(x[2:]).mean(axis=0)
    np.testing.assert_allclose(stairs(plain)[1][0], want, atol=1e-12)
    before, after = cn.plot.distributions(np.full((2, 5), 7.0))  # one value has a bin to stand in
    assert stairs(before)[0][1][[0, -1]].tolist() == [6.5, 7.5]
    assert stairs(after)[0][1][[0, -1]].tolist() == [-0.5, 0.5]


def test_rows_weight_and_eps_are_those_of_the_call():
    x, w, b = data(), np.linspace(1, 2, 40), np.linspace(-1, 1, 40)
    _, after = cn.plot.distributions(x, 40, w, b, 0.5, rows=[2])
    y = oracle.layer_norm(x, (-1,), w, b, 0.5)[0][2]
    np.testing.assert_allclose(stairs(after)[0][1][[0, -1]], (y.min(), y.max()))
    x = data((4, 5, 6))
    before, _ = cn.plot.distributions(x, axis=1, rows=[7])  # (0, 1), as 7 = 0 * 6 + ... + 1 * 6 + 1
    values = x[1, :, 1]
    np.testing.assert_allclose(stairs(before)[0][1][[0, -1]], (values.min(), values.max()))


def test_a_matrix_gives_points_and_one_row_a_point():
    x = data()
    mean, variance = cn.plot.moments(x)
    np.testing.assert_allclose(mean.lines[0].get_ydata(), x.mean(axis=1))
    np.testing.assert_allclose(variance.lines[0].get_ydata(), x.var(axis=1))
    assert mean.get_xlabel() == "index along axis 0 of x"
    mean, _ = cn.plot.moments(x[0])
    np.testing.assert_allclose(mean.lines[0].get_ydata(), [x[0].mean()])


def test_two_axes_give_a_map():
    x = data((4, 5, 6))
    for ax, want in zip(cn.plot.moments(x, axis=1), (x.mean(1), x.var(1)), strict=True):
        np.testing.assert_allclose(ax.images[0].get_array(), want)
        assert (ax.get_xlabel(), ax.get_ylabel()) == ("axis 2 of x", "axis 0 of x")


def test_images_stand_side_by_side():
    x = data((5, 3, 4, 7))
    mean, variance = cn.plot.moments(x, axis=1, images=2)
    for ax, want in ((mean, x.mean(1)), (variance, x.var(1))):
        drawn = ax.images[0].get_array()
        assert drawn.shape == (4, 7 + 1 + 7)
        np.testing.assert_allclose(drawn[:, :7], want[0])
        np.testing.assert_allclose(drawn[:, 8:], want[1])
        assert drawn.mask[:, 7].all()  # NaN: nothing is drawn
    assert mean.get_xlabel() == "axis 3 of x, 2 images"


def test_a_wide_span_gets_a_scale_of_powers():
    x = data()
    x[0] *= 1e4
    assert cn.plot.moments(x)[1].get_yscale() == "log"
    assert cn.plot.moments(data())[1].get_yscale() == "linear"
    x = data((4, 5, 6))
    x[0] *= 1e4
    _, variance = cn.plot.moments(x)
    assert isinstance(variance.images[0].norm, matplotlib.colors.LogNorm)


@pytest.mark.parametrize("op", ["layer_norm", "zero_centered_layer_norm"])
@pytest.mark.parametrize("given", ["weight", "bias", "both"])
def test_bands_are_those_of_the_columns(given, op):
    x = data((50, 6))
    w = np.linspace(-2, 3, 6) if given != "bias" else None
    b = np.linspace(5, 1, 6) if given != "weight" else None
    less = 0 if w is None or op == "layer_norm" else 1
    plain, scaled = cn.plot.affine(x, 6, w if w is None else w - less, b, op=op)
    for ax, y in ((plain, exact(x)), (scaled, exact(x, weight=w, bias=b))):
        (high, edges, low), (center, _, _) = stairs(ax)[:2]
        np.testing.assert_allclose(center, y.mean(axis=0), atol=1e-12)
        np.testing.assert_allclose((high - low) / 2, y.std(axis=0), atol=1e-12)
        np.testing.assert_allclose(edges, np.arange(7) - 0.5)
    upper, lower = (values for values, _, _ in stairs(scaled)[2:])
    middle, reach = (0 if b is None else b), (1 if w is None else np.abs(w))
    np.testing.assert_allclose(upper, middle + reach * np.ones(6))
    np.testing.assert_allclose(lower, middle - reach * np.ones(6))
    assert scaled.get_title() == {"both": "with weight and bias"}.get(given, f"with {given}")


def test_weight_of_axes_in_any_order_reaches_its_columns():
    x, w = data((3, 4, 5)), np.linspace(1, 2, 20).reshape(5, 4)
    _, scaled = cn.plot.affine(x, weight=w, axis=(2, 1))
    y = exact(x.reshape(3, 20), weight=w.T.ravel())
    np.testing.assert_allclose(stairs(scaled)[1][0], y.mean(axis=0), atol=1e-12)
    np.testing.assert_allclose(stairs(scaled)[2][0], w.T.ravel())


def test_arrays_of_every_library_are_drawn(lib):
    dtype = "bfloat16" if "bfloat16" in lib.backend.dtypes else "float32"
    values = data((5, 12)).astype(np_dtype(dtype))
    x, w = lib.array(values, dtype), lib.array(np.linspace(0, 2, 12), dtype)
    before, after = cn.plot.distributions(x, rows=[2])
    row = values.astype(np.float64)[2]
    np.testing.assert_allclose(stairs(before)[0][1][[0, -1]], (row.min(), row.max()))
    bound = 2 * oracle.tolerance(dtype, 12)
    y = exact(values.astype(np.float64))[2]
    edges = stairs(after)[0][1]
    np.testing.assert_allclose(edges[[0, -1]], (y.min(), y.max()), rtol=bound, atol=bound)
    mean, _ = cn.plot.moments(x)
    np.testing.assert_allclose(mean.lines[0].get_ydata()[2], row.mean())
    cn.plot.affine(x, 12, w)
    if hasattr(x, "requires_grad_"):  # a tensor in training
        mean, _ = cn.plot.moments(x.requires_grad_())
        np.testing.assert_allclose(mean.lines[0].get_ydata()[2], row.mean())


def test_axes_of_the_caller_are_drawn_on(agg):
    figure, pair = agg.subplots(2, 1)
    before = len(agg.get_fignums())
    assert list(cn.plot.distributions(data(), ax=pair)) == list(pair)
    assert len(agg.get_fignums()) == before
    assert pair[0].patches
    assert figure.axes == list(pair)


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_ink_follows_the_style(agg, style):
    with agg.style.context(style):
        _, scaled = cn.plot.affine(data(), 40, np.ones(40))
        ink = matplotlib.colors.to_hex(agg.rcParams["axes.labelcolor"])
    assert matplotlib.colors.to_hex(scaled.patches[2].get_edgecolor()) == ink
