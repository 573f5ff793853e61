"""Where loads find their data, told by lines of the kernels' own source."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.cycles.listing import instructions
from tools.cycles.places import functions, places
from tools.cycles.steps import Place
from ttt4rec import kernels

FOLDER = Path(kernels.__file__).parent


def at(file: str, text: str, nth: int = 0) -> tuple[str, int]:
    """The line of a kernel's file that has a text, as if it had been compiled somewhere else."""
    lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
    return f"/elsewhere/{file}", [i for i, line in enumerate(lines, 1) if text in line][nth]


LOADED = at("primitives.py", "return tl.load(pointer + elements")
STEPS = at("copies.py", "k_rows = load_rows(k,")
READING = "load_steps(k, G_kept, inner_lr"
IN_REPLAY = LOADED, STEPS, at("linear_backward.py", READING, 0)
FIRST, AGAIN = ((LOADED, STEPS, at("linear_backward.py", READING, n)) for n in (3, 4))


def places_of(*sources, name="LDG.E", copies=Place.CACHE):
    (x,) = instructions(name)
    return places([replace(x, source=source) for source in sources], copies)


def test_functions_are_those_around_a_line_and_called_in_it():
    assert functions([STEPS]) == {"load_steps", "load_rows"}
    assert functions([("/elsewhere/unknown.py", 3)]) == set()


def test_tokens_come_from_memory():
    assert places_of((LOADED, at("linear_forward.py", "k_rows = load_rows"))) == [Place.MEMORY]
    assert places_of(IN_REPLAY) == [Place.MEMORY]


@pytest.mark.parametrize("copies", [Place.CACHE, Place.MEMORY])
def test_what_the_replay_has_read_and_stored_is_where_the_copies_are(copies):
    copy = at("copies.py", "W = tl.load(weights"), at("linear_backward.py", "W, b = load_state(states")
    stored = at("copies.py", "tl.store(weights + W_place"), at("linear_backward.py", "store_state(states, number + ")
    assert places_of(FIRST, copy, copies=copies) == [copies, copies]
    assert places_of(copy[1:], copies=copies) == [copies]  # where the compiler keeps the calling line only
    assert places_of(stored, name="STG.E", copies=copies) == [copies]


def test_what_a_mini_batch_reads_again_is_near():
    assert places_of(FIRST, FIRST, AGAIN) == [Place.CACHE, Place.CACHE, Place.NEAR]


def test_chunks_of_the_state_wait_in_the_cache():
    taken = at("hidden_layer.py", "tl.load(W1"), at("mlp_forward.py", "take_chunk(state, outgoing, contiguous, place")
    assert places_of(taken) == [Place.CACHE]


@pytest.mark.parametrize("copies", [Place.CACHE, Place.MEMORY])
def test_weights_of_a_segments_mini_batch_are_where_the_copies_are(copies):
    W2 = at("segment_places.py", "return tl.load(weights + tile.head_dim"), at("segment_walk.py", "load_W2_of_slot(", 1)
    stored = at("segment_places.py", "tl.store(weights + W_at"), at("segment_replay.py", "store_weights_in_slot(slots")
    assert places_of(W2, copies=copies) == [copies]
    assert places_of(stored, name="STG.E", copies=copies) == [copies]


def test_what_ends_was_read_when_it_began():
    W1, W2 = (at("segment_walk.py", f"load_{name}_of_slot(") for name in ("W1", "W2"))
    assert places_of((W1,), (W2,), copies=Place.MEMORY) == [Place.MEMORY, Place.CACHE]


def test_what_the_kernel_before_has_made_is_in_the_cache():
    """Shares and initial weights, of which all sequences have the same."""
    made = at("mlp_forward.py", "load_of_heads(decays[0]"), at("mlp_forward.py", "take_initial(held, decays")
    assert places_of(*((line,) for line in made), copies=Place.MEMORY) == [Place.CACHE, Place.CACHE]


def test_only_global_memory_has_places():
    assert places_of((LOADED,), name="LDS") == [Place.NEAR]
