"""What is written to stderr while an engine starts: the cause of a failed start is often told there
only, by a process of the engine."""

from __future__ import annotations

import contextlib
import os
import re
import threading

KEPT_BYTES = 1 << 16
LAST_WORDS_S = 1.0
"""So long is waited where another process (Python's resource tracker) keeps the pipe open."""

_EXCEPTION = re.compile(r"(?:^|\s)(?:[\w.]+\.)?(\w*(?:Error|Exception)\w*): (.+)$")
_SECOND_HAND = re.compile(r"root cause|initialization failed|background process", re.IGNORECASE)


class Overheard:
    """Copies stderr, of this process and of those started meanwhile, on its way to the terminal.

    Processes started inside the `with` block keep writing through the copy until they end, so the
    copying thread lives as long as they do; it sleeps unless something is written.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._terminal = -1
        self._copier: threading.Thread | None = None

    def __enter__(self) -> Overheard:
        try:
            self._terminal = os.dup(2)
        except OSError:  # no stderr at all: nothing to overhear
            return self
        source, sink = os.pipe()
        os.dup2(sink, 2)
        os.close(sink)
        copy = os.dup(self._terminal)
        self._copier = threading.Thread(target=self._copy, args=(source, copy), daemon=True)
        self._copier.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal >= 0:
            os.dup2(self._terminal, 2)
            os.close(self._terminal)

    def _copy(self, source: int, terminal: int) -> None:
        with contextlib.suppress(OSError):
            while chunk := os.read(source, 1 << 14):
                self._tail = (self._tail + chunk)[-KEPT_BYTES:]
                with contextlib.suppress(OSError):
                    os.write(terminal, chunk)
        os.close(source)
        os.close(terminal)

    def cause(self) -> str | None:
        """The last exception that was written and is not a report of another one.

        To be asked when the engine's processes are gone: waits for their last words.
        """
        if self._copier is not None:
            self._copier.join(LAST_WORDS_S)
        return cause_in(self._tail.decode(errors="replace"))


def cause_in(text: str) -> str | None:
    """The last exception in a log that names its own cause, without its class; None if none."""
    found = None
    for line in text.splitlines():
        match = _EXCEPTION.search(line.strip())
        if match and not _SECOND_HAND.search(match[2]):
            found = match[2] if match[1] not in ("KeyError", "AssertionError") else match[0].strip()
    return found
