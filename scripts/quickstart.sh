#!/usr/bin/env bash
# Set up .venv, train TTT4Rec on MovieLens-100K, rank its test targets and recommend films to a user.
# Arguments go to `ttt4rec train`, for example --epochs 1. An interrupted run goes on where it stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" recsys,plot
ttt4rec train ml-100k --dropout 0.5 --patience 10 --out runs/ml-100k "$@"
echo "trained, $SECONDS s after the start" >&2
recommend=(ttt4rec recommend runs/ml-100k --user 196 --k 10)
"${recommend[@]}" --titles ml-100k || "${recommend[@]}" # where the titles cannot be fetched, by ids
echo "recommended, $SECONDS s after the start" >&2
