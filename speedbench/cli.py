"""The command line: run, report, calibrate, engines; what data there is, is in cli_data."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    NamedTuple,
    NoReturn,
    Union,
    get_args,
    get_origin,
)

from speedbench.types import UserError

if TYPE_CHECKING:  # imported where needed, so that --help answers at once
    from speedbench.config import RunConfig
    from speedbench.launch import Launch
    from speedbench.replicas import Replicas
    from speedbench.session import Outcome, Place, Prepared, Progress, Target
    from speedbench.types import Algorithm, Engine

OK, FAILED, USAGE, INTERRUPTED, PREEMPTED, TERMINATED = 0, 1, 2, 130, 138, 143
"""Exit codes: measured; the engine died or nothing could be measured; the user can mend it;
Ctrl-C; SIGUSR1, by which a batch system tells that time is up; SIGTERM. After the last three what
was measured is stored, and --resume goes on."""

OUTSIDE_CONFIG = ("runtime_params", "config", "resume", "mtbench", "specbench")

ABOUT = """\
speedbench measures speculative decoding inside the engine: every step of every request is
recorded, and acceptance, step time, throughput and speedup are computed from those records.

  {prog} --engine VLLM --model_dir TARGET                                the baseline
  {prog} --engine VLLM --model_dir TARGET --draft_model_dir DRAFT \\
      --speculative_algorithm DRAFT_TARGET --draft_length 3              with a drafter
  mpirun -n 4 python run.py --engine VLLM ...                            four replicas, one run
  speedbench report runs/BASELINE runs/WITH_DRAFTER                      both, side by side
  speedbench calibrate --engine VLLM                         is it measured right?

`{prog} --help` lists every flag.
"""


def main(argv: Sequence[str] | None = None, prog: str = "speedbench") -> int:
    """Run one command. Returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv, prog)
    except UserError as error:
        if not _is_silent_replica():
            print(f"{prog}: {error}", file=sys.stderr)
        return USAGE
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `... | head`
            return OK
        print(f"{prog}: {error}: check the path and its permissions", file=sys.stderr)
        return USAGE


def _dispatch(argv: list[str], prog: str) -> int:
    commands: Mapping[str, Callable[[list[str], str], int]] = {
        "run": _run,
        "report": _report,
        "calibrate": _calibrate,
        "engines": _engines,
        "prepare": _prepare,
        "data": _data,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(ABOUT.format(prog=f"{prog} run"))
        print("commands: " + ", ".join(commands))
        return OK
    if argv[0] == "--version":
        from speedbench import __version__

        print(f"speedbench {__version__}")
        return OK
    command = commands.get(argv[0])
    if command is None:
        raise UserError(f"there is no command '{argv[0]}': expected {', '.join(commands)}")
    if argv[0] == "calibrate":
        if (launched := _launch()).n_replicas > 1:
            raise UserError(
                f"{launched.launcher} started {launched.size} processes, calibrate is one: use "
                "mpirun -n 1"
            )
        _settle(launched)
    return command(argv[1:], prog if prog != "speedbench" else f"speedbench {argv[0]}")


def _launch() -> Launch:
    from speedbench import launch

    return launch.of_environment(os.environ)


def _is_silent_replica() -> bool:
    """Whether replica 0 says what this process would say, too."""
    launched = _launch()
    return launched.n_replicas > 1 and launched.rank > 0


def _settle(launched: Launch) -> Place:
    """Take the CPUs that this process may use, and say so if the launcher had bound it to fewer."""
    from speedbench import launch
    from speedbench.session import Place

    launch.prepare_environment(launched, os.environ)
    cpus = launch.unbind(launched)
    if cpus.n != cpus.n_given and launched.rank == 0:
        share = f", its share among {launched.local_size} ranks" if launched.local_size > 1 else ""
        print(
            f"speedbench: {launched.launcher} bound this process to {cpus.n_given} CPU(s); it and "
            f"its engine use {cpus.n} now{share}",
            file=sys.stderr,
        )
    return Place(launched.launcher, cpus.n_given, cpus.n)


class _Parser(argparse.ArgumentParser):
    """Errors are one sentence, and both --two_words and --two-words are understood."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see --help")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        return self.parse_args([_underscored(word) for word in argv])


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


# ---------------------------------------------------------------- run


def _run_parser(prog: str) -> _Parser:
    """One flag per RunConfig field, in the field's group."""
    from speedbench.config import RunConfig

    parser = _Parser(
        prog=prog,
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
    )
    groups: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        extra = field.json_schema_extra
        group = str(extra["group"]) if isinstance(extra, dict) else ""
        if group:
            groups.setdefault(group, parser.add_argument_group(group))
            _add_flag(groups[group], name, field.annotation, field.description or "", field.default)
    groups["data"].add_argument("--mtbench", metavar="FILE", help="same as --dataset mtbench ...")
    groups["data"].add_argument(
        "--specbench", metavar="FILE", help="same as --dataset specbench ..."
    )
    other = parser.add_argument_group("configuration")
    other.add_argument(
        "--runtime_params",
        metavar="FILE",
        help="YAML with engine_args, sampling_kwargs, chat_template_args, dataset_kwargs; a flag "
        "given here wins over the file",
    )
    other.add_argument(
        "--config", metavar="MANIFEST", help="repeat a stored run: its manifest.json or directory"
    )
    other.add_argument(
        "--resume", action="store_true", help="continue the run in --save_dir where it stopped"
    )
    other.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def _add_flag(group: Any, name: str, annotation: Any, text: str, default: Any) -> None:
    choices = None
    kinds = [a for a in get_args(annotation) if a is not type(None)]
    optional = get_origin(annotation) is Union or type(None) in get_args(annotation)
    kind = kinds[0] if optional and kinds else annotation
    if get_origin(kind) is Literal:
        choices, kind = get_args(kind), str
    if kind is bool:
        group.add_argument(f"--{name}", action="store_const", const=True, help=text)
        group.add_argument(
            f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS
        )
        return
    if isinstance(default, (int, float, str)) and default != "":
        text += f" (default: {default})"
    if get_origin(kind) is tuple:
        group.add_argument(f"--{name}", action="append", metavar="NAME", help=text)
        return
    # Numbers stay text here: the configuration says what is wrong with them, in one place.
    is_number = kind in (int, float)
    group.add_argument(
        f"--{name}",
        choices=choices,
        metavar=None if choices else "N" if is_number else "X",
        help=text,
    )


def _run(argv: list[str], prog: str) -> int:
    if not argv:
        print(ABOUT.format(prog=prog))
        return OK
    given = vars(_run_parser(prog).parse(argv))
    from speedbench.replicas import join

    launched = _launch()
    with _signals(loud=not _is_silent_replica()) as signals:
        place = _settle(launched)
        if launched.node_rank > 0:
            # A notice to all of a job's processes is the first node's to answer: this one must
            # serve until that has stored what it measured.
            with signals.held_back(), signals.graceful():
                return _serve(_configuration(given).config, launched)
        replicas = join(launched)
        start = _Start(launched, replicas, place)
        if replicas.size == 1:
            return _run_configured(_configuration(given), signals, start)
        return _run_together(given, signals, start, prog)


class _Start(NamedTuple):
    """How this process was started, and beside which others."""

    launch: Launch
    replicas: Replicas
    place: Place


def _run_together(given: dict[str, Any], signals: _Signals, start: _Start, prog: str) -> int:
    """Replicas end together: one that went before would make the launcher end the others."""
    from speedbench.replicas import AgreedError

    replicas = start.replicas
    try:
        asked = replicas.agree(lambda: _configuration(given))
        code = _run_configured(asked, signals, start)
    except AgreedError as error:
        if replicas.is_first:
            print(f"{prog}: {error}", file=sys.stderr)
        code = USAGE
    except UserError as error:
        print(f"{prog}: replica {replicas.rank}: {error}", file=sys.stderr)
        return USAGE
    sys.stdout.flush()
    sys.stderr.flush()
    code = max(replicas.exchange(code))
    replicas.leave()
    return code


def _serve(config: RunConfig, launched: Launch) -> int:
    """A further node of one engine: its adapter serves, and ends with the first node."""
    import engines
    from speedbench import launch

    launch.node_arguments(launched, engines.adapter(config.engine).node_args)
    launch.follow_head(launched)
    start_engine(config, launched).close()
    return OK


def _run_configured(asked: _Asked, signals: _Signals, start: _Start) -> int:
    from speedbench import session, store
    from speedbench.replicas import AgreedError

    replicas = start.replicas
    config, resume_dir = asked.config, asked.resume_dir
    if not replicas.is_first:
        config = config.model_copy(update={"show_progress": False})
    replicas.agree(lambda: _refuse_replicas(config, replicas))
    directory = replicas.from_first(lambda: resume_dir or _directory(config))
    if resume_dir is None:
        replicas.from_first(lambda: store.refuse_existing(directory))
    _say(f"reading and encoding the prompts of --dataset {config.dataset}", config)
    prepared = replicas.agree(lambda: session.prepare(config))
    _refuse_other_prompts(replicas.exchange(prepared.fingerprint))
    if asked.fingerprint not in (None, prepared.fingerprint):
        raise AgreedError(
            "--config cannot be repeated: its prompts had the fingerprint "
            f"{str(asked.fingerprint)[:12]}, they have {prepared.fingerprint[:12]} now; restore "
            "the dataset and the tokenizer, or type the flags out to measure something new"
        )
    target = replicas.from_first(
        lambda: (
            session.resumed_target(directory, config, prepared)
            if resume_dir is not None
            else session.Target(directory)
        )
    )
    if target.is_complete(prepared):
        replicas.agree(lambda: session.call_complete(target) if replicas.is_first else None)
        if replicas.is_first:
            _print_report([directory], "console")
            print(f"\n{directory} was complete already: nothing was measured", file=sys.stderr)
        return OK
    if config.trust_remote_code and replicas.is_first:
        print("note: --trust_remote_code runs code that ships with the checkpoint", file=sys.stderr)
    start = _with_own_devices(config, start)
    _say(f"starting {config.engine}", config)
    with signals.held_back():
        engine, fault = _start_engines(config, start)
    try:
        outcome = _measure(config, prepared, engine, target, signals, start, fault)
    finally:
        if engine is not None:
            engine.close()
    if replicas.is_first:
        try:
            _add_known_answer(config, prepared, directory)
        except UserError as error:
            print(f"speedbench: no comparison with the closed form: {error}", file=sys.stderr)
        _print_report([directory], "console")
        _say_end(outcome, directory)
    return _exit_code(outcome, signals)


def _refuse_replicas(config: RunConfig, replicas: Replicas) -> None:
    import engines

    if replicas.size > 1 and engines.adapter(config.engine).owns_ranks:
        raise UserError(
            f"{config.engine} starts MPI ranks of its own and cannot be one of {replicas.size} "
            "replicas: start jobs of one process each (mpirun -n 1) with --shard r/R and a "
            "--save_dir of its own, then `speedbench report --merge DIR DIR ...`"
        )


def _refuse_other_prompts(fingerprints: Sequence[str]) -> None:
    from speedbench.replicas import AgreedError

    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise AgreedError(
                f"the prompts differ: their fingerprint is {fingerprints[0][:12]} in replica 0 and "
                f"{fingerprint[:12]} in replica {rank}; give every host the same dataset and "
                "tokenizer"
            )


def _with_own_devices(config: RunConfig, start: _Start) -> _Start:
    """Before the engine is imported: this replica's share of the host's GPUs."""
    from speedbench import launch

    if config.engine == "NULL":
        return start
    own = start.replicas.agree(lambda: launch.own_devices(start.launch, config.n_gpus, os.environ))
    if own is None:
        return start
    os.environ["CUDA_VISIBLE_DEVICES"] = own
    return start._replace(place=replace(start.place, devices=own))


def _start_engines(config: RunConfig, start: _Start) -> tuple[Engine | None, str]:
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


def _measure(
    config: RunConfig,
    prepared: Prepared,
    engine: Engine | None,
    target: Target,
    signals: _Signals,
    start: _Start,
    fault: str,
) -> Outcome:
    from speedbench import environment, session

    progress = session.Progress()
    with _showing(progress, config.show_progress), signals.graceful():
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
        )


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


def _exit_code(outcome: Outcome, signals: _Signals) -> int:
    if signals.received is not None:
        return 128 + signals.received
    if outcome.end.reason in ("engine died", "crashed") or (
        outcome.n_failed and outcome.n_failed == outcome.n_committed
    ):
        return FAILED
    return OK


def _say_end(outcome: Outcome, directory: Path) -> None:
    if outcome.end.reason == "finished":
        return
    print(
        f"\nThe run stopped early ({outcome.end.message}): of {outcome.n_rows} conversations that "
        f"were left, {outcome.n_committed} are stored now. Continue it with the same command and "
        f"--resume, or: run.py --save_dir {directory} --resume",
        file=sys.stderr,
    )


class _Asked(NamedTuple):
    """What the command line asks for; `fingerprint` is that of a run to be repeated exactly."""

    config: RunConfig
    resume_dir: Path | None
    fingerprint: str | None


def _configuration(given: dict[str, Any]) -> _Asked:
    """The run's configuration from flags, files and a stored manifest."""
    from speedbench import store
    from speedbench.config import from_dict
    from speedbench.environment import redact

    outside = {name: given.pop(name) for name in OUTSIDE_CONFIG if name in given}
    flags = _normalised(given, outside)
    values: dict[str, Any] = {}
    resume_dir = fingerprint = None
    if outside.get("resume"):
        if "save_dir" not in flags:
            raise UserError("--resume needs --save_dir: name the run directory to continue")
        resume_dir = Path(flags["save_dir"])
        if "config" in outside:
            raise UserError("--resume continues a run as it was configured: leave out --config")
        values = dict(store.read_manifest(resume_dir)["config"])
        values.update(max_duration=None, show_progress=False)  # of that session, not of the run
    elif "config" in outside:
        path = Path(outside["config"])
        manifest = (
            store.read_manifest(path)
            if path.is_dir()
            else store.read_manifest(path.parent, path.name)
        )
        values = {**manifest["config"], "save_dir": None}
        fingerprint = str(manifest["prompts"]["fingerprint"])
    stored = from_dict(values) if values else None
    values.update(_merged_with_file(outside.get("runtime_params")))
    if "<redacted>" in str(values):
        raise UserError(
            "the stored configuration lacks a secret that was redacted: give --runtime_params again"
        )
    values.update(flags)
    if "engine" not in values:
        raise UserError(f"--engine is missing: use one of {', '.join(_engine_names())}")
    values["engine"] = _known_engine(str(values["engine"]))
    _absorb_engine_arguments(values, flags)
    config = from_dict(values)
    _refuse_algorithm(config)
    if config.engine != "NULL" and config.model_dir is None:
        raise UserError("--model_dir is missing: name the target checkpoint")
    if resume_dir is not None and stored is not None:
        shown = from_dict(redact(config.model_dump(mode="json")))
        for name, (was, now) in stored.differences(shown).items():
            raise UserError(
                f"--resume cannot change --{name}: the run in {resume_dir} has {was!r}, you ask "
                f"for {now!r}; leave it out, or start a new run"
            )
    if stored is None or stored.differences(config):
        fingerprint = None  # something new was asked for
    return _Asked(config, resume_dir, fingerprint)


def _normalised(given: dict[str, Any], outside: Mapping[str, Any]) -> dict[str, Any]:
    """Flags as configuration values: dataset shorthands, split categories."""
    flags = dict(given)
    for name in ("mtbench", "specbench"):
        if name in outside:
            if flags.get("dataset", name) != name or "dataset_path" in flags:
                raise UserError(f"--{name} already names the dataset: leave out --dataset")
            flags.update(dataset=name, dataset_path=outside[name])
    if "random_isl" in flags:
        flags.setdefault("dataset", "random")
    if "category" in flags:
        parts = [name.strip() for part in flags["category"] for name in part.split(",")]
        if not all(parts):
            raise UserError("--category has an empty name: separate names by single commas")
        flags["category"] = parts
    return flags


def _merged_with_file(path: str | None) -> dict[str, Any]:
    """Sections of the YAML file; sampling names that have a flag move to it."""
    from speedbench.config import read_runtime_params

    if path is None:
        return {}
    sections: dict[str, Any] = dict(read_runtime_params(path))
    sampling = dict(sections.get("sampling_kwargs", {}))
    for name, field in (
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("ignore_eos", "ignore_eos"),
        ("max_tokens", "output_length"),
    ):
        if name in sampling:
            sections[field] = sampling.pop(name)
    if "sampling_kwargs" in sections:
        sections["sampling_kwargs"] = sampling
    return sections


def _absorb_engine_arguments(values: dict[str, Any], flags: Mapping[str, Any]) -> None:
    """An engine argument that a flag owns becomes that flag's value, unless the flag was given."""
    import engines

    arguments = dict(values.get("engine_args") or {})
    for name, field in engines.adapter(values["engine"]).flag_of.items():
        if name in arguments:
            value = arguments.pop(name)
            if field not in flags:
                values[field] = value
    if "engine_args" in values:
        values["engine_args"] = arguments


def _engine_names() -> list[str]:
    import engines

    return list(engines.ADAPTERS)


def _known_engine(name: str) -> str:
    names = _engine_names()
    if name.upper() not in names:
        raise UserError(f"--engine is '{name}': expected one of {', '.join(names)}")
    return name.upper()


def _refuse_algorithm(config: RunConfig) -> None:
    import engines

    supported = engines.adapter(config.engine).algorithms
    if config.speculative_algorithm not in supported:
        raise UserError(
            f"{config.engine} does not support --speculative_algorithm "
            f"{config.speculative_algorithm}: it has {', '.join(supported)}"
        )


def _directory(config: RunConfig) -> Path:
    if config.save_dir is not None:
        return Path(config.save_dir)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    parts = (stamp, config.engine, config.speculative_algorithm, config.dataset)
    return Path("runs") / "-".join(parts).lower()


def _add_known_answer(config: RunConfig, prepared: Prepared, directory: Path) -> None:
    """For a calibration checkpoint: hold the records against the closed form, and store that."""
    if config.model_dir is None or config.engine == "NULL":
        return
    from speedbench import calibrate, store

    found = calibrate.known_answer(directory, prepared)
    if found is not None:
        manifest = store.read_manifest(directory)
        store.write_manifest(directory, {**manifest, "known_answer": found})


def _say(text: str, config: RunConfig) -> None:
    if config.show_progress:
        print(f"speedbench: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- signals and progress


class _Signals:
    """Ctrl-C, SIGTERM, SIGUSR1: the first ends a measurement in order, the next at once.

    SIGUSR1 is a notice, which srun and mpirun may both pass on: it never ends anything at once
    that is measuring.
    """

    def __init__(self, loud: bool = True) -> None:
        self.received: int | None = None
        self._loud = loud
        self._held_back = False
        self._graceful = False

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
            raise SystemExit(128 + number)  # not KeyboardInterrupt: vLLM swallows that one
        self._say("stopping; once more ends it at once")

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
def _signals(loud: bool = True) -> Iterator[_Signals]:
    """Handle them inside the block; an exit before or after measuring is clean."""
    signals = _Signals(loud)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {n: signal.signal(n, signals.handle) for n in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _showing(progress: Progress, wanted: bool) -> Iterator[None]:
    """Progress on stderr: a line that renews itself on a terminal, one every 10 s in a log."""
    if not wanted:
        yield
        return
    done = threading.Event()
    terminal = sys.stderr.isatty()

    def show() -> None:
        started_s = time.monotonic()
        while not done.wait(1.0 if terminal else 10.0):
            if (loop := progress.loop) is None:
                continue
            elapsed_s = time.monotonic() - started_s
            line = (
                f"speedbench: {loop.n_done}/{progress.n_rows} conversations, {loop.n_tokens} "
                f"tokens, {elapsed_s:.0f} s"
            )
            print(
                f"\r{line}" if terminal else line,
                end="" if terminal else "\n",
                file=sys.stderr,
                flush=True,
            )

    thread = threading.Thread(target=show, name="speedbench-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if terminal:
            print(file=sys.stderr)


# ---------------------------------------------------------------- report


def _report(argv: list[str], prog: str) -> int:
    parser = _Parser(prog=prog, description="Report one stored run, or a baseline and a run.")
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="run directories")
    parser.add_argument(
        "--merge",
        nargs="+",
        action="append",
        default=[],
        metavar="RUN_DIR",
        help="directories that hold the shards (--shard r/R) of one run; may be given twice, for a "
        "baseline and a run",
    )
    parser.add_argument(
        "--format", choices=("console", "markdown", "json"), default="console", help="what to print"
    )
    given = parser.parse(argv)
    if not given.runs and not given.merge:
        raise UserError("no run directory was named: name one, or a baseline and another")
    merges = [[Path(run) for run in shards] for shards in given.merge]
    _print_report([Path(run) for run in given.runs], given.format, merges)
    return OK


def _print_report(
    directories: Sequence[Path], form: str, merges: Sequence[Sequence[Path]] = ()
) -> None:
    """One run, or a baseline and a speculative run side by side, in the given form."""
    import json

    from speedbench import store
    from speedbench.report import as_json, console, markdown
    from speedbench.report.merge import merged
    from speedbench.report.pair import pair
    from speedbench.report.summary import summarize

    runs = [store.load(directory) for directory in directories]
    runs += [merged(shards) for shards in merges]
    both = None
    if len(runs) == 2:
        runs.sort(key=lambda run: run.manifest["engine"]["draft_length"] > 0)
        both = pair(*runs)
        if runs[0].directory.resolve() == runs[1].directory.resolve():
            raise UserError(f"{runs[0].directory} was named twice: name a baseline and another run")
        if runs[1].manifest["engine"]["draft_length"] == 0:
            raise UserError(
                f"neither {runs[0].directory} nor {runs[1].directory} speculates: name a baseline "
                "and a speculative run"
            )
    elif len(runs) > 2:
        raise UserError(
            f"{len(runs)} runs were named: report one, or a baseline and a speculative run"
        )
    if form == "json":
        found = as_json.render_pair(both) if both else as_json.render(summarize(runs[0]))
        print(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
    elif form == "markdown":
        print(markdown.render_pair(both) if both else markdown.render(summarize(runs[0])))
    else:
        from rich.console import Console

        screen = Console()
        if both:
            console.render_pair(both, screen)
        else:
            console.render(summarize(runs[0]), screen)


# ---------------------------------------------------------------- calibrate


def _calibrate(argv: list[str], prog: str) -> int:
    parser = _Parser(
        prog=prog,
        description="Run checkpoints whose every step is known through a real engine, and compare.",
    )
    parser.add_argument("--engine", default="VLLM", help="engine to prove (default: VLLM)")
    parser.add_argument(
        "--algorithm", default="all", help="EAGLE3, MTP, ..., comma-separated, or all (default)"
    )
    parser.add_argument("--draft_length", default="1,3,5", metavar="K,K", help="default: 1,3,5")
    parser.add_argument("--concurrency", default="1,8,64", metavar="N,N", help="default: 1,8,64")
    parser.add_argument("--output_length", default="5,20,128", metavar="N,N", help="5,20,128")
    parser.add_argument("--tp_size", default="1", metavar="N", help="tensor parallel size")
    parser.add_argument("--runtime_params", metavar="FILE", help="YAML with engine_args")
    parser.add_argument("--save_dir", metavar="DIR", help="default: runs/<time>-calibrate-<engine>")
    parser.add_argument(
        "--build_only", action="store_true", help="write the checkpoints to --save_dir and stop"
    )
    given = parser.parse(argv)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = _known_engine(given.engine)
    directory = Path(given.save_dir or f"runs/{stamp}-calibrate-{name.lower()}")
    if given.build_only:
        from speedbench.calibration import checkpoints

        checkpoints.build(directory)
        print(f"calibration checkpoints: {directory}")
        return OK
    with _signals():
        return _print_verdicts(name, given, directory)


def _print_verdicts(engine: str, given: argparse.Namespace, directory: Path) -> int:
    """Run the cases, a line as each is judged; at the end one table, and the exit code."""
    from rich.console import Console
    from rich.markup import escape

    import engines
    from speedbench import calibrate
    from speedbench.report.support import verdict_table
    from speedbench.types import Support

    adapter = engines.adapter(engine)
    asked = _algorithms(given.algorithm)
    supported = [name for name in asked if name in adapter.algorithms]
    if not supported:
        raise UserError(
            f"{engine} has none of {', '.join(asked)}: it has {', '.join(adapter.algorithms)}"
        )
    if directory.exists():
        raise UserError(f"{directory} exists: choose another --save_dir")
    concurrencies = _numbers("--concurrency", given.concurrency)
    if (limit := adapter.max_concurrency) is not None:
        concurrencies = sorted({min(n, limit) for n in concurrencies})
    cases = list(
        calibrate.engine_cases(
            supported,
            _numbers("--draft_length", given.draft_length),
            concurrencies,
            _numbers("--output_length", given.output_length),
        )
    )
    base = {
        "engine": engine,
        "tp_size": given.tp_size,
        **_merged_with_file(given.runtime_params),
    }
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{'case':<42}{'requests':>9}{'steps':>8}  verdict[/bold]")
    cells = []
    for cell in calibrate.calibrate(base, cases, directory, adapter, adapter.calibration_args):
        cells.append(cell)
        found = cell.verdict
        if found is None:
            console.print(f"{cell.directory.name:<59}  not on this engine: {escape(cell.refusal)}")
            continue
        word = f"[green]{found.kind}[/green]" if found.ok else f"[red]FAULT: {found.fault}[/red]"
        console.print(f"{cell.directory.name:<42}{found.n_requests:>9}{found.n_steps:>8}  {word}")
        if not found.ok or found.kind != "exact" or not found.sentence.endswith("tokens)."):
            console.print(f"    {escape(found.sentence)}")
    absent = {
        name: adapter.support.get(name, Support("absent"))
        for name in asked
        if name not in supported
    }
    console.print()
    console.print(verdict_table(cells, absent))
    judged = [cell.verdict for cell in cells if cell.verdict is not None]
    n_right = sum(found.ok for found in judged)
    console.print(f"\n{n_right} of {len(judged)} cases are as computed. Records: {directory}/runs")
    refused = [c for c in cells if c.verdict is None and not c.case.subject.capture_experts]
    refused_by_name = given.algorithm != "all" and bool(refused)
    return OK if judged and n_right == len(judged) and not refused_by_name else FAILED


def _algorithms(text: str) -> list[Algorithm]:
    """What --algorithm names; 'all' is every algorithm there is."""
    from speedbench.types import Algorithm

    known: tuple[Algorithm, ...] = get_args(Algorithm)
    if text.lower() == "all":
        return list(known)
    named = [name.strip().upper() for name in text.split(",")]
    for name in named:
        if name not in known:
            raise UserError(f"--algorithm is '{name}': expected {', '.join(known)}, or all")
    return [name for name in known if name in named]


def _numbers(flag: str, text: str) -> list[int]:
    """'1,8,64' -> [1, 8, 64]."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise UserError(f"{flag} is '{text}': expected whole numbers from 1, comma-separated")
    return numbers


# ---------------------------------------------------------------- data


def _prepare(argv: list[str], prog: str) -> int:
    from speedbench.cli_data import prepare_command

    return prepare_command(argv, prog)


def _data(argv: list[str], prog: str) -> int:
    from speedbench.cli_data import data_command

    return data_command(argv, prog)


# ---------------------------------------------------------------- engines


def _engines(argv: list[str], prog: str) -> int:
    parser = _Parser(prog=prog, description="What each engine supports, and how it was proven.")
    parser.add_argument(
        "--format", choices=("console", "markdown"), default="console", help="what to print"
    )
    given = parser.parse(argv)
    import engines
    from speedbench.report.support import markdown, support_table

    adapters = {name: engines.adapter(name) for name in engines.ADAPTERS if name != "NULL"}
    if given.format == "markdown":
        print(markdown(adapters))
    else:
        from rich.console import Console

        Console().print(support_table(adapters))
    return OK
