#!/usr/bin/env bash
# Set up .venv and run the tests; arguments go to pytest. With --emulate sm_90 and no tests named, those of the kernels
# alone run, on what was compiled for that architecture (docs/emulation.md).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" test
# Threads that spin while they wait make these small computations up to ten times slower on a busy machine.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
kernel_tests=()
if [[ " $*" == *" --emulate"* && "$*" != *tests/* ]]; then
  for name in kernels/test_{inner_loop_kernels,step_kernels,triton_backend} operators/test_{projection,output} \
    layers/test_compile emulator/emulated{,_host}; do
    kernel_tests+=("tests/$name.py")
  done
fi
exec python -m pytest -q "$@" "${kernel_tests[@]}"
