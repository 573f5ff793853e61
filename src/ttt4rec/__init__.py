"""Test-time-training layers for PyTorch, and the sequential recommender built on them."""
