"""What every command shares: exit codes, how flags are read, what a signal does."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from speedbench.types import UserError
from speedbench.words import like

OK, FAILED, USAGE, INTERRUPTED, PREEMPTED, TERMINATED = 0, 1, 2, 130, 138, 143
"""Exit codes: measured; the engine died or nothing could be measured; the user can mend it;
Ctrl-C; SIGUSR1, by which a batch system tells that time is up; SIGTERM. After the last three what
was measured is stored, and --resume goes on."""


class Parser(argparse.ArgumentParser):
    """Errors are one sentence, and both --two_words and --two-words are understood."""

    def error(self, message: str) -> NoReturn:
        _, is_unknown, words = message.partition("unrecognized arguments: ")
        flag = next((word for word in words.split() if word.startswith("--")), "")
        if is_unknown and flag:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            flag = flag.partition("=")[0]
            raise UserError(f"there is no {flag}{like(flag, known, 'see --help')}")
        raise UserError(f"{message}: see --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        return self.parse_args([underscored(word) for word in argv])


def underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


class Signals:
    """Ctrl-C, SIGTERM, SIGUSR1: the first ends a measurement in order, the next at once.

    SIGUSR1 is a notice, which srun and mpirun may both pass on: it never ends anything at once
    that is measuring.
    """

    def __init__(self, loud: bool = True) -> None:
        self.received: int | None = None
        self._loud = loud
        self._held_back = False
        self._graceful = False
        self._raised: SystemExit | None = None
        self._alarm: Any = None  # who had SIGALRM, while it is needed here

    def handle(self, number: int, _frame: FrameType | None) -> None:
        again = self.received is not None
        if again and number == signal.SIGUSR1:
            return
        self.received = number
        name = signal.Signals(number).name
        noted = number == signal.SIGUSR1 and self._held_back and not self._graceful
        if noted:
            return
        if again or not self._graceful:
            self._say(f"ended by {name}")
            self._raise()
        self._say("stopping; once more ends it at once")

    def _raise(self, *_: object) -> NoReturn:
        self.calm()
        # Not KeyboardInterrupt: vLLM swallows that one.
        self._raised = SystemExit(128 + (self.received or 0))
        raise self._raised

    def dropped(self, what: sys.UnraisableHookArgs) -> bool:
        """Python drops what is raised in a destructor or a weak reference's callback. If that was
        how a signal ends the process, it is raised again when the callback is over."""
        if self._raised is None or what.exc_value is not self._raised:
            return False
        self._alarm = signal.signal(signal.SIGALRM, self._raise)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        return True

    def calm(self) -> bool:
        """Whether something was still to be raised again; it no longer is."""
        if self._alarm is None:
            return False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._alarm)
        self._alarm = None
        return True

    def _say(self, text: str) -> None:
        if self._loud:
            print(f"\nspeedbench: {text}", file=sys.stderr)

    def why(self) -> str | None:
        return (
            None if self.received is None else f"{signal.Signals(self.received).name} was received"
        )

    @contextmanager
    def graceful(self) -> Iterator[None]:
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """While an engine starts, and from then on: SIGUSR1 is only noted, and ends the measurement
        in order. The processes that are started inherit that it is blocked, so that a notice to
        every process of a job ends none of them."""
        self._held_back = True
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


@contextmanager
def signals_handled(loud: bool = True) -> Iterator[Signals]:
    """Handle them inside the block; an exit before or after measuring is clean."""
    signals = Signals(loud)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {n: signal.signal(n, signals.handle) for n in numbers}
    hook = sys.unraisablehook
    sys.unraisablehook = lambda what: None if signals.dropped(what) else hook(what)
    try:
        yield signals
    finally:
        sys.unraisablehook = hook
        pending = signals.calm()
        for number, handler in before.items():
            signal.signal(number, handler)
        if pending:
            raise SystemExit(128 + (signals.received or 0))


def numbers(flag: str, text: str) -> list[int]:
    """'1,8,64' -> [1, 8, 64]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{flag} is '{text}': expected whole numbers from 1, comma-separated")
    return numbers


def warn_of_foreign_code(is_run: bool) -> None:
    """Said before anything is loaded: what follows runs what others wrote."""
    if is_run:
        print(
            "warning: --trust_remote_code runs code that ships with the checkpoint, with your "
            "rights on this machine",
            file=sys.stderr,
        )
