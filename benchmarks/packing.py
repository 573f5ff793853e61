"""How much of a training batch padding would take: tokens of the longest window times windows, against packed tokens.

python benchmarks/packing.py FILE...
"""

import sys
from pathlib import Path

import torch

from ttt4rec.recsys import build_histories, filter_k_core, load_interactions, split_by_ratio
from ttt4rec.recsys.data.windows import batches, training_windows

print("| data | windows | padded tokens an epoch | packed | saved |\n| --- | --- | --- | --- | --- |")
for source in sys.argv[1:]:
    histories = build_histories(filter_k_core(load_interactions(source), min_user=5, min_item=5))
    windows = training_windows(split_by_ratio(histories), max_len=50)
    plan = batches(windows, targets_per_batch=2048, generator=torch.Generator().manual_seed(0))
    padded = sum(int(windows.lengths[batch].max()) * len(batch) for batch in plan)
    packed = int(windows.lengths.sum())
    name = Path(source).name.split(".")[0]
    print(f"| {name} | {len(windows):,} | {padded:,} | {packed:,} | {1 - packed / padded:.0%} |")
