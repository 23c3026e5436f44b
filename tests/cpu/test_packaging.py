"""The sdist and the wheels built from it, each imported from a clean environment: built without kernels, with an nvcc
that does not work, and without a C++ compiler. Needs no network: build tools and torch are this environment's."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from fused_parallel import __version__

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("build")
pytest.importorskip("pybind11")

pytestmark = pytest.mark.timeout(600)

# Optional packages: importing the library must not need them.
OPTIONAL = ("triton", "transformers", "tokenizers", "matplotlib", "pynvml", "scipy")

IMPORT = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import fused_parallel
from fused_parallel import _ext
print(fused_parallel.__version__, fused_parallel.__file__, sep="\\n")
print(_ext.extension() is not None, bool(_ext.extension() and _ext.extension().cuda_built))
print(_ext.why_no_extension() or _ext.extension().why_no_cuda)
"""


def run(*command, **kwargs):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, timeout=550, **kwargs
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources: setuptools leaves files behind where it builds."""
    source = tmp_path_factory.mktemp("source") / "fused_parallel"
    for name in ("fused_parallel", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, source)
    return source


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", out, source)
    (archive,) = out.iterdir()
    return archive


def build_wheel(sdist, tmp_path, **environment):
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "-w", tmp_path / "wheel", sdist, env=os.environ | environment)
    (wheel,) = (tmp_path / "wheel").iterdir()
    return wheel


class Clean:
    """An environment with the wheel in it and, by a path file, the packages of this one except ours."""

    def __init__(self, wheel, tmp_path):
        self.home = tmp_path / "environment"
        run(sys.executable, "-m", "venv", "--without-pip", self.home)
        pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed")
        run(*pip, "--no-warn-script-location", "--prefix", self.home, wheel)
        (packages,) = self.home.glob("lib/python*/site-packages")
        others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (packages / "torch_is_there.pth").write_text("\n".join(others) + "\n")

    def python(self, *arguments):
        # -I: neither the current folder nor PYTHONPATH can stand in for what the wheel lacks.
        return run(self.home / "bin" / "python", "-I", *arguments, cwd=self.home)

    def imports(self):
        """(has the extension, has kernels, why not) after the import was found to be that of the wheel."""
        version, file, state, reason = self.python("-c", IMPORT).split("\n", 3)
        assert version == __version__
        assert Path(file).is_relative_to(self.home.resolve())
        extension, kernels = (word == "True" for word in state.split())
        return extension, kernels, reason.strip()


def can_build_extension():
    return shutil.which("c++") is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def test_sdist_holds_what_a_build_needs(source, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    sources = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "fused_parallel/py.typed"} <= names


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Without kernels, which take long to compile; `.ci/run` builds and imports a wheel that has them."""
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel"), FP_NO_CUDA="1")


def test_wheel_holds_the_package_alone(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "fused_parallel/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"fused_parallel", f"fused_parallel-{__version__}.dist-info"}
    missing = [p for p in (source / "fused_parallel").rglob("*.py") if str(p.relative_to(source)) not in names]
    assert missing == []


needs_compiler = pytest.mark.skipif(not can_build_extension(), reason="no C++ compiler or no Python.h")


@needs_compiler
def test_wheel_without_kernels(wheel, tmp_path):
    environment = Clean(wheel, tmp_path)
    assert environment.imports() == (True, False, "it was built with FP_NO_CUDA set")
    assert "it was built with FP_NO_CUDA set" in environment.python("-m", "fused_parallel", "doctor")


@needs_compiler
def test_broken_nvcc_does_not_fail_the_build(sdist, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text('#!/bin/sh\n[ "$*" = --version ] && echo "release 13.0" || exit 1\n')
    nvcc.chmod(0o755)
    extension, kernels, reason = Clean(build_wheel(sdist, tmp_path, CUDACXX=str(nvcc)), tmp_path).imports()
    assert (extension, kernels) == (True, False)
    assert reason.startswith(f"{nvcc} cannot compile a test program")


def test_wheel_without_a_compiler(sdist, tmp_path):
    environment = Clean(build_wheel(sdist, tmp_path, PATH="/nowhere", CXX=""), tmp_path)
    extension, _, reason = environment.imports()
    assert not extension
    assert "no C++ compiler" in reason
    assert "no C++ compiler" in environment.python("-m", "fused_parallel", "doctor")
