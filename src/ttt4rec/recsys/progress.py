"""Progress bars, shown on a terminal or when asked for."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


def progress_bar(*, total: int, unit: str, desc: str, enabled: bool) -> Any:
    """A tqdm bar on stderr that disappears when it is done; silent unless enabled."""
    return tqdm(total=total, unit=unit, desc=desc, leave=False, disable=not enabled)
