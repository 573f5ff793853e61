"""The recommender within an application of your own, which here asks for a token.

    pip install ".[serve]" starlette
    ttt4rec train ml-100k --out runs/ml-100k
    python examples/serve_http.py runs/ml-100k --token secret

    curl localhost:8000/recommender/recommendations -H "Authorization: Bearer secret" --json '{"user_ids": ["196"]}'

`ttt4rec serve runs/ml-100k` serves without anything of one's own.
"""

import argparse
import hmac
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ttt4rec.recsys import OnlineRecommender, Recommender, SQLiteEventLog
from ttt4rec.recsys.serving.app import Service
from ttt4rec.recsys.serving.connections import Connection


class Authorised:
    """Lets in who knows the token."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self.app, self.expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        app = self.app if hmac.compare_digest(given, self.expected) else PlainTextResponse("who are you?", 401)
        await app(scope, receive, send)


async def welcome(_: Request) -> PlainTextResponse:
    return PlainTextResponse("the recommender is at /recommender")


def make_app(folder: Path, token: str) -> Starlette:
    recommender = Recommender.load(folder)
    histories = recommender.histories
    log = SQLiteEventLog(folder / "events.db")
    log.begin(histories)
    online = OnlineRecommender(recommender.model, histories.item_ids, log, snapshot=folder / "states.safetensors")
    service = Service(online)
    routes = [Route("/", welcome), Mount("/recommender", Authorised(service, token))]
    return Starlette(routes=routes, lifespan=lambda _: service.running())  # which saves the states now and then


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a recommender; receives the events and the states")
    parser.add_argument("--token", required=True)
    args = parser.parse_args(argv)
    uvicorn.run(make_app(args.folder, args.token), http=Connection)  # which cuts off those who keep it waiting


if __name__ == "__main__":
    main()
