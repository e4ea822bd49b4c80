"""Pictures of layer norm: rows before and after, their statistics, what weight and bias do.

Of the library it imports the rules and the settled calls, no other adapter; of others,
matplotlib alone, when something is drawn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cupynorm import _calls, _rules
from cupynorm._layout import Facts
from cupynorm._libraries import to_host
from cupynorm.plot import _drawing

__all__ = ["affine", "distributions", "moments"]

Array = np.ndarray[Any, np.dtype[np.float64]]


def distributions(
    x: Any,
    normalized_shape: Any = None,
    weight: Any = None,
    bias: Any = None,
    eps: float | None = None,
    *,
    axis: Any = None,
    op: str = "layer_norm",
    rows: int | Sequence[int] = 8,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw how the values of single rows are distributed, before and after `cupynorm.layer_norm`.

    Each row is a histogram over its base line, in the same bins as the others, scaled to the same
    height; a dot and a bar below it are its mean and its standard deviation. NaN and infinity are
    left out.

    Parameters
    ----------
    x : array
        As for `cupynorm.layer_norm`. A picture is for eyes: x and y are copied to the host,
        wherever they are, which the norm itself never does. Of a large x pass a part.
    normalized_shape, weight, bias, eps, axis : optional
        As for `cupynorm.layer_norm`.
    op : str, default 'layer_norm'
        As for `cupynorm.prepare`; of one that adds, x is the sum.
    rows : int or sequence of int, default 8
        Which rows to draw, counted along the axes that are not normalized: so many, evenly spread
        from the smallest standard deviation to the largest; or exactly these.
    ax : two Axes, optional
        Where to draw; a new figure of ``matplotlib.pyplot`` where left out.

    Returns
    -------
    tuple of two Axes
        Before and after.

    Raises
    ------
    TypeError, ValueError
        As `cupynorm.layer_norm` for its arguments; for a row that is not there, an x without
        elements, and an `ax` that is not two Axes.
    ImportError
        If matplotlib is not installed and `ax` is left out.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x = np.array([[1.0, 2.0, 3.0], [100.0, 200.0, 300.0]])
    >>> before, after = cn.plot.distributions(x)
    >>> [label.get_text() for label in before.get_yticklabels()]
    ['row 0', 'row 1']
    """
    call, normalize = _checked(op, x, weight, bias, (normalized_shape, axis, eps))
    table = _rows_of(call.facts, call.x)
    picked = _picked_rows(table, rows)
    y = normalize(weight, bias)
    axes = _drawing.two_axes(ax, (9.0, 1.2 + 0.42 * len(picked)), sharey=True)
    labels = [f"row {i}" for i in picked]
    _drawing.ridges(axes[0], table[picked], labels, _drawing.BEFORE)
    _drawing.ridges(axes[1], _rows_of(call.facts, y)[picked], labels, _drawing.AFTER)
    axes[0].set_title("before")
    axes[1].set_title(f"after {call.facts.op.function}")
    return axes


def moments(
    x: Any,
    normalized_shape: Any = None,
    *,
    axis: Any = None,
    images: int = 8,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw the mean and the variance of every row of a batch, as `cupynorm.layer_norm` sees them.

    What is not normalized is what is drawn: points for a matrix, whose rows each have one mean; a
    map for two axes, such as the sequences and steps of (batch, step, feature); and images side by
    side for more, such as (batch, channel, height, width) over its channels. Where the values span
    more than a factor of 100, the scale is logarithmic.

    Parameters
    ----------
    x : array
        As for `distributions`.
    normalized_shape, axis : optional
        As for `distributions`.
    images : int, default 8
        Where there are three axes and more to draw, how many images are shown.
    ax : two Axes, optional
        As for `distributions`.

    Returns
    -------
    tuple of two Axes
        Mean, and variance: the biased one, divided by the number of elements, in float64.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `distributions`; for `images` below 1.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x = np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    >>> mean, variance = cn.plot.moments(x)
    >>> [float(value) for value in mean.lines[0].get_ydata()]
    [2.0, 20.0]
    """
    if images < 1:
        msg = f"images={images} leaves nothing to draw; pass 1 or more"
        raise ValueError(msg)
    call, _ = _checked("layer_norm", x, None, None, (normalized_shape, axis, None))
    table = _rows_of(call.facts, call.x)
    kept = [i for i in range(call.x.ndim) if i not in call.facts.axes]
    shape = [call.x.shape[i] for i in kept]
    with np.errstate(invalid="ignore"):  # of rows with infinities; they are left out
        statistics = table.mean(axis=1).reshape(shape), table.var(axis=1).reshape(shape)
    axes = _drawing.two_axes(ax, (9.0, 3.4))
    for one, statistic in zip(axes, statistics, strict=True):
        if statistic.ndim < 2:
            label = f"index along axis {kept[0]} of x" if kept else "x, all of it one row"
            _drawing.line(one, np.atleast_1d(statistic), label, _drawing.BEFORE)
        elif statistic.ndim == 2:
            labels = f"axis {kept[1]} of x", f"axis {kept[0]} of x"
            _drawing.map_of(one, statistic, *labels, square=False)
        else:
            tiles = statistic.reshape(-1, *statistic.shape[-2:])[:images]
            labels = f"axis {kept[-1]} of x, {len(tiles)} images", f"axis {kept[-2]} of x"
            _drawing.map_of(one, _side_by_side(tiles), *labels, square=True)
            one.set_xticks([])
            one.set_yticks([])
    axes[0].set_title("mean")
    axes[1].set_title("variance")
    return axes


def affine(
    x: Any,
    normalized_shape: Any = None,
    weight: Any = None,
    bias: Any = None,
    eps: float | None = None,
    *,
    axis: Any = None,
    op: str = "layer_norm",
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw what weight and bias do to each column of the normalized rows.

    On the left `cupynorm.layer_norm` without them, on the right with them: for each column its
    mean over the rows, and a band of one standard deviation around it. A weight stretches the band
    of its column, a bias moves it; dashed lines show both alone, bias ± abs(weight), which is where
    the band of a column of mean 0 and deviation 1 lies. Rows with NaN or infinity are left out.

    Parameters
    ----------
    x : array
        As for `distributions`.
    normalized_shape, weight, bias, eps, axis, op, ax : optional
        As for `distributions`; weight or bias must be given.

    Returns
    -------
    tuple of two Axes
        Without and with weight and bias.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `distributions`; if there is neither weight nor bias.

    Examples
    --------
    >>> import numpy as np
    >>> import cupynorm as cn
    >>> x = np.random.default_rng(0).normal(size=(100, 3))
    >>> plain, scaled = cn.plot.affine(x, 3, weight=np.array([1.0, 2.0, 4.0]))
    >>> scaled.get_title()
    'with weight'
    """
    given = [name for name, value in (("weight", weight), ("bias", bias)) if value is not None]
    if not given:
        msg = "neither weight nor bias is given, so there is no effect to draw; pass one or both"
        raise ValueError(msg)
    call, normalize = _checked(op, x, weight, bias, (normalized_shape, axis, eps))
    axes = _drawing.two_axes(ax, (9.0, 3.4), sharey=True)
    looks = ((None, None, _drawing.BEFORE), (weight, bias, _drawing.AFTER))
    for one, (w, b, color) in zip(axes, looks, strict=True):
        y = _rows_of(call.facts, normalize(w, b))
        _drawing.band(one, *_mean_and_std_of_columns(y), color)
    n, unit = y.shape[1], call.facts.op.unit_weight
    stretch = np.ones(n) if weight is None else _column(call.turn, call.arrays[1]) + unit
    shift = np.zeros(n) if bias is None else _column(call.turn, call.arrays[2])
    told = "1" if weight is None else "abs(1 + weight)" if unit else "abs(weight)"
    label = f"{'0' if bias is None else 'bias'} ± {told}"
    _drawing.outline(axes[1], shift, np.abs(stretch), label)
    axes[0].set_title(f"{call.facts.op.function} alone")
    axes[1].set_title(f"with {' and '.join(given)}")
    return axes


# --- what is drawn of an array ------------------------------------------------------------------


def _checked(
    name: str, x: Any, weight: Any, bias: Any, how: tuple[Any, Any, Any]
) -> tuple[_calls.Checked, Callable[..., Any]]:
    """Apply the rules of an operation, refuse an x without elements; what gives y comes, too."""
    op = _rules.resolve_op(name).alone
    rest = *how[:2], _rules.default_eps(op, how[2]), "K", False
    call = _calls.check(op, x, weight, bias, None, rest)
    if not call.facts.size:
        msg = f"x with shape {call.facts.shape} has no elements to draw; pass one that has"
        raise ValueError(msg)
    return call, lambda w, b: _calls.normalize(op, call.x, w, b, None, rest)


def _rows_of(facts: Facts, array: Any) -> Array:
    """Values of x or y, the normalized axes as the columns, (M, N)."""
    last = range(-len(facts.axes), 0)
    return np.moveaxis(to_host(array).astype(np.float64), facts.axes, last).reshape(-1, facts.N)


def _column(turn: tuple[int, ...] | None, value: Any) -> Array:
    """Values of weight or bias, one per column, (N,)."""
    values = to_host(value).astype(np.float64)
    return (values if turn is None else values.transpose(turn)).ravel()


def _mean_and_std_of_columns(table: Array) -> tuple[Array, Array]:
    """Over the rows that are finite: one other row would leave no column a mean."""
    finite = table[np.isfinite(table).all(axis=1)]
    if not len(finite):
        msg = (
            "every row of y has NaN or infinity, so no column has a mean to draw; pass finite rows"
        )
        raise ValueError(msg)
    return finite.mean(axis=0), finite.std(axis=0)


def _picked_rows(table: Array, rows: int | Sequence[int]) -> list[int]:
    """Read the parameter `rows`: the rows themselves, or so many from the narrowest to the widest.

    Those are evenly spread over the order of standard deviations.
    """
    m = len(table)
    if not isinstance(rows, int):
        wanted = list(_rules.integers(np.ravel(rows).tolist(), "rows"))
        if not wanted or not all(-m <= i < m for i in wanted):
            msg = f"rows={wanted} is not among the {m} rows of x; pass indices from 0 to {m - 1}"
            raise ValueError(msg)
        return [i % m for i in wanted]
    if rows < 1:
        msg = f"rows={rows} leaves nothing to draw; pass 1 or more, or a list of indices"
        raise ValueError(msg)
    with np.errstate(invalid="ignore"):  # a row with infinities has no standard deviation
        by_std = np.argsort(table.std(axis=1), kind="stable")
    return [int(i) for i in by_std[np.linspace(0, m - 1, min(rows, m)).astype(int)]]


def _side_by_side(tiles: Array) -> Array:
    """Images (count, height, width) as one, a column of NaN between them."""
    gap = np.full((*tiles.shape[:2], 1), np.nan)
    return np.hstack(list(np.concatenate([tiles, gap], axis=2)))[:, :-1]
