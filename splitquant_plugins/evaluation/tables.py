"""Tables for people and JSON for programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitquant_plugins.checkpoints.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

Column = tuple[str, str, Callable[[Any], str]]


def percent(value: float | None) -> str:
    """A fraction as a percentage with two decimals; nothing for None."""
    return "" if value is None else f"{100 * value:.2f} %"


def decibel(value: float | None) -> str:
    """Decibels with one decimal; nothing for None."""
    return "" if value is None else f"{value:.1f}"


def kilobytes(value: int) -> str:
    """Bytes as kilobytes of 1000."""
    return f"{value / 1000:,.0f}"


def two_decimals(value: float | None) -> str:
    """A number with two decimals; nothing for None."""
    return "" if value is None else f"{value:.2f}"


def whole(value: float | None) -> str:
    """A number without decimals; nothing for None."""
    return "" if value is None else f"{value:.0f}"


def number(value: float | None) -> str:
    """A number with three digits; nothing for None."""
    return "" if value is None else f"{value:.3g}"


def text(value: object) -> str:
    """A value as it prints; nothing for None."""
    return "" if value is None else str(value)


COMPARE_COLUMNS: tuple[Column, ...] = (
    ("backend", "backend", text),
    ("weights", "weights", text),
    ("granularity", "grid", text),
    ("scheme", "scheme", text),
    ("split", "split", text),
    ("k", "k", text),
    ("method", "method", text),
    ("accuracy", "accuracy", percent),
    ("agreement", "agreement", percent),
    ("logit_sqnr_db", "logit dB", decibel),
    ("weight_sqnr_db", "weight dB", decibel),
    ("linear_bits_per_weight", "bits/weight", two_decimals),
    ("linear_disk_bits_per_weight", "on disk", two_decimals),
    ("linear_bytes", "Linear kB", kilobytes),
    ("model_bytes", "model kB", kilobytes),
    ("split_seconds", "split s", two_decimals),
    ("quantize_seconds", "quantize s", two_decimals),
    ("peak_mb", "peak MB", whole),
)

# What stands in the place of the accuracy in a table of language models.
LANGUAGE_COLUMNS: tuple[Column, ...] = (("perplexity", "perplexity", number), ("kl", "KL", number))


def compare_columns(measures: Sequence[str]) -> tuple[Column, ...]:
    """Return the columns of a comparison of models of a kind that has these measures."""
    if "perplexity" not in measures:
        return COMPARE_COLUMNS
    place = [key for key, *_ in COMPARE_COLUMNS].index("accuracy")
    return (*COMPARE_COLUMNS[:place], *LANGUAGE_COLUMNS, *COMPARE_COLUMNS[place + 1 :])


def print_table(
    title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], console: Console | None = None
) -> None:
    """Print rows as a table with the columns chosen."""
    from rich.console import Console
    from rich.markup import escape  # names of layers and files are no markup
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for _, heading, show in columns:
        table.add_column(heading, justify="left" if show is text else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(show(row[key])) for key, _, show in columns))
    console = console or Console()
    if not console.is_terminal and not os.environ.get("COLUMNS"):  # a pipe or a file has no width to fit into
        console = Console(width=200, file=console.file)
    console.print(table)


def write_rows(path: str | Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON where a path is given."""
    if path is not None:
        write_json(Path(path), list(rows))
