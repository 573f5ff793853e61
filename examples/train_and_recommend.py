"""The Python API from a file of interactions to recommendations: load, filter, split, fit, evaluate, recommend.

    python examples/train_and_recommend.py ml-100k --epochs 5

The source is "ml-100k", which is fetched, or the path of a .csv, .tsv or .inter file with columns user_id, item_id
and timestamp.
"""

import argparse
from collections.abc import Sequence

import torch

from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.recsys import (
    EpochReport,
    Recommender,
    TrainOptions,
    build_histories,
    evaluate,
    evaluation_prefixes,
    filter_k_core,
    fit,
    load_interactions,
    split_by_ratio,
)


def print_epoch(report: EpochReport) -> None:
    seconds = report.train_seconds + report.valid_seconds
    print(
        f"epoch {report.epoch}  loss {report.loss:.3f}  valid NDCG@10 {report.metrics['NDCG@10']:.4f}  {seconds:.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="ml-100k")
    parser.add_argument("--out", default="runs/example", help="folder of checkpoint and metrics; an old run goes on")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--min-user", type=int, default=5, help="drop users with fewer interactions")
    parser.add_argument("--min-item", type=int, default=5, help="drop items with fewer interactions")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--max-len", type=int, default=50, help="items of history that a prediction sees")
    args = parser.parse_args(argv)

    interactions = load_interactions(args.source)
    interactions = filter_k_core(interactions, min_user=args.min_user, min_item=args.min_item)
    histories = build_histories(interactions)
    print(f"{histories.num_users} users, {histories.num_items} items, {len(interactions)} interactions")
    split = split_by_ratio(histories, (3, 2, 5))

    torch.manual_seed(0)
    model = TTT4Rec(TTT4RecConfig(num_items=histories.num_items, width=args.width, max_len=args.max_len))
    fit(model, split, args.out, options=TrainOptions(epochs=args.epochs), report=print_epoch)
    recommender = Recommender(model, histories)
    recommender.save(args.out)  # for ttt4rec recommend, similar and serve

    metrics = evaluate(model, evaluation_prefixes(split, "test", max_len=args.max_len))
    print("test", "  ".join(f"{name} {metrics[name]:.4f}" for name in ("HR@10", "HR@50", "NDCG@10", "NDCG@50")))

    user = histories.user_ids[0]
    print(f"for user {user!r}, items not yet seen:")
    for item, score in recommender.recommend(user_id=user, k=5, exclude_seen=True).items:
        print(f"  {item!r}  {score:.3f}")  # an id may hold what moves a cursor


if __name__ == "__main__":
    main()
