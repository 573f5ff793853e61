"""From windows of histories to a trained model: losses, the loop, checkpoints, metrics, reports."""
