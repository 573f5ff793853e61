"""The studies there are."""

from . import knobs, paper
from .models import FORGETTING, LOSSES, MIXERS, MORE_MIXERS, PROTOCOL, RATES, TUNED, tried
from .study import Data, Study

ML_100K, ML_1M, GOWALLA_1K, AMAZON = map(Data, ("ml-100k", "ml-1m", "gowalla-1k", "amazon-video-games"))

STUDIES = {
    "published-code": Study(
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
        datasets=(ML_100K, GOWALLA_1K, AMAZON, ML_1M),
        variants={label: TUNED[label] for label in MIXERS},
        common=PROTOCOL,
    ),
    "losses": Study(
        "Losses",
        datasets=(ML_100K, ML_1M, AMAZON),
        variants={label: TUNED[label] for label in LOSSES},
        common=PROTOCOL,
    ),
    "forgetting": Study(
        "Layers that forget",
        datasets=(ML_100K, GOWALLA_1K, AMAZON, ML_1M),
        variants=FORGETTING,
        common=PROTOCOL,
    ),
    "knobs": knobs.STUDY,
    "tuning": Study(
        "Tuning",
        datasets=(ML_100K, GOWALLA_1K, AMAZON, ML_1M),
        variants=tried(MIXERS, RATES),
        seeds=(0,),
        common=PROTOCOL,
    ),
    "more-tuning": Study(
        "Tuning of more models",
        datasets=(GOWALLA_1K, AMAZON),
        variants=tried(MORE_MIXERS, RATES),
        seeds=(0,),
        common=PROTOCOL,
    ),
    "loss-tuning": Study(
        "Tuning of the losses",
        datasets=(ML_100K, AMAZON),
        variants=tried(LOSSES, (*RATES, 1e-2)),
        seeds=(0,),
        common=PROTOCOL,
    ),
    **paper.TABLES,
}
