"""Limits on the times of a request, as a user writes them: 'ttft=200ms,step_time=30ms'."""

from __future__ import annotations

import re
from collections.abc import Mapping

LIMITED: Mapping[str, str] = {
    "ttft": "time to the first token",
    "step_time": "mean time of a decode step",
    "tpot": "mean time per token after the first",
    "e2e": "time to the last token",
}
"""What of a request may be limited."""

_LIMIT = re.compile(r"\s*([a-z0-9_]+)\s*=\s*(\d+(?:\.\d+)?|\.\d+)\s*(ms|s)\s*")


def parse_limits(text: str) -> dict[str, float]:
    """'ttft=200ms,step_time=30ms' -> seconds by name. Raises ValueError, one sentence."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        match = _LIMIT.fullmatch(part.lower())
        if match is None or match[1] not in LIMITED:
            raise ValueError(
                f"--goodput is '{text}': expected limits such as ttft=200ms,step_time=30ms, of "
                f"{', '.join(LIMITED)}"
            )
        if match[1] in limits:
            raise ValueError(f"--goodput is '{text}': {match[1]} is limited twice, name one limit")
        limits[match[1]] = float(match[2]) * (1e-3 if match[3] == "ms" else 1.0)
        if limits[match[1]] <= 0:
            raise ValueError(f"--goodput is '{text}': a limit of 0 is never met, name a longer one")
    return limits
