"""Executes the PTX of compiled Triton kernels on a CPU, and checks what they do to memory."""
