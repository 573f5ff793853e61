"""Batches as Hypothesis draws them."""

import torch
from hypothesis import strategies as st


@st.composite
def batches(draw, head_dims=(2, 4, 6)):
    """Shape options and where the sequences are: dense, padded or packed."""
    K, H, D = draw(st.integers(1, 5)), draw(st.integers(1, 2)), draw(st.sampled_from(head_dims))
    kind = draw(st.sampled_from(["dense", "mask", "packed"]))
    where = {}
    B, L = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    if kind == "mask":
        mask = torch.zeros(B, L, dtype=torch.bool)
        for row in mask:
            first, last = sorted(draw(st.tuples(st.integers(0, L), st.integers(0, L))))
            row[first:last] = True
        where["mask"] = mask
    elif kind == "packed":
        B = 1
        lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any))
        where["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
        L = sum(lengths)
    return {"B": B, "L": L, "H": H, "D": D, "K": K, "hidden": draw(st.integers(1, 9))}, where
