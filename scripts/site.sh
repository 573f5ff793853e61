#!/usr/bin/env bash
# Build the documentation's site and check its links: bash scripts/site.sh [FOLDER], site/ if not given. Open index.html.
# `mkdocs serve` in the environment shows it while you write.
set -euo pipefail
folder="$(realpath -m "${1:-"$(dirname "${BASH_SOURCE[0]}")/../site"}")"
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" docs
export NO_MKDOCS_2_WARNING=1
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec mkdocs build --quiet --strict --clean --site-dir "$folder"
