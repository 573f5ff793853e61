"""Settings of a run: read from a file, and those among them that would have no effect."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .models.losses import LOSSES
from .models.mixers import MIXERS
from .models.presets import PRESETS
from .options import DataOptions

_OF_THE_FRAME = ("width", "num_heads", "max_len", "times")
"""Fields of the model that count with every mixer."""
_OF_NEGATIVES = ("num_negatives", "popularity")
_OF_TEXT = ("separator", "columns", "encoding")


def read_settings(path: Path) -> tuple[dict[str, Any], bool]:
    """Settings by name, and whether they are the whole record of a run, ``run.json``, and not what somebody chose.

    Names may have ``-`` for ``_``. What is null is left out.

    Args:
        path: a file that ends in ``.json`` or, from Python 3.11 on, ``.toml``.

    Raises:
        ValueError: it is neither, holds no settings, or one twice.
        OSError: it cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in (".json", ".toml"):
        raise ValueError(f"--config must be a .json or .toml file; given {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"--config must be a file; given {str(path)!r}, where there is none")
    try:
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, object_pairs_hook=_once) if suffix == ".json" else _toml(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must hold {suffix[1:].upper()}; given what cannot be read ({error})") from error
    is_record = isinstance(content, dict) and isinstance(content.get("settings"), dict)
    settings = content["settings"] if is_record else content
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold options by name; given {type(settings).__name__}")
    named = [(name.replace("-", "_"), x) for name, x in settings.items()]
    try:
        return {name: x for name, x in _once(named).items() if x is not None}, is_record
    except ValueError as error:
        raise ValueError(f"{path} must hold each option once; given {error}") from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} twice")
    return found


def _toml(text: str) -> Any:
    if sys.version_info < (3, 11):
        raise ValueError("TOML needs Python 3.11 or newer: write JSON")
    import tomllib

    return tomllib.loads(text)


def check_effects(given: Collection[str], settings: Mapping[str, Any], data_sets: Collection[str] = ()) -> None:
    """Refuse what was given and would have no effect with the other settings.

    Args:
        given: names of the settings that somebody chose.
        settings: all of them, by name.
        data_sets: names of data, which are read in one way.

    Raises:
        ValueError: some have no effect; all of them are named.
    """
    found = [f"--{name.replace('_', '-')} with {why}" for name, why in _idle(settings, data_sets) if name in given]
    if found:
        raise ValueError(f"options must have an effect; given {', '.join(found)}: leave it out or change the other")


def _idle(settings: Mapping[str, Any], data_sets: Collection[str]) -> Iterator[tuple[str, str]]:
    """Names of settings without an effect, and what takes it from them."""
    mixer, loss = settings["mixer"], settings["loss"]
    of_any = {name for kind in MIXERS.values() for name in kind.options}
    for name in sorted(of_any - {*MIXERS[mixer].options, *_OF_THE_FRAME}):
        yield name, f"--mixer {mixer}"
    if MIXERS[mixer].causal:
        yield "hide_rate", f"--mixer {mixer}"
    if settings["ffn"] == "none":
        yield "ffn_width", "--ffn none"
    if LOSSES[loss].compute is None:
        yield from ((name, f"--loss {loss}") for name in _OF_NEGATIVES)
    if not LOSSES[loss].calibrated:
        yield "calibration", f"--loss {loss}"
    if settings["split_by"] == "last":
        yield "split", "--split-by last"
    if settings["item_features"] is None:
        yield "feature_columns", "no --item-features"
    if settings["row_order"]:
        yield from ((name, "--row-order") for name in ("time_field", "date_format", "times"))
    of_features = _of_features(settings["item_features"])
    if settings["data"] in data_sets:
        names = [field.name for field in dataclasses.fields(DataOptions) if field.name not in of_features]
        yield from ((name, f"the data {settings['data']}") for name in names)
    elif _is_parquet(settings["data"]):
        yield from ((name, "a Parquet file") for name in _OF_TEXT if name not in of_features)


def _of_features(file: str | None) -> tuple[str, ...]:
    """Options of the data that say how a file of items' features is read too."""
    if file is None:
        return ()
    return ("item_field",) if _is_parquet(file) else ("item_field", "encoding")


def _is_parquet(file: object) -> bool:
    return str(file).lower().endswith(".parquet")


def of_preset(given: Collection[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, with what the preset that they name says of training where nothing else was given."""
    preset = settings["preset"]
    training = {} if preset is None else PRESETS[preset].training
    return {**settings, **{name: x for name, x in training.items() if name not in given}}
