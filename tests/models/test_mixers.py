"""Baselines against their definitions: NARM's, Mamba's and HSTU's mixers, BERT4Rec's hidden items."""

import dataclasses
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.recsys_data import make_model, make_split
from ttt4rec import TTT4Rec, TTT4RecConfig, register_mixer
from ttt4rec.models import mixers
from ttt4rec.models.blocks import AttentionMixer, HistoryMixer
from ttt4rec.models.cloze import hide_next, hide_some
from ttt4rec.models.mixers import MIXERS, HSTUMixer, MambaMixer, NARMMixer
from ttt4rec.models.ttt4rec import make_mixer
from ttt4rec.recsys.data.windows import evaluation_prefixes
from ttt4rec.recsys.recommend import Recommender
from ttt4rec.recsys.training.evaluate import evaluate
from ttt4rec.recsys.training.train import TrainOptions, fit

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
TARGETS = torch.tensor([6, 7, 8, 0, 10, 11, 12])  # histories 5 6 7 [8] and 8 9 10 11 [12]; 9 is no target
CU_SEQLENS = torch.tensor([0, 3, 7])


@pytest.fixture
def x():
    return torch.randn(2, 7, 6, dtype=torch.float64)


def randomised(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double()


@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_narm_is_its_definition(x, monkeypatch, at_once):
    monkeypatch.setattr(mixers, "ELEMENTS_AT_ONCE", at_once)
    mixer = randomised(NARMMixer(6))
    y = mixer(x)
    for row in range(2):
        h = mixer.gru(x[row])[0]
        for t in range(7):
            local = torch.zeros(6, dtype=torch.float64)
            for j in range(t + 1):
                hidden = torch.sigmoid(mixer.query.weight @ h[t] + mixer.key.weight @ h[j])
                local += (mixer.energy.weight[0] @ hidden) * h[j]
            torch.testing.assert_close(y[row, t], mixer.output.weight @ torch.cat((h[t], local)))


def test_mamba_is_its_definition(x):
    mixer = randomised(MambaMixer(6, state_size=3))
    y = mixer(x)
    for row in range(2):
        first, z = (mixer.input.weight @ x[row].T).T.chunk(2, -1)  # [L, 12] each
        state = torch.zeros(12, 3, dtype=torch.float64)
        for t in range(7):
            window = F.pad(first, (0, 0, 3, 0))[t : t + 4]
            u = F.silu((window * mixer.conv.weight.T).sum(0) + mixer.conv.bias)
            rank, B, C = (mixer.selection.weight @ u).split([1, 3, 3])
            delta = F.softplus(mixer.rate @ rank + mixer.rate_bias)[:, None]
            state = torch.exp(-delta * mixer.log_decay.exp()) * state + delta * u[:, None] * B
            gated = (state @ C + mixer.skip * u) * F.silu(z[t])
            torch.testing.assert_close(y[row, t], mixer.output.weight @ gated)


@pytest.mark.parametrize("at_once", [1, 2 * 2 * 7 * 3, 1 << 20])  # one row of queries, three, all
def test_hstu_is_its_definition(x, monkeypatch, at_once):
    monkeypatch.setattr(mixers, "ELEMENTS_AT_ONCE", at_once)
    mixer = randomised(HSTUMixer(6, 2, max_len=4))  # fewer distances than the seven items have
    y = mixer(x)
    for row in range(2):
        u, v, q, k = F.silu(x[row] @ mixer.input.weight.T).split(6, -1)
        for t in range(7):
            attended = torch.zeros(6, dtype=torch.float64)
            for j in range(t + 1):
                for head in (slice(0, 3), slice(3, 6)):
                    score = q[t, head] @ k[j, head] + mixer.distance_table[min(t - j, 3)]
                    attended[head] += score * torch.sigmoid(score) * v[j, head] / 4
            centred = attended - attended.mean()
            normalised = centred / (centred.square().mean() + 1e-6).sqrt()
            torch.testing.assert_close(y[row, t], mixer.output.weight @ (normalised * u[t]))


@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_hstu_with_times_is_its_definition(x, monkeypatch, at_once):
    """A bias more for the time between two events; no time is known across a gap that is infinite."""
    monkeypatch.setattr(mixers, "ELEMENTS_AT_ONCE", at_once)
    mixer = randomised(HSTUMixer(6, 2, max_len=4, times="gap"))
    never = math.inf
    gaps = torch.tensor([[never, 3, 0, 70, -5, 1, 900], [8, 1, never, 2, 4, never, 6]], dtype=torch.float64)
    y = mixer(x, gaps=gaps)
    for row in range(2):
        u, v, q, k = F.silu(x[row] @ mixer.input.weight.T).split(6, -1)
        for t in range(7):
            attended = torch.zeros(6, dtype=torch.float64)
            for j in range(t + 1):
                elapsed = sum(max(0.0, gap) for gap in gaps[row, j + 1 : t + 1].tolist())
                place = 64 if elapsed == never else int(math.log2(1 + elapsed))
                bias = mixer.distance_table[min(t - j, 3)] + mixer.time_table[place, 0]
                for head in (slice(0, 3), slice(3, 6)):
                    score = q[t, head] @ k[j, head] + bias
                    attended[head] += score * torch.sigmoid(score) * v[j, head] / 4
            normalised = F.layer_norm(attended, (6,), eps=1e-6)
            torch.testing.assert_close(y[row, t], mixer.output.weight @ (normalised * u[t]))


def test_hstu_reads_times_packed_and_padded_as_alone():
    mixer = randomised(HSTUMixer(8, 2, max_len=4, times="query"))
    lengths = [3, 0, 1, 17, 4]
    x, gaps = torch.randn(1, sum(lengths), 8, dtype=torch.float64), 10 ** (5 * torch.rand(1, sum(lengths)))
    packed = mixer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), gaps=gaps)
    pairs = [(x[:, a:b], gaps[:, a:b]) for a, b in ((0, 3), (3, 4), (4, 21), (21, 25))]
    alone = torch.cat([mixer(part, gaps=between) for part, between in pairs], 1)
    torch.testing.assert_close(packed, alone)
    ahead = F.pad(gaps[:, -4:], (2, 0), value=math.nan)
    mask = torch.tensor([[False, False, True, True, True, True]])
    padded = mixer(F.pad(x[:, -4:], (0, 0, 2, 0)), mask=mask, gaps=ahead)
    torch.testing.assert_close(padded[:, 2:], alone[:, -4:])


def test_hstu_knows_when_an_item_was_taken():
    model = randomised(TTT4Rec(TTT4RecConfig(9, 8, 1, 2, "hstu", max_len=4, times="gap"))).eval()
    ids = torch.tensor([[5, 1, 2, 3]])
    soon, late = (model(ids, gaps=torch.tensor([[math.inf, gap, 1, 1]]))[:, -1] for gap in (1, 1000))
    assert not torch.allclose(soon, late)
    with torch.no_grad():  # of the second item the vector of its gap tells as well
        model.event_times.gap.zero_()
    soon, late = (model(ids, gaps=torch.tensor([[math.inf, gap, 1, 1]]))[:, -1] for gap in (1, 1000))
    assert not torch.allclose(soon, late)
    with torch.no_grad():
        model.blocks[0].mixer.time_table.zero_()
    soon, late = (model(ids, gaps=torch.tensor([[math.inf, gap, 1, 1]]))[:, -1] for gap in (1, 1000))
    torch.testing.assert_close(soon, late)


def test_hstu_knows_how_far_back_an_item_is():
    model = randomised(TTT4Rec(TTT4RecConfig(9, 8, 1, 2, "hstu", max_len=4))).eval()
    there, earlier = model(torch.tensor([[5, 1, 2, 3], [1, 5, 2, 3]]))[:, -1]
    assert not torch.allclose(there, earlier)
    with torch.no_grad():
        model.blocks[0].mixer.distance_table.zero_()
    there, earlier = model(torch.tensor([[5, 1, 2, 3], [1, 5, 2, 3]]))[:, -1]
    torch.testing.assert_close(there, earlier)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_sequences_of_any_lengths_are_read_alone(name):
    width = 8
    mixer = randomised(make_mixer(TTT4RecConfig(9, width, 1, 2, name)))
    lengths = [3, 0, 1, 17, 4, 5, 1, 8, 9, 2]
    x = torch.randn(1, sum(lengths), width, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = mixer(x, cu_seqlens=cu_seqlens)
    alone = torch.cat([mixer(part) for part in x.split(lengths, 1) if part.shape[1]], 1)
    torch.testing.assert_close(packed, alone)
    given, expected = (torch.autograd.grad((y * weights).sum(), (x, *mixer.parameters())) for y in (packed, alone))
    torch.testing.assert_close(given, expected)
    if isinstance(mixer, HistoryMixer):
        nothing = x.detach()[:, :0]
        assert mixer(nothing, cu_seqlens=torch.tensor([0, 0])).shape == nothing.shape


def test_narrow_attention_turns_in_float32():
    """300 angles of 8 bits would be far off, beside which stands what weights, products and results are rounded to."""
    mixer = AttentionMixer(16, 2)
    with torch.no_grad():
        mixer.qkv.weight[:32] *= 6  # so that it matters where a token stands
    mixer, x = mixer.bfloat16(), torch.randn(1, 300, 16).bfloat16()
    given, expected = mixer(x).double(), mixer.double()(x.double())
    assert (given - expected).norm() <= 6 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_mamba_begins_as_in_mamba4rec():
    mixer = MambaMixer(64)
    assert not mixer.rate_bias.any()
    assert 0.015 < mixer.rate.std() < 0.025
    assert torch.allclose(mixer.log_decay.exp(), torch.arange(1.0, 33).expand(128, 32))
    assert mixer.state_size == 32


def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """As mamba-ssm documents it, on [N, features, L]."""
    assert delta_softplus
    delta = F.softplus(delta + delta_bias[:, None])
    state, outputs = torch.zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * u[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(outputs, -1) * F.silu(z)


@pytest.fixture
def mamba_ssm(tmp_path, monkeypatch):
    """A package of that name, without anything in it; its folder of operations."""

    def forget(clear=mixers.find_scan.cache_clear):
        clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
            del sys.modules[name]

    folder = tmp_path / "mamba_ssm" / "ops"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield folder
    forget()


def test_mamba_ssm_is_called_as_it_documents(x, monkeypatch, mamba_ssm):
    (mamba_ssm / "selective_scan_interface.py").write_text(f"from {__name__} import selective_scan_fn")
    fused = mixers.find_scan("cuda")
    assert mixers.find_scan("cpu") is mixers.plain_scan
    mixer, x = randomised(MambaMixer(6)).float().requires_grad_(False), x.float()
    plain = mixer(x)
    monkeypatch.setattr(mixers, "find_scan", lambda device_type: fused)
    # the two sum 32 products in different orders, seven tokens deep
    torch.testing.assert_close(mixer(x), plain, rtol=0, atol=7 * 32 * 2**-24 * float(plain.abs().max()))


def test_a_mamba_ssm_that_does_not_load_is_warned_of(mamba_ssm):
    (mamba_ssm / "selective_scan_interface.py").write_text("import no_such_extension")
    with pytest.warns(UserWarning, match="loop over the tokens: mamba-ssm does not load.*no_such_extension"):
        assert mixers.find_scan("cuda") is mixers.plain_scan


def test_bidirectional_attention_is_its_definition(x):
    mixer = randomised(AttentionMixer(6, 1, causal=False))
    q, k, v = mixer.qkv(x).chunk(3, -1)
    position = torch.arange(7, dtype=torch.float64)[:, None] * 10000.0 ** (-2 * torch.arange(3).double() / 6)
    turn = torch.polar(torch.ones_like(position), position)
    q, k = (torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (3, 2))) * turn).flatten(-2) for t in (q, k))
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(6), -1)
    torch.testing.assert_close(mixer(x), mixer.output(weights @ v))


def test_hidden_items_in_training():
    hidden = hide_some(IDS, TARGETS, CU_SEQLENS, 1.0)
    assert hidden.ids.tolist() == [[5, 0, 0, 0, 8, 9, 0, 0, 0]]
    assert hidden.cu_seqlens.tolist() == [0, 4, 9]
    assert hidden.places.tolist() == [1, 2, 3, 6, 7, 8]
    assert hidden.items.tolist() == [6, 7, 8, 10, 11, 12]
    last = hide_some(IDS, TARGETS, CU_SEQLENS, 0.0)
    assert last.ids.tolist() == [[5, 6, 7, 0, 8, 9, 10, 11, 0]]
    assert (last.places.tolist(), last.items.tolist()) == ([3, 8], [8, 12])


def test_the_hide_rate():
    total = 20_000
    targets, rate = torch.arange(2, total + 2), 0.2
    hidden = hide_some(targets[None] - 1, targets, torch.tensor([0, total]), rate)
    assert abs(len(hidden.items) / total - rate) < 5 * math.sqrt(rate * (1 - rate) / total)


@pytest.mark.parametrize("at_once", [1, 1 << 16])
def test_every_target_has_a_history_of_its_own(monkeypatch, at_once):
    monkeypatch.setattr("ttt4rec.models.cloze.TOKENS_AT_ONCE", at_once)
    parts = list(hide_next(IDS, TARGETS, CU_SEQLENS, 2))
    assert len(parts) == (6 if at_once == 1 else 1)
    rows = [row for part in parts for row in part.ids[0].tensor_split(part.cu_seqlens[1:-1])]
    assert [row.tolist() for row in rows] == [[5, 0], [5, 6, 0], [6, 7, 0], [8, 9, 0], [9, 10, 0], [10, 11, 0]]
    assert torch.cat([part.items for part in parts]).tolist() == [6, 7, 8, 10, 11, 12]
    assert all(part.ids[0, part.places].eq(0).all() for part in parts)


def test_bert4rec_sees_nothing_of_what_it_predicts():
    torch.manual_seed(0)
    model = TTT4Rec(TTT4RecConfig(num_items=12, width=8, num_heads=2, mixer="bidirectional", max_len=3)).double().eval()
    randomised(model)
    hidden, items = model.predict(IDS, TARGETS, CU_SEQLENS)
    assert items.tolist() == [6, 7, 8, 10, 11, 12]
    alone = model(torch.tensor([[8, 9, 10, 0]]), cu_seqlens=torch.tensor([0, 4]))[0, -1]
    torch.testing.assert_close(hidden[4], alone, rtol=0, atol=1e-12)
    both = model(torch.tensor([[8, 0, 10, 11]]), cu_seqlens=torch.tensor([0, 4]))[0, 1]
    other = model(torch.tensor([[8, 0, 10, 12]]), cu_seqlens=torch.tensor([0, 4]))[0, 1]
    assert not torch.allclose(both, other)  # it does read in both directions


@pytest.mark.parametrize(
    "mixer", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("narm", "mamba")), "bidirectional", "hstu"]
)
def test_a_baseline_learns_the_pattern(tmp_path, mixer):
    split = make_split(tmp_path)
    options = TrainOptions(epochs=30, patience=30, targets_per_batch=64, learning_rate=1e-2)
    model = make_model(split, mixer=mixer)
    reports = fit(model, split, tmp_path / "run", options)
    assert max(report.metrics["NDCG@10"] for report in reports) > 0.6  # 0.19 by chance
    metrics = evaluate(model, evaluation_prefixes(split, "test", max_len=8))
    assert metrics["NDCG@10"] > 0.6
    model.save(tmp_path / "model")
    again = Recommender(TTT4Rec.load(tmp_path / "model"), split.histories)
    best, _ = again.recommend(history=["i3", "i4", "i5"], k=2).items
    assert best[0] in ("i6", "i7")


def test_hidden_items_stand_for_all_targets(tmp_path):
    split = make_split(tmp_path)
    options = TrainOptions(epochs=1, learning_rate=1e-9)  # stays where it begins, where all items are about alike
    for rate in (0.0, 0.5, 1.0):
        model = make_model(split, mixer="bidirectional", hide_rate=rate, dropout=0.0)
        (report,) = fit(model, split, tmp_path / str(rate), options)
        assert report.loss == pytest.approx(math.log(24), rel=0.1)


@pytest.mark.parametrize("mixer", ["narm", "mamba", "bidirectional", "hstu"])
def test_a_baseline_goes_on_after_an_interruption(tmp_path, mixer):
    split = make_split(tmp_path)
    options = TrainOptions(epochs=2, targets_per_batch=256)
    whole = fit(make_model(split, mixer=mixer), split, tmp_path / "whole", options)
    fit(make_model(split, mixer=mixer), split, tmp_path / "parts", dataclasses.replace(options, epochs=1))
    parts = fit(make_model(split, mixer=mixer), split, tmp_path / "parts", options)
    assert [report.loss for report in parts] == [report.loss for report in whole]


@pytest.mark.parametrize("mixer", [name for name, mixer in MIXERS.items() if not mixer.streams])
def test_a_state_is_refused(mixer):
    model = TTT4Rec(TTT4RecConfig(num_items=5, mixer=mixer))
    with pytest.raises(ValueError, match="Mixer keeps no state; give it the whole history instead"):
        model(torch.ones(1, 2, dtype=torch.int64), return_states=True)


@pytest.mark.parametrize("mixer", MIXERS)
def test_padding_yields_zeros_whatever_reads(mixer):
    x, mask = torch.randn(2, 5, 8), torch.tensor([[True] * 5, [False, True, True, False, False]])
    assert not make_mixer(TTT4RecConfig(9, 8, 1, 2, mixer))(x, mask=mask)[~mask].any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_mixer_reads_backwards_only_if_it_says_so(mixer):
    model = randomised(TTT4Rec(TTT4RecConfig(9, 8, 1, 2, mixer))).eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    changed = ids.clone()
    changed[0, -1] = 6
    before = (model(changed) - model(ids))[0, :-1].abs().max()
    assert (before < 1e-12) == MIXERS[mixer].causal
    assert (model.hidden_item is None) == MIXERS[mixer].causal


def test_a_mixer_is_registered_once_and_with_known_options():
    with pytest.raises(ValueError, match=r"name must be new, not one of ttt, attention, .*; given 'gru'"):
        register_mixer("gru", MIXERS["gru"])
    with pytest.raises(ValueError, match=r"options must be fields of TTT4RecConfig, num_items, width, .*; given speed"):
        register_mixer("other", MIXERS["gru"]._replace(options=("width", "speed")))
    assert "other" not in MIXERS
