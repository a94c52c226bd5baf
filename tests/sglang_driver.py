"""Runs in SGLang's environment, as tests/test_sglang_real.py asks: one engine after the other.

    python -m tests.sglang_driver '[{"config": {...}, "hooked": true, "runs": [{...}]}, ...]'

Each entry is one engine; every run of it is {"config": {...}, "lag_s": 0, "prompt": null}: values
over those of the engine, how long the consumer sleeps for each step, and what the fourth row asks
instead of its own prompt. Without the hook, SGLang's own streams are read slowly, too.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import engines
from speedbench import inputs, session
from speedbench.config import from_dict
from speedbench.target import Target
from speedbench.types import Engine, EngineCounters, EngineInfo, Request, Step


@dataclass(frozen=True, slots=True)
class Lagging:
    """An engine whose consumer sleeps."""

    engine: Engine
    lag_s: float

    def submit(self, request: Request) -> None:
        self.engine.submit(request)

    def poll(self) -> Sequence[Step]:
        steps = self.engine.poll()
        time.sleep(self.lag_s * len(steps))
        return steps

    def counters(self) -> EngineCounters | None:
        return self.engine.counters()

    def describe(self) -> EngineInfo:
        return self.engine.describe()

    def forget(self) -> None:
        self.engine.forget()

    def close(self) -> None:
        self.engine.close()


def _read_slowly(llm: Any) -> None:
    """Let SGLang's stream of a request wait until it has merged several steps."""
    generate = llm.async_generate

    async def slowly(**arguments: Any) -> AsyncIterator[Any]:
        stream = await generate(**arguments)

        async def chunks() -> AsyncIterator[Any]:
            async for chunk in stream:
                yield chunk
                await asyncio.sleep(0.02)

        return chunks()

    llm.async_generate = slowly


def measure_on_one_engine(asked: dict[str, Any]) -> None:
    adapter: Any = engines.adapter("SGLANG")
    hook = "_handle_batch_output" if asked["hooked"] else "_no_such_method"
    recording: Any = type("Recording", (adapter,), {"_hook": hook})
    configs = [from_dict({**asked["config"], **run["config"]}) for run in asked["runs"]]
    engine = recording(configs[0].engine_settings())
    if not asked["hooked"]:
        _read_slowly(engine._llm)
    try:
        for config, run in zip(configs, asked["runs"], strict=True):
            prepared = inputs.prepare(config)
            if run.get("prompt") is not None:
                key = (prepared.rows[3].id, 0)
                changed = replace(prepared.prompts[key], token_ids=run["prompt"])
                prepared = replace(prepared, prompts={**prepared.prompts, key: changed})
            target = Target(Path(config.save_dir or ""))
            lagging = Lagging(engine, run.get("lag_s", 0))
            outcome = session.measure(config, prepared, lagging, target)
            print(json.dumps([outcome.end.reason, outcome.n_failed]), flush=True)  # noqa: T201
    finally:
        engine.close()
        engine.close()
    assert not multiprocessing.active_children()


if __name__ == "__main__":  # SGLang's processes import this module again
    for one in json.loads(sys.argv[1]):
        measure_on_one_engine(one)
