"""Fields of dataclasses that say themselves what they may be: checks and the command line follow from them."""

import dataclasses
import inspect
import re
from collections.abc import Collection
from typing import Any

from .checks import check_choice


def choice(default: str, among: Collection[str]) -> Any:
    """A field whose value is one of some names; of a registry, also those that are added to it later."""
    return dataclasses.field(default=default, metadata={"choices": among})


def choices(field: dataclasses.Field[Any]) -> Collection[str] | None:
    """What a field's value may be, as given to ``choice``; None for other fields."""
    among: Collection[str] | None = field.metadata.get("choices")
    return among


def check_choices(settings: Any) -> None:
    """Raise ValueError unless every field of a dataclass that is a choice is one of what it may be."""
    for field in dataclasses.fields(settings):
        if (among := choices(field)) is not None:
            check_choice(field.name, getattr(settings, field.name), among)


def descriptions(settings: type[Any]) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields under ``Attributes:``, each on one line, without markup."""
    _, _, section = (inspect.getdoc(settings) or "").partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(text.replace("``", "").split()).rstrip(".") for name, text in found}
