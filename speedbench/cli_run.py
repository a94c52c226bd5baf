"""The command that measures: from flags and files to an engine, a run directory and its report."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union, get_args, get_origin

from speedbench.cli_base import FAILED, OK, USAGE, Parser, Signals, signals_handled
from speedbench.cli_report import print_report
from speedbench.types import UserError

if TYPE_CHECKING:  # imported where needed, so that --help answers at once
    from speedbench.config import RunConfig
    from speedbench.launch import Launch
    from speedbench.replicas import Replicas
    from speedbench.session import Outcome, Place, Prepared, Progress, Target
    from speedbench.types import Engine

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
    cpus = launch.unbind(launched)
    if cpus.n != cpus.n_given and launched.rank == 0:
        share = f", its share among {launched.local_size} ranks" if launched.local_size > 1 else ""
        print(
            f"speedbench: {launched.launcher} bound this process to {cpus.n_given} CPU(s); it and "
            f"its engine use {cpus.n} now{share}",
            file=sys.stderr,
        )
    return Place(launched.launcher, cpus.n_given, cpus.n)


def run_parser(prog: str) -> Parser:
    """One flag per RunConfig field, in the field's group."""
    from speedbench.config import RunConfig

    parser = Parser(
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


def run_command(argv: list[str], prog: str) -> int:
    if not argv:
        print(ABOUT.format(prog=prog))
        return OK
    given = vars(run_parser(prog).parse(argv))
    from speedbench.replicas import join

    launched = launch_of_process()
    with signals_handled(loud=not is_silent_replica()) as signals:
        place = settle(launched)
        if launched.node_rank > 0:
            # A notice to all of a job's processes is the first node's to answer: this one must
            # serve until that has stored what it measured.
            with signals.held_back(), signals.graceful():
                return _serve(configuration(given).config, launched)
        replicas = join(launched)
        start = _Start(launched, replicas, place)
        if replicas.size == 1:
            return _run_configured(configuration(given), signals, start)
        return _run_together(given, signals, start, prog)


class _Start(NamedTuple):
    """How this process was started, and beside which others."""

    launch: Launch
    replicas: Replicas
    place: Place


def _run_together(given: dict[str, Any], signals: Signals, start: _Start, prog: str) -> int:
    """Replicas end together: one that went before would make the launcher end the others."""
    from speedbench.replicas import AgreedError

    replicas = start.replicas
    try:
        asked = replicas.agree(lambda: configuration(given))
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


def _run_configured(asked: _Asked, signals: Signals, start: _Start) -> int:
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
            print_report([directory], "console")
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
        print_report([directory], "console")
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
    signals: Signals,
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


def _exit_code(outcome: Outcome, signals: Signals) -> int:
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


def configuration(given: dict[str, Any]) -> _Asked:
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
    values.update(merged_with_file(outside.get("runtime_params")))
    if "<redacted>" in str(values):
        raise UserError(
            "the stored configuration lacks a secret that was redacted: give --runtime_params again"
        )
    values.update(flags)
    if "engine" not in values:
        raise UserError(f"--engine is missing: use one of {', '.join(_engine_names())}")
    values["engine"] = known_engine(str(values["engine"]))
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


def merged_with_file(path: str | None) -> dict[str, Any]:
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


def known_engine(name: str) -> str:
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
