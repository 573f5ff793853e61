"""What a TTT layer remembers of a generation, in transformers' caches."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from .sequences import Sequences


class TTTCacheLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's place in a cache, with the state of its streams instead of keys and values.

    Attributes:
        state: of the streams, one a row of the batch: a ``TTTState``, or any pytree of tensors whose first dimension
            counts streams; None before the first call.
        length: tokens seen, padding included, as masks count them.
        batch_size: rows of the batch, 0 before the first call.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def advance(self, state: Any, length: int, ends_in_padding: bool) -> None:
        """Take the state behind a call over ``length`` tokens."""
        self.length += length
        self._ends_in_padding = ends_in_padding
        self._take(state)

    def check_goes_on(self) -> None:
        """Raise unless the next token of each row follows a token.

        Raises:
            ValueError: a row ended in padding, whose predictions are none.
        """
        if self._ends_in_padding:
            raise ValueError("attention_mask must pad on the left where a cache goes on; given padding on the right")

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what a mask for ``query_length`` new tokens covers."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers 5.6

    def reset(self) -> None:
        """Forget all streams."""
        self.state: Any = None
        self.length = self.batch_size = 0
        self._ends_in_padding = False
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each beam the state of the one that it continues."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row ``repeats`` times."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, given by their indices or by a mask."""
        self._map(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Raise, unless nothing is to be removed.

        Raises:
            ValueError: tokens are to be removed; a state does not tell what it was before them.
        """
        if tokens_to_remove:
            raise ValueError(
                "a TTT state cannot give back tokens, so that assisted generation and other ways that try tokens "
                f"out are not for it; asked to remove {abs(tokens_to_remove)}"
            )

    def offload(self) -> None:
        """Do nothing: a state is small."""

    def prefetch(self) -> None:
        """Do nothing, as ``offload``."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raise: there are no keys and values."""
        raise TypeError("a TTT layer's place in a cache holds no keys and values; another layer writes to it")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise: there are no keys and values."""
        self.lazy_initialization(key_states, value_states)
        raise AssertionError("unreachable")

    def _map(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self._take(_pytree.tree_map_only(Tensor, function, self.state))

    def _take(self, state: Any) -> None:
        self.state, self.is_initialized = state, True
        self.batch_size = _pytree.tree_leaves(state)[0].shape[0]


class TTTCache(DynamicCache):  # type: ignore[misc]
    """A cache of states for ``num_layers`` TTT layers, for models that have no other.

    ``generate`` needs none to be made: in the cache that it makes by itself, TTT layers take their places.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.layers = [TTTCacheLayer() for _ in range(num_layers)]


def place_of(cache: Cache, layer_idx: int) -> TTTCacheLayer:
    """A TTT layer's place in a cache, made at its first use.

    Raises:
        ValueError: the cache is no dynamic one, or other keys and values stand in the place.
    """
    layers: list[Any] = getattr(cache, "layers", [])
    if not isinstance(cache, Cache) or not all(isinstance(x, DynamicLayer | TTTCacheLayer) for x in layers):
        raise ValueError(
            f"cache must be a DynamicCache or TTTCache, whose places TTT layers can take; given {type(cache).__name__}"
        )
    while len(layers) <= layer_idx:
        layers.append(TTTCacheLayer() if len(layers) == layer_idx else DynamicLayer())
    if not isinstance(layers[layer_idx], TTTCacheLayer):
        if layers[layer_idx].get_seq_length():
            raise ValueError(f"cache must be of the model that reads it; given keys and values for layer {layer_idx}")
        layers[layer_idx] = TTTCacheLayer()
    place: TTTCacheLayer = layers[layer_idx]
    return place


def read_on(module: Callable[..., Any], x: Tensor, sequences: Sequences, place: TTTCacheLayer | None) -> Tensor:
    """What a layer or block makes of x ``[B, L, width]``; it goes on from the state in its place, and leaves the next.

    Raises:
        ValueError: the place cannot go on, or sequences are packed.
    """
    mask, cu_seqlens = sequences
    if place is None:
        y: Tensor = module(x, mask=mask, cu_seqlens=cu_seqlens)
        return y
    if cu_seqlens is not None:
        raise ValueError("packed sequences leave no state to go on from; give use_cache=False")
    place.check_goes_on()
    y, state = module(x, mask=mask, state=place.state, return_state=True)
    place.advance(state, x.shape[1], sequences.end_in_padding)
    return y
