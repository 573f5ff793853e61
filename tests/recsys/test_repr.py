"""What is shown of objects that hold arrays: counts, shapes, types and bytes, in one short line, and nobody's ids."""

import dataclasses

import numpy as np
import torch

from tests.support.checks import make_layer
from tests.support.recsys_data import make_model
from ttt4rec.models.losses import Loss
from ttt4rec.recsys import Interactions, build_histories
from ttt4rec.recsys.data.split import split_by_ratio
from ttt4rec.recsys.data.windows import training_windows


def interactions(number=30_000):
    users, items = np.arange(number) % 1000, np.arange(number) % 2000
    names = [tuple(f"{what}-{code}-of-somebody" for code in range(count)) for what, count in (("u", 1000), ("i", 2000))]
    return Interactions(users, items, np.arange(number) * 0.5, *names)


def test_data():
    data = interactions()
    histories = build_histories(data)
    split = split_by_ratio(histories)
    windows = training_windows(split, max_len=5)
    assert repr(data) == "Interactions(30,000 of 1,000 users with 2,000 items, times float64, 720,000 bytes)"
    shown = "Histories(1,000 users, 2,000 items, 30,000 interactions, times float64, 488,008 bytes)"
    assert repr(histories) == str(histories) == shown
    assert repr(split) == f"Split(10,000 / 5,000 / 14,000 train / valid / test targets of {shown})"
    size = 8 * (30_000 + 4 * len(windows))
    assert repr(windows) == f"Windows({len(windows):,} with 10,000 targets among 30,000 items, {size:,} bytes)"
    assert "somebody" not in repr([data, histories, split])
    nothing = Interactions(*(np.empty(0, dtype=np.int64) for _ in range(3)), (), ())
    assert repr(build_histories(nothing)) == "Histories(0 users, 0 items, 0 interactions, times int64, 8 bytes)"


def test_states_and_pools():
    layer = make_layer("mlp", "mamba")
    _, state = layer(torch.randn(3, 6, 8, dtype=torch.float64), return_state=True)
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in state.tensors().items())
    assert shapes.startswith("weights.0 [3, 2, 4, 16], weights.1 [3, 2, 16], ")
    assert repr(state) == f"TTTState(3 streams: {shapes}; float64 on cpu, {state.nbytes:,} bytes)"
    assert repr(state.to("meta")) == repr(state).replace("cpu", "meta")
    pool = layer.make_pool(1000)
    records, conv = list(pool.records.shape), list(pool.conv.shape)
    shown = f"StatePool(1,000 slots: records {records}, conv {conv}; mini-batches of 4; "
    assert repr(pool) == f"{shown}float64 on cpu, {pool.nbytes:,} bytes)"
    assert "conv" not in repr(make_layer("linear", "transformer").make_pool(2))


def test_what_holds_them():
    split = split_by_ratio(build_histories(interactions()))
    model = make_model(split)
    (pool,) = model.make_pools(5)
    assert repr(pool) == f"BlockPool(mixer={pool.mixer!r}, conv=None)"
    _, (state,) = model(torch.ones(1, 3, dtype=torch.int64), return_states=True)
    assert repr(state) == f"BlockState(mixer={state.mixer!r}, conv=None)"
    loss = Loss.make("sampled", torch.ones(2000), num_negatives=5, popularity=1.0, calibration=0.5)
    assert repr(loss) == "Loss(name='sampled', num_negatives=5, calibration=0.5)"
    assert dataclasses.replace(loss, num_negatives=6).num_negatives == 6
