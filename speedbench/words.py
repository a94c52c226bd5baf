"""What a sentence about a fault is made of: an exception in a line, a near name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


def first_line(error: BaseException) -> str:
    """The informative line of an exception; pydantic puts it third, below the field's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in lines:
        if line.startswith("Value error, "):
            return line.removeprefix("Value error, ").split(" [type=")[0]
    if len(lines) > 2 and re.match(r"\d+ validation errors? for ", lines[0]):
        return f"{lines[1]}: {lines[2].split(' [type=')[0]}"
    return lines[0] if lines else type(error).__name__


def like(name: str, known: Iterable[str], otherwise: str = "see its documentation") -> str:
    """How a sentence about an unknown name goes on: the names it resembles, whatever their case,
    or `otherwise`."""
    spelled = {one.lower(): one for one in sorted(known)}
    close = [spelled[one] for one in difflib.get_close_matches(name.lower(), spelled, 3)]
    return f": did you mean {' or '.join(close)}?" if close else f": {otherwise}"
