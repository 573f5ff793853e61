"""Masks of transformers, of two and four dimensions, become ours."""

import pytest
import torch

from ttt4rec.hf.sequences import find_sequences

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def causal(real, window=99):
    """Which key a token attends to ``[B, 1, L, L]``, of rows with padding."""
    L = real.shape[1]
    place = torch.arange(L)
    near = (place[:, None] >= place) & (place[:, None] - place < window)
    return (near & real[:, None, :].bool())[:, None]


def added(mask):
    """The same, to be added to scores."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("real", [LEFT, LEFT.flip(1)], ids=["left", "right"])
@pytest.mark.parametrize("form", [lambda x: x, causal, lambda x: added(causal(x)), lambda x: causal(x, 2)],
                         ids=["two", "four", "added", "window"])  # fmt: skip
def test_padding_on_either_side(form, real):
    found = find_sequences(form(real), None, 5)
    assert found.mask.tolist() == real.bool().tolist()
    assert found.cu_seqlens is None
    assert found.end_in_padding == (not bool(real[:, -1].all()))


def test_of_a_call_that_goes_on_the_last_columns_count():
    assert find_sequences(LEFT, None, 4).mask.tolist() == LEFT[:, 1:].bool().tolist()
    assert find_sequences(LEFT, torch.tensor([[2], [4]]), 1) == (None, None)
    assert find_sequences(causal(LEFT)[:, :, 3:], None, 2) == (None, None)
    assert find_sequences(causal(LEFT)[:, :, 1:], None, 4).mask.tolist() == LEFT[:, 1:].bool().tolist()


def test_without_padding_there_is_no_mask():
    for mask in (None, torch.ones(2, 5), causal(torch.ones(2, 5))):
        assert find_sequences(mask, torch.arange(5)[None], 5) == (None, None)


def test_positions_of_a_padded_row_begin_once():
    positions = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
    assert find_sequences(LEFT, positions, 5).mask.tolist() == LEFT.bool().tolist()


def test_packed_sequences_by_positions_and_by_attention():
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    own = torch.tensor([0, 0, 0, 1, 2, 2])
    attention = causal(torch.ones(1, 6)) & (own[:, None] == own)
    for found in (find_sequences(None, positions, 6), find_sequences(attention, None, 6)):
        assert found.mask is None
        assert found.cu_seqlens.tolist() == [0, 3, 4, 6]


def test_packed_sequences_in_several_rows_are_refused():
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    for mask in (None, LEFT):
        with pytest.raises(ValueError, match="packed sequences must be in a batch of one row without padding"):
            find_sequences(mask, positions, 5)


def test_what_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="attention_mask must be a tensor of two or four dimensions; given dict"):
        find_sequences({"full_attention": LEFT}, None, 5)


def test_a_mask_that_others_look_at_is_found_out_once():
    """As on a GPU, where a look waits; a change in place is seen."""
    from ttt4rec.hf import sequences

    class Elsewhere(torch.Tensor):
        is_cpu = False

    mask = LEFT.clone().as_subclass(Elsewhere)
    first = find_sequences(mask, None, 5)
    assert find_sequences(mask, None, 5) is first
    assert mask in sequences._found
    mask[0] = 1
    assert find_sequences(mask, None, 5) == (None, None)
