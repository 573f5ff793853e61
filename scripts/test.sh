#!/usr/bin/env bash
# Set up .venv and run the tests, on all cores; arguments go to pytest. Those marked "slow" run with --all, or where
# tests are named. With --emulate sm_90 and no tests named, those of the kernels alone run, on what was compiled for that
# architecture (docs/emulation.md).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test
# Threads that spin while they wait make these small computations up to ten times slower on a busy machine.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
arguments=() all= named= emulated=
for argument in "$@"; do
  case $argument in
    --all) all=1 && continue ;;
    --emulate | --emulate=*) emulated=1 ;;
    tests/*) named=1 ;;
  esac
  arguments+=("$argument")
done
if [[ $emulated ]]; then
  options=(-n 0) # one process counts what was executed
  if [[ ! $named ]]; then
    for name in kernels/test_{{forgetting,inner_loop,step}_kernels,long_mini_batches,segments,triton_backend} operators/test_{projection,output} \
      layers/test_compile emulator/emulated{,_errors,_fences,_host}; do
      arguments+=("tests/$name.py")
    done
  fi
else
  options=(-n "$(env -u OMP_NUM_THREADS nproc)" --dist worksteal) # nproc would give the threads of OpenMP
  [[ $all || $named ]] || options+=(-m "not slow")
fi
exec python -m pytest -q "${options[@]}" "${arguments[@]}"
