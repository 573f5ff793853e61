"""``generate`` says what whole calls say, token by token, however it searches."""

import pytest
import torch

from tests.support.language_models import MODELS, exact_and_allowed, make_model, prompts
from ttt4rec.hf import TTTCache, TTTCacheLayer

pytestmark = pytest.mark.slow  # transformers takes seconds to import
NEW = 9  # more than two mini-batches
GIVEN = {"max_new_tokens": NEW, "min_new_tokens": NEW, "return_dict_in_generate": True, "do_sample": False}
all_models = pytest.mark.parametrize("name", MODELS)


def real(ids):
    return torch.ones_like(ids)


@pytest.mark.parametrize("search", [{}, {"do_sample": True, "temperature": 1.5}], ids=["greedy", "sampling"])
@all_models
def test_every_token_is_that_of_a_whole_call(name, search):
    model, ids = make_model(name), prompts()
    found = model.generate(ids, attention_mask=real(ids), output_logits=True, **(GIVEN | search))
    exact, allowed = exact_and_allowed(model, found.sequences)
    error = (torch.stack(found.logits, 1) - exact[:, 5:-1]).abs().max()
    assert error <= allowed


@all_models
def test_beams_take_their_states_along(name, monkeypatch):
    model, ids = make_model(name), prompts()
    given = GIVEN | {"num_beams": 4, "num_return_sequences": 2, "output_scores": True}
    found, whole = (
        model.generate(ids, attention_mask=real(ids), use_cache=cached, **given) for cached in (True, False)
    )
    assert torch.equal(found.sequences, whole.sequences)
    assert torch.allclose(found.sequences_scores, whole.sequences_scores, rtol=1e-5)
    assert found.beam_indices[:, : NEW - 1].diff().abs().max() > 0  # beams did move
    monkeypatch.setattr(TTTCacheLayer, "reorder_cache", lambda self, beam_idx: None)
    stayed = model.generate(ids, attention_mask=real(ids), **given)
    assert not torch.allclose(stayed.sequences_scores, whole.sequences_scores, rtol=1e-5)


@all_models
def test_prompts_padded_on_the_left_go_on_as_alone(name):
    model, ids = make_model(name), prompts()
    mask = real(ids)
    mask[0, :3] = 0
    ids[0, :3] = 0
    found = model.generate(ids, attention_mask=mask, output_logits=True, **GIVEN)
    for row, first in enumerate((3, 0)):
        sequence = found.sequences[row : row + 1, first:]
        exact, allowed = exact_and_allowed(model, sequence)
        logits = torch.stack(found.logits, 1)[row : row + 1]
        assert (logits - exact[:, 5 - first : -1]).abs().max() <= allowed


@all_models
def test_prompts_padded_on_the_right_are_refused(name):
    model, ids = make_model(name), prompts()
    mask = real(ids)
    mask[0, 4:] = 0
    with pytest.raises(ValueError, match=r"pad(ded)? on the left"):
        model.generate(ids, attention_mask=mask, **GIVEN)


@all_models
def test_padding_on_either_side_of_a_whole_call(name):
    model, ids = make_model(name), prompts()
    mask = real(ids)
    mask[0, 4:] = 0
    mask[1, :2] = 0
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    for row, part in ((0, slice(4)), (1, slice(2, 6))):
        exact, allowed = exact_and_allowed(model, ids[row : row + 1, part])
        assert (logits[row : row + 1, part] - exact).abs().max() <= allowed


@all_models
def test_packed_sequences_are_those_alone(name):
    model, ids = make_model(name), prompts(1, 13)
    positions = torch.cat((torch.arange(6), torch.arange(7)))[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    parts = [exact_and_allowed(model, part) for part in ids.split((6, 7), dim=1)]
    assert (packed - torch.cat([exact for exact, _ in parts], 1)).abs().max() <= max(allowed for _, allowed in parts)


@pytest.mark.parametrize("name", ["linear-mamba", "llama"])
def test_packed_sequences_do_not_go_on(name):
    with pytest.raises(ValueError, match="packed sequences leave no state to go on from; give use_cache=False"):
        make_model(name)(prompts(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=True)


def test_a_prompt_in_pieces_is_a_prompt():
    model, ids = make_model("linear-mamba"), prompts(2, 11)
    exact, allowed = exact_and_allowed(model, ids)
    cache, logits = TTTCache(2), []
    for piece in ids.split((5, 1, 3, 2), dim=1):
        logits.append(model(piece, cache=cache).logits)
    assert (torch.cat(logits, 1) - exact).abs().max() <= allowed
    assert cache.get_seq_length() == 11
    cache.reset()
    assert (model(ids, cache=cache).logits - exact).abs().max() <= allowed


def test_rows_of_a_cache():
    model, ids = make_model("linear-mamba"), prompts(3, 6)
    last = ids[:, 5:]

    def read_to_the_end():
        cache = TTTCache(2)
        model(ids[:, :5], cache=cache)
        return cache

    expected = model(ids).logits[:, 5:]
    repeated, chosen = read_to_the_end(), read_to_the_end()
    repeated.batch_repeat_interleave(2)
    assert repeated.layers[0].batch_size == 6
    assert torch.allclose(
        model(last.repeat_interleave(2, 0), cache=repeated).logits, expected.repeat_interleave(2, 0), atol=1e-5
    )
    chosen.batch_select_indices(torch.tensor([2, 0]))
    assert torch.allclose(model(last[[2, 0]], cache=chosen).logits, expected[[2, 0]], atol=1e-5)


@pytest.mark.parametrize("name", ["linear-mamba", "llama"])
def test_what_takes_tokens_back_is_refused(name):
    model, ids = make_model(name), prompts(1)
    with pytest.raises(ValueError, match=r"assisted generation|Assisted decoding"):
        model.generate(ids, attention_mask=real(ids), prompt_lookup_num_tokens=2, **GIVEN)
    cache = TTTCache(2)
    model(ids, cache=cache)
    cache.crop(0)
    with pytest.raises(ValueError, match="asked to remove 2"):
        cache.crop(-2)


@pytest.mark.parametrize("name", ["linear-mamba", "llama"])
def test_other_caches_are_refused(name):
    from transformers import DynamicCache

    model, ids = make_model(name), prompts(1)
    with pytest.raises(ValueError, match="cache must be a DynamicCache or TTTCache"):
        model.generate(ids, attention_mask=real(ids), cache_implementation="static", **GIVEN)
    other = DynamicCache()
    other.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(ValueError, match="cache must be of the model that reads it; given keys and values for layer 0"):
        model(ids, cache=other)
    with pytest.raises(TypeError, match="holds no keys and values"):
        TTTCache(1).update(torch.zeros(1), torch.zeros(1), 0)
