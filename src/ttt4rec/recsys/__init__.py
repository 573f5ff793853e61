"""Sequential recommendation with TTT layers: data, splits, windows, metrics and training."""
