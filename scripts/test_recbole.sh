#!/usr/bin/env bash
# Test the RecBole adapter against RecBole itself, in an environment of its own, .venv-recbole (made on the first run:
# some minutes and a few hundred megabytes). RecBole 1.2.1 needs NumPy 1 and Python up to 3.11. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=.venv-recbole source scripts/setup_env.sh recbole,test
export TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 # RecBole's checkpoints hold its configuration, an object, beside the weights
exec python -m pytest -q tests/recbole_adapter.py "$@"
