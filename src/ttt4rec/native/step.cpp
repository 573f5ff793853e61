// One token more of many streams, in place: what step.py calls.

#include "step.h"

// For step.py, to be compared with its own.
TTT_EXPORT int64_t ttt_step_call_size() { return sizeof(StepCall); }
TTT_EXPORT int64_t ttt_decay_call_size() { return sizeof(DecayCall); }

// Tokens begin to end - 1 of the B · H. Returns 1 if there is no memory.
TTT_EXPORT int ttt_step(const StepCall* call, int64_t begin, int64_t end) try {
  Step step(*call);
  for (int64_t i = begin; i < end; ++i) step.run(i);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
