"""What the commands of ``ttt4rec.cli`` do with their parsed arguments."""

from ttt4rec.recsys.commands.evaluating import evaluate, report
from ttt4rec.recsys.commands.recommending import add_items, recommend, similar
from ttt4rec.recsys.commands.serving import serve
from ttt4rec.recsys.commands.training import train

__all__ = ["add_items", "evaluate", "recommend", "report", "serve", "similar", "train"]
