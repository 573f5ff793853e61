#!/usr/bin/env bash
# Test the adapters, and the comparisons with RecBole and RecTools, against these themselves, in an environment of its
# own, .venv-adapters (made on the first run: some minutes and a gigabyte). Both want NumPy 1, RecBole also Python up to
# 3.11. Arguments go to pytest.
set -euo pipefail
if ! "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
  echo "RecBole wants Python 3.10 or 3.11: expected PYTHON to name one, got $("${PYTHON:-python3}" --version)" >&2
  exit 2
fi
VENV=.venv-adapters source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" recbole,rectools,test
export TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 # RecBole's checkpoints hold its configuration, an object, beside the weights
exec python -m pytest -q tests/recsys/recbole_adapter.py tests/recsys/rectools_adapter.py tests/studies/with_peers.py "$@"
