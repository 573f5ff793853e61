#!/usr/bin/env bash
# Make all tables of docs/emulation.md anew: bash scripts/emulation.sh FOLDER [TRITON...]
# Reports and logs are kept in FOLDER, and a report that is there is not made again. TRITON is a folder with another
# Triton than the installed one: pip install --no-deps --target TRITON triton==3.6.0
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(realpath "${1:?the folder for the reports}") failed=0 path=${PYTHONPATH-} number=0
shift
mkdir -p "$folder"

# NAME ARGUMENTS...: a run of the tests
report() {
  local name=$1
  shift
  [[ -s $folder/$name.json ]] && return
  echo "$(date +%H:%M) $name"
  bash scripts/test.sh "$@" --emulate-report "$folder/$name.json" >"$folder/$name.log" 2>&1 || {
    tail -n 3 "$folder/$name.log"
    failed=1
  }
}

for triton in "" "$@"; do
  export PYTHONPATH=$triton${path:+${triton:+:}$path}
  number=$((number + 1))
  report "$number.interpreter" tests/emulator/emulated_errors.py
  for architecture in sm_90 sm_80; do
    listed=(--emulate "$architecture" --emulate-findings list)
    report "$number.$architecture" "${listed[@]}"
    [[ $triton ]] || report losses."$architecture" "${listed[@]}" --emulate-mutations tests/emulator/emulated_losses.py
  done
done
python3 -m tools.emulation docs/emulation.md "$folder"/*.json --anew
exit "$failed"
