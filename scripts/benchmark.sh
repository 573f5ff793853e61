#!/usr/bin/env bash
# Set up .venv with the competitors that install, and measure: bash scripts/benchmark.sh FOLDER [--note "an idle machine"]
# On a GPU: parity tests, the tuner of the launch table and the benchmarks, within eight minutes after the set-up; on a
# CPU the benchmarks at small sizes, within five. FOLDER receives benchmark.json, report.md and the plots.
set -euo pipefail
if [ $# -eq 0 ]; then
  sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}"
  exit 2
fi
mkdir -p "$1"
folder="$(cd "$1" && pwd)"
shift
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" bench,competitors
if nvidia-smi >/dev/null 2>&1 && ! python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("mamba_ssm"))'; then
  pip install -qq setuptools packaging ninja # what its build asks for; only its Triton kernels are wanted, not its CUDA
  MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE pip install -qq --no-deps --no-build-isolation \
    mamba-ssm==2.3.2.post1 || echo "mamba-ssm did not install; it will be reported as absent" >&2
fi
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # see test.sh
exec python -m benchmarks.run "$folder" "$@"
