"""TTT4Rec beside the models that the field compares with, on its protocols: ``python -m studies.benchmark``."""
