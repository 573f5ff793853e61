"""The studies there are."""

from . import knobs, paper
from .models import LOSSES, MIXERS, PROTOCOL, RATES, TUNED, tried
from .study import Data, Study

ML_100K = Data("ml-100k")

STUDIES = {
    "readme": Study(
        "MovieLens-100K",
        datasets=(ML_100K,),
        variants={
            "TTT-MLP, dropout 0.2, patience 5": {"dropout": 0.2, "patience": 5},
            "TTT-MLP, dropout 0.5, patience 10": {"dropout": 0.5, "patience": 10},
            "SASRec (attention), dropout 0.5, patience 10": {"mixer": "attention", "dropout": 0.5, "patience": 10},
            "GRU4Rec (GRU), dropout 0.5, patience 10": {"mixer": "gru", "dropout": 0.5, "patience": 10},
        },
        published={"ml-100k": {"TTT-MLP, dropout 0.2, patience 5": (0.0746, 0.2613, 0.0344, 0.0742)}},
    ),
    "mixers": Study(
        "Mixers",
        datasets=(ML_100K, Data("gowalla-1k"), Data("amazon-video-games"), Data("ml-1m")),
        variants={label: TUNED[label] for label in ("SASRec (attention)", "GRU4Rec (GRU)", "TTT-Linear", "TTT-MLP")},
        common=PROTOCOL,
    ),
    "losses": Study(
        "Losses",
        datasets=(ML_100K, Data("ml-1m"), Data("gowalla-1k")),
        variants={label: TUNED[label] for label in LOSSES},
        common=PROTOCOL,
    ),
    "knobs": knobs.STUDY,
    "tuning": Study("Tuning", datasets=(ML_100K,), variants=tried(MIXERS, RATES), seeds=(0,), common=PROTOCOL),
    "loss-tuning": Study(
        "Tuning of the losses", datasets=(ML_100K,), variants=tried(LOSSES, (*RATES, 1e-2)), seeds=(0,), common=PROTOCOL
    ),
    **paper.TABLES,
}
