"""Times of events: buckets and gaps, and that streams, packed and padded histories know them alike."""

import json
import math

import pytest
import torch

from tests.support.checks import assert_close
from ttt4rec import TTT4Rec, TTT4RecConfig
from ttt4rec.models.event_times import FIRST, bucket, gaps_of, time_between, time_since
from ttt4rec.models.losses import LOSSES, Loss
from ttt4rec.models.mixers import MIXERS

ITEMS, LENGTH = 9, 11
CAUSAL = [name for name, mixer in MIXERS.items() if mixer.causal]


def make_model(times="query", *, trained=True, **options):
    shape = {"width": 16, "num_heads": 2, "ffn_width": 16, "mini_batch_size": 3, "max_len": 5, "dropout": 0.0}
    torch.manual_seed(0)
    model = TTT4Rec(TTT4RecConfig(ITEMS, times=times, **(shape | options)), dtype=torch.float64).eval()
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
            model.embedding.weight[0] = 0
    return model


def make_histories(rows=2):
    torch.manual_seed(1)
    ids = torch.randint(1, ITEMS + 1, (rows, LENGTH))
    times = (10 ** (6 * torch.rand(rows, LENGTH, dtype=torch.float64))).cumsum(1)
    return ids, gaps_of(times)


@pytest.mark.filterwarnings("error")
def test_buckets_of_any_strides_are_told_without_a_warning():
    elapsed = torch.tensor([[0.0, 1.0, 3.0], [2.0, 7.0, 1e30]])
    assert bucket(elapsed.T).T.tolist() == bucket(elapsed).tolist() == [[0, 1, 2], [1, 3, 64]]


def test_buckets_begin_at_powers_of_two():
    bounds = [2.0**k - 1 for k in range(1, 50)]
    assert bucket(torch.tensor(bounds, dtype=torch.float64)).tolist() == list(range(1, 50))
    below = torch.nextafter(torch.tensor(bounds, dtype=torch.float64), torch.zeros(()).double())
    assert bucket(below).tolist() == list(range(49))
    odd = torch.tensor([0.0, -5.0, 2.0**64 - 2.0**12, 2.0**80, math.inf], dtype=torch.float64)
    assert bucket(odd).tolist() == [0, 0, 63, FIRST, FIRST]
    assert bucket(torch.tensor([0, 1, 7, 2**63 - 1])).tolist() == [0, 1, 3, 63]


def test_what_is_not_later_has_no_gap_and_what_is_first_an_infinite_one():
    times = torch.tensor([[5, 9, 9, 7, 20, 21]])
    assert gaps_of(times).tolist() == [[math.inf, 4, 0, 0, 13, 1]]
    assert gaps_of(times, torch.tensor([0, 2, 2, 5, 6])).tolist() == [[math.inf, 4, math.inf, 0, 13, math.inf]]
    before = torch.tensor([math.nan, -math.inf, -math.inf, 3])
    assert time_between(before, torch.tensor([1, 1, -math.inf, 2.5])).tolist() == [math.inf, math.inf, 0, 0]


def test_time_since_is_the_sum_of_the_gaps_between():
    """The first gap, which may be of any size, is between no two events; what is below 0 counts 0, all the way down."""
    gaps = torch.tensor([[1.7e18, 1, 3, 60], [math.inf, 2, -math.inf, 4], [0, 5, math.inf, 6]], dtype=torch.float64)
    assert time_since(gaps)[:, -1].tolist() == [[64, 63, 60, 0], [6, 4, 4, 0], [math.inf, math.inf, 6, 0]]
    assert time_since(gaps, 2).tolist() == time_since(gaps)[:, 2:].tolist()


@pytest.mark.parametrize("times", ["gap", "query"])
def test_a_new_model_is_the_one_without_times(times):
    ids, gaps = make_histories()
    plain = make_model("none", trained=False)
    drawn = torch.rand(1)
    timed = make_model(times, trained=False)
    assert torch.equal(drawn, torch.rand(1))  # nor is anything else drawn than before
    assert timed.state_dict().keys() - plain.state_dict().keys() == {f"event_times.{n}" for n in NAMES[times]}
    assert torch.equal(timed.at_request(timed(ids, gaps=gaps), gaps), plain(ids))
    assert "times" not in plain.config.identity()  # as in snapshots of before
    assert timed.config.identity()["times"] == times


NAMES = {"gap": ["gap"], "query": ["gap", "scale", "shift"]}


@pytest.mark.parametrize("mixer", CAUSAL)
def test_packed_and_padded_histories_are_read_alike(mixer):
    model = make_model("gap", mixer=mixer)
    ids, gaps = make_histories()
    whole = model(ids, gaps=gaps)
    assert (whole - model(ids, gaps=gaps.roll(1, 0))).abs().max() > 1e-3  # times matter
    bounds = torch.tensor([0, 4, LENGTH])
    packed = model(ids[:1], gaps=gaps[:1], cu_seqlens=bounds)
    assert_close(packed[:, :4], whole[:1, :4])
    padded = model(ids[:1].roll(2, 1).index_fill(1, torch.arange(2), 0), gaps=gaps[:1].roll(2, 1))
    assert_close(padded[:, 2:], model(ids[:1, :-2], gaps=gaps[:1, :-2]))


@pytest.mark.parametrize("inner", ["linear", "mlp"])
def test_streams_know_the_times_that_whole_histories_know(inner):
    model = make_model(inner=inner, num_blocks=2)
    ids, gaps = make_histories()
    whole = model(ids, gaps=gaps)
    pools, slots = model.make_pools(3), torch.tensor([2, 0])
    steps = [model.step(ids[:, t], pools, slots, gaps[:, t]) for t in range(LENGTH)]
    assert_close(torch.stack(steps, 1), whole)
    states, parts = None, []
    for cut in (slice(0, 4), slice(4, 5), slice(5, LENGTH)):
        part, states = model(ids[:, cut], gaps=gaps[:, cut], states=states, return_states=True)
        parts.append(part)
    assert_close(torch.cat(parts, 1), whole)


def test_the_request_is_asked_for_behind_the_state():
    model = make_model()
    ids, gaps = make_histories()
    targets, bounds = torch.ones(2 * LENGTH, dtype=torch.int64), torch.tensor([0, LENGTH, 2 * LENGTH])
    elapsed = torch.rand(2 * LENGTH).double() * 1e4
    packed = ids.reshape(1, -1), targets, bounds, gaps.reshape(1, -1)
    h, (y, _) = model(packed[0], gaps=packed[3], cu_seqlens=bounds)[0], model.predict(*packed, elapsed)
    place = (1 + elapsed).log2().floor().long()
    assert_close(y, (1 + model.event_times.scale[place]) * h + model.event_times.shift[place])
    assert torch.equal(model.at_request(h, elapsed), y)
    gap = make_model("gap")
    assert torch.equal(gap.at_request(h, elapsed), h)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains_the_vectors(loss):
    model = make_model().train()
    ids, gaps = make_histories(1)
    targets = ids[0].roll(-1)
    targets[:3] = 0
    hidden, items = model.predict(ids, targets, torch.tensor([0, LENGTH]), gaps, gaps[0].roll(-1))
    compute = Loss.make(loss, torch.ones(ITEMS, dtype=torch.int64), num_negatives=4, popularity=0.0, calibration=0.5)
    compute(model, hidden, items).backward()
    reached = {name: p.grad.abs().amax(1) > 0 for name, p in model.event_times.named_parameters()}
    assert reached["gap"][bucket(gaps[0])].all()
    used = torch.zeros(FIRST + 1, dtype=torch.bool).index_fill(0, bucket(gaps[0].roll(-1)[3:]), True)
    assert torch.equal(reached["scale"], used)
    assert torch.equal(reached["shift"], used)


def test_models_are_saved_with_their_times_and_older_ones_have_none(tmp_path):
    ids, gaps = make_histories()
    model = make_model()
    model.save(tmp_path / "timed")
    loaded = TTT4Rec.load(tmp_path / "timed")
    assert torch.equal(loaded(ids, gaps=gaps), model(ids, gaps=gaps))
    larger = model.with_items(ITEMS + 3)
    assert torch.equal(larger(ids, gaps=gaps), model(ids, gaps=gaps))
    make_model("none").save(tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("times") == "none"
    assert TTT4RecConfig(**config) == make_model("none").config


def test_wrong_times_are_refused():
    model, plain = make_model(), make_model("none")
    ids, gaps = make_histories()
    pools = model.make_pools(2)
    before = [pool.mixer.records.clone() for pool in pools]
    with pytest.raises(ValueError, match=r"gaps must be given, as the model has times='query'; given None"):
        model(ids)
    with pytest.raises(ValueError, match="gaps must be given"):
        model.step(ids[:, 0], pools, torch.arange(2))
    with pytest.raises(ValueError, match="gaps must be numbers; given NaN"):
        model.step(ids[:, 0], pools, torch.arange(2), gaps[:, 0] * math.nan)
    assert all(map(torch.equal, before, [pool.mixer.records for pool in pools]))
    with pytest.raises(ValueError, match=r"gaps must have shape .* = \[2, 11\]; given \[2, 1\]"):
        model(ids, gaps=gaps[:, :1])
    with pytest.raises(ValueError, match="gaps must be left out, as the model has times='none'"):
        plain(ids, gaps=gaps)
    with pytest.raises(ValueError, match="gaps must be left out"):
        plain.step(ids[:, 0], plain.make_pools(2), torch.arange(2), gaps[:, 0])
    with pytest.raises(ValueError, match="elapsed must be given"):
        model.predict(ids[:1], ids[0], torch.tensor([0, LENGTH]), gaps[:1])
    with pytest.raises(ValueError, match="times must be none with mixer bidirectional, which hides items; given 'gap'"):
        TTT4RecConfig(ITEMS, mixer="bidirectional", times="gap")
    with pytest.raises(ValueError, match="times must be one of none, gap, query; given 'all'"):
        TTT4RecConfig(ITEMS, times="all")


def test_surprise_and_meta_tensors_know_times():
    model = make_model("gap")
    ids, gaps = make_histories()
    assert not torch.equal(model.surprise(ids, gaps), model.surprise(ids, gaps.roll(1, 0)))
    assert make_model("gap").to("meta")(ids.to("meta"), gaps=gaps.to("meta")).shape == (2, LENGTH, 16)


@pytest.mark.slow
def test_models_with_times_are_compiled():
    model = make_model().float()
    ids, gaps = make_histories()
    compiled = torch.compile(lambda ids, gaps: model.at_request(model(ids, gaps=gaps), gaps), fullgraph=True)
    expected = model.at_request(model(ids, gaps=gaps), gaps)
    torch.testing.assert_close(compiled(ids, gaps), expected, rtol=1e-4, atol=1e-5)
