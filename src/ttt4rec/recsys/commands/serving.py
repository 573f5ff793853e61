"""What ``ttt4rec serve`` does."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ttt4rec.extras import require
from ttt4rec.options import ServeOptions
from ttt4rec.recsys.commands.arguments import chosen


def serve(args: Namespace) -> None:
    """Take events and recommend over HTTP until the process is told to end."""
    require("ttt4rec serve", "httptools", "prometheus_client", "pydantic", "uvicorn")
    from ttt4rec.recsys.serving import command  # after the others, since it needs these packages

    command.serve(Path(args.folder), ServeOptions(**chosen(args, ServeOptions)))
