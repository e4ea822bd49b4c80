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
    return json.loads(run(python, "-c", PROBE, path=path))


def build(source, outdir, kind):
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", outdir, source)
    (built,) = outdir.iterdir()
    return built


@pytest.fixture(scope="module")
def kernels():
    """Digest of each kernel text in the checkout."""
    texts = sorted((ROOT / "kernels").glob("*.cuh"))
    assert texts, "the checkout has no kernels"
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in texts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


def install(wheel, target):
    run(
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("--no-deps", "--no-index", "--ignore-installed", "--target", target, wheel),
    )
    return target


def test_wheel_installed(wheel, kernels, tmp_path):
    site = install(wheel, tmp_path / "site")
    found = probe(site)
    assert Path(found["file"]).is_relative_to(site)
    assert found["kernels"] == kernels


def test_wheel_imported_as_zip(wheel, kernels):
    found = probe(wheel)
    assert wheel.name in found["file"]
    assert found["kernels"] == kernels


def test_sdist_gives_the_same_wheel(sdist, wheel, kernels, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    again = build(source, tmp_path / "dist", "wheel")
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(again) as b:
        assert {i.filename: i.CRC for i in a.infolist()} == {
            i.filename: i.CRC for i in b.infolist()
        }
    assert probe(install(again, tmp_path / "site"))["kernels"] == kernels


def test_sdist_holds_what_a_packager_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        *("pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
        *("Makefile", "constraints.txt", "tests/test_packaging.py", "kernels/types.cuh"),
        *("bench/results/PENDING.md", "cupynorm/py.typed"),
    }
    assert wanted <= names, f"not in the sdist: {sorted(wanted - names)}"
    strangers = {n for n in names if n.startswith((".venv", "out/", "dist/", "build/"))}
    assert not strangers


def test_editable_install(kernels, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(
        *(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--no-index", "--ignore-installed", "--no-build-isolation", "-e", ROOT),
    )
    found = probe(python=python)
    assert Path(found["file"]) == ROOT / "cupynorm" / "__init__.py"
    assert found["kernels"] == kernels


def test_bare_checkout(kernels):
    found = probe(ROOT)
    assert Path(found["file"]) == ROOT / "cupynorm" / "__init__.py"
    assert found["kernels"] == kernels


def test_wheel_brings_one_top_level_name(wheel, kernels):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"cupynorm"}
    assert "cupynorm/py.typed" in names
    shipped = {name for name in names if name.startswith("cupynorm/kernels/")}
    assert shipped == {f"cupynorm/kernels/{name}" for name in kernels}
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def test_kernels_folder_shadows_no_package_of_that_name(tmp_path):
    """Hugging Face's package `kernels` must win even when Python runs from our root."""
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("")
    code = "import kernels; print(kernels.__file__)"
    out = run(sys.executable, "-c", code, cwd=ROOT, path=(ROOT, tmp_path))
    assert Path(out.strip()) == other / "__init__.py"


def test_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        data = email.message_from_string(archive.read(name).decode())
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    assert data["Name"] == "cupynorm"
    assert data["Version"] == probe(ROOT)["version"]
    assert data["Requires-Python"] == ">=3.11"
    assert data["License-Expression"] == "Apache-2.0"
    extras = {"cuda12", "cuda13", "cpu", "torch", "sklearn", "dask", "notebook", "demo", "test"}
    extras |= {"bench", "docs", "safetensors"}
    assert set(data.get_all("Provides-Extra")) == extras
    required = [r for r in data.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(r.partition(">")[0] for r in required) == ["array-api-compat", "numpy"]
    # cupynorm[cuda12] must not bring cuBLAS and the like: gigabytes that nothing here uses
    cuda = [r for r in data.get_all("Requires-Dist") if "extra == 'cuda12'" in r]
    nvidia = {r.partition("<")[0] for r in cuda if r.startswith("nvidia")}
    assert nvidia == {"nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12"}
