"""What every command that measures does: find its launch, start engines, measure one run on one.

It prints, to stderr.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from speedbench import processes
from speedbench.cli_base import FAILED, Signals
from speedbench.guardian import Guard
from speedbench.types import UserError

if TYPE_CHECKING:  # imported where needed, so that --help answers at once
    from speedbench.config import RunConfig
    from speedbench.inputs import Prepared
    from speedbench.launch import Launch
    from speedbench.replicas import Replicas
    from speedbench.session import Outcome, Place
    from speedbench.share import Progress
    from speedbench.target import Target
    from speedbench.types import Engine


CLOSE_S = 60.0
"""How long an engine may take to end."""


class Start(NamedTuple):
    """How this process was started, and beside which others.

    url  where what is written ends up, if that is no folder of this machine
    """

    launch: Launch
    replicas: Replicas
    place: Place
    guard: Guard
    url: str = ""

    def shown(self, directory: Path) -> str:
        """What the user calls the folder that is written."""
        return self.url or str(directory)


class Destination(NamedTuple):
    """Where a command is told to write: --save_dir, a path or a URL, and whether what is there is
    continued."""

    save_dir: str | None
    resume: bool

    @property
    def url(self) -> str:
        """'' where it is a folder of this machine."""
        from speedbench import remote

        return self.save_dir if self.save_dir and remote.is_url(self.save_dir) else ""

    def local(self) -> str | None:
        """Where it is written on this machine."""
        from speedbench import remote

        return None if self.save_dir is None else str(remote.local_path(self.save_dir))


@contextmanager
def mirrored(destination: Destination, replicas: Replicas) -> Iterator[Callable[[], bool]]:
    """While a command writes: replica 0 puts it behind the URL, too, where --save_dir is one. What
    it yields tells, afterwards, whether everything is there."""
    from speedbench import remote

    if destination.save_dir is None or not remote.is_url(destination.save_dir):
        yield lambda: True
        return
    from speedbench.mirror_process import Mirroring
    from speedbench.mirror_process import mirrored as following

    def tell(text: str) -> None:
        print(f"speedbench: {text}", file=sys.stderr, flush=True)

    with ExitStack() as held:

        def begin() -> Mirroring:
            if not replicas.is_first:
                return Mirroring()
            return held.enter_context(
                following(destination.save_dir, resume=destination.resume, tell=tell)
            )

        state = replicas.agree(begin)
        yield lambda: state.is_whole


def launch_of_process() -> Launch:
    from speedbench import launch

    return launch.of_environment(os.environ)


def is_silent_replica() -> bool:
    """Whether replica 0 says what this process would say, too."""
    launched = launch_of_process()
    return launched.n_replicas > 1 and launched.rank > 0


def settle(launched: Launch) -> Place:
    """Take the CPUs that this process may use, and say so if the launcher had bound it to fewer."""
    from speedbench import launch
    from speedbench.session import Place

    launch.prepare_environment(launched, os.environ)
    _speak_when_killed()
    cpus = launch.unbind(launched)
    if cpus.n != cpus.n_given and launched.rank == 0:
        share = f", its share among {launched.local_size} ranks" if launched.local_size > 1 else ""
        print(
            f"speedbench: {launched.launcher} bound this process to {cpus.n_given} CPU(s); it and "
            f"its engine use {cpus.n} now{share}",
            file=sys.stderr,
        )
    return Place(launched.launcher, cpus.n_given, cpus.n)


def _speak_when_killed() -> None:
    """Let this process and those it starts print where they are when a fault, or we, end them."""
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")
    with suppress(AttributeError, OSError, ValueError):  # stderr may be no file
        if not faulthandler.is_enabled():
            faulthandler.enable(sys.__stderr__)  # type: ignore[arg-type]


def refuse_replicas(config: RunConfig, replicas: Replicas) -> None:
    import engines

    if replicas.size > 1 and engines.adapter(config.engine).owns_ranks:
        raise UserError(
            f"{config.engine} starts MPI ranks of its own and cannot be one of {replicas.size} "
            "replicas: start jobs of one process each (mpirun -n 1) with --shard r/R and a "
            "--save_dir of its own, then `speedbench report --merge DIR DIR ...`"
        )


def refuse_other_prompts(fingerprints: Sequence[str]) -> None:
    from speedbench.replicas import AgreedError

    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise AgreedError(
                f"the prompts differ: their fingerprint is {fingerprints[0][:12]} in replica 0 and "
                f"{fingerprint[:12]} in replica {rank}; give every host the same dataset and "
                "tokenizer"
            )


def with_own_devices(configs: Sequence[RunConfig], start: Start) -> Start:
    """Before the engine is imported: this replica's share of the host's GPUs, enough for every
    configuration that it will measure."""
    from speedbench import launch

    if all(config.engine == "NULL" for config in configs):
        return start
    n_gpus = max(config.n_gpus for config in configs)
    own = start.replicas.agree(lambda: launch.own_devices(start.launch, n_gpus, os.environ))
    if own is None:
        return start
    os.environ["CUDA_VISIBLE_DEVICES"] = own
    return start._replace(place=replace(start.place, devices=own))


def start_engines(config: RunConfig, start: Start) -> tuple[Engine | None, str]:
    """This replica's engine, or why it did not start while another's did."""
    if start.replicas.size == 1:
        return start_engine(config, start.launch), ""
    from speedbench.replicas import AgreedError

    engine, fault = None, ""
    try:
        engine = start_engine(config, start.launch)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other replicas can measure
        fault = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    faults = start.replicas.exchange(fault)
    if all(faults):
        raise AgreedError(faults[0])
    for rank, sentence in enumerate(faults):
        if sentence and start.replicas.is_first:
            print(
                f"speedbench: replica {rank} did not start, the others measure their shares: "
                f"{sentence}",
                file=sys.stderr,
            )
    return engine, fault


def measure(
    config: RunConfig,
    prepared: Prepared,
    engine: Engine | None,
    target: Target,
    signals: Signals,
    start: Start,
    fault: str,
) -> Outcome:
    from speedbench import environment, session
    from speedbench.share import Progress

    progress = Progress()
    wanted = start.replicas.is_first and config.show_progress is not False
    with showing(progress, target.directory, wanted), signals.graceful():
        return session.measure(
            config,
            prepared,
            engine,
            target,
            argv=environment.command_line(),
            stop=signals.why,
            progress=progress,
            replicas=start.replicas,
            place=start.place,
            fault=fault,
            guard=start.guard,
            abandon=lambda outcome: _abandon(outcome, target.directory, signals),
        )


def _abandon(outcome: Outcome, directory: Path, signals: Signals) -> NoReturn:
    """The end of a process whose engine hangs in it."""
    stored = f"What was measured is stored: speedbench report {directory}, and --resume"
    print(
        f"\nspeedbench: {outcome.end.message}; the engine cannot be left, so this process ends. "
        f"{outcome.not_stored or stored}",
        file=sys.stderr,
    )
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(FAILED if signals.received is None else 128 + signals.received)


def close_engine(engine: Engine) -> None:
    """End the engine; one that does not end in time is killed."""

    def kill() -> None:
        found = processes.of_engine()
        processes.kill([(process, processes.started(process)) for process in found])

    timer = threading.Timer(CLOSE_S, kill)
    timer.daemon = True
    timer.start()
    try:
        engine.close()
    finally:
        timer.cancel()


def start_engine(config: RunConfig, launched: Launch) -> Engine:
    """Start the engine that a configuration names. Raises UserError."""
    import engines
    from speedbench import launch

    settings = config.engine_settings()
    nodes = launch.node_arguments(launched, engines.adapter(config.engine).node_args)
    if nodes:
        settings = replace(settings, engine_args={**settings.engine_args, **nodes})
    if launched.node_rank == 0:
        launch.hold_nodes(launched)
    return engines.adapter(config.engine)(settings)


def has_failed(outcome: Outcome) -> bool:
    """Whether a run ended by a fault, or measured nothing but failures."""
    return outcome.end.reason in ("engine died", "stalled", "crashed") or (
        outcome.n_failed > 0 and outcome.n_failed == outcome.n_committed
    )


def not_repeatable(was: str | None, now: str) -> str:
    return (
        f"--config cannot be repeated: its prompts had the fingerprint {str(was)[:12]}, they have "
        f"{now[:12]} now; restore the dataset and the tokenizer, or type the flags out to measure "
        "something new"
    )


def try_known_answer(config: RunConfig, prepared: Prepared, directory: Path) -> None:
    """For a calibration checkpoint: hold the records against the closed form, and store that."""
    if config.model_dir is None or config.engine == "NULL" or config.endpoint == "chat":
        return  # of a chat the prompts are the server's
    from speedbench import calibrate, store

    try:
        found = calibrate.known_answer(directory, prepared)
    except UserError as error:
        print(f"speedbench: no comparison with the closed form: {error}", file=sys.stderr)
        return
    if found is not None:
        manifest = store.read_manifest(directory)
        store.write_manifest(directory, {**manifest, "known_answer": found})


def say(text: str, config: RunConfig) -> None:
    """What goes on before the first token, where someone may be waiting for it."""
    if config.show_progress or (config.show_progress is None and sys.stderr.isatty()):
        print(f"speedbench: {text}", file=sys.stderr, flush=True)


TERMINAL_S, LOG_S = 1.0, 30.0
"""How often progress is told: on a terminal the line renews itself, in a log there is a new one."""


@contextmanager
def showing(progress: Progress, directory: Path, wanted: bool) -> Iterator[None]:
    """Progress on stderr, from a thread of its own."""
    if not wanted:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(
        target=_show, args=(progress, directory, done), name="speedbench-progress", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(5.0)  # it may wait for a disk that has gone


def _show(progress: Progress, directory: Path, done: threading.Event) -> None:
    """What cannot be shown (a terminal that went away, say) is no reason to end a run."""
    from rich.console import Console
    from rich.text import Text

    from speedbench.progress import Meter, StoredAcceptance, line

    terminal = sys.stderr.isatty()
    console, stored, meter = Console(stderr=True), StoredAcceptance(directory), None
    with suppress(OSError, ValueError):
        while not done.wait(TERMINAL_S if terminal else LOG_S):
            if (loop := progress.loop) is None:
                continue
            meter = meter or Meter(progress.n_rows, progress.started_s)
            stored.refresh()
            moment = meter.at(time.monotonic(), loop.n_done, loop.n_tokens, len(progress.failed))
            text = f"speedbench: {line(moment, stored)}"
            if terminal:  # no live display: it hides the cursor, and we may end at once
                console.file.write("\r\x1b[2K")
                console.print(Text(text), end="", no_wrap=True, overflow="ellipsis", crop=True)
            else:
                console.file.write(text + "\n")
            console.file.flush()
        if terminal and meter is not None:
            console.file.write("\n")
            console.file.flush()
