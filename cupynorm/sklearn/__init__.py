"""Layer and RMS norm as scikit-learn transformers; needs the extra ``sklearn``.

Estimators with scikit-learn's conventions; what they are given and give back is in `_data`.
Imports `_calls` and the tables of `frames`; no other adapter.
"""

from numbers import Real
from typing import Any, Self

import numpy as np
from sklearn import get_config
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
from sklearn.utils.validation import validate_data

from cupynorm import _calls
from cupynorm._libraries import library_of
from cupynorm._ops import LAYER_NORM, RMS_NORM, Op
from cupynorm._rules import check_eps
from cupynorm.frames import columns
from cupynorm.sklearn import _data as data

__all__ = ["LayerNormalizer", "RMSNormalizer"]

_OUTPUT_TYPES = (None, "input", "numpy", "cupy", "pandas", "cudf")
_FLOATS = ("float64", "float32", "float16")


class _Normalizer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    _op: Op
    eps: float | None
    copy: bool
    output_type: str | None

    def fit(self, X: Any, y: Any = None) -> Self:
        """Check the parameters and X; remember number and names of the features, nothing else.

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            Samples in rows.
        y : ignored
            Here for scikit-learn's conventions.

        Returns
        -------
        estimator
            Itself.

        Raises
        ------
        TypeError, ValueError
            If X is sparse, lazy, not 2-D, empty, complex, not numeric or not finite, or a parameter
            is none of what it may be.

        Examples
        --------
        >>> from cupynorm.sklearn import LayerNormalizer
        >>> LayerNormalizer().fit([[1.0, 2.0, 3.0]]).n_features_in_
        3
        """
        self._check_parameters()
        self._check(X, reset=True)
        return self

    def transform(self, X: Any) -> Any:
        """Normalize each sample.

        Parameters
        ----------
        X : array-like or DataFrame of shape (n_samples, n_features)
            As for `fit`.

        Returns
        -------
        array or DataFrame of shape (n_samples, n_features)
            What `output_type` and ``set_output`` say.

        Raises
        ------
        TypeError, ValueError
            As `fit` does; if number or names of the features are not those of `fit`.

        Examples
        --------
        >>> from cupynorm.sklearn import LayerNormalizer
        >>> LayerNormalizer().transform([[1.0, 2.0, 3.0]]).shape
        (1, 3)
        """
        eps = self._check_parameters()
        checked = self._check(X, reset=False)
        if isinstance(checked, list):
            on_host = isinstance(checked[0].values, np.ndarray)
            # cuDF transposes a row-major matrix, at the cost of a copy.
            order = "C" if on_host or self.output_type not in (None, "input", "cudf") else "F"
            dtype = data.floats_of(checked)
            y = columns.normalize(self._op, checked, None, None, eps, dtype=dtype, order=order)
        else:
            given = isinstance(X, np.ndarray) or data.is_foreign(X)  # not made here of a table
            out = checked if given and not self.copy and data.may_overwrite(checked) else None
            how = None, 1, eps, "K", False
            y = _calls.normalize(self._op, checked, None, None, out, how)
        return data.convert(y, self.output_type, X, getattr(self, "feature_names_in_", None))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.array_api_support = True
        tags.transformer_tags.preserves_dtype = list(_FLOATS)
        return tags

    def _check_parameters(self) -> float | None:
        """Check the parameters, which scikit-learn forbids `__init__` to do; give eps."""
        eps = self.eps
        if eps is not None or self._op.center:
            if isinstance(eps, bool) or not isinstance(eps, Real):
                msg = f"eps={eps!r} is a {type(eps).__name__}, not a number; pass e.g. 1e-5"
                raise TypeError(msg)
            eps = check_eps(float(eps))
        if eps is not None and eps < 0:
            msg = f"eps={self.eps!r} is negative; pass 0 or more: it is added to the variance"
            raise ValueError(msg)
        if not isinstance(self.copy, (bool, np.bool_)):
            msg = f"copy={self.copy!r} is a {type(self.copy).__name__}; pass True or False"
            raise TypeError(msg)
        if self.output_type not in _OUTPUT_TYPES:
            msg = f"output_type={self.output_type!r} is not one of {_OUTPUT_TYPES}; pass one"
            raise ValueError(msg)
        return eps

    def _check(self, X: Any, reset: bool) -> Any:
        """Check X, its features' number and names; give an array of floats, or columns."""
        data.check_kind(X)
        foreign, what = data.is_foreign(X), type(self).__name__
        self._check_library(library_of(X) if foreign else "numpy", reset)
        any_value = get_config()["assume_finite"]
        table = None
        if foreign:
            X = data.as_floats(X, what)
            if not any_value:
                data.refuse_not_finite(X, what)
        elif table := data.columns_of(X, what):
            if not any_value:
                data.refuse_bad_columns(X, table, what)
        else:
            # X is written to only where it is an array; a read-only one is copied then.
            in_place = not self.copy and isinstance(X, np.ndarray)
            floats = [np.dtype(name) for name in _FLOATS]
            named = {"dtype": floats, "force_writeable": in_place}
            checked = validate_data(self, X, reset=reset, **named)
            far = self._op.center and columns.is_far(X, "float64")
            return columns.gather(list(X.T)) if far else checked
        X = validate_data(self, X, reset=reset, skip_check_array=True)
        return X if table is None else table

    def _check_library(self, library: str, reset: bool) -> None:
        """Hold `transform` to `fit`'s library as scikit-learn does while it dispatches."""
        if reset:
            self._fit_library = library
        seen = getattr(self, "_fit_library", library)
        if seen != library and get_config()["array_api_dispatch"]:
            name = type(self).__name__
            msg = (
                f"Inputs passed to {name}.transform() must use the same namespace as those passed "
                f"to fit(): {seen}, not {library}. Call fit on {library} data, or do not call it: "
                f"{name} learns nothing there"
            )
            raise ValueError(msg)


class LayerNormalizer(_Normalizer):
    """Normalize each sample over its features, to mean 0 and variance 1.

    As `cupynorm.layer_norm` computes it. A sample's result depends on that sample alone, so there
    is nothing to learn from data: no leak between folds, no statistics that drift. For features
    that have comparable units: pixels, bands of a spectrum, counts of words, outputs of a model.

    Parameters
    ----------
    eps : float, default 1e-5
        As for `cupynorm.layer_norm`, but at least 0.
    copy : bool, default True
        False writes the result into X where X is a NumPy, CuPy or torch array of floats. Anything
        else, tables among it, is never written to.
    output_type : {None, 'input', 'numpy', 'cupy', 'pandas', 'cudf'}, default None
        As cuML has it: 'input' gives what X was, the others name a library, and data is moved
        between host and GPU where that needs it. None is scikit-learn's way: an array of X's
        library, NumPy for lists and for tables of pandas and polars, unless ``set_output`` asks for
        a DataFrame; and 'input' for cuDF. cuML's global setting is not looked at.

    Attributes
    ----------
    n_features_in_ : int
        Number of features seen by `fit`.
    feature_names_in_ : ndarray of shape ``(n_features_in_,)``
        Names of the features seen by `fit`, where X had names that are all strings.

    See Also
    --------
    cupynorm.layer_norm : The function, for any axes, with weight and bias.
    cupynorm.frames.layer_norm : For tables with missing values.
    sklearn.preprocessing.Normalizer : Unit norm of each sample; does not subtract the mean.
    sklearn.preprocessing.StandardScaler : Mean and variance of each feature, learned by `fit`.

    Notes
    -----
    The formula is that of Ba, Kiros and Hinton (2016), arXiv:1607.06450. The estimator is
    stateless: `transform` needs no `fit`, which checks X and remembers the number and the names of
    its features. There is no `inverse_transform`, as each sample's mean and variance are gone.

    Floats keep their dtype; integers and bool become float64 (float32 on a device that has no
    float64). A table takes the dtype that NumPy's promotion finds for its columns: int8 and float32
    give float32, int32 and float32 give float64. It is not copied into one matrix first.

    NaN, infinities and nulls are refused, as one would make all of its row NaN. Impute them, or,
    inside ``sklearn.config_context(assume_finite=True)``, skip that check, which is a pass over X.
    `cupynorm.frames.layer_norm` can leave them out of a row's statistics (``nulls='omit'``). Sparse
    X is refused, as subtracting the mean makes it dense; so are Dask's collections, as scikit-learn
    would compute them: `cupynorm.layer_norm` takes them.

    Arrays of CuPy, torch, JAX or another array-API library stay what and where they are, whether
    ``array_api_dispatch`` is on or not; torch's autograd goes through. While it is on, `transform`
    refuses another library than `fit` has seen, as scikit-learn's own estimators do. ``set_output``
    makes tables from data on the host only: for a GPU's give ``output_type='numpy'`` as well.

    Examples
    --------
    >>> from cupynorm.sklearn import LayerNormalizer
    >>> X = [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]
    >>> LayerNormalizer(eps=0.0).fit_transform(X).round(3)
    array([[-1.225,  0.   ,  1.225],
           [-1.225,  0.   ,  1.225]])
    """

    _op = LAYER_NORM

    def __init__(self, *, eps: float = 1e-5, copy: bool = True, output_type: str | None = None):
        self.eps = eps
        self.copy = copy
        self.output_type = output_type


class RMSNormalizer(_Normalizer):
    """Divide each sample by the root mean square of its features.

    As `cupynorm.rms_norm` computes it, and otherwise as `LayerNormalizer`, of which all that is
    said holds, sparse X too. ``sklearn.preprocessing.Normalizer`` divides by the root of the sum.

    Parameters
    ----------
    eps : float, optional
        As for `cupynorm.rms_norm`, but at least 0.
    copy, output_type : optional
        As for `LayerNormalizer`.

    Notes
    -----
    The formula is that of Zhang and Sennrich (2019), arXiv:1910.07467.

    Examples
    --------
    >>> from cupynorm.sklearn import RMSNormalizer
    >>> RMSNormalizer(eps=0.0).fit_transform([[3.0, -3.0], [1.0, 1.0]])
    array([[ 1., -1.],
           [ 1.,  1.]])
    """

    _op = RMS_NORM

    def __init__(
        self, *, eps: float | None = None, copy: bool = True, output_type: str | None = None
    ):
        self.eps = eps
        self.copy = copy
        self.output_type = output_type
