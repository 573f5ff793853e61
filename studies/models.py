"""What is compared, and how it is trained."""

from collections.abc import Sequence

from ttt4rec.models import mixers

from .study import Settings

PROTOCOL: Settings = {"dropout": 0.5, "patience": 5, "epochs": 100, "targets_per_batch": 512}
RATES = (3e-4, 1e-3, 3e-3)


def baseline(name: str) -> dict[str, Settings]:
    """A mixer of the registry under its label."""
    return {f"{mixers.MIXERS[name].published} ({mixers.MIXERS[name].kind})": {"mixer": name}}


MIXERS: dict[str, Settings] = {
    **baseline("attention"),
    **baseline("gru"),
    "TTT-Linear": {"inner": "linear"},
    "TTT-MLP": {"inner": "mlp"},
}
MORE_MIXERS: dict[str, Settings] = {
    **baseline("narm"),
    **baseline("bidirectional"),
    **baseline("mamba"),
    "TTT-Linear, Mamba backbone": {"inner": "linear", "backbone": "mamba"},
    "TTT-MLP, Mamba backbone": {"inner": "mlp", "backbone": "mamba"},
}
LOSSES: dict[str, Settings] = {
    "softmax over all items": {"inner": "mlp"},
    "sampled softmax, 256 negatives": {"inner": "mlp", "loss": "sampled"},
    "gBCE, 256 negatives, t = 0.75": {"inner": "mlp", "loss": "gbce"},
    "BPR, 256 negatives": {"inner": "mlp", "loss": "bpr"},
}
BEST_RATES: dict[str, dict[str, float]] = {
    "SASRec (attention)": {"ml-100k": 3e-3, "gowalla-1k": 1e-3, "amazon-video-games": 3e-4, "ml-1m": 3e-3},
    "GRU4Rec (GRU)": {"ml-100k": 3e-4, "gowalla-1k": 1e-3, "amazon-video-games": 3e-4, "ml-1m": 3e-3},
    "TTT-Linear": {"ml-100k": 1e-3, "gowalla-1k": 1e-3, "amazon-video-games": 3e-4, "ml-1m": 3e-3},
    "TTT-MLP": {"ml-100k": 1e-3, "gowalla-1k": 1e-3, "amazon-video-games": 3e-4, "ml-1m": 3e-3},
    "NARM (GRU with attention)": {"gowalla-1k": 1e-3, "amazon-video-games": 3e-4},
    "BERT4Rec (bidirectional)": {"gowalla-1k": 3e-3, "amazon-video-games": 3e-3},
    "Mamba4Rec (Mamba)": {"gowalla-1k": 1e-3, "amazon-video-games": 3e-4},
    "TTT-Linear, Mamba backbone": {"gowalla-1k": 1e-3, "amazon-video-games": 3e-4},
    "TTT-MLP, Mamba backbone": {"gowalla-1k": 1e-3, "amazon-video-games": 3e-4},
    "softmax over all items": {"ml-100k": 1e-2, "ml-1m": 1e-3, "amazon-video-games": 3e-4},
    "sampled softmax, 256 negatives": {"ml-100k": 3e-4, "ml-1m": 1e-3, "amazon-video-games": 3e-4},
    "gBCE, 256 negatives, t = 0.75": {"ml-100k": 1e-2, "ml-1m": 1e-2, "amazon-video-games": 1e-3},
    "BPR, 256 negatives": {"ml-100k": 1e-3, "ml-1m": 1e-3, "amazon-video-games": 3e-4},
}
"""On each data set, by validation NDCG@10 in the studies of tuning, but for ``STOPPED_TOO_SOON``."""
STOPPED_TOO_SOON = {(label, "gowalla-1k", 3e-4) for label in MIXERS | MORE_MIXERS} | {
    ("BERT4Rec (bidirectional)", "amazon-video-games", 3e-4)
}
"""Where some seeds end on the plateau from which others start to learn; on gowalla-1k those of every kind of model."""
UNTRIED = {(label, "ml-1m", 3e-4) for label in MIXERS}
"""Rates left out for the time that training with them would take."""
TUNED_ON = {"gowalla": "gowalla-1k", "twitch-100k": "gowalla-1k"}
"""Data sets that take another's rates."""


def rates_of(label: str) -> dict[str, float]:
    """Learning rates by names of data sets."""
    rates = BEST_RATES[label]
    return rates | {name: rates[like] for name, like in TUNED_ON.items() if like in rates}


TUNED: dict[str, Settings] = {
    label: {**settings, "learning_rate": rates_of(label)} for label, settings in (MIXERS | MORE_MIXERS | LOSSES).items()
}

FORGETTING: dict[str, Settings] = {label: TUNED[label] for label in ("TTT-Linear", "TTT-MLP")} | {
    f"{label}, decay {kind}": {**TUNED[label], "forget": gate}
    for label in ("TTT-Linear", "TTT-MLP")
    for kind, gate in (("constant", "constant"), ("by token", "token"))
}
"""Layers that forget, at the learning rates that are best for those that do not."""


def tried(kinds: dict[str, Settings], rates: Sequence[float]) -> dict[str, Settings]:
    """Every kind with every learning rate."""
    return {
        f"{label}, {rate:g}": {**settings, "learning_rate": rate} for label, settings in kinds.items() for rate in rates
    }
