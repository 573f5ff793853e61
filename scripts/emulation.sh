#!/usr/bin/env bash
# Make all tables of docs/emulation.md anew: bash scripts/emulation.sh FOLDER [TRITON...]
# In parts, the most telling first. Each leaves a report and a log in FOLDER, and is not run again when its report is
# there: what was stopped goes on, and of a stopped part those tests count that had ended. TRITON is a folder
# with another Triton than the installed one: pip install --no-deps --target TRITON triton==3.6.0
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(realpath -m "${1:?the folder for the reports}") failed=0 path=${PYTHONPATH-} tritons=("" "${@:2}")
errors=tests/emulator/emulated_errors.py
broken=tests/emulator/emulated_fences.py::test_a_pipeline_without_fences_is_found # whose findings are wanted
mkdir -p "$folder"

# TRITON NAME ARGUMENTS...: a run of the tests under a Triton; its report is a .json when all of it has run
report() {
  local triton=$1 file=$folder/$2 status
  shift 2
  [[ -s $file.json ]] && return
  echo "$(date +%H:%M) ${file##*/}"
  PYTHONPATH=$triton${path:+${triton:+:}$path} bash scripts/test.sh "$@" --emulate-report "$file.part" >"$file.log" 2>&1
  status=$?
  ((status)) && failed=1 && tail -n 3 "$file.log"
  ((status < 2)) && mv "$file.part" "$file.json" # all passed, or some failed
}

# ARCHITECTURE PART ARGUMENTS...: the same on what is compiled for an architecture, of every Triton
executed() {
  local architecture=$1 part=$2 number
  shift 2
  for number in "${!tritons[@]}"; do
    report "${tritons[number]}" "$((number + 1)).$architecture.$part" \
      --emulate "$architecture" --emulate-findings list "$@"
  done
}

# PART TESTS: what becomes of kernels without each of their barriers, waits, fences and masks
lost() {
  report "" "losses.$architecture.$1" --emulate "$architecture" --emulate-findings list --emulate-mutations \
    tests/emulator/emulated_losses.py -k "$2"
}

tables() {
  python3 -m tools.emulation docs/emulation.md "$folder"/*.json "$folder"/*.part --anew
}

shopt -s nullglob
trap 'tables; exit 1' INT TERM
for architecture in sm_90 sm_80; do
  executed "$architecture" bfloat16 $errors -k bfloat16
done
for architecture in sm_90 sm_80; do
  lost around "not inner_loop"
  lost linear "inner_loop and linear"
  executed "$architecture" float32 $errors -k "float32 and not 128"
done
for architecture in sm_90 sm_80; do
  executed "$architecture" float16 $errors -k "float16 and not bfloat16"
  lost mlp "inner_loop and mlp"
done
for architecture in sm_90 sm_80; do
  executed "$architecture" float32-128 $errors -k "float32 and 128"
  executed "$architecture" tests "--deselect=$errors" "--deselect=$broken"
done
report "" interpreter.bfloat16 $errors -k bfloat16
report "" interpreter.float32 $errors -k float32
report "" interpreter.float16 $errors -k "float16 and not bfloat16"
tables
exit "$failed"
