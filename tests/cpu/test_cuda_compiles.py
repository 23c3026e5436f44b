"""Every csrc/*.cu compiles with the flags of CMakeLists.txt, without warnings and without register spills on sm_90a."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path.name for path in (ROOT / "csrc").glob("*.cu"))

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not in PATH: the CUDA sources are not compiled"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler in PATH: nvcc cannot work"),
]


def find_tool(name):
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What nvcc and ptxas print when all kernels are compiled from nothing."""
    pybind11 = pytest.importorskip("pybind11")
    cmake = find_tool("cmake") or pytest.skip("cmake was not found")
    build = str(tmp_path_factory.mktemp("cuda"))
    ninja = find_tool("ninja")  # prints the output of each command in one piece
    options = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    options += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"]
    options += ["-DCMAKE_CUDA_FLAGS=-Xptxas=-v", "-DFP_CUDA_ARCHITECTURES=90a"]
    configure = [cmake, "-S", str(ROOT), "-B", build, *options]
    subprocess.run(configure, check=True, capture_output=True, text=True)
    command = [cmake, "--build", build, "--target", "fp_kernels", "--verbose", "--parallel", "2" if ninja else "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_every_source_is_compiled(report):
    assert SOURCES
    for source in SOURCES:
        assert f"csrc/{source}" in report
    assert "warning" not in report.lower(), report


def test_no_kernel_spills_on_hopper(report):
    pattern = r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    kernels = re.findall(pattern, report, flags=re.DOTALL)
    on_hopper = [kernel for kernel in kernels if kernel[1] == "sm_90a"]
    assert len(on_hopper) >= len(SOURCES)
    assert [kernel for kernel in on_hopper if int(kernel[2]) or int(kernel[3])] == []
