"""Search of a recipe by Optuna, on validation alone."""
