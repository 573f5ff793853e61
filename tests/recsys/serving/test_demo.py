"""The demo: what its page asks for, and the page itself in a browser."""

import json
import math
import re
import time
from contextlib import closing

import pytest

from tests.recsys.serving.test_app import ask
from tests.recsys.serving.test_serve import copied, fits, folder, served  # noqa: F401, a fixture
from tests.support import online_data
from tests.support.browser import browser
from tests.support.online_data import make_online
from tests.support.recsys_data import make_model, make_split
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.cli import main
from ttt4rec.options import ServeOptions
from ttt4rec.recsys.data import build_histories
from ttt4rec.recsys.data.datasets import load_interactions
from ttt4rec.recsys.online import SQLiteEventLog
from ttt4rec.recsys.recommend import Recommender
from ttt4rec.recsys.serving.app import Service
from ttt4rec.recsys.serving.demo import Demo

TITLES = {f"i{number}": f"Film {number}" for number in range(1, 24)} | {"i7": "<b>Seven</b> & Störche", "i8": ""}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A recommender, its histories, and its demo."""
    split = make_split(tmp_path_factory.mktemp("demo"))
    model = make_model(split, max_len=100).eval()
    online = make_online(model, slots=4, items=split.histories.item_ids)
    return online, split.histories, Demo(online, split.histories, TITLES)


def asked(shown, *requests):
    """Answers of the service with the demo, each compared with what openapi.json promises."""
    online, _, demo = shown
    described = json.loads(Service(online, demo=demo)._description)
    answers = ask(online, *requests, demo=demo)
    for (method, path, _), answer in zip(requests, answers, strict=True):
        promised = described["paths"][path][method.lower()]["responses"][str(answer.status_code)]["content"]
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in promised
        if kind == "application/json":
            assert fits(answer.json(), promised[kind]["schema"], described), answer.text
    return answers


def post(path, **body):
    return "POST", path, {"json": body}


def test_there_is_a_page_if_it_is_asked_for(shown):
    page, style, script = asked(shown, *(("GET", path, {}) for path in ("/", "/page.css", "/page.js")))
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    linked = set(re.findall(r'(?:href|src)="([^"]*)"', page.text))
    assert linked == {"data:,", "page.css", "page.js"}
    for text in (page.text, style.text, script.text):
        assert set(re.findall(r"https?://[^\"'\s]*", text)) <= {"http://www.w3.org/2000/svg"}  # a name, not fetched
    online = shown[0]
    without = ask(online, ("GET", "/", {}), ("GET", "/page.js", {}), post("/demo/items"), post("/demo/visitor"))
    assert [answer.status_code for answer in without] == [404] * 4
    assert not any("demo" in path or "page" in path for path in json.loads(Service(online)._description)["paths"])


def test_items_are_found_by_all_words_those_first_that_most_took(shown):
    histories = shown[1]
    every, words, name, number, nothing = (
        answer.json()
        for answer in asked(
            shown,
            post("/demo/items", k=100),
            post("/demo/items", text="12  FILM"),
            post("/demo/items", text="störche"),
            post("/demo/items", text="i8"),
            post("/demo/items", text="i8 störche"),
        )
    )
    counts = [sum(histories.items == 1 + histories.item_ids.index(item["item_id"])) for item in every["items"]]
    assert every["total"] == len(counts) == 24
    assert counts == sorted(counts, reverse=True)
    assert words == {"items": [{"item_id": "i12", "name": "Film 12"}], "total": 1}
    assert name["items"] == [{"item_id": "i7", "name": "<b>Seven</b> & Störche"}]
    assert number["items"] == [{"item_id": "i8", "name": "i8"}]  # by its id, as its title is empty
    assert nothing == {"items": [], "total": 0}
    (few,) = asked(shown, post("/demo/items", k=3))
    assert (few.json()["items"], few.json()["total"]) == (every["items"][:3], 24)


def test_the_items_of_a_model_that_came_later_are_found():
    """Its own and no others; what most took stays first, and titles go with ids."""
    histories = build_histories(load_interactions([*((f"u{i}", "i2", i) for i in range(3)), ("u", "i1", 0)]))
    online = make_online(online_data.make_model(num_items=2), items=("i1", "i2"))
    demo = Demo(online, histories, TITLES)

    def found():
        return [(item["item_id"], item["name"]) for item in json.loads(demo.find(b'{"k": 9}').body)["items"]]

    assert found() == [("i2", "Film 2"), ("i1", "Film 1")]
    online.refresh(online_data.make_model(num_items=3), ["i9", "i2", "new"])
    assert found() == [("i2", "Film 2"), ("i9", "Film 9"), ("new", "new")]


def test_a_visitor_sees_what_the_recommender_knows(shown):
    online = shown[0]
    online.observe(["visitor-ada"] * 6, ["i1", "i2", "i3", "i7", "i2", "i4"])
    stranger, ada = (
        answer.json()
        for answer in asked(
            shown, *(post("/demo/visitor", user_id=user, k=4) for user in ("visitor-nobody", "visitor-ada"))
        )
    )
    assert stranger == {"history": [], "length": 0, "best": [], "moved": 0.0, "clock": None}
    assert [(one["item_id"], one["surprise"]) for one in ada["history"]] == online.surprise("visitor-ada")
    assert [one["name"] for one in ada["history"]][2:4] == ["Film 3", "<b>Seven</b> & Störche"]
    assert [(one["item_id"], one["score"]) for one in ada["best"]] == online.recommend(["visitor-ada"], 4)[0]
    assert ada["moved"] == online.moved(["visitor-ada"])[0] > 0
    assert ada["length"] == 6
    online.observe(["visitor-bob"] * 150, ["i5", "i6"] * 75)
    (bob,) = asked(shown, post("/demo/visitor", user_id="visitor-bob"))
    assert (len(bob.json()["history"]), bob.json()["length"]) == (100, 150)


def test_the_page_is_told_the_clock_of_a_model_that_reads_times(shown):
    model = online_data.make_model(num_items=2, times="gap")
    online = make_online(model, items=("i1", "i2"))
    demo = Demo(online, shown[1], TITLES, per_second=1000)

    def told():
        (answer,) = asked((online, None, demo), post("/demo/visitor", user_id="visitor-u"))
        return answer.json()["clock"]

    begin = time.time()
    clock = told()
    assert clock["per_second"] == 1000
    assert begin <= clock["now"] <= time.time()
    online.refresh(online_data.make_model(num_items=2))
    assert told() is None


def test_bad_questions_are_refused(shown):
    bad = (
        post("/demo/items", text="x" * 201),
        post("/demo/items", k=101),
        post("/demo/visitor"),
        post("/demo/visitor", user_id="visitor-u", k=0),
        post("/demo/visitor", user_id="u7"),  # of the training data: what users did is nobody's to see
    )
    answers = asked(shown, *bad)
    assert [answer.status_code for answer in answers] == [422] * 5
    assert "should match pattern '^visitor-.'" in answers[-1].text


def test_titles_without_the_page_are_a_mistake(tmp_path, capsys):
    with pytest.raises(ValueError, match="titles must come with demo"):
        ServeOptions(titles="films.tsv")
    with pytest.raises(ValueError, match="encoding must come with the titles"):
        ServeOptions(demo=True, encoding="latin-1")
    assert ServeOptions(titles="films.tsv", demo=True).encoding == "utf-8"
    split = make_split(tmp_path)
    Recommender(make_model(split), split.histories).save(tmp_path)
    assert main(["serve", str(tmp_path), "--demo", "--titles", str(tmp_path / "none.tsv")]) == 2
    assert "none.tsv" in capsys.readouterr().err
    assert not (tmp_path / "events.db").exists()


SHOWN = "Array.from(document.querySelectorAll('#{} .name'), (one) => one.textContent)"
IDLE = "!document.body.dataset.busy && !document.getAnimations().length"


@pytest.mark.slow
def test_the_list_follows_each_click_in_a_browser(folder, tmp_path):  # noqa: F811
    titles = tmp_path / "titles.tsv"
    titles.write_text("item_id\ttitle\n" + "".join(f"{item}\t{title}\n" for item, title in TITLES.items()))
    place = copied(folder, tmp_path)
    with served(place, "--demo", "--titles", str(titles)) as (client, process), browser() as page:

        def names(where):
            page.until(IDLE)
            return page.run(SHOWN.format(where))

        def expected(user):
            answer = client.post("/demo/visitor", json={"user_id": user, "k": 15}).json()
            return [item["name"] for item in answer["best"]], [item["name"] for item in reversed(answer["history"])]

        page.open(f"{client.base_url}/")
        assert (names("best"), names("history")) == ([], [])
        user = page.run("document.getElementById('user').textContent")
        assert "log" in page.run("document.querySelector('footer').textContent")
        page.click("#search")
        page.write("störche")
        page.until("document.querySelectorAll('#items li').length === 1")
        assert names("items") == ["<b>Seven</b> & Störche"]  # a name is text, whatever it holds
        page.click("#items button")
        assert names("history") == ["<b>Seven</b> & Störche"]
        first = names("best")
        assert (first, names("history")) == expected(user)
        taken = names("history")
        for line in (1, 3, 2, 1, 4):
            wanted = names("best")[line - 1]
            page.click(f"#best li:nth-child({line}) button")
            taken.insert(0, wanted)
            assert names("history") == taken
            assert wanted not in names("best")
        assert (names("best"), taken) == expected(user)
        steps = page.run("Array.from(document.querySelectorAll('#best .step'), (one) => one.textContent)")
        assert any(re.fullmatch("[▲▼] \\d+", step) for step in steps), steps
        moved = client.post("/demo/visitor", json={"user_id": user}).json()["moved"]
        assert moved > 0
        told = float(page.run("document.getElementById('moved').textContent").rstrip(" %"))
        assert math.isclose(told, 100 * moved, abs_tol=0.51)

        page.open(f"{client.base_url}/", width=390, height=844)  # the same visitor, on a phone's window
        assert names("history") == taken
        assert page.run("document.documentElement.scrollWidth") <= 390
        page.click("#again")
        page.until("document.querySelectorAll('#history li').length === 0")
        assert names("best") == []
        other = page.run("document.getElementById('user').textContent")
        assert other != user
        assert expected(user)[1] == taken  # the old one's events stay
        assert page.said == []

        process.kill()
        process.wait()
        page.click("#items button")
        page.until(f"{IDLE} && !document.getElementById('trouble').hidden")
        assert page.run("document.getElementById('trouble').textContent") == "The service does not answer."


@pytest.mark.slow
def test_a_click_has_its_time_where_the_model_reads_times(folder, tmp_path):  # noqa: F811
    place = copied(folder, tmp_path)
    histories = Recommender.load(place).histories
    model = TTT4Rec(TTT4RecConfig(histories.num_items, width=16, num_heads=2, times="query")).eval()
    Recommender(model, histories).save(place)
    begin = time.time()
    with served(place, "--demo", "--time-unit", "ms") as (client, _), browser() as page:
        fast = "const real = Date.now; Date.now = () => real() + 10 * 86400e3"  # such times the service refuses
        page.ask("Page.addScriptToEvaluateOnNewDocument", source=fast)
        page.open(f"{client.base_url}/")
        page.until(IDLE)
        user = page.run("document.getElementById('user').textContent")
        for _ in range(2):
            page.click("#items button")
            page.until(IDLE)
    with closing(SQLiteEventLog(place / "events.db")) as log:
        (tail,) = log.read([user], [[]])
    times = list(tail.times)
    # Between the service's answer and the page's reading it its clock goes on.
    assert 1000 * (begin - 5) <= times[0] < times[1] <= 1000 * time.time() + 1
