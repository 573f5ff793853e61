"""What the layers and models cost, beside others: ``pytest benchmarks/ --benchmark-only``."""
