"""Presets: how small a difference of acceptance length the rows of a preset can show."""

from __future__ import annotations

import math

LEVEL, POWER = 0.95, 0.80
Z_LEVEL, Z_POWER = 1.959963984540054, 0.8416212335729143
"""Quantiles of the normal distribution at (1 + LEVEL) / 2 and at POWER."""


def smallest_difference(interval: tuple[float, float]) -> float:
    """The least true difference of two runs that a two-sided test at 5 % finds in 80 % of cases.

    (z_0.975 + z_0.80) * sqrt(2) * standard error, the minimum detectable effect of Bloom 1995,
    Evaluation Review 19:547-556, for two independent runs of the same size and spread. The standard
    error is that of the run itself: its 95 % interval is 2 * z_0.975 of them wide.
    """
    standard_error = (interval[1] - interval[0]) / (2 * Z_LEVEL)
    return (Z_LEVEL + Z_POWER) * math.sqrt(2) * standard_error


def sentence(preset: str, n_rows: int, interval: tuple[float, float] | None) -> str:
    """What a report says beside the acceptance length of a run with --preset."""
    if interval is None:
        return (
            f"Preset {preset} ({n_rows} rows): AL has no interval, so how small a difference can "
            "be found is not known."
        )
    return (
        f"Preset {preset} ({n_rows} rows): smallest difference of AL that two such runs show with "
        f"80 % power at the 5 % level: {smallest_difference(interval):.3f} (2.80 x sqrt(2) x "
        "standard error, from the 95 % interval of AL; assumes runs of one size and spread that "
        "are compared unpaired; on the same rows, paired, smaller ones show)."
    )
