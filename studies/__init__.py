"""Grids of trainings on real data, run one by one, kept, and written up: ``python -m studies``."""
