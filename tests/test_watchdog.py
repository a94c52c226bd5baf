"""The watchdog's clock: what is silence of the engine, and what is none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from speedbench.watchdog import Watchdog


class Loop:
    """A loop of which nothing comes."""

    n_tokens = n_done = 0

    def __init__(self, n_in_flight: int) -> None:
        self.n_in_flight = n_in_flight

    def overlong(self) -> str | None:
        return None


@pytest.mark.parametrize(("n_in_flight", "stalled"), [(0, False), (1, True)])
def test_an_engine_that_was_asked_nothing_is_not_silent(
    tmp_path: Path, n_in_flight: int, stalled: bool
) -> None:
    """Between the arrivals of an open loop nothing is in flight, for as long as it takes."""
    dog = Watchdog(
        Loop(n_in_flight), 0.05, stacks=tmp_path / "stalls" / "0.txt", stop=lambda: None,
        abandon=lambda _dog: None,
    )  # fmt: skip
    with dog:
        until_s = time.monotonic() + (30 if stalled else 1)
        while not dog.fault and time.monotonic() < until_s:
            time.sleep(0.01)
    assert dog.stalled is stalled
