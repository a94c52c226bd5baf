"""What the garbage collector does while a loop runs, and afterwards."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator

import pytest

from speedbench.collector import SWITCH_S, YOUNGEST, kept_short


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    thresholds, switch_s = gc.get_threshold(), sys.getswitchinterval()
    assert gc.get_freeze_count() == 0
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    sys.setswitchinterval(switch_s)


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_all_is_as_before_afterwards_also_after_an_error() -> None:
    before = gc.get_threshold(), round(sys.getswitchinterval(), 6), gc.get_freeze_count()
    inside = []

    def fails() -> None:
        inside.append((gc.get_threshold()[0], gc.get_freeze_count() > 1000))
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        raise KeyError

    with pytest.raises(KeyError), kept_short():
        fails()
    assert inside == [(YOUNGEST, True)]
    assert (gc.get_threshold(), round(sys.getswitchinterval(), 6), gc.get_freeze_count()) == before


def test_cycles_made_inside_are_collected_inside() -> None:
    with kept_short():
        seen = weakref.ref(Node())
        assert seen() is not None
        gc.collect()
        assert seen() is None


def test_what_someone_else_set_aside_stays_so() -> None:
    gc.freeze()
    with kept_short():
        pass
    assert gc.get_freeze_count() > 0


def test_a_collector_that_is_less_eager_stays_so() -> None:
    gc.set_threshold(10 * YOUNGEST, 7, 5)
    with kept_short():
        assert gc.get_threshold() == (10 * YOUNGEST, 7, 5)
