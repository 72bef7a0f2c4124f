"""`splitquant plugins`: what is installed, what it brings, and what is broken."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from splitquant_plugins.cli.options import json_option
from splitquant_plugins.evaluation import tables as report

if TYPE_CHECKING:
    from splitquant_plugins.plugins import Plugins


@click.command()
@json_option
def plugins(json_path: Path | None) -> None:
    """List plugins with their splitters and backends, broken ones with the reason."""
    import warnings
    from dataclasses import asdict

    from splitquant_plugins.plugins import Plugins

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table says it
        loaded = Plugins.load()
    rows: list[dict[str, Any]] = []
    for info in loaded.infos:
        rows.append(
            {
                **asdict(info),
                "hooks": list(info.hooks),
                "splitters": [s.name for s in loaded.splitters.values() if s.plugin == info.name],
                "backends": [b.name for b in loaded.backends.values() if b.plugin == info.name],
            }
        )
    shown = [
        {
            **row,
            "brings": ", ".join(row["splitters"] + row["backends"]) or ", ".join(_short(row["hooks"])),
            "state": f"BROKEN: {row['error']}" if row["error"] else "ok",
        }
        for row in rows
    ]
    columns = [(key, key, report.text) for key in ("name", "source", "version", "brings", "state")]
    report.print_table("plugins", shown, columns)
    for row in rows:
        row["quantizers"] = [one for name in row["backends"] for one in _stock_quantizers(loaded, name)]
    stock = [one for row in rows for one in row["quantizers"]]
    if stock:
        columns = [(key, key, report.text) for key in ("backend", "quantizer", "description", "state")]
        report.print_table("stock quantizers, for compare --backend BACKEND --quantizer QUANTIZER", stock, columns)
    report.write_rows(json_path, rows)


def _stock_quantizers(plugins: Plugins, backend: str) -> list[dict[str, str]]:
    """One row for each stock quantizer of a backend; none where the backend itself cannot be loaded."""
    from splitquant_plugins.errors import SplitQuantError

    try:
        found = plugins.backend(backend).stock_quantizers()
    except SplitQuantError:
        return []  # the table of plugins says so
    return [
        {"backend": backend, "quantizer": name, "description": text, "state": found.missing.get(name, "installed")}
        for name, text in found.descriptions.items()
    ]


def _short(hooks: list[str]) -> list[str]:
    return [hook.removeprefix("splitquant_") for hook in hooks]
