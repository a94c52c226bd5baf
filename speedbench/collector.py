"""The garbage collector, kept out of the way while a loop measures."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator

YOUNGEST = 50_000
"""Objects that may be new before it looks at them (Python's own: 700). A poll of 4,096 requests
makes twice as many, which all end before the next poll: with Python's own number it looks at each
of them, and now and then at everything an engine has loaded."""

SWITCH_S = 0.0001
"""How long another thread (the store's, an engine's) may keep the interpreter from the one that
polls (Python's own: 5 ms, half a step of a fast engine)."""


@contextlib.contextmanager
def kept_short() -> Iterator[None]:
    """Inside, a collection only sees what was made inside, and threads take turns more often.

    Cycles made inside are still collected. What was there before is set aside (gc.freeze), so that
    a full collection does not walk through the modules and models of the process, which takes from
    tenths of a second to seconds; it is given back at the end, unless someone else had set objects
    aside before.
    """
    thresholds, switch_s = gc.get_threshold(), sys.getswitchinterval()
    others = gc.get_freeze_count()
    gc.freeze()
    gc.set_threshold(max(YOUNGEST, thresholds[0]), *thresholds[1:])
    sys.setswitchinterval(min(SWITCH_S, switch_s))
    try:
        yield
    finally:
        sys.setswitchinterval(switch_s)
        gc.set_threshold(*thresholds)
        if not others:
            gc.unfreeze()
