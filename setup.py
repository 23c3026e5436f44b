"""Builds the optional extension fused_parallel._C by CMake, which holds all compiler flags. Never imports torch.

Without a C++ compiler the package is installed without the extension; without nvcc the extension has no kernels. Either
way everything works through the reference implementations, and `fused-parallel doctor` says what is missing.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name):
    """A build tool in PATH, or beside this interpreter (a virtual environment that is not activated)."""
    return shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))


def why_no_extension():
    """What is missing to build the extension, or None."""
    if not (os.environ.get("CXX") or any(shutil.which(name) for name in ("c++", "g++", "clang++"))):
        return "no C++ compiler was found (install g++ or clang++)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return f"Python.h is not in {sysconfig.get_path('include')} (install python3-dev)"
    if find_tool("cmake") is None:
        return "cmake was not found (pip install cmake)"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 was not found (pip install pybind11)"
    return None


class CMakeBuild(build_ext):
    def run(self):
        reason = why_no_extension()
        if reason is not None:
            self.warn(f"fused_parallel: the extension is left out, because {reason}")
            self.extensions = []
        super().run()

    def build_extension(self, ext):
        import pybind11

        build = Path(self.build_temp).resolve()
        if self.inplace or getattr(self, "editable_mode", False):
            # An editable install keeps its build directory, so that only changed sources are compiled again.
            build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FP_NO_CUDA": "ON" if os.environ.get("FP_NO_CUDA", "0") not in ("", "0") else "OFF",
        }
        configure = [find_tool("cmake"), "-S", str(ROOT), "-B", str(build)]
        if find_tool("ninja"):
            options["CMAKE_MAKE_PROGRAM"] = find_tool("ninja")
            configure += ["-G", "Ninja"]
        if os.environ.get("FP_CUDA_ARCHITECTURES"):
            options["FP_CUDA_ARCHITECTURES"] = os.environ["FP_CUDA_ARCHITECTURES"]
        else:
            configure.append("-UFP_CUDA_ARCHITECTURES")  # not those of the last build
        configure += [f"-D{name}={value}" for name, value in options.items()]
        if subprocess.run(configure).returncode:
            # A build directory of another place or generator is refused: begin anew.
            shutil.rmtree(build)
            subprocess.run(configure, check=True)
        subprocess.run([find_tool("cmake"), "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)


setup(ext_modules=[Extension("fused_parallel._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
