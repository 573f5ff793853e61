"""Snapshots: the states of users in one file, so that a restart need not read their histories again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ttt4rec.atomic_files import checksum, remove_partials, write_tensors
from ttt4rec.layers.ttt import TTTLayer
from ttt4rec.recsys.online.events import is_text
from ttt4rec.recsys.online.user_states import UserStates

_KIND = "ttt4rec states of users, version 2"
_USERS_AT_ONCE = 256  # while these are copied, others wait
_USERS = "users"

logger = logging.getLogger(__name__)


def save_snapshot(path: str | os.PathLike[str], states: UserStates) -> int:
    """Replace a snapshot by one of the present states; others may use them meanwhile, but not save to the same path.

    It holds no users that the log has forgotten.

    Returns:
        How many users it holds.

    Raises:
        OSError: it cannot be written, or the log not be read; the old one stays whole.
    """
    everyone: list[str] = []
    tensors: dict[str, Tensor] = {}
    users = states.users()
    for start in range(0, len(users), _USERS_AT_ONCE):
        kept, part = states.export(users[start : start + _USERS_AT_ONCE])
        tensors = tensors or {name: torch.empty(len(users), *x.shape[1:], dtype=x.dtype) for name, x in part.items()}
        for name, x in part.items():
            tensors[name][len(everyone) : len(everyone) + len(kept)] = x
        everyone += kept
    tensors = {name: x[: len(everyone)] for name, x in tensors.items()}
    tensors[_USERS] = torch.from_numpy(np.frombuffer(json.dumps(everyone).encode(), np.uint8).copy())
    marks = {"kind": _KIND, "model": fingerprint(states), "checksum": checksum(tensors)}
    remove_partials(Path(path).parent, Path(path).name)  # of savers that were killed
    write_tensors(Path(path), tensors, marks)
    return len(everyone)


def load_snapshot(path: str | os.PathLike[str], states: UserStates) -> int:
    """Fill empty states from a snapshot, with the most recently used users if not all fit.

    A file that is damaged or of another model is passed over with a warning in the log of this module: every state can
    be made from the event log. A missing file is a start without a snapshot.

    Returns:
        How many users have a state now.
    """
    path = Path(path)
    if not path.exists():
        return 0
    try:
        users, tensors = _read(path, fingerprint(states))
        users = users[-states.num_slots :]
        for start in range(0, len(users), _USERS_AT_ONCE):
            stop = min(start + _USERS_AT_ONCE, len(users))
            first = len(tensors["length"]) - len(users)
            states.load(users[start:stop], {name: x[first + start : first + stop] for name, x in tensors.items()})
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:  # the latter are torch's
        reason = str(error).splitlines()[0]
        logger.warning("snapshot %s is passed over, states are made from the event log: %s", path, reason)
    return len(states.users())


def fingerprint(states: UserStates) -> str:
    """Of weights, configuration, inner rates and item ids: all that a state depends on besides the history."""
    config, tensors = states.model.config.identity(), states.model.state_dict()
    layers = [layer for layer in states.model.modules() if isinstance(layer, TTTLayer)]
    rates = [float(layer.inner_lr_scale) * layer.adapt for layer in layers]
    return hashlib.sha256(json.dumps([config, rates, states.item_ids, checksum(tensors)]).encode()).hexdigest()


def _read(path: Path, model: str) -> tuple[list[str], dict[str, Tensor]]:
    """Users and tensors; ValueError if the file is not a whole snapshot of this model's states."""
    with safe_open(path, "pt") as file:
        marks = file.metadata() or {}
        if marks.get("kind") != _KIND:
            raise ValueError("it is not a snapshot of this version")
        if marks.get("model") != model:
            raise ValueError("it belongs to another model")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if checksum(tensors) != marks.get("checksum"):
        raise ValueError("its checksum is wrong")
    users = json.loads(tensors.pop(_USERS).numpy().tobytes())
    if not (isinstance(users, list) and all(map(is_text, users)) and len(set(users)) == len(users)):
        raise ValueError("its users are not texts that all differ")
    if any(len(x) != len(users) for x in tensors.values()):
        raise ValueError(f"its tensors do not belong to its {len(users)} users")
    return users, tensors
