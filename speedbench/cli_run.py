"""The command that measures: from flags and files to an engine, a run directory and its report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin

from speedbench.cli_base import (
    FAILED,
    OK,
    USAGE,
    Parser,
    Signals,
    signals_handled,
    warn_of_foreign_code,
)
from speedbench.cli_measure import (
    Destination,
    Start,
    close_engine,
    has_failed,
    is_silent_replica,
    launch_of_process,
    measure,
    mirrored,
    not_repeatable,
    refuse_other_prompts,
    refuse_replicas,
    say,
    settle,
    start_engine,
    start_engines,
    try_known_answer,
    with_own_devices,
)
from speedbench.cli_report import print_summary
from speedbench.guardian import guarded
from speedbench.types import UserError

if TYPE_CHECKING:  # imported where needed, so that --help answers at once
    from speedbench.config import RunConfig
    from speedbench.configure import Asked
    from speedbench.launch import Launch
    from speedbench.replicas import Replicas
    from speedbench.session import Outcome

Asking = TypeVar("Asking")

ABOUT = """\
speedbench measures speculative decoding inside the engine: every step of every request is
recorded, and acceptance, step time, throughput and speedup are computed from those records.

  {prog} --engine VLLM --model_dir TARGET                                the baseline
  {prog} --engine VLLM --model_dir TARGET --draft_model_dir DRAFT \\
      --speculative_algorithm DRAFT_TARGET --draft_length 3              with a drafter
  {prog} ... --speculative_algorithm EAGLE3 --baseline --repeat 2        both arms, twice, compared
  mpirun -n 4 python run.py --engine VLLM ...                            four replicas, one run
  speedbench sweep --grid draft_length=1,3,5 --grid concurrency=1,8,32 ...   which K, at which load
  speedbench compare runs/BASELINE runs/WITH_DRAFTER         how much faster, how sure
  speedbench report runs/DIR ...                             everything that was recorded
  speedbench calibrate --engine VLLM                         is it measured right?

`{prog} --help` lists every flag.
"""


def run_parser(prog: str, *, for_sweep: bool = False) -> Parser:
    """One flag per RunConfig field, in the field's group. A sweep adds --config and --resume of its
    own."""
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
    _add_arms(groups["measurement"])
    other = parser.add_argument_group("configuration")
    other.add_argument(
        "--runtime_params",
        metavar="FILE",
        help="YAML with engine_args, sampling_kwargs, chat_template_args, dataset_kwargs; a flag "
        "given here wins over the file",
    )
    if not for_sweep:
        other.add_argument(
            "--config",
            metavar="MANIFEST",
            help="repeat a stored run: its manifest.json or directory",
        )
        other.add_argument(
            "--resume", action="store_true", help="continue the run in --save_dir where it stopped"
        )
    other.add_argument("-h", "--help", action="help", help="show this and exit")
    return parser


def _add_arms(group: Any) -> None:
    group.add_argument(
        "--baseline",
        action="store_true",
        help="measure the same without speculation, too, and compare; --save_dir is then a folder "
        "of runs",
    )
    group.add_argument(
        "--repeat",
        metavar="R",
        help="measure so often, each time on a newly started engine; with --baseline in the order "
        "ABBA (default: 1)",
    )


def _add_flag(group: Any, name: str, annotation: Any, text: str, default: Any) -> None:
    import engines

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
    if name == "engine":
        text += f": {', '.join(engines.ADAPTERS)}"
    if get_origin(kind) is tuple:
        group.add_argument(f"--{name}", action="append", metavar="NAME", help=text)
        return
    # Numbers stay text here: the configuration says what is wrong with them, in one place.
    is_number = kind in (int, float)
    group.add_argument(
        f"--{name}",
        choices=choices,
        type=_any_case(choices) if choices else None,
        metavar=None if choices else "N" if is_number else "X",
        help=text,
    )


def _any_case(choices: Sequence[str]) -> Callable[[str], str]:
    """The choice that a word is, whatever its case; a word that is none stays as it is."""
    spelled = {choice.lower(): choice for choice in choices}
    return lambda word: spelled.get(word.lower(), word)


def run_command(argv: list[str], prog: str) -> int:
    if not argv:
        print(ABOUT.format(prog=prog))
        return OK
    given = vars(run_parser(prog).parse(argv))
    from speedbench.configure import configuration

    destination = Destination(given.get("save_dir"), "resume" in given)
    if destination.save_dir is not None:
        given["save_dir"] = destination.local()
    return measuring(destination, lambda: configuration(given), _run_asked, prog)


def measuring(
    destination: Destination,
    ask: Callable[[], Asking],
    run: Callable[[Asking, Signals, Start], int],
    prog: str,
) -> int:
    """Find this process's place among others, ask what is to be measured, and measure that."""
    from speedbench.replicas import join

    launched = launch_of_process()
    with signals_handled(loud=not is_silent_replica()) as signals:
        place = settle(launched)
        if launched.node_rank > 0:
            # A notice to all of a job's processes is the first node's to answer: this one must
            # serve until that has stored what it measured.
            with signals.held_back(), signals.graceful():
                return _serve(ask(), launched)
        replicas = join(launched)

        def work() -> int:
            with mirrored(destination, replicas) as is_whole:
                asked = replicas.agree(ask)
                with guarded() as guard:
                    begun = Start(launched, replicas, place, guard, destination.url)
                    code = run(asked, signals, begun)
            return FAILED if code == OK and not is_whole() else code

        return work() if replicas.size == 1 else _together(work, replicas, prog)


def _together(work: Callable[[], int], replicas: Replicas, prog: str) -> int:
    """Replicas end together: one that went before would make the launcher end the others."""
    from speedbench.replicas import AgreedError

    try:
        code = work()
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


def _serve(asked: object, launched: Launch) -> int:
    """A further node of one engine: its adapter serves, and ends with the first node."""
    import engines
    from speedbench import launch
    from speedbench.configure import Asked

    if not isinstance(asked, Asked) or asked.is_series:
        raise UserError(ONE_NODE)
    config = asked.config
    launch.node_arguments(launched, engines.adapter(config.engine).node_args)
    launch.follow_head(launched)
    close_engine(start_engine(config, launched))
    return OK


ONE_NODE = (
    "several runs start several engines, and the further nodes of one follow it to its end only: "
    "measure each run by itself, without --baseline, --repeat or a sweep"
)


def refuse_nodes(launched: Launch) -> None:
    """Raise UserError where further nodes would have to follow one engine after the other."""
    if launched.head and launched.size > 1:
        raise UserError(ONE_NODE)


def _run_asked(asked: Asked, signals: Signals, start: Start) -> int:
    return (
        _run_series(asked, signals, start) if asked.is_series else _run_one(asked, signals, start)
    )


# ---------------------------------------------------------------- one run


def _run_one(asked: Asked, signals: Signals, start: Start) -> int:
    from speedbench import inputs, store
    from speedbench.replicas import AgreedError
    from speedbench.target import Target, call_complete, resumed_target

    replicas = start.replicas
    config, resume_dir = asked.config, asked.resume_dir
    if not replicas.is_first:
        config = config.model_copy(update={"show_progress": False})
    replicas.agree(lambda: refuse_replicas(config, replicas))
    directory = replicas.from_first(lambda: resume_dir or _directory(config))
    if resume_dir is None:
        replicas.from_first(lambda: store.refuse_existing(directory))
    replicas.from_first(lambda: store.refuse_unwritable(directory))
    warn_of_foreign_code(config.trust_remote_code and replicas.is_first)
    say(f"reading and encoding the prompts of --dataset {config.dataset}", config)
    prepared = replicas.agree(lambda: inputs.prepare(config))
    refuse_other_prompts(replicas.exchange(prepared.fingerprint))
    if asked.fingerprint not in (None, prepared.fingerprint):
        raise AgreedError(not_repeatable(asked.fingerprint, prepared.fingerprint))
    target = replicas.from_first(
        lambda: (
            resumed_target(directory, config, prepared)
            if resume_dir is not None
            else Target(directory)
        )
    )
    if target.is_complete(prepared):
        replicas.agree(lambda: call_complete(target) if replicas.is_first else None)
        if replicas.is_first:
            place = start.shown(directory)
            print_summary(directory, place)
            print(f"{place} was complete already: nothing was measured", file=sys.stderr)
        return OK
    start = with_own_devices([config], start)
    say(f"starting {config.engine}", config)
    with signals.held_back():
        engine, fault = start_engines(config, start)
    try:
        outcome = measure(config, prepared, engine, target, signals, start, fault)
    finally:
        if engine is not None:
            close_engine(engine)
    if replicas.is_first:
        try_known_answer(config, prepared, directory)
        print_summary(directory, start.shown(directory))
        _say_end(outcome, start.shown(directory))
    return _exit_code(outcome, signals)


# ---------------------------------------------------------------- two arms


def _run_series(asked: Asked, signals: Signals, start: Start) -> int:
    """Two arms, or repeats of one, in a folder of runs."""
    from speedbench import series, store
    from speedbench.cli_series import measure_all
    from speedbench.sweep import Spec

    refuse_nodes(start.launch)
    replicas, config = start.replicas, asked.config
    directory = replicas.from_first(lambda: asked.resume_dir or _directory(config))
    if asked.resume_dir is None:
        replicas.from_first(lambda: store.refuse_existing(directory))
    base = config.model_dump(mode="json", exclude={"save_dir"})
    spec = Spec(base=base, baseline=asked.baseline, repeat=asked.repeat)
    plan = series.Plan("series", directory, spec, series.arms(config, asked.baseline))
    kept = replicas.from_first(lambda: series.read(directory))
    return measure_all(plan, kept, signals, start, asked.fingerprint)


def _exit_code(outcome: Outcome, signals: Signals) -> int:
    if signals.received is not None:
        return 128 + signals.received
    return FAILED if has_failed(outcome) else OK


def _say_end(outcome: Outcome, place: str) -> None:
    if outcome.end.reason == "finished":
        return
    done = (
        f"{outcome.n_committed} of the {outcome.n_rows} conversations that were left are stored"
        if outcome.n_committed
        else f"none of the {outcome.n_rows} conversations that were left came to its end"
    )
    print(
        f"\nThe run stopped early ({outcome.end.message}): {done}. Continue it with the same "
        f"command and --resume, or: run.py --save_dir {place} --resume",
        file=sys.stderr,
    )


def _directory(config: RunConfig) -> Path:
    if config.save_dir is not None:
        return Path(config.save_dir)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    parts = (stamp, config.engine, config.speculative_algorithm, config.dataset)
    return Path("runs") / "-".join(parts).lower()
