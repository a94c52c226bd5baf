"""Measures a folder of runs: two arms and their repeats, or the cells of a sweep. It prints."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from speedbench import cli_measure
from speedbench.cli_base import FAILED, OK, Signals, warn_of_foreign_code
from speedbench.cli_report import print_summary
from speedbench.types import UserError

if TYPE_CHECKING:  # imported where needed, so that --help answers at once
    from speedbench.cli_measure import Start
    from speedbench.config import RunConfig
    from speedbench.inputs import Prepared
    from speedbench.report.arms import Arm
    from speedbench.report.blocks import Block
    from speedbench.series import Kept, Plan, PlannedRun
    from speedbench.session import Outcome
    from speedbench.target import Target
    from speedbench.types import Engine


def measure_all(
    plan: Plan,
    kept: Kept | None,
    signals: Signals,
    start: Start,
    fingerprint: str | None = None,
) -> int:
    """Measure what is left of a plan, in order. Returns the exit code.

    fingerprint  the prompts' of a run that is to be repeated exactly

    Raises UserError for a mistake that concerns all runs; in a sweep, what concerns one cell is
    told and stored, and the others go on.
    """
    from speedbench import series, store

    replicas = start.replicas
    replicas.from_first(lambda: store.refuse_unwritable(plan.directory))
    with contextlib.ExitStack() as held:
        work = _Work(plan, kept, signals, start, held)
        if kept is not None:
            work.claim()
        work.left = replicas.from_first(lambda: series.left(plan))
        work.prepare(fingerprint)
        try:
            work.measure()
        finally:
            work.close()
        code = work.exit_code()
    if replicas.is_first and not work.stopped:
        print_results(plan.directory, start.shown(plan.directory))
    return code


def describe(plan: Plan, left: Sequence[PlannedRun] | None = None) -> str:
    """How much there is to do, in one line."""
    from speedbench import series

    runs = plan.runs()
    todo = runs if left is None else list(left)
    text = f"{len(plan.cells)} cell(s), {len(runs)} run(s)"
    if len(todo) < len(runs):
        text += f", of which {len(runs) - len(todo)} are complete"
    return f"{text}; {series.n_starts(plan, todo)} engine start(s) to come"


@dataclass(slots=True)  # mutable: what is going on
class _Work:
    """A plan being measured. All replicas do the same, in the same order.

    held          what is held until the end: the folder's lock, once the folder is claimed
    left          runs that are still to be measured, or to be continued
    inputs        input identity -> what is asked
    engine        the running one; None on a replica whose engine did not start (`fault` says why)
    not_measured  run -> why it could not be measured
    refusal       why the engine of the runs at hand does not start, or ''
    stopped       why no further run is begun, or ''
    """

    plan: Plan
    kept: Kept | None
    signals: Signals
    start: Start
    held: contextlib.ExitStack
    left: Sequence[PlannedRun] = ()
    is_claimed: bool = False
    inputs: dict[str, Prepared] = field(default_factory=dict)
    engine: Engine | None = None
    is_open: bool = False
    fault: str = ""
    not_measured: dict[str, str] = field(default_factory=dict)
    n_told: int = 0
    n_failed: int = 0
    refusal: str = ""
    stopped: str = ""
    deadline_s: float | None = None

    # ------------------------------------------------------------ before any engine

    def claim(self) -> None:
        """Take the folder, and write down what it is to hold. A new one is made when there is
        something to store, so that a mistake leaves nothing behind."""
        from speedbench import series, store

        if self.is_claimed:
            return
        replicas, plan = self.start.replicas, self.plan

        def take() -> None:
            if not replicas.is_first:
                return
            plan.directory.mkdir(parents=True, exist_ok=True)
            self.held.enter_context(store.locked(plan.directory))
            if self.kept is None:
                store.refuse_existing(plan.directory)
            series.refuse_other_runs(plan)
            series.write(plan, self.not_measured, self.kept)

        replicas.agree(take)
        self.is_claimed = True

    def prepare(self, fingerprint: str | None) -> None:
        """Read and encode what is asked, once for all runs that ask the same."""
        trusts = any(run.cell.config.trust_remote_code for run in self.left)
        warn_of_foreign_code(trusts and self.start.replicas.is_first)
        from speedbench import inputs
        from speedbench.replicas import AgreedError

        self._say(describe(self.plan, self.left))
        replicas = self.start.replicas
        for run in self.left:
            key = inputs.input_identity(run.cell.config)
            if key in self.inputs:
                continue
            prepared = self._prepared(run.cell.config)
            cli_measure.refuse_other_prompts(replicas.exchange(prepared.fingerprint))
            if fingerprint not in (None, prepared.fingerprint):
                raise AgreedError(cli_measure.not_repeatable(fingerprint, prepared.fingerprint))
            self.inputs[key] = prepared
        configs = [self.plan.config_of(run) for run in self.left]
        if configs:
            self.start = cli_measure.with_own_devices(configs, self.start)
            self._hint_at_live_history()

    def _prepared(self, config: RunConfig) -> Prepared:
        from speedbench import inputs

        replicas = self.start.replicas
        replicas.agree(lambda: cli_measure.refuse_replicas(config, replicas))
        return replicas.agree(lambda: inputs.prepare(config))

    def _hint_at_live_history(self) -> None:
        live = [prepared for prepared in self.inputs.values() if not prepared.all_turns]
        if not live or len(self.plan.cells) == 1:
            return
        n_turns = max(sum(row.n_turns > 1 for row in prepared.rows) for prepared in live)
        self._say(
            f"note: {n_turns} conversation(s) have several turns, and with --history live each arm "
            "answers its own later turns: where those differ, the conversation is in no paired "
            "speedup (--history frozen asks all arms the same)"
        )

    # ------------------------------------------------------------ measuring

    def measure(self) -> None:
        names = {run.name for run in self.left}
        for started in self.plan.starts():
            self.refusal = ""
            for run in started.runs:
                if run.name in names:
                    if not self._may_go_on():
                        return
                    self._measure_one(run)
                    if self.stopped:
                        return
            self.close()

    def _may_go_on(self) -> bool:
        """Whether a further run is begun: asked of all replicas, of which one may have been told
        to stop."""
        replicas = self.start.replicas
        if any(replicas.exchange(self.signals.received is not None)):
            self.stopped = self.signals.why() or "another replica was told to stop"
        elif replicas.from_first(self._is_over):
            self.stopped = "--max_duration was reached"
        return not self.stopped

    def _is_over(self) -> bool:
        return self.deadline_s is not None and time.monotonic() >= self.deadline_s

    def _measure_one(self, run: PlannedRun) -> None:
        """One run, on the engine that is running or on a new one. In a sweep, what cannot be
        measured is noted; in a series it is a mistake that concerns the whole."""
        from speedbench.session import NotStoredError

        try:
            outcome = self._measured(run)
        except NotStoredError:
            raise
        except UserError as error:
            if self.plan.kind == "series":
                raise
            self._note(run, str(error))
        else:
            self._tell(run, outcome)

    def _measured(self, run: PlannedRun) -> Outcome | None:
        """How the run ended; None if nothing of it was left to measure."""
        from speedbench import inputs, series, session
        from speedbench.configure import refuse_unsupported
        from speedbench.target import Target, call_complete, resumed_target

        replicas = self.start.replicas
        config = self._within_time(self.plan.config_of(run))
        prepared = self.inputs[inputs.input_identity(config)]
        directory = self.plan.directory / run.name
        replicas.agree(lambda: refuse_unsupported(config))
        replicas.agree(lambda: inputs.refuse_missing_checkpoints(config))
        replicas.from_first(lambda: series.refuse_headless(directory))
        target = replicas.from_first(
            lambda: (
                resumed_target(directory, config, prepared)
                if (directory / "manifest.json").is_file()
                else Target(directory)
            )
        )
        if target.is_complete(prepared):
            replicas.agree(lambda: call_complete(target) if replicas.is_first else None)
            return None
        self._open(config)
        info = session.engine_info(self.engine, replicas)
        replicas.agree(lambda: inputs.within_limit(config, prepared, info))
        self.claim()
        return self._on_engine(config, prepared, target, directory)

    def _on_engine(
        self, config: RunConfig, prepared: Prepared, target: Target, directory: Path
    ) -> Outcome:
        """Measure; whatever ends otherwise than in order ends the engine, too, so that nothing of
        it is left to the next run."""
        ended_well = False
        try:
            outcome = cli_measure.measure(
                config, prepared, self.engine, target, self.signals, self.start, self.fault
            )
            ended_well = outcome.end.reason == "finished"
        finally:
            if not ended_well:
                self.close()
        if self.start.replicas.is_first:
            cli_measure.try_known_answer(config, prepared, directory)
        return outcome

    def _within_time(self, config: RunConfig) -> RunConfig:
        """--max_duration bounds all runs together, from the first one's start."""
        if config.max_duration is None:
            return config
        if self.deadline_s is None:
            self.deadline_s = time.monotonic() + config.max_duration
        left_s = max(0.001, self.deadline_s - time.monotonic())
        return config.model_copy(update={"max_duration": left_s})

    # ------------------------------------------------------------ the engine

    def _open(self, config: RunConfig) -> None:
        """Start the engine, unless it runs. One that did not start is not tried again for the
        other runs that need it."""
        if self.is_open:
            return
        if self.refusal:
            raise UserError(self.refusal)
        self._say(f"starting {config.engine}{started_as(config)}")
        try:
            with self.signals.held_back():
                self.engine, self.fault = cli_measure.start_engines(config, self.start)
        except UserError as error:
            self.refusal = str(error)
            raise
        except Exception as error:
            if self.plan.kind == "series":
                raise
            self.refusal = f"the engine did not start: {type(error).__name__}: {error}"
            raise UserError(self.refusal) from error
        self.is_open = True

    def close(self) -> None:
        engine, self.engine, self.is_open, self.fault = self.engine, None, False, ""
        if engine is not None:
            cli_measure.close_engine(engine)

    # ------------------------------------------------------------ telling

    def _note(self, run: PlannedRun, why: str) -> None:
        """A run that could not be measured."""
        from speedbench import series

        self.n_told += 1
        self.not_measured[run.name] = why
        self.claim()
        if self.start.replicas.is_first:
            series.write(self.plan, self.not_measured, self.kept)
        self._say(f"{self._place()} {run.name} was not measured: {why}")

    def _tell(self, run: PlannedRun, outcome: Outcome | None) -> None:
        self.n_told += 1
        if outcome is None:
            self._say(f"{self._place()} {run.name} was complete already")
            return
        seconds = (outcome.end.ended_ns - outcome.end.started_ns) / 1e9
        text = f"{outcome.n_committed} of {outcome.n_rows} conversations in {seconds:.1f} s"
        if outcome.n_failed:
            text += f", {outcome.n_failed} of them failed"
        if outcome.end.reason != "finished":
            text += f"; {outcome.end.reason}: {outcome.end.message}"
        self._say(f"{self._place()} {run.name}: {text}")
        if cli_measure.has_failed(outcome):
            self.n_failed += 1
        if outcome.end.reason == "stopped":
            self.stopped = outcome.end.message

    def _place(self) -> str:
        return f"{self.n_told}/{len(self.left)}"

    def _say(self, text: str) -> None:
        if self.start.replicas.is_first:
            print(f"speedbench: {text}", file=sys.stderr, flush=True)

    def exit_code(self) -> int:
        if self.stopped:
            done = self.n_told - len(self.not_measured)
            self._say(
                f"stopped early ({self.stopped}): {done} of {len(self.left)} run(s) were begun, "
                "and what they measured is stored; go on with the same command and --resume"
            )
        elif self.not_measured or self.n_failed:
            self._say(
                f"{len(self.not_measured)} run(s) could not be measured and {self.n_failed} "
                "failed: mend what is told above and use --resume"
            )
        if self.signals.received is not None:
            return 128 + self.signals.received
        return FAILED if self.not_measured or self.n_failed else OK


def started_as(config: RunConfig) -> str:
    """What an engine is started for, beside its target."""
    k = config.effective_draft_length
    drafts = f" with {config.speculative_algorithm} K={k}" if k else ""
    slots = config.max_num_seqs or config.concurrency
    return f"{drafts}, for {slots} request(s) at a time"


def print_results(directory: Path, place: str) -> None:
    """What the runs of a folder say together: of a sweep its curves, else what they come to.

    place  what the user calls the folder
    """
    from speedbench.report.arms import load_arms
    from speedbench.report.layout_pareto import of_sweep

    try:
        arms = load_arms([directory])
        blocks = list(of_sweep(arms))
        if not blocks:
            print_summary(directory, place)
            return
        _draw([*_above(arms), *blocks])
    except Exception as error:  # noqa: BLE001 - how the measuring ended decides the exit code
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        print(f"speedbench: no report: {what}", file=sys.stderr)
    print(f"\nRuns: {place}. The whole report: speedbench report {place}", file=sys.stderr)


def _above(arms: Sequence[Arm]) -> Iterator[Block]:
    """What must be known before any number: what is wrong with the runs, each thing once."""
    from speedbench.checks import all_checks
    from speedbench.report.blocks import Heading, Paragraph

    n_runs = sum(len(arm.runs) for arm in arms)
    yield Heading(f"speedbench: sweep of {len(arms)} arms, {n_runs} runs", 1)
    wrong: dict[str, list[str]] = {}
    for arm in arms:
        for run in arm.runs:
            for check in all_checks(run):
                if check.level == "error":
                    wrong.setdefault(check.sentence, []).append(run.directory.name)
    for sentence, names in wrong.items():
        where = "all runs" if len(names) == n_runs else ", ".join(names)
        yield Paragraph(f"{where}: {sentence}", "error")


def _draw(blocks: Sequence[Block]) -> None:
    from rich.console import Console

    from speedbench.report import console

    console.draw(blocks, Console())
