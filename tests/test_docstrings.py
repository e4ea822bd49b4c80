"""Docstrings of what users call: numpydoc's form, with shapes, errors, and examples that run."""

import doctest
import importlib
import inspect
import re
import warnings

import pytest

for extra in ("dask", "matplotlib", "sklearn", "torch"):
    pytest.importorskip(extra)
ClassDoc = pytest.importorskip("numpydoc.docscrape").ClassDoc
validate = pytest.importorskip("numpydoc.validate").validate

ROOMS = ("frames.columns", "dask", "frames", "plot", "sklearn", "torch")
MODULES = ("cupynorm", *(f"cupynorm.{room}" for room in ROOMS))
RESULTS = [f"cupynorm._report.config.{name}" for name in ("Config", "Gpu", "PathStatus")]
# Of numpydoc's checks, what does not hold here, and why.
LEFT_OUT = {
    "ES01",  # a summary that says all needs no second paragraph
    "PR01",  # fields of named tuples and dataclasses stand as attributes; looked at below
    "PR08",  # x, mean and float16 begin sentences in small letters
    "RT04",
    "SA01",  # a See Also where there is something to see
    "SS05",  # a noun phrase reads better for what is a value
}
NO_EXAMPLE = set(RESULTS)  # made by show_config alone, which has one
# Classes whose objects a function gives: their constructors' parameters are no user's business.
GIVEN = {"cupynorm.PreparedLayerNorm"}
# What computes the formula says whose it is.
COMPUTES = re.compile(r"layer_norm\w*$|LayerNorm$|LayerNormalizer$")


def public():
    """Every public name with a docstring of its own: functions, classes, and their methods."""
    names = []
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            if not name.startswith("__"):
                names += with_methods(f"{module}.{name}")
    for name in RESULTS:
        names += with_methods(name)
    return names


def find(name):
    module, _, rest = name.partition(".")
    found = importlib.import_module(module)
    for part in rest.split("."):
        if inspect.ismodule(found) and not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def with_methods(name):
    thing = find(name)
    if inspect.ismodule(thing):  # cn.plot, whose own names are in MODULES
        return []
    if not inspect.isclass(thing):
        return [name]
    ours = [base for base in thing.__mro__ if base.__module__.startswith("cupynorm")]
    methods = {
        key
        for base in ours
        for key, value in vars(base).items()
        if not key.startswith("_") and (callable(value) or isinstance(value, classmethod))
    }
    return [name, *(f"{name}.{method}" for method in sorted(methods))]


every_name = pytest.mark.parametrize("name", public())


@every_name
def test_numpydoc_finds_nothing(name):
    left_out = LEFT_OUT | ({"EX01"} if name in NO_EXAMPLE else set())
    if fields_of(find(name)) is None and name not in GIVEN:
        left_out = left_out - {"PR01"}
    faults = [f"{code} {text}" for code, text in validate(name)["errors"] if code not in left_out]
    assert not faults


def fields_of(thing):
    fields = getattr(thing, "_fields", None) or getattr(thing, "__dataclass_fields__", None)
    return None if fields is None else list(fields)


@pytest.mark.parametrize("name", [n for n in public() if fields_of(find(n)) is not None])
def test_every_field_is_described(name):
    described = [
        field.strip()
        for attribute in ClassDoc(find(name))["Attributes"]
        if attribute.desc  # numpydoc adds what has no description
        for field in attribute.name.split(",")
    ]
    assert described == fields_of(find(name))


@every_name
def test_what_computes_says_whose_formula_it_is(name):
    if COMPUTES.search(name):
        assert "arXiv:1607.06450" in inspect.getdoc(find(name))


@every_name
def test_examples_run(name):
    doc = inspect.getdoc(find(name))
    examples = doctest.DocTestParser().get_doctest(doc, {}, name, None, 0)
    assert examples.examples or name in NO_EXAMPLE
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runner.run(examples, out=report.append)
    assert not runner.failures, "".join(report)
