#!/usr/bin/env bash
# Makes the environment that the Makefile's commands run in, and installs the package there, editable, with its extension.
#
#   scripts/setup_env.sh FILE    writes the path of the environment's interpreter into FILE
#
# Installs only what cannot be imported yet, and works without a network when nothing is missing. Settings, all optional:
#   PYTHON   interpreter to start from                      (python3, else the newest python3.x from 3.10 on in PATH)
#   TORCH    what to install where torch is missing         (torch==2.13.0; with an NVIDIA GPU torch>=2.8)
#   pip's own (PIP_NO_INDEX, PIP_FIND_LINKS ...) are honoured. FP_NO_CUDA=1 builds without kernels,
#   FP_CUDA_ARCHITECTURES=90a for Hopper alone.
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/setup_env.sh FILE}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { echo "setup: $*" >&2; }
die() { say "$*"; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python3.10}; do
        if command -v "$name" >/dev/null && new_enough "$name"; then
            command -v "$name"
            return
        fi
    done
    die "Python >= 3.10 is needed, but ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 || true);" \
        "install one (apt-get install python3) or name it: make PYTHON=/path/to/python3.12 ..."
}

has_torch() { "$1" -c 'import torch' 2>/dev/null; }

# $1: interpreter, $2: --system-site-packages or nothing
make_venv() {
    local python=$1 version
    shift
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -m venv "$@" .venv >/dev/null 2>&1 && return
    # Debian and Ubuntu leave out the part of venv that installs pip, until python3-venv is installed.
    rm -rf .venv
    if "$python" -m pip --version >/dev/null 2>&1 && "$python" -m venv --without-pip "$@" .venv >/dev/null 2>&1 &&
        "$python" -m pip --python .venv/bin/python install -q pip >&2; then
        return
    fi
    rm -rf .venv
    "$python" -m virtualenv -q "$@" .venv >/dev/null 2>&1 && return
    rm -rf .venv
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing python$version-venv by apt-get"
        apt-get update -qq >/dev/null || true
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "python$version-venv" >/dev/null ||
            DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null || true
        "$python" -m venv "$@" .venv >&2 && return
        rm -rf .venv
    fi
    die "cannot make a virtual environment with $python; run 'sudo apt-get install python$version-venv', then make again"
}

in_venv() { "$1" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; }

choose_environment() {
    local python=${PYTHON:-python3}
    if in_venv "$python" && new_enough "$python"; then
        command -v "$python" # the active virtual environment: the user's choice
        return
    fi
    if new_enough .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1; then
        echo .venv/bin/python
        return
    fi
    python=$(find_python)
    rm -rf .venv
    if has_torch "$python"; then
        say "making .venv over $python, which has torch"
        make_venv "$python" --system-site-packages
    else
        say "making .venv with $python"
        make_venv "$python"
    fi
    echo .venv/bin/python
}

python=$(choose_environment)
case $python in /*) ;; *) python=$PWD/$python ;; esac
pip() { "$python" -m pip "$@"; }

# The build tools, as pyproject.toml lists them, less those that are in PATH already.
mapfile -t tools < <("$python" - <<'PY'
import shutil
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    for requirement in tomllib.load(file)["build-system"]["requires"]:
        if not shutil.which(requirement.split(">")[0]):
            print(requirement)
PY
)
pip install -q "${tools[@]}" || say "could not install ${tools[*]}; going on with what is there"

if ! has_torch "$python"; then
    if [ -z "${TORCH:-}" ]; then
        TORCH="torch==2.13.0"
        if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; then TORCH="torch>=2.8"; fi
    fi
    say "installing $TORCH"
    pip install -q "$TORCH"
fi

say "installing fused_parallel (editable) and what its tests need"
if ! pip install -q --no-build-isolation -e ".[test]"; then
    say "some of the packages above are missing and cannot be installed; installing fused_parallel alone"
    pip install -q --no-build-isolation --no-deps -e .
fi

"$python" - >&2 <<'PY'
import fused_parallel
from fused_parallel import _ext

state = _ext.why_no_extension() or (
    f"CUDA kernels for {_ext.extension().cuda_architectures}"
    if _ext.extension().cuda_built
    else f"no CUDA kernels, because {_ext.extension().why_no_cuda}"
)
print(f"setup: fused_parallel {fused_parallel.__version__} is ready; extension: {state}")
PY
mkdir -p "$(dirname "$out")"
echo "$python" >"$out"
