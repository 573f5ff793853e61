"""What results are written into documents with."""

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
"""The repository's folder."""


def section(name: str) -> re.Pattern[str]:
    """What stands between a document's markers of this name."""
    return re.compile(rf"(?<=<!-- {name}:begin -->\n).*?(?=<!-- {name}:end -->)", re.DOTALL)


def number(x: float, digits: int = 3) -> str:
    """So many digits, or all before the point."""
    return f"{x:,.0f}" if x >= 10 ** (digits - 1) else f"{x:#.{digits}g}".rstrip(".")


def spread(values: Sequence[float], *, bold: bool = False) -> str:
    """Mean ± standard deviation, the latter where there are several."""
    mean = f"**{statistics.fmean(values):.4f}**" if bold else f"{statistics.fmean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"
