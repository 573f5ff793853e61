"""``ttt4rec serve`` in two folders, on one event log in PostgreSQL."""

import pytest

from tests.recsys.serving.test_serve import copied, observe, recommended, served
from tests.support.recsys_data import make_model, make_split
from ttt4rec.cli import main
from ttt4rec.recsys.online.sharing import service_of
from ttt4rec.recsys.recommend import Recommender


@pytest.mark.slow
def test_a_service_goes_on_for_one_that_was_killed(tmp_path, server):
    """With all that the other one acknowledged."""
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    split = make_split(places[0])
    Recommender(make_model(split, max_len=100), split.histories).save(places[0])
    copied(*places)
    log = "--log", server.conninfo()
    with served(places[0], *log) as (first, process), served(places[1], *log) as (second, _):
        clients, users = {"a": first, "b": second}, ["u7", *(f"new {n}" for n in range(9))]
        for step, item in enumerate(("i3", "i4", "i3")):
            for user in users:
                at_home = clients[service_of(user, ["a", "b"])]
                assert observe(at_home, (user, item, str(step))).json() == {"new": [True]}
        expected = recommended(first, *users, k=24)
        process.kill()
        assert recommended(second, *users, k=24) == expected
        assert observe(second, *((user, "i4", "1") for user in users)).json() == {"new": [False] * 10}
        assert observe(second, *((user, "i4") for user in users)).json() == {"new": [True] * 10}
        assert second.get("/health").json() == {"status": "ok"}
    assert not list(tmp_path.glob("*/events.db"))


@pytest.mark.slow
def test_a_database_that_is_not_there(folder_of_a_model, tmp_path, capsys):
    assert main(["serve", str(folder_of_a_model), "--log", f"postgresql://nobody@/x?host={tmp_path}"]) != 0
    message = capsys.readouterr().err
    assert "cannot read the event log in the database x on" in message
    assert message.count("\n") == 1


@pytest.fixture
def folder_of_a_model(tmp_path):
    split = make_split(tmp_path)
    Recommender(make_model(split), split.histories).save(tmp_path / "model")
    return tmp_path / "model"
