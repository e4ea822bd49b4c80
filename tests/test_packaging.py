"""The package as it reaches users: wheel, sdist, editable install, bare checkout."""

import email
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEPENDENCIES = sysconfig.get_paths()["purelib"]  # numpy and the build backend, for every context
PIP = "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"

# Prints where the package came from and what it reads as kernels.
PROBE = """
import hashlib, json, cupynorm
from cupynorm._cuda import source as _source
texts = {f.name: f.read_bytes() for f in _source.kernels_folder().iterdir() if f.is_file()}
digests = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
print(json.dumps({"file": cupynorm.__file__, "version": cupynorm.__version__, "kernels": digests}))
"""


def run(*command, cwd="/", path=()):
    """Run python with only `path` and the dependencies in front; return its output."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env["PYTHONPATH"] = os.pathsep.join([*map(str, path), DEPENDENCIES])
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def probe(*path, python=sys.executable):
    """Where the package is found, and its version; its kernels are those of the checkout."""
    found = json.loads(run(python, "-c", PROBE, path=path))
    texts = sorted((ROOT / "kernels").glob("*.cuh"))
    assert texts, "the checkout has no kernels"
    assert found["kernels"] == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in texts}
    return Path(found["file"]), found["version"]


def build(source, outdir, kind):
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", outdir, source)
    (built,) = outdir.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


def install(wheel, target):
    run(sys.executable, *PIP, "--ignore-installed", "--target", target, wheel)
    return target


def test_wheel(wheel, tmp_path):
    """Installed, and imported as a zip."""
    site = install(wheel, tmp_path / "site")
    assert probe(site)[0].is_relative_to(site)
    assert wheel.name in str(probe(wheel)[0])


def test_sdist_gives_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build(source, tmp_path / "dist", "wheel")
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(again) as b:
        sums = ({i.filename: i.CRC for i in archive.infolist()} for archive in (a, b))
        assert next(sums) == next(sums)


def test_sdist_holds_what_a_packager_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        *("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
        *("Makefile", "constraints.txt", "tests/test_packaging.py", "kernels/types.cuh"),
        *("bench/results/PENDING.md", "cupynorm/py.typed"),
    }
    assert wanted <= names, f"not in the sdist: {sorted(wanted - names)}"
    assert not {n for n in names if n.startswith((".venv", "out/", "dist/", "build/"))}


def test_editable_install_and_bare_checkout(tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, *PIP, "--ignore-installed", "--no-build-isolation", "-e", ROOT)
    here = ROOT / "cupynorm" / "__init__.py"
    assert probe(python=python)[0] == probe(ROOT)[0] == here


def test_wheel_brings_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"cupynorm"}
    assert "cupynorm/py.typed" in names
    shipped = {name for name in names if name.startswith("cupynorm/kernels/")}
    assert shipped == {f"cupynorm/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.cuh")}
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def test_kernels_folder_shadows_no_package_of_that_name(tmp_path):
    """Hugging Face's package `kernels` must win even when Python runs from our root."""
    other = tmp_path / "kernels" / "__init__.py"
    other.parent.mkdir()
    other.write_text("")
    code = "import kernels; print(kernels.__file__)"
    assert Path(run(sys.executable, "-c", code, cwd=ROOT, path=(ROOT, tmp_path)).strip()) == other


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        data = email.message_from_string(archive.read(name).decode())
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert (data["Name"], data["Version"]) == ("cupynorm", probe(ROOT)[1])
    assert data["Requires-Python"] == ">=3.11"
    assert data["License-Expression"] == "Apache-2.0"
    extras = {"cuda12", "cuda13", "cpu", "torch", "sklearn", "dask", "notebook", "demo", "test"}
    assert set(data.get_all("Provides-Extra")) == extras | {"bench", "docs", "safetensors"}
    required = [r for r in data.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(r.partition(">")[0] for r in required) == ["array-api-compat", "numpy"]
    # cupynorm[cuda12] must not bring cuBLAS and the like: gigabytes that nothing here uses
    cuda = [r for r in data.get_all("Requires-Dist") if "extra == 'cuda12'" in r]
    nvidia = {r.partition("<")[0] for r in cuda if r.startswith("nvidia")}
    assert nvidia == {"nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"}
