"""What every benchmark needs: the machine in words, alternating timing, a table and a JSON file."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_PACKAGES = ("splitquant-plugins", "torch", "numpy", "scikit-learn")


def machine(packages: Sequence[str] = _PACKAGES) -> dict[str, Any]:
    """CPU, cores, threads and versions: what a measured time depends on."""
    import torch

    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "versions": versions,
    }


def alternate(
    first: Callable[[], object], second: Callable[[], object], runs: int
) -> tuple[tuple[float, float], float]:
    """Time two functions in turn, `runs` times each: their median seconds, and the median of first/second.

    Turns share whatever else the machine does, so the ratio is steadier than either time.
    """
    if runs < 1:
        raise ValueError(f"runs={runs}: at least one run is needed")
    pairs = [(_seconds(first), _seconds(second)) for _ in range(runs)]
    medians = statistics.median(one for one, _ in pairs), statistics.median(two for _, two in pairs)
    return medians, statistics.median(one / two for one, two in pairs)


def report(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    json_path: str | Path | None = None,
    packages: Sequence[str] = _PACKAGES,
) -> None:
    """Print rows as a table under the machine's description, and write both to `json_path`."""
    from rich.console import Console
    from rich.table import Table

    described = machine(packages)
    versions = ", ".join(f"{name} {number}" for name, number in described["versions"].items())
    caption = (
        f"{described['cpu']}, {described['cores']} cores, {described['torch_threads']} threads; "
        f"Python {described['python']}, {versions}"
    )
    table = Table(title=title, caption=caption)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    for column in columns:
        table.add_column(column, justify="right" if _is_number(rows, column) else "left")
    for row in rows:
        table.add_row(*(_shown(row.get(column)) for column in columns))
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)
    if json_path is not None:
        content = {"title": title, "machine": described, "rows": [dict(row) for row in rows]}
        Path(json_path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _is_number(rows: Sequence[Mapping[str, Any]], column: str) -> bool:
    return all(isinstance(row.get(column, 0), int | float) for row in rows)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
