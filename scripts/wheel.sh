#!/usr/bin/env bash
# Make what a release uploads: an sdist, whose tests run, and a wheel for x86-64 Linux with compiled libraries, into a
# folder: scripts/wheel.sh FOLDER. With --sdist the first alone. The wheel is made of what the sdist holds. It serves any
# Python and any PyTorch: the libraries are called by pointers alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="$(mkdir -p "$1" && cd "$1" && pwd)" kind="${2:-}"
# shellcheck source=scripts/setup_env.sh
[[ ${VIRTUAL_ENV:-} ]] || source scripts/setup_env.sh test

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir "$work/tree" "$work/sdist"
pip install -q --target "$work/tools" "setuptools>=77"
export PYTHONPATH="$work/tools"
git ls-files -z | xargs -0 cp --parents -t "$work/tree" # no more than what is under version control
(
  cd "$work/tree"
  python - "$work/sdist" <<'PYTHON'
import sys
from setuptools import build_meta
print(build_meta.build_sdist(sys.argv[1]))
PYTHON
) >"$work/log" 2>&1 || { cat "$work/log" >&2 && exit 1; }
cp "$work"/sdist/*.tar.gz "$out"
[[ $kind == --sdist ]] && exit

tar -xzf "$work"/sdist/*.tar.gz -C "$work"
cd "$work"/ttt4rec-*/
PYTHONPATH="$PWD/src:$PWD" TTT4REC_CACHE="$work/cache" python -m tools.libraries src/ttt4rec/native/libraries
pip wheel -q --no-deps --no-build-isolation -w "$out" \
  --config-settings="--build-option=--plat-name=manylinux_2_28_x86_64" .
