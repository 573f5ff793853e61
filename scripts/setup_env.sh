# shellcheck shell=bash
# Make .venv with this package, editable, and activate it: source scripts/setup_env.sh [EXTRAS], "test" if not given.
# Does nothing but activate when the extras are installed and pyproject.toml has not changed. PYTHON names the
# interpreter to build on, python3 if not set; VENV another folder than .venv.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
extras="${1:-test}"
venv="${VENV:-.venv}"
stamp="$venv/installed.${extras//,/-}"

# Install torch before anything else can ask for it: on Linux the default build brings gigabytes of CUDA libraries,
# which a machine without an NVIDIA GPU has no use for.
install_torch() {
  if [ "$(uname -s)" != Linux ] || nvidia-smi >/dev/null 2>&1; then
    pip install -qq "torch>=2.11"
  elif pip install -qq "torch==2.13.0+cpu" 2>/dev/null; then
    :
  elif ! pip install -qq --timeout 15 --retries 1 --index-url https://download.pytorch.org/whl/cpu "torch>=2.11" \
    2>/dev/null; then
    echo "no CPU build of torch is within reach; installing the default one, which is large" >&2
    pip install -qq "torch>=2.11"
  fi
}

if [ ! -x "$venv/bin/python" ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
  "${PYTHON:-python3}" -m venv "$venv"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"
hash="$(python -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')"
if [ "$(cat "$stamp" 2>/dev/null)" != "$hash" ]; then
  echo "installing ttt4rec[$extras] into $venv" >&2
  export PIP_DISABLE_PIP_VERSION_CHECK=1
  python -c "import torch" 2>/dev/null || install_torch
  pip install -qq --editable ".[$extras]"
  echo "$hash" >"$stamp"
  echo "installed, $SECONDS s after the start" >&2
fi
