"""The same job by ttt4rec, RecTools and RecBole: ``python -m benchmarks.peers``."""
