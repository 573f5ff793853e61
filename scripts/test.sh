#!/usr/bin/env bash
# Set up .venv and run the tests; arguments go to pytest.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test
exec python -m pytest -q "$@"
