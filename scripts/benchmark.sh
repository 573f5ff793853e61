#!/usr/bin/env bash
# Set up .venv with the competitors that install, and measure: bash scripts/benchmark.sh FOLDER [--note "an idle machine"]
# On a GPU: parity tests and the benchmarks, within ten minutes after the set-up; on a CPU the benchmarks at small sizes,
# within five. FOLDER receives benchmark.json, report.md and the plots. NO_SETUP=1 takes the python that is there, with
# what it has, as on a machine without a network.
set -euo pipefail
if [ $# -eq 0 ]; then
  sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"
  exit 2
fi
mkdir -p "$1"
folder="$(cd "$1" && pwd)"
shift
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # see test.sh
if [ -n "${NO_SETUP:-}" ]; then
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" exec python3 -m benchmarks.run "$folder" "$@"
fi
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" bench,competitors
if nvidia-smi >/dev/null 2>&1 && ! python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("mamba_ssm"))'; then
  pip install -qq setuptools packaging ninja # what its build asks for; only its Triton kernels are wanted, not its CUDA
  MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install -qq --no-deps --no-build-isolation \
    mamba-ssm==2.3.2.post1 || echo "mamba-ssm did not install; it will be reported as absent" >&2
fi
exec python -m benchmarks.run "$folder" "$@"
