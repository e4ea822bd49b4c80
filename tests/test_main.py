"""`python -m cupynorm` and `show_config`: what they report, and that they can say no."""

import dataclasses
import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import cupynorm as cn
from cupynorm.__main__ import main
from cupynorm._report import config as _config
from cupynorm._report import selfcheck as _selfcheck


@pytest.fixture
def small(monkeypatch):
    """One small table and the NumPy path alone, to keep in-process checks short."""
    table = _selfcheck.Data("small", np.random.default_rng(0).normal(3.0, 2.0, size=(8, 16)))
    backend = _selfcheck.Backend("cpu-numpy", "numpy", ("float32", "float64"))
    monkeypatch.setattr(_selfcheck, "datasets", lambda: ([table], ""))
    monkeypatch.setattr(_selfcheck, "find", lambda config: ([backend], []))


@pytest.mark.filterwarnings("ignore:'cupynorm.__main__' found in sys.modules:RuntimeWarning")
def test_program_checks_every_path_and_draws(tmp_path, capsys, monkeypatch):
    """Run as `python -m cupynorm` does it, in a process that has the libraries."""
    from matplotlib.image import imread

    picture = tmp_path / "new" / "demo.png"
    monkeypatch.setattr(sys, "argv", ["cupynorm", "--json", "--picture", str(picture)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("cupynorm", run_name="__main__", alter_sys=True)
    said = capsys.readouterr()
    assert (ended.value.code, said.err) == (0, ""), said.out
    report = json.loads(said.out)
    assert report["ok"]
    assert report["config"]["versions"]["cupynorm"] == cn.__version__
    seen = {
        tuple(c[k] for k in ("op", "path", "library", "data", "dtype")) for c in report["checks"]
    }
    every = {"float16", "bfloat16", "float32", "float64"}
    for path, library, dtypes in (
        ("cpu-numba", "numpy", every),
        ("cpu-numpy", "numpy", every),
        ("torch", "torch", every),
        ("reference", "jax", every - {"float64"}),
        ("reference", "array-api-strict", {"float32", "float64"}),
    ):
        tables = "digits", "breast-cancer"
        wanted = {("layer_norm", path, library, d, t) for d in tables for t in dtypes}
        assert wanted | {("rms_norm", path, library, "digits", "float32")} <= seen
    if not report["config"]["gpus"]:
        (cuda,) = (u for u in report["unavailable"] if u["path"] == "cuda")
        assert "->" in cuda["why"]
    assert all(0 < c["error"] <= c["allowed"] and c["seconds"] > 0 for c in report["checks"])
    assert all(c["torch_ratio"] > 0 for c in report["checks"])
    assert Path(report["picture"]) == picture.resolve()
    pixels = imread(picture)[..., :3]
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 900
    assert 0.02 < (pixels < 0.9).any(axis=-1).mean() < 0.9, "all paper or all ink"
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100  # greys and two color scales


def test_text_report(small, tmp_path, capsys, monkeypatch):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 checks right" in out
    assert "layer_norm  cpu-numpy  numpy   small  8x16   float32" in out
    assert "rms_norm    cpu-numpy  numpy   small  8x16   float32" in out
    assert "versions" in out
    out.encode("ascii", "strict")  # consoles that are not UTF-8 exist
    monkeypatch.setattr("cupynorm._report.picture.draw", lambda table, path: path.resolve())
    assert main(["--picture", str(tmp_path / "p.png")]) == 0
    assert f"picture: {tmp_path / 'p.png'}" in capsys.readouterr().out


def broken(_):
    raise RuntimeError("launch failed\nand much more")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda r: r._replace(y=r.y * (1 + 1e-4)), "y is off by"),
        (lambda r: r._replace(y=np.full_like(r.y, np.nan)), "y is off by nan"),
        (lambda r: r._replace(y=r.y[:-1]), "y has shape (7, 16), not (8, 16)"),
        (lambda r: r._replace(y=r.y.astype("longdouble")), "y has dtype"),
        (lambda r: r._replace(mean=r.mean + 1e-3), "mean is off by"),
        (lambda r: r._replace(rstd=r.rstd * 1.001), "rstd is off by"),
        (broken, "RuntimeError: launch failed\n"),
    ],
    ids=["scale", "nan", "shape", "dtype", "mean", "rstd", "raised"],
)
def test_a_wrong_path_exits_1(small, monkeypatch, capsys, spoil, words):
    def wrong(*args, return_stats=False):
        result = spoil(cn.layer_norm(*args, return_stats=True))
        return result if return_stats else result.y

    monkeypatch.setattr(_selfcheck, "layer_norm", wrong)
    assert main([]) == 1
    out = capsys.readouterr().out
    assert f"WRONG: {words}" in out
    assert "1 of 3 checks right" in out


def test_what_cannot_be_drawn_exits_2(small, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert main(["--picture", str(tmp_path / "file" / "p.png")]) == 2
    captured = capsys.readouterr()
    assert "cannot draw to" in captured.err
    assert "3 of 3 checks right" in captured.out
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["--picture", str(tmp_path / "p.png")]) == 2
    assert "pip install 'cupynorm[demo]'" in capsys.readouterr().err


def test_no_sklearn_takes_a_seeded_table_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    (table,), remark = _selfcheck.datasets()
    (again,), _ = _selfcheck.datasets()
    assert table.x.shape == (1797, 64)
    assert np.array_equal(table.x, again.x)
    assert "pip install 'cupynorm[demo]'" in remark


def test_no_bfloat16_and_no_library_are_left_out(monkeypatch):
    for name in ("ml_dtypes", "torch", "array_api_strict"):
        monkeypatch.setitem(sys.modules, name, None)
    there, absent = _selfcheck.find(cn.show_config())
    assert not [b for b in there if "bfloat16" in b.dtypes]
    assert {"torch", "array-api-strict"} <= {u.library for u in absent}
    assert _selfcheck._torch_seconds("cpu", "rms_norm", [np.ones((2, 3))] * 2) is None


def test_config_as_text():
    names = [p.name for p in cn.show_config().paths if p.available or p.way_out]
    assert names == ["cuda", "cpu-numba", "cpu-numpy", "reference"]
    path = _config.PathStatus("cuda", False, "no <GPU>", "buy one & plug it in")
    gpu = _config.Gpu("H200", "90", 141 * 2**30)
    config = _config.Config({"torch": None}, "570.1", "12.9", None, (gpu,), (path,))
    lines = str(config).splitlines()
    assert "  torch    not installed" in lines
    assert "  GPU 0    H200, sm_90, 141.0 GiB" in lines
    at = lines.index("  cuda     no: no <GPU>")
    assert lines[at + 1] == "           -> buy one & plug it in"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.driver = "other"


def test_config_without_cupy_and_with_two_and_the_driver(monkeypatch, tmp_path):
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Tue\n")
    monkeypatch.setattr(_config, "_DRIVER_FILE", file)
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(_config, "_installed", lambda name: None)
    config = cn.show_config()
    assert config.driver == "570.86.15"
    assert config.path("cuda").detail == "cupy is not installed"
    assert "cupynorm[cuda12]" in config.path("cuda").way_out
    there = {"cupy-cuda12x": "14.2.0", "cupy-cuda13x": "14.2.0"}
    monkeypatch.setattr(_config, "_installed", there.get)
    monkeypatch.setattr(_config, "_DRIVER_FILE", tmp_path / "absent")
    config = cn.show_config()
    assert config.driver is None
    assert "two CuPy distributions" in config.path("cuda").detail
    assert "pip uninstall" in config.path("cuda").way_out


@pytest.mark.parametrize("name", ["cupy", "numba", "array_api_compat"])
def test_config_survives_a_package_that_does_not_import(monkeypatch, name):
    real = _config.import_module

    def import_module(wanted):
        if wanted == name:
            msg = "===\n libsomething.so: undefined symbol"
            raise OSError(msg)
        return real(wanted)

    monkeypatch.setattr(_config, "import_module", import_module)
    status = cn.show_config().path({"cupy": "cuda", "numba": "cpu-numba"}.get(name, "reference"))
    assert not status.available
    assert "does not import (OSError: libsomething.so: undefined symbol)" in status.detail
    assert "pip install" in status.way_out


@pytest.fixture
def fake(monkeypatch):
    """Put stand-ins for cupy and for the search of CUDA's headers in place."""

    def put(gpus=1, nvrtc=(12, 9), headers="/cuda/include"):
        properties = {"name": b"Fake", "major": 9, "minor": 0, "totalGlobalMem": 2**30}
        runtime = types.SimpleNamespace(
            driverGetVersion=lambda: 12080,
            getDeviceCount=lambda: gpus,
            getDeviceProperties=lambda i: properties,
        )
        cuda = types.SimpleNamespace(
            runtime=runtime, nvrtc=types.SimpleNamespace(getVersion=lambda: nvrtc)
        )
        finder = types.SimpleNamespace(find_nvidia_header_directory=lambda name: headers)
        monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
        monkeypatch.setitem(sys.modules, "cuda.pathfinder", finder)
        monkeypatch.setattr(_config, "_driver_version", lambda: "570.86")
        return cn.show_config()

    return put


def test_config_with_gpus(fake):
    config = fake(gpus=2)
    assert config.path("cuda").available
    assert [str(gpu) for gpu in config.gpus] == ["Fake, sm_90, 1.0 GiB"] * 2
    assert config.driver == "570.86, runs CUDA up to 12.8"
    assert (config.nvrtc, config.cuda_headers) == ("12.9", "/cuda/include")


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        ({"nvrtc": None}, "NVRTC cannot be loaded (TypeError"),
        ({"headers": None}, "CUDA's headers cannot be found"),
        ({"gpus": 0}, "no GPU can be used"),
        ({"gpus": 0, "headers": None}, "cannot be found (FileNotFoundError: CuPy compiles nothing"),
    ],
)
def test_config_tells_what_a_gpu_lacks(fake, lacks, words):
    config = fake(**lacks)
    assert words in config.path("cuda").detail
    assert config.path("cuda").detail.count(";") == len(lacks) - 1  # one failure hides no other
    assert not config.path("cuda").available
    assert config.driver == "570.86, runs CUDA up to 12.8"
