"""Progress bars, shown on a terminal or when asked for."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from tqdm import tqdm


class _Silent:
    def update(self, count: int = 1) -> None:
        """Show nothing."""


def progress_bar(*, total: int, unit: str, desc: str, enabled: bool) -> Any:
    """A tqdm bar on stderr that disappears when it is done; silent unless enabled.

    A silent one is none of tqdm's, which would take a lock and start a thread that does: a process forked at that
    moment would always wait for the lock.
    """
    return tqdm(total=total, unit=unit, desc=desc, leave=False) if enabled else nullcontext(_Silent())
