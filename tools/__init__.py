"""For those who work on the kernels: what the compiler makes of them. Not part of the package."""
