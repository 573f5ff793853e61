#!/usr/bin/env bash
# Make what a release uploads into a folder: an sdist, whose tests run, and wheels for Linux with compiled libraries.
#   scripts/wheel.sh FOLDER            the sdist and the wheel for x86-64
#   scripts/wheel.sh FOLDER MACHINE... the sdist and wheels for x86_64, aarch64 or both
#   scripts/wheel.sh FOLDER --sdist    the sdist alone
# On another machine than this one a cross compiler makes the libraries (Debian's g++-aarch64-linux-gnu). Wheels are made of
# what the sdist holds. They serve any Python and any PyTorch: the libraries are called by pointers alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out="$(mkdir -p "$1" && cd "$1" && pwd)"
shift
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
[[ ${1:-} == --sdist ]] && exit

for machine in "${@:-x86_64}"; do
  mkdir "$work/$machine"
  tar -xzf "$work"/sdist/*.tar.gz -C "$work/$machine"
  cd "$work/$machine"/ttt4rec-*/
  (
    [[ $machine == "$(uname -m)" ]] || export CXX="$machine-linux-gnu-g++"
    export PYTHONPATH="$PWD/src:$PWD" TTT4REC_CACHE="$work/cache"
    python -m tools.libraries src/ttt4rec/native/libraries --machine "$machine"
  )
  pip wheel -q --no-deps --no-build-isolation -w "$out" \
    --config-settings="--build-option=--plat-name=manylinux_2_28_$machine" .
done
