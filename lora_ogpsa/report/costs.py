"""Where time and memory went, as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping

from lora_ogpsa.report.model import Arm

_KINDS = {
    "preparation": "preparing data and references",
    "training": "training",
    "reference_passes": "reference passes",
    "projection": "projection",
}
_MEMORY = {
    "training": "memory at the peak of training",
    "reference_passes": "memory at the peak of reference passes",
    "projection": "memory at the peak of projection",
    "process": "memory of the process at its peak",
}


def cost_rows(arms: list[Arm]) -> list[list[str]]:
    """Seconds by kind and peaks of memory, a column for each arm; empty if nothing is known."""
    known = [arm for arm in arms if arm.stages]
    rows = []
    for kind, title in _KINDS.items():
        if any(kind in arm.times for arm in known):
            rows.append([title, *(_seconds(arm.times.get(kind)) for arm in known)])
    for kind, title in _MEMORY.items():
        peaks = [_peak(arm, kind) for arm in known]
        if any(peaks):
            rows.append([title, *(f"{peak / 1e9:.2f} GB" if peak else "" for peak in peaks)])
    return rows


def stage_seconds(records: list[Mapping[str, float]]) -> dict[str, float]:
    """Seconds of several stages, added up by kind."""
    found: dict[str, float] = {}
    for record in records:
        for kind, value in record.items():
            found[kind] = found.get(kind, 0.0) + value
    return found


def _seconds(value: float | None) -> str:
    if value is None:
        return "part of training"
    return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"


def _peak(arm: Arm, kind: str) -> int:
    return max((stage.record.get("peak_bytes", {}).get(kind, 0) for stage in arm.stages), default=0)
