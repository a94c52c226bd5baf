"""What the harness costs: CPU per step, what it does to the times it records, memory, stalls.

    .venv/bin/python scripts/overhead.py --quick                      # about a minute
    .venv/bin/python scripts/overhead.py --specdec_bench DIR --out docs/overhead.md

A null engine gives steps on the real clock from a process of its own, or as fast as it is polled;
the loop and the store are those of a run. DIR is your own checkout of the publisher's
examples/specdec_bench (NVIDIA/Model-Optimizer): its run loop then drives the same null engine, in
the same session. Every case is a fresh process. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import gc
import importlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engines.null_paced import Pace, Paced, Unpaced  # noqa: E402
from speedbench import cli_measure, store  # noqa: E402
from speedbench.loop import Loop  # noqa: E402
from speedbench.share import Progress, broken, deadline, first_of  # noqa: E402
from speedbench.types import (  # noqa: E402
    Conversation,
    Engine,
    Prompt,
    Request,
    Sampling,
    Step,
)
from speedbench.watchdog import Watchdog  # noqa: E402
from tests.builders import manifest  # noqa: E402

Ints = np.ndarray[Any, np.dtype[np.int64]]
Harness = Literal["speedbench", "published"]

CONCURRENCIES = (1, 32, 256, 1024, 4096)
PERIODS_MS = (2, 10, 30)
ACCEPTANCE = 0.7
PREFILL_MS = 30
TIMEOUT_S = 300
LONG = 16384
LENGTHS = (512, 1024, 2048, 4096)
"""Of answers; the publisher's run.py asks for 4,096 tokens unless it is told otherwise."""
PROMPT = tuple(range(3, 35))


# ---------------------------------------------------------------- arithmetic


def tokens_per_step(draft_length: int, acceptance: float = ACCEPTANCE) -> float:
    """Mean tokens of a decode step: each draft is kept with the same probability, up to the first
    that is not."""
    return sum(acceptance**k for k in range(draft_length + 1))


def gaps_ns(request: Ints, time_ns: Ints) -> Ints:
    """Times between consecutive steps of the same request: of (S,) request numbers and stamps, in
    order within each request."""
    order = np.argsort(request, kind="stable")
    same = np.diff(request[order]) == 0
    return np.asarray(np.diff(time_ns[order])[same])


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and 99th percentile of times, in ms."""

    median_ms: float
    p99_ms: float

    @classmethod
    def of(cls, times_ns: Ints) -> Spread:
        if not len(times_ns):
            return cls(float("nan"), float("nan"))
        median, p99 = np.quantile(times_ns, (0.5, 0.99)) / 1e6
        return cls(float(median), float(p99))


def distortion(recorded: float, true: float) -> float:
    """By which share of the true value the recorded one is off; negative: too small."""
    return recorded / true - 1 if true else float("nan")


def own_us(cpu_s: float, engine_s: Sequence[float], n_steps: int) -> float:
    """Microseconds per step that are the harness's: CPU of all, less the mean of the engine's."""
    return 1e6 * (cpu_s - statistics.mean(engine_s)) / n_steps


def growth_mib(samples: Sequence[tuple[int, float]]) -> float:
    """The median of resident memory in the last quarter of the steps, less that in the second: of
    (steps so far, MiB). It rises and falls with every part, and is filled in the first."""
    n = samples[-1][0] if samples else 0
    second, last = (
        [mib for at, mib in samples if begin * n < at <= end * n]
        for begin, end in ((0.25, 0.5), (0.75, 1))
    )
    return statistics.median(last) - statistics.median(second) if second and last else float("nan")


# ---------------------------------------------------------------- cases


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement, in a process of its own.

    step_ms   period of the engine's steps; 0: as fast as it is polled
    seconds   of a paced case: how long the engine is busy with it; a request then lasts a third
    n_steps   of an unpaced case, about: the rows are as many as make them, at least twice those in
              flight
    objects   the engine hands over an object for each step, as the published loop always gets them;
              else a batch
    told      the progress line is made every second, as on a terminal
    decoded   the published loop turns replies into text with a real (word-level) tokenizer, as it
              does in use; else its tokenizer costs nothing
    """

    harness: Harness
    concurrency: int
    draft_length: int = 3
    step_ms: float = 0
    stamps: Literal["engine", "arrival"] = "arrival"
    output_length: int = 1024
    seconds: float = 6
    n_steps: int = 1_000_000
    decoded: bool = False
    told: bool = False
    objects: bool = False

    @property
    def pace(self) -> Pace:
        return Pace(
            self.draft_length,
            int(self.step_ms * 1e6),
            PREFILL_MS * 10**6,
            self.stamps,
            ACCEPTANCE,
            batches=self.harness == "speedbench" and not self.objects,
        )

    @property
    def tokens(self) -> int:
        """Of every answer."""
        if not self.step_ms:
            return self.output_length
        n_steps = max(2.0, self.seconds / 3 * 1e3 / self.step_ms)
        return min(LONG, round(n_steps * tokens_per_step(self.draft_length)))

    @property
    def n_rows(self) -> int:
        steps_each = self.tokens / tokens_per_step(self.draft_length)
        if self.step_ms:
            rounds = max(1.0, self.seconds * 1e3 / self.step_ms / steps_each)
            return round(self.concurrency * rounds)
        return max(2 * self.concurrency, round(self.n_steps / steps_each))

    def rows(self) -> list[Conversation]:
        return [
            Conversation(f"c{i}", f"category {i % 11}", token_turns=(PROMPT,))
            for i in range(self.n_rows)
        ]

    def label(self) -> str:
        pace = f"{self.step_ms:g} ms steps" if self.step_ms else "unpaced"
        return f"{self.harness}, {self.concurrency} in flight, K={self.draft_length}, {pace}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one case showed; NaN where it does not apply.

    cpu_us      CPU of the whole process per step
    own_us      the same less the engine's own cost, which bare polling of the same steps takes
    beyond_streams_us  the same less what trivial readers of one stream per request cost: for a
                harness that is built on such streams (the published loop)
    busy        CPU seconds per second while it ran (a paced case)
    step_*, ttft_*  as recorded, and by the engine's own clock
    period_ms   median of the times between the engine's own steps
    worst_ms    unpaced: the longest time between two polls; paced: the longest time a step waited
                to be seen
    grown_mib   memory in the last quarter of the steps, beyond that in the second
    rss_mib     memory at its largest, less that before the run
    merged      share of the engine's steps that were not told apart from the next
    """

    n_steps: int
    cpu_us: float
    own_us: float = float("nan")
    beyond_streams_us: float = float("nan")
    busy: float = float("nan")
    step: Spread = Spread(float("nan"), float("nan"))
    step_true: Spread = Spread(float("nan"), float("nan"))
    ttft: Spread = Spread(float("nan"), float("nan"))
    ttft_true: Spread = Spread(float("nan"), float("nan"))
    period_ms: float = float("nan")
    worst_ms: float = float("nan")
    grown_mib: float = float("nan")
    rss_mib: float = float("nan")
    merged: float = 0.0
    fault: str = ""


# ---------------------------------------------------------------- the engine alone


class Watched:
    """An engine and the longest time between two of its polls."""

    def __init__(self, engine: Paced | Unpaced) -> None:
        self.engine = engine
        self.n_steps = 0
        self.longest_ns = 0
        self.samples: list[tuple[int, float]] = []
        self._returned_ns = 0
        self._next_sample = 0

    def submit(self, request: Request) -> None:
        self.engine.submit(request)

    def poll(self) -> Sequence[Step]:
        if self._returned_ns:
            self.longest_ns = max(self.longest_ns, time.monotonic_ns() - self._returned_ns)
        steps = self.engine.poll()
        self.n_steps += len(steps)
        if self.n_steps >= self._next_sample:
            self._next_sample += 100_000
            self.samples.append((self.n_steps, rss_mib()))
        self._returned_ns = time.monotonic_ns()
        return steps

    def counters(self) -> None:
        return None

    def describe(self) -> Any:
        return self.engine.describe()

    def forget(self) -> None:
        return None

    def close(self) -> None:
        self.engine.close()


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def drained(case: Case) -> tuple[float, int]:
    """CPU seconds and steps of the engine when nothing is done with what it gives."""
    engine = Unpaced(case.pace)
    sampling = Sampling()
    waiting = iter(case.rows())
    n_steps = 0
    began_s = time.process_time()
    while True:
        while engine.n_live < case.concurrency and (row := next(waiting, None)) is not None:
            engine.submit(Request(row.id, PROMPT, case.tokens, sampling))
        if not engine.n_live:
            return time.process_time() - began_s, n_steps
        n_steps += len(engine.poll())


# ---------------------------------------------------------------- this harness


def run_ours(engine: Engine, case: Case, directory: Path) -> tuple[float, float]:
    """All rows of the case through the loop, the watchdog and the store, as in a run: CPU seconds
    until everything is on disk, and CPU seconds per second while the loop ran."""
    prompt, rows = Prompt(PROMPT, "00"), case.rows()
    store.create(directory)
    store.write_manifest(directory, manifest(draft_length=case.draft_length, status="running"))
    gc.collect()
    began_s, cpu_s = time.monotonic(), time.process_time()
    writer = store.Writer(directory, 0)
    stop = first_of(deadline(3600), lambda: broken(writer), lambda: None)
    loop = Loop(
        engine,
        lambda _row, _turn, _replies: prompt,
        Sampling(),
        output_length=case.tokens,
        concurrency=case.concurrency,
        id_prefix="s0-",
        commit=writer.commit,
        stop=first_of(stop, lambda: watchdog.fault or None),
        idle=writer.give_turn,
    )
    watchdog = Watchdog(
        loop, 600, stacks=directory / "stalls", stop=stop, abandon=lambda dog: sys.exit(dog.fault)
    )
    if case.told:  # this process does nothing else
        cli_measure.LOG_S = cli_measure.TERMINAL_S
    progress = Progress(len(rows), started_s=time.monotonic(), loop=loop)
    with cli_measure.showing(progress, directory, case.told), watchdog:
        end = loop.run(rows)
    busy = (time.process_time() - cpu_s) / (time.monotonic() - began_s)
    writer.close()
    cpu_s = time.process_time() - cpu_s
    engine.close()
    if end.reason != "finished":
        raise SystemExit(f"{case.label()}: {end.reason}: {end.message}")
    return cpu_s, busy


def measure_ours(case: Case, directory: Path) -> Outcome:
    engine_s = [] if case.step_ms else [drained(case)[0]]
    engine = Watched(Paced(case.pace) if case.step_ms else Unpaced(case.pace))
    rss_before = rss_mib()
    cpu_s, busy = run_ours(engine, case, directory)
    base = Outcome(
        engine.n_steps,
        1e6 * cpu_s / engine.n_steps,
        busy=busy,
        worst_ms=engine.longest_ns / 1e6,
        grown_mib=growth_mib(engine.samples),
        rss_mib=max(mib for _, mib in engine.samples) - rss_before,
    )
    if not case.step_ms:
        engine_s.append(drained(case)[0])
        return dataclasses.replace(base, own_us=own_us(cpu_s, engine_s, engine.n_steps))
    request, time_ns, submitted_ns, names = _stored(directory)
    arrived = np.array([engine.engine.arrived_ns[name] for name in names])
    return _with_times(base, engine.engine, case, request, time_ns, submitted_ns, arrived)


def _stored(directory: Path) -> tuple[Ints, Ints, Ints, list[str]]:
    """Of a run's parts: request number and stamp of each step (S,); submission and name of each
    request (R,)."""
    import pyarrow.parquet as pq

    steps = pq.read_table(directory / "steps", columns=["request_id", "step", "time_ns"])
    turns = pq.read_table(directory / "turns", columns=["request_id", "submitted_ns"])
    names = turns["request_id"].to_pylist()
    number_of = {name: i for i, name in enumerate(names)}
    request = np.array([number_of[name] for name in steps["request_id"].to_pylist()])
    order = np.lexsort((steps["step"].to_numpy(), request))
    return (
        request[order],
        steps["time_ns"].to_numpy()[order],
        turns["submitted_ns"].to_numpy(),
        names,
    )


def _with_times(
    base: Outcome,
    engine: Paced | Unpaced,
    case: Case,
    request: Ints,
    time_ns: Ints,
    submitted_ns: Ints,
    arrived_ns: Ints,
) -> Outcome:
    """The recorded times beside the engine's own: a stamp tells which of its steps it was."""
    own, seen = np.array(engine.engine_ns), np.array(engine.seen_ns)
    if case.harness == "published":
        # It stamps in each request's own coroutine, after what was seen and before what came next.
        step = np.searchsorted(seen, time_ns, side="right") - 1
    else:
        step = np.searchsorted(own if case.stamps == "engine" else seen, time_ns)
    true_ns = own[step]
    first = np.append(True, np.diff(request) != 0)
    return dataclasses.replace(
        base,
        step=Spread.of(gaps_ns(request, time_ns)),
        step_true=Spread.of(gaps_ns(request, true_ns)),
        ttft=Spread.of(time_ns[first] - submitted_ns),
        ttft_true=Spread.of(true_ns[first] - arrived_ns),
        period_ms=float(np.median(np.diff(own))) / 1e6,
        worst_ms=float((seen - own).max()) / 1e6,
    )


# ---------------------------------------------------------------- the published loop


class Streams:
    """What the published loop is written for: an engine that gives each request a stream of its
    own, each item with all tokens so far. Over the same null engine."""

    def __init__(self, engine: Paced | Unpaced, output_length: int) -> None:
        self.engine = engine
        self.n_steps = 0
        self._output_length = output_length
        self._sampling = Sampling()
        self._streams: dict[str, _Stream] = {}
        self._pump: asyncio.Task[None] | None = None
        self._reading = False

    def generate(self, *, request_id: str, **_asked: object) -> _Stream:
        stream = self._streams[request_id] = _Stream()
        self.engine.submit(Request(request_id, PROMPT, self._output_length, self._sampling))
        if isinstance(self.engine, Paced):
            if not self._reading:
                self._reading = True
                loop = asyncio.get_running_loop()
                loop.add_reader(self.engine.fileno(), self._hand_out)
        elif self._pump is None or self._pump.done():
            self._pump = asyncio.ensure_future(self._go_on())
        return stream

    async def _go_on(self) -> None:
        while self._streams:
            self._hand_out()
            await asyncio.sleep(0)  # every stream's reader has its turn

    def _hand_out(self) -> None:
        steps = self.engine.poll()
        self.n_steps += len(steps)
        for step in steps:
            stream = self._streams[step.request_id]
            stream.put(step)
            if step.finish_reason is not None:
                del self._streams[step.request_id]


class _Stream:
    """One request's items; an item is its own completion, as little as there can be."""

    __slots__ = ("_waiter", "finished", "fresh", "outputs", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.outputs = (self,)
        self.finished = False
        self.fresh = False
        self._waiter: asyncio.Future[None] | None = None

    def put(self, step: Step) -> None:
        self.token_ids += step.token_ids
        self.finished = step.finish_reason is not None
        self.fresh = True
        if self._waiter is not None:
            self._waiter.set_result(None)
            self._waiter = None

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> _Stream:
        if not self.fresh:
            if self.finished:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self.fresh = False
        return self


def streamed(case: Case) -> float:
    """CPU seconds of the engine's streams when their readers do nothing."""
    streams = Streams(Unpaced(case.pace), case.tokens)
    limit = asyncio.Semaphore(case.concurrency)

    async def read(name: str) -> None:
        async with limit:
            async for _ in streams.generate(request_id=name):
                pass

    async def read_all() -> None:
        await asyncio.gather(*(read(row.id) for row in case.rows()))

    began_s = time.process_time()
    asyncio.run(read_all())
    return time.process_time() - began_s


class NoTokenizer:
    """Costs nothing."""

    eos_token_id = -2  # never made

    def apply_chat_template(self, *_args: object, **_options: object) -> str:
        return ""

    def encode(self, *_args: object, **_options: object) -> list[int]:
        return list(PROMPT)

    def decode(self, _tokens: Sequence[int]) -> str:
        return ""


class WordTokenizer(NoTokenizer):
    """Decodes with the library that every checkpoint's fast tokenizer is."""

    def __init__(self, n_words: int) -> None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = {f"w{i}": i for i in range(n_words)}
        self._tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0"))
        )

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens))


def measure_published(case: Case, directory: Path, harness: Path) -> Outcome:
    """Its run loop, its vLLM wrapper and its metrics, unchanged; in place of vLLM, the null engine.

    What it does when the run is over (statistics, files) is not counted.
    """
    published = imported(harness, NAMES)
    engine_s = [] if case.step_ms else [drained(case)[0]]
    streams_s = [] if case.step_ms else [streamed(case)]
    engine: Paced | Unpaced = Paced(case.pace) if case.step_ms else Unpaced(case.pace)
    streams = Streams(engine, case.tokens)
    with published.engine_is(streams):
        model = published.models.VLLMModel(
            "null", max_concurrent_requests=case.concurrency, sampling_kwargs={"temperature": 0}
        )
    kept = Kept()
    metrics = [published.metrics.AcceptanceRate(), published.metrics.Timing(1), kept]
    runner = published.runners.SimpleRunner(model, metrics=metrics)
    ended: list[tuple[float, float]] = []
    runner.process_metrics_final = lambda _outputs: ended.append(
        (time.process_time(), time.monotonic())
    )
    request = published.base.Request
    rows = [request(question_id=i, turns=["a"]) for i in range(case.n_rows)]
    tokenizer = WordTokenizer(8 * max(CONCURRENCIES)) if case.decoded else NoTokenizer()
    gc.collect()
    rss_before, began_s, cpu_s = rss_mib(), time.monotonic(), time.process_time()
    asyncio.run(
        published.run.run_loop(
            runner,
            types.SimpleNamespace(data=rows),
            tokenizer,
            case.tokens,
            lambda text: text,
            case.concurrency,
            tokenizer.eos_token_id,
        )
    )
    engine.close()
    cpu_s, wall_s = ended[0][0] - cpu_s, ended[0][1] - began_s
    n_steps = sum(len(times) - 1 for times in kept.times.values())
    base = Outcome(
        n_steps,
        1e6 * cpu_s / n_steps,
        busy=cpu_s / wall_s,
        rss_mib=rss_mib() - rss_before,
        merged=1 - n_steps / streams.n_steps,
    )
    if not case.step_ms:
        engine_s.append(drained(case)[0])
        streams_s.append(streamed(case))
        return dataclasses.replace(
            base,
            own_us=own_us(cpu_s, engine_s, n_steps),
            beyond_streams_us=own_us(cpu_s, streams_s, n_steps),
        )
    names = sorted(kept.times)
    number = np.repeat(np.arange(len(names)), [len(kept.times[name]) - 1 for name in names])
    time_ns = (np.concatenate([kept.times[name][1:] for name in names]) * 1e9).astype(np.int64)
    submitted_ns = np.array([kept.times[name][0] * 1e9 for name in names]).astype(np.int64)
    arrived_ns = np.array([engine.arrived_ns[f"{name}.0"] for name in names])
    return _with_times(base, engine, case, number, time_ns, submitted_ns, arrived_ns)


class Kept:
    """A metric of the published harness's kind that keeps the times it is handed."""

    def __init__(self) -> None:
        self.times: dict[int, list[float]] = {}

    def process_step(self, outputs: Mapping[str, Any], request_id: int, _turn_id: int) -> None:
        self.times[request_id] = outputs["token_times"]


@dataclass(frozen=True, slots=True)
class Published:
    """The modules of a checkout."""

    run: Any
    models: Any
    metrics: Any
    runners: Any
    base: Any

    @contextlib.contextmanager
    def engine_is(self, streams: Streams) -> Iterator[None]:
        """What its vLLM wrapper starts is this."""
        wrapper = sys.modules["specdec_bench.models.vllm"]
        wrapper.AsyncLLM.from_engine_args = lambda _arguments: streams
        yield


MEDUSA = {"specdec_bench.models.specbench_medusa": ("SpecBenchMedusaModel",)}
"""A wrapper of theirs that nobody asks for here, and that alone would import torch."""

NAMES = {
    "vllm": ("SamplingParams",),
    "vllm.engine": (),
    "vllm.engine.arg_utils": ("AsyncEngineArgs",),
    "vllm.inputs": ("TokensPrompt",),
    "vllm.v1": (),
    "vllm.v1.engine": (),
    "vllm.v1.engine.async_llm": ("AsyncLLM",),
    **MEDUSA,
}
"""A vLLM that is only names: the null engine stands in for it."""


def imported(harness: Path, names: Mapping[str, Sequence[str]]) -> Published:
    """A checkout's modules. In place of those in `names`, module -> names, are classes that take
    everything."""
    for name, values in names.items():
        module = types.ModuleType(name)
        for value in values:
            setattr(module, value, type(value, (types.SimpleNamespace,), {}))
        sys.modules[name] = module
    sys.path.insert(0, str(harness))
    sys.dont_write_bytecode = True
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return Published(
            importlib.import_module("run"),
            importlib.import_module("specdec_bench.models"),
            importlib.import_module("specdec_bench.metrics"),
            importlib.import_module("specdec_bench.runners"),
            importlib.import_module("specdec_bench.datasets.base"),
        )


# ---------------------------------------------------------------- one session


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured; each cost `repeats` times, in turn."""

    costs: tuple[Case, ...]
    times: tuple[Case, ...]
    memory: tuple[Case, ...]
    repeats: int


def plan(quick: bool, published: bool) -> Plan:
    harnesses: tuple[Harness, ...] = ("speedbench", "published") if published else ("speedbench",)
    n_steps, seconds = (150_000, 1.5) if quick else (1_500_000, 6)
    in_flight = (1, 256) if quick else CONCURRENCIES
    costs = [
        Case(harness, c, n_steps=n_steps, output_length=512)
        for c in in_flight
        for harness in harnesses
    ]
    costs.append(Case("speedbench", 256, n_steps=n_steps, output_length=512, told=True))
    if published and not quick:
        costs.append(Case("published", 256, n_steps=n_steps, output_length=512, decoded=True))
    lengths = LENGTHS[:1] if quick else LENGTHS
    costs += [
        Case(harness, 256, n_steps=n_steps, output_length=length)
        for length in lengths[1:]
        for harness in harnesses
    ]
    costs += [
        Case("speedbench", 256, n_steps=n_steps, output_length=length, objects=True)
        for length in lengths
    ]
    if not quick:
        costs += [Case("speedbench", 256, k, output_length=512, n_steps=n_steps) for k in (0, 1, 7)]
        costs += [Case("speedbench", 256, k, output_length=LONG) for k in (0, 7)]
    paces = [(256, 10), (4096, 10)] if quick else [(c, p) for c in in_flight for p in PERIODS_MS]
    times = [Case("speedbench", c, step_ms=p, seconds=seconds) for c, p in paces]
    times += [
        Case("speedbench", c, step_ms=10, stamps="engine", seconds=seconds)
        for c in ((4096,) if quick else (256, 4096))
    ]
    if not quick:
        times.append(Case("speedbench", 32, 7, step_ms=2, seconds=32))  # answers of 16k
    if published:
        paces = [(256, 10)] if quick else [(c, 10) for c in in_flight] + [(256, 2), (256, 30)]
        times += [Case("published", c, step_ms=p, seconds=seconds) for c, p in paces]
    memory = [
        Case("speedbench", 256, output_length=4096, n_steps=4_000_000 if quick else 10_000_000)
    ]
    if not quick:
        memory.append(Case("speedbench", 4096, 7, output_length=LONG, n_steps=1))
    return Plan(tuple(costs), tuple(times), tuple(memory), 1 if quick else 3)


def measured(case: Case, harness: Path | None) -> Outcome:
    """The case in a process of its own."""
    command = [sys.executable, __file__, "--measure", json.dumps(dataclasses.asdict(case))]
    if harness is not None:
        command += ["--specdec_bench", str(harness)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Outcome(0, float("nan"), fault=f"not done in {TIMEOUT_S} s")
    if done.returncode:
        raise SystemExit(f"{case.label()} failed:\n{done.stderr[-2000:]}")
    return outcome_of(json.loads(done.stdout.splitlines()[-1]))


def outcome_of(told: Mapping[str, Any]) -> Outcome:
    values: dict[str, Any] = {k: Spread(**v) if isinstance(v, dict) else v for k, v in told.items()}
    return Outcome(**values)


def measure(case: Case, harness: Path | None) -> Outcome:
    """In this process."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        if case.harness == "speedbench":
            return measure_ours(case, Path(folder) / "run")
        if harness is None:
            raise SystemExit("a published case needs --specdec_bench")
        os.chdir(folder)  # it writes where it stands
        with contextlib.redirect_stdout(io.StringIO()):
            return measure_published(case, Path(folder), harness)


@dataclass(frozen=True, slots=True)
class Session:
    """All outcomes; of each cost several."""

    plan: Plan
    costs: Mapping[Case, Sequence[Outcome]]
    times: Mapping[Case, Outcome]
    memory: Mapping[Case, Outcome]
    command: str
    harness: Path | None

    def own_us(self, case: Case) -> float:
        return statistics.median(outcome.own_us for outcome in self.costs[case])

    def beyond_streams_us(self, case: Case) -> float:
        return statistics.median(outcome.beyond_streams_us for outcome in self.costs[case])


def session(chosen: Plan, harness: Path | None, command: str) -> Session:
    costs: dict[Case, list[Outcome]] = {case: [] for case in chosen.costs}
    for _ in range(chosen.repeats):
        for case in chosen.costs:
            outcome = measured(case, harness)
            costs[case].append(outcome)
            print(f"{case.label()}: {outcome.own_us:.2f} us per step", flush=True)
    times, memory = {}, {}
    for case in chosen.times:
        times[case] = found = measured(case, harness)
        print(f"{case.label()}: median {found.step.median_ms:.3f} ms {found.fault}", flush=True)
    for case in chosen.memory:
        memory[case] = found = measured(case, harness)
        print(f"{case.label()}: {found.grown_mib:+.0f} MiB", flush=True)
    return Session(chosen, costs, times, memory, command, harness)


# ---------------------------------------------------------------- the page


def page(s: Session) -> str:
    blocks = [
        "# What the harness costs",
        "Made by `scripts/overhead.py`; every number is of one session, each case of a fresh "
        "process. The null engine stands in for an engine: at every step it hands over the tokens "
        "of all requests in flight (always the same ones, which costs it nothing), from a process "
        "of its own on the real clock, or, where the cost is measured, as fast as it is polled. "
        "The loop, the watchdog and the store are those of a run, with every step written to "
        "disk.",
        *_facts(s),
        "## Against the targets",
        _targets(s),
        "## CPU per step",
        "CPU time of the whole process (the thread that polls, the thread that writes), per step "
        "of one request, less what bare polling of the same steps takes; median of "
        f"{s.plan.repeats} run(s). To `speedbench` the engine hands what it made in one step as "
        "columns, the form in which the vLLM adapter does; where it says so, and to the published "
        "loop, as an object for each request. Making either is the engine's; what the adapter "
        "takes to make columns of vLLM's messages is in the figures of docs/front_end.md. "
        f"{_streams_sentence(s)}",
        _cost_table(s),
        "## What is recorded, beside the engine's own clock",
        "The engine stamps each of its steps itself, when it has made the message. `speedbench` "
        "records the arrival of a step in its own process here, as with engines that tell no time "
        "of their own; the rows marked `engine's stamps` are those of engines that do (vLLM). "
        "Off by: recorded / true - 1, of the quantile over all steps and requests. Longest wait: "
        "from the engine's stamp to the poll that saw the step. An engine period above the nominal "
        "one means that the machine did not keep up: the engine itself was late.",
        _times_table(s),
        "## Memory",
        "Steps of conversations in flight are kept, 24 bytes each and 4 for each token, until the "
        f"conversation ends; with answers of {LONG:,} tokens nearly all are in flight at once.",
        _memory_table(s),
        "## Other tools",
        "GuideLLM and AIPerf speak HTTP to a server and cannot be handed an engine in their own "
        "process: n/a here.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _facts(s: Session) -> list[str]:
    harness = "" if s.harness is None else f", publisher's harness at {commit(s.harness)}"
    return [
        f"- Date: {date.today().isoformat()}\n"
        f"- Machine: {cpu()}, {os.cpu_count()} CPUs, load when it ended "
        f"{os.getloadavg()[1]:.1f}\n"
        f"- Python {platform.python_version()}, numpy {np.__version__}, pyarrow "
        f"{_version('pyarrow')}, speedbench at {commit(ROOT)}{harness}\n"
        f"- Command: `{s.command}`",
        "**The machine was not idle: costs and distortions are those of a busy one.**"
        if os.getloadavg()[1] > 0.75 * (os.cpu_count() or 1) + 1
        else "",
    ]


def _streams_sentence(s: Session) -> str:
    if s.harness is None:
        return "The published loop was not given."
    return (
        "The published run loop is written for an engine that gives each request a stream of its "
        "own; handing a step to such a stream and waking its reader is part of its cost in the "
        "first figure. The second takes off what readers take that do nothing. Its tokenizer costs "
        "nothing here but where `replies decoded` is said; it stores nothing before the end, and "
        "its statistics at the end are not counted. No engine is loaded in its process, whose "
        "objects Python's garbage collector would otherwise walk through."
    )


def _targets(s: Session) -> str:
    rows = []
    ours = [c for c in s.costs if c.harness == "speedbench"]
    worst = max(ours, key=s.own_us)
    rows.append(
        ("harness per step polled", "under 3 us", f"{s.own_us(worst):.2f} us at worst "
         f"({worst.concurrency} in flight)", _verdict(s.own_us(worst) < 3))
    )  # fmt: skip
    for case, found in s.times.items():
        if (case.harness, case.concurrency, case.step_ms) == ("speedbench", 4096, 10):
            offs = _off(found.step, found.step_true)
            rows.append(
                (
                    f"step time, 4,096 in flight, 10 ms, {_stamps(case)}",
                    "median and P99 within 1 %",
                    f"{offs[0]:+.2%}, {offs[1]:+.2%}",
                    _verdict(all(abs(off) < 0.01 for off in offs))
                    + (", by construction" if case.stamps == "engine" else ""),
                )
            )
    for case in s.costs:
        if (case.harness, case.concurrency) != ("published", 256):
            continue
        what = f"answers of {case.tokens:,} tokens" + ", decoded" * case.decoded
        for objects in (False, True):
            ours_us = s.own_us(
                dataclasses.replace(case, harness="speedbench", decoded=False, objects=objects)
            )
            ratio, beyond = s.own_us(case) / ours_us, s.beyond_streams_us(case) / ours_us
            handed = "objects as the other is" if objects else "columns"
            rows.append(
                (f"published loop's CPU per step / ours handed {handed}, 256 in flight, {what}",
                 "at least 10",
                 f"{ratio:.1f}; without the streams it is written for {beyond:.1f}",
                 _verdict(ratio >= 10))
            )  # fmt: skip
    for case, found in s.memory.items():
        if case.concurrency == 256:
            rows.append(
                (f"memory over {found.n_steps / 1e6:.1f} million steps", "flat",
                 f"{found.grown_mib:+.0f} MiB in the last quarter of the steps, beside the second",
                 _verdict(found.grown_mib < FLAT_MIB) if found.n_steps > 9e6 else "too few to tell")
            )  # fmt: skip
    return _table(("what", "target", "found", ""), rows)


FLAT_MIB = 32
"""Growth that counts as none: by so much one part differs from another. A leak of 8 bytes a step
would be 40 MiB in five million steps."""


def _verdict(met: bool) -> str:
    return "met" if met else "**not met**"


def _off(recorded: Spread, true: Spread) -> tuple[float, float]:
    return (
        distortion(recorded.median_ms, true.median_ms),
        distortion(recorded.p99_ms, true.p99_ms),
    )


def _stamps(case: Case) -> str:
    return "engine's stamps" if case.stamps == "engine" else "stamped on arrival"


def _cost_table(s: Session) -> str:
    rows = []
    for case, outcomes in s.costs.items():
        name = case.harness + (", replies decoded" if case.decoded else "")
        name += ", progress told" if case.told else ""
        name += ", an object for each step" if case.objects else ""
        streams = s.beyond_streams_us(case) if case.harness == "published" else None
        stall = max(o.worst_ms for o in outcomes) if case.harness == "speedbench" else None
        rows.append(
            (name, f"{case.concurrency:,}", str(case.draft_length), f"{case.tokens:,}",
             f"{outcomes[0].n_steps:,}", f"{s.own_us(case):.2f}",
             "" if streams is None else f"{streams:.2f}",
             "" if stall is None else f"{stall:.1f}")
        )  # fmt: skip
    head = ("harness", "in flight", "K", "output tokens", "steps", "us per step",
            "us beyond bare streams", "longest time between two polls, ms")  # fmt: skip
    return _table(head, rows)


def _times_table(s: Session) -> str:
    rows = []
    for case, found in s.times.items():
        name = case.harness + (", engine's stamps" if case.stamps == "engine" else "")
        start = (name, f"{case.concurrency:,}", str(case.draft_length), f"{case.step_ms:g}")
        if found.fault:
            rows.append((*start, found.fault, *[""] * 7))
            continue
        step, ttft = _off(found.step, found.step_true), _off(found.ttft, found.ttft_true)
        rows.append(
            (*start, f"{found.period_ms:.2f}", *(f"{off:+.2%}" for off in (*step, *ttft)),
             f"{found.worst_ms:.1f}", f"{found.merged:.1%}", f"{found.busy:.0%}")
        )  # fmt: skip
    head = ("harness", "in flight", "K", "period, ms", "engine's period, ms", "median step off by",
            "P99 step off by", "median TTFT off by", "P99 TTFT off by", "longest wait, ms",
            "steps merged", "CPU")  # fmt: skip
    return _table(head, rows)


def _memory_table(s: Session) -> str:
    rows = [
        (
            f"{case.concurrency:,}",
            str(case.draft_length),
            f"{case.tokens:,}",
            f"{found.n_steps / 1e6:.1f}",
            f"{found.rss_mib:.0f}",
            f"{found.rss_mib / found.n_steps * 1e6:.0f}",
            f"{found.grown_mib:+.0f}" if case.tokens < LONG else "",
        )
        for case, found in s.memory.items()
    ]
    grown = "MiB in the last quarter of the steps, beyond the second"
    head = ("in flight", "K", "output tokens", "million steps", "MiB at most, over the start",
            "MiB per million steps", grown)  # fmt: skip
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str) -> str:
    return str(importlib.import_module("importlib.metadata").version(name))


def commit(folder: Path) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()[:12] if done.returncode == 0 else "an unknown commit"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Plain)
    add = parser.add_argument
    add("--quick", action="store_true", help="few cases, short ones: about a minute")
    add("--specdec_bench", type=Path, metavar="DIR", help="a checkout's examples/specdec_bench")
    add("--out", type=Path, help="write the page here (default: print it)")
    add("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    harness = given.specdec_bench.resolve() if given.specdec_bench else None
    if harness is not None and not (harness / "run.py").is_file():
        parser.error(f"{harness} holds no run.py: give the folder examples/specdec_bench")
    if given.measure:
        print(json.dumps(dataclasses.asdict(measure(Case(**json.loads(given.measure)), harness))))
        return
    command = " ".join(
        ["scripts/overhead.py"]
        + ["--quick"] * given.quick
        + ["--specdec_bench DIR"] * (harness is not None)
    )
    text = page(session(plan(given.quick, harness is not None), harness, command))
    if given.out is None:
        print(text)
        return
    given.out.write_text(text, encoding="utf-8")
    print(f"written: {given.out}")


class Plain(argparse.RawDescriptionHelpFormatter):
    """The docstring as it stands."""


if __name__ == "__main__":
    main()
