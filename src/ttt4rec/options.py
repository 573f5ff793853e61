"""How to train and to serve: what ``recsys`` and the command line both read.

It stands apart from ``recsys``, which needs more packages.
"""

from __future__ import annotations

import codecs
import math
from dataclasses import dataclass
from typing import Any

from .checks import check_integer, check_positive, is_number
from .fields import check_choices, choice
from .models.losses import LOSSES
from .models.presets import preset

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""What a run may be followed in."""


@dataclass(frozen=True)
class DataOptions:
    """How interactions are read.

    Attributes:
        user_field: column of user ids.
        item_field: column of item ids.
        time_field: column of times, numbers or dates.
        separator: between the fields of a text file; by default what its suffix or its first line says.
        columns: names of the columns of a text file that has no header line.
        encoding: a text file's encoding, such as latin-1.
        date_format: how dates are written, such as %m/%d/%Y %H:%M; by default as in 2024-12-31T23:59:59.
        row_order: read no times; rows stand in the order of the events.
        skip_bad_rows: the most rows to leave out because they cannot be understood.
    """

    user_field: str = "user_id"
    item_field: str = "item_id"
    time_field: str = "timestamp"
    separator: str | None = None
    columns: tuple[str, ...] = ()
    encoding: str = "utf-8"
    date_format: str | None = None
    row_order: bool = False
    skip_bad_rows: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: one is out of range.
        """
        object.__setattr__(self, "columns", tuple(self.columns or ()))
        check_integer("skip_bad_rows", self.skip_bad_rows, least=0)
        if self.separator is not None and (not self.separator or set(self.separator) & set('\r\n"')):
            raise ValueError(f"separator must be one or more characters other than quotes; given {self.separator!r}")
        try:
            "".encode(self.encoding)
            name = codecs.lookup(self.encoding).name
        except LookupError as error:
            raise ValueError(
                f"encoding must be one that Python knows, such as latin-1; given {self.encoding!r}"
            ) from error
        object.__setattr__(self, "encoding", name)

    @property
    def fields(self) -> dict[str, str]:
        """Names of the columns to read, by the options that give them."""
        names = ("user_field", "item_field") if self.row_order else ("user_field", "item_field", "time_field")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class TrainOptions:
    """How to train; the defaults are the paper's.

    Attributes:
        epochs: the most passes over the training targets.
        patience: epochs without a better validation NDCG@10 after which training stops.
        learning_rate: Adam's.
        learning_rate_warmup: steps over which the learning rate rises to its full size; 0: none.
        weight_decay: share, times the learning rate, that each step takes off weights of linear maps and items.
        average_over: share of the steps so far, the newest, over which weights are averaged; the average is what is
            validated and kept; 0: the weights themselves are.
        targets_per_batch: scored targets in one step.
        clip_norm: largest norm of all gradients together.
        inner_lr_warmup: steps over which TTT layers' inner rates rise from 0 to their full size; 0: none.
        loss: what is minimised.
        num_negatives: negatives drawn for each piece of a step, shared by its targets; by each process for its own.
        popularity: negatives are drawn in proportion to an item's training count + 1 to this power; 0: all alike.
        calibration: gBCE's t, from 0 (binary cross-entropy) to 1.
        exclude_seen: rank only targets new to the user, among items new to the user; see ``evaluate``.
        accumulate: pieces in which a step's gradients are computed, one after the other, to save memory.
        autocast: run the model in bfloat16 under autocast; weights, inner loop, scores and loss stay float32.
        deterministic: have torch use deterministic algorithms only, and raise where there is none.
        seed: of the shuffling, and with the number of processes of the dropout and the negatives; at least 0.
    """

    epochs: int = 300
    patience: int = 5
    learning_rate: float = 1e-3
    learning_rate_warmup: int = 0
    weight_decay: float = 0.0
    average_over: float = 0.0
    targets_per_batch: int = 2048
    clip_norm: float = 5.0
    inner_lr_warmup: int = 0
    loss: str = choice("softmax", LOSSES)
    num_negatives: int = 256
    popularity: float = 0.0
    calibration: float = 0.75
    exclude_seen: bool = False
    accumulate: int = 1
    autocast: bool = False
    deterministic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: one is out of range.
        """
        for name in ("epochs", "patience", "targets_per_batch", "num_negatives", "accumulate"):
            check_integer(name, getattr(self, name))
        for name in ("learning_rate_warmup", "inner_lr_warmup", "seed"):
            check_integer(name, getattr(self, name), least=0)
        for name in ("exclude_seen", "autocast", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False; given {getattr(self, name)!r}")
        check_positive("learning_rate", self.learning_rate)
        check_positive("clip_norm", self.clip_norm)
        check_choices(self)
        for name in ("popularity", "weight_decay"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and at least 0; given {value!r}")
        for name in ("average_over", "calibration"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"{name} must be from 0 to 1; given {value!r}")

    @staticmethod
    def from_preset(name: str, num_targets: int | None = None, **given: Any) -> TrainOptions:
        """The options of a preset, ``"best"``, ``"paper"`` or ``"fast"``.

        Args:
            name: one of ``models.presets.PRESETS``.
            num_targets: training targets, ``split.num_targets("train")``: small data get smaller steps; None: many.
            given: fields that are to have these values.

        Raises:
            ValueError: the preset is unknown, or a field is out of range.
        """
        return TrainOptions(**preset(name).options(num_targets, given))


PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Units of times, by name."""


@dataclass(frozen=True)
class ServeOptions:
    """How to serve a recommender over HTTP.

    Attributes:
        host: address to listen on; nobody is asked who they are, so let others in through a gateway only.
        port: to listen on; 0: any that is free.
        allowed_host: names, without port, under which requests may come, besides localhost, 127.0.0.1 and [::1]; *
            for any.
        demo: show a page at / where one takes items and watches the list follow; its events are logged like all others.
        titles: with demo, a text file with a column of item ids and one of titles; or ml-100k.
        encoding: the titles' encoding, such as latin-1.
        pool_bytes: memory for the states of users.
        time_unit: unit of the events' times, which count from 1970.
        max_ahead: seconds by which an event may lie in the future; a later one is refused; inf: none is.
        no_flush: answer before the disk has flushed an event: a failure of the power may take the last ones.
        log: PostgreSQL database of the event log, as postgresql://user@host/database, for several services on one log;
            None: a file in the folder.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_host: tuple[str, ...] = ()
    demo: bool = False
    titles: str | None = None
    encoding: str = "utf-8"
    pool_bytes: int = 1 << 30
    time_unit: str = choice("s", PER_SECOND)
    max_ahead: float = 86400.0
    no_flush: bool = False
    log: str | None = None

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ValueError: one is out of range.
        """
        check_integer("port", self.port, least=0)
        if self.port > 65535:
            raise ValueError(f"port must be at most 65535; given {self.port}")
        if self.titles is not None and not self.demo:
            raise ValueError("titles must come with demo, whose page shows them; given titles alone")
        if self.encoding != "utf-8" and self.titles is None:
            raise ValueError(f"encoding must come with the titles that it is of; given {self.encoding!r} alone")
        check_integer("pool_bytes", self.pool_bytes)
        check_choices(self)
        if not is_number(self.max_ahead) or math.isnan(self.max_ahead):
            raise ValueError(f"max_ahead must be a number of seconds; given {self.max_ahead!r}")
