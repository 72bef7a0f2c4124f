"""Why no pass is attached to the other configurations of INC 3.10, by class name."""

from __future__ import annotations

NOT_TRIED = "it was not tried with split layers"

REASONS = {
    "TEQConfig": (
        "INC's TEQ makes codes of 4 bits whatever bits= says, finds no layers by itself in models of transformers 5, "
        "and scales parts off the grid that they were made for; use RTNConfig"
    ),
    "SmoothQuantConfig": "INC's SmoothQuant needs intel_extension_for_pytorch; use StaticQuantConfig",
    "MixedPrecisionConfig": "it casts to 16-bit floats, and rounds nothing that a split could help",
}


def reason_against(kind: str) -> str:
    """Return why a configuration of that class takes no pass."""
    return REASONS.get(kind, NOT_TRIED)
