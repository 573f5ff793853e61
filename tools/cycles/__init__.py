"""How fast compiled kernels may run on GPUs that need not be there: a simulation of machine code, cycle by cycle.

Every number this makes is a prediction. docs/predicted.md tells what is simulated, how it was held against published
speeds, and what it cannot know.
"""
