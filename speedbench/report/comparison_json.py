"""JSON of a comparison: what `speedbench compare` found, for programs, at full precision.

Field names are those of the dataclasses that hold the numbers: CategoryComparison and its like in
report/compare.py, Greedy and Sampled in lossless.py, GateResult in report/gate.py.

History
  speedbench.comparison/1  base, arms (comparison, lossless, gates), outcome
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from speedbench.lossless import Greedy, Losslessness
from speedbench.report.blocks import clean
from speedbench.report.compare import Comparison
from speedbench.report.gate import GateResult, overall
from speedbench.report.sample import Sample

SCHEMA = "speedbench.comparison/1"


def render(
    comparison: Comparison,
    lossless: Sequence[Losslessness],
    gates: Sequence[GateResult],
    base: Sample,
) -> dict[str, Any]:
    """lossless: of every arm, in order."""
    return {
        "schema": SCHEMA,
        "outcome": overall(gates) if gates else None,
        "base": {
            "label": clean(base.label),
            "from": [run.source for run in base.runs],
            "file": base.file or None,
            "manifest": plain(base.manifest),
            "checks": plain(comparison.checks),
        },
        "arms": [
            {
                "label": clean(one.arm.label),
                "from": [run.source for run in one.arm.runs],
                "manifest": plain(one.arm.manifest),
                "comparison": {
                    field.name: plain(getattr(one, field.name))
                    for field in dataclasses.fields(one)
                    if field.name != "arm"
                },
                "lossless": {
                    "method": "identical" if isinstance(found, Greedy) else "two-sample",
                    **plain(found),
                },
                "gates": [plain(gate) for gate in gates if gate.arm == one.arm.label],
            }
            for one, found in zip(comparison.arms, lossless, strict=True)
        ],
    }


def plain(value: Any) -> Any:
    """Dataclasses as objects under the names of their fields; no NaN, no infinity, no control
    characters; an arm is its label."""
    if isinstance(value, Sample):
        return clean(value.label)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {clean(str(name)): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, str):
        return clean(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
