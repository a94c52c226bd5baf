"""Writes docs/report_schema.json and docs/report_schema.md: what `speedbench report --format json`
holds. Run it after a change of the report's JSON, and raise `as_json.SCHEMA` if a reader could
break; tests hold both files against this program, and reports against the schema."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from speedbench.insights.collected import Insights
from speedbench.lossless import Greedy, Sampled
from speedbench.report import as_json
from speedbench.report.arms import Arm
from speedbench.report.compare import Comparison
from speedbench.report.curves import Curves
from speedbench.report.load import Load
from speedbench.report.pareto import Pareto
from speedbench.report.sample import Sample
from speedbench.report.summary import Figure

DOCS = Path(__file__).parent.parent / "docs"
Schema = dict[str, Any]


# ---------------------------------------------------------------- words


def text(about: str = "") -> Schema:
    return _about({"type": "string"}, about)


def whole(about: str = "") -> Schema:
    return _about({"type": "integer", "minimum": 0}, about)


def number(about: str = "") -> Schema:
    return _about({"type": "number"}, about)


def truth(about: str = "") -> Schema:
    return _about({"type": "boolean"}, about)


def array(items: Schema, about: str = "") -> Schema:
    return _about({"type": "array", "items": items}, about)


def mapping(values: Schema, about: str = "") -> Schema:
    return _about({"type": "object", "additionalProperties": values}, about)


def of(properties: Mapping[str, Schema], about: str = "") -> Schema:
    """An object with exactly these."""
    return _about(
        {
            "type": "object",
            "properties": dict(properties),
            "required": list(properties),
            "additionalProperties": False,
        },
        about,
    )


def named(name: str, about: str = "") -> Schema:
    return _about({"$ref": f"#/$defs/{name}"}, about)


def maybe(schema: Schema, about: str = "") -> Schema:
    return _about({"anyOf": [schema, {"type": "null"}]}, about)


def _about(schema: Schema, about: str) -> Schema:
    return {**schema, "description": about} if about else schema


# ---------------------------------------------------------------- one run

FIGURE = of(
    {
        "value": maybe(number(), "the number at full precision; null where there is none"),
        "interval": maybe(
            {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
            "95 % interval; null where there is none",
        ),
        "why_not": text("why the value, or else its interval, is null"),
    },
    "A number that has its interval, or the reason why it has none.",
)

CHECKS = array(
    of({"level": {"enum": ["error", "warning", "note"]}, "sentence": text()}),
    "what the records make doubtful",
)

HISTOGRAM = mapping(whole(), "steps by their number of tokens")

PUBLISHED = of(
    {
        "histogram": HISTOGRAM,
        "conditional_rates": array(named("figure"), "of 2, 3, ... tokens, given one fewer"),
        "al_token_weighted": named("figure", "tokens per event"),
    },
    "What the published harness counts: every event as it looks, prefill and cut-off ones, too.",
)

ACCEPTANCE = of(
    {
        "events": mapping(whole(), "events by kind"),
        "histogram": HISTOGRAM,
        "n_censored": whole("decode steps that the end of a request cut off"),
        "rates_over": text("which steps the rates are over"),
        "conditional_rates": array(named("figure"), "of positions 1..K, given the ones before"),
        "joint_rates": array(named("figure"), "of all of the first k positions, k = 1..K"),
        "draft_hit_rate": named("figure", "verify steps / decode steps"),
        "al": mapping(
            of({**FIGURE["properties"], "definition": text()}),
            "acceptance lengths by name; `al` is the primary one",
        ),
        "closed_form_al": maybe(number(), "of a known-answer checkpoint"),
        "by_category": array(
            of(
                {
                    "name": text(),
                    "n_complete": whole("conversations measured"),
                    "n_expected": whole("conversations that were to be measured"),
                    "n_decode_steps": whole(),
                    "al": mapping(named("figure"), "by name"),
                    "conditional_rates": array(named("figure")),
                    "closed_form_al": maybe(number()),
                }
            )
        ),
    },
    "How many tokens a decode step holds.",
)

DISTRIBUTION = _about(
    {"type": "object", "additionalProperties": {"type": ["number", "null", "string"]}},
    "n, min, mean, std, p25, p50, p75, p90, p95, p99, max; or n = 0 and why_not",
)

RUN = of(
    {
        "title": text("what ran, in one line"),
        "run_dir": text(),
        "simulated": truth("the engine made everything up: nothing here is a measurement"),
        "status": text(),
        "checks": CHECKS,
        "draft_length": whole("K, as the engine really drafts"),
        "n_conversations": whole("that did not fail: what every other number is of"),
        "n_failed": whole(),
        "n_requests": whole("recorded, failed ones included"),
        "n_steps": whole("recorded, failed ones included"),
        "n_output_tokens": whole("recorded, failed ones included"),
        "acceptance": named("acceptance"),
        "as_published": named("as_published"),
        "output_tps": of(
            {
                "whole": named("figure", "tokens/s over the whole run"),
                "steady": of(
                    {**FIGURE["properties"], "duration_s": maybe(number())},
                    "tokens/s while all slots were filled",
                ),
                "per_gpu": named("figure", "tokens/s and GPU"),
            }
        ),
        "timing": of(
            {
                "ttft_s": named("distribution", "first step - submitted"),
                "step_time_s": named("distribution", "between steps of a request"),
                "e2e_s": named("distribution", "last step - submitted"),
                "user_tps": named("distribution", "tokens/s after the first step, by request"),
                "output_tokens": named("distribution", "by request"),
            }
        ),
        "load": named("Load", "of an open loop, and of stated limits"),
        "curves": named("Curves", "what figures draw"),
        "manifest": _about({"type": "object"}, "manifest.json of the run, whole"),
    },
    "One run. Times are in seconds.",
)

POOLED = of(
    {
        "n_conversations": whole(),
        "acceptance": named("acceptance"),
        "as_published": named("as_published"),
    },
    "Repeats together: a conversation's steps of all of them are added up. Times are told by run.",
)


# ---------------------------------------------------------------- what dataclasses hold


def of_type(kind: Any, found: dict[str, Schema]) -> Schema:
    """A field's type as `as_json` writes its values; dataclasses are added to `found` by name."""
    if kind in (Arm, Sample):
        return text("label of the arm")
    if kind is Figure:
        return named("figure")
    if dataclasses.is_dataclass(kind):
        return _of_dataclass(typing.cast(type, kind), found)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        rest = [one for one in arguments if one is not type(None)]
        inner = of_type(rest[0], found) if len(rest) == 1 else {
            "anyOf": [of_type(one, found) for one in rest]
        }  # fmt: skip
        return maybe(inner) if len(rest) < len(arguments) else inner
    if origin is Literal:
        return {"enum": list(arguments)}
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return mapping(of_type(arguments[1], found))
    if isinstance(origin, type) and issubclass(origin, (tuple, list, Sequence, frozenset)):
        if origin is tuple and arguments[-1] is not Ellipsis:
            items = [of_type(one, found) for one in arguments]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        return array(of_type(arguments[0], found))
    plain: dict[Any, Schema] = {
        str: text(),
        int: {"type": "integer"},
        float: maybe(number()),
        bool: truth(),
    }
    if kind in plain:
        return plain[kind]
    if kind is Any or kind is object:
        return {}
    raise TypeError(f"{kind} has no place in the schema: teach scripts/report_schema.py what it is")


def _lossless(kind: type, method: str, found: dict[str, Schema]) -> Schema:
    """Its fields, and by which method they were found."""
    own = _of_dataclass(kind, found)
    fields = {"method": {"const": method}, **found[kind.__name__]["properties"]}
    found[kind.__name__] = of(fields, found[kind.__name__]["description"])
    return own


def _of_dataclass(kind: type, found: dict[str, Schema]) -> Schema:
    if kind.__name__ not in found:
        found[kind.__name__] = {}  # a dataclass may hold its own kind
        hints = get_type_hints(kind)
        fields = {
            field.name: of_type(hints[field.name], found)
            for field in dataclasses.fields(kind)
            if not field.name.startswith("_")
        }
        found[kind.__name__] = of(fields, " ".join((kind.__doc__ or "").split()))
    return named(kind.__name__)


# ---------------------------------------------------------------- the documents


def schema() -> Schema:
    """The JSON Schema (2020-12) of a report."""
    found: dict[str, Schema] = {
        "figure": FIGURE,
        "run": RUN,
        "acceptance": ACCEPTANCE,
        "as_published": PUBLISHED,
        "distribution": DISTRIBUTION,
        "pooled": POOLED,
    }
    of_type(Curves, found)
    of_type(Load, found)
    report = of(
        {
            "schema": {"const": as_json.SCHEMA},
            "arms": array(
                of(
                    {
                        "label": text("what tells it from the other arms"),
                        "is_baseline": truth("nothing was drafted"),
                        "runs": array(named("run"), "one, or its repeats in order"),
                        "pooled": maybe(named("pooled"), "null unless there are repeats"),
                    }
                ),
                "runs that measured the same, in the order in which they were named",
            ),
            "comparisons": array(
                of_type(Comparison, found),
                "one for each baseline that some arm can be held against",
            ),
            "not_compared": mapping(text(), "label of an arm that is in none -> why"),
            "lossless": mapping(
                {
                    "anyOf": [
                        _lossless(Greedy, "identical", found),
                        _lossless(Sampled, "two-sample", found),
                    ]
                },
                "label of an arm -> its outputs against its baseline's",
            ),
            "sweep": maybe(of_type(Pareto, found), "of arms that offer a choice"),
            "insights": of_type(Insights, found),
        },
        "A report of stored runs. A null number has its reason beside it; nothing is NaN.",
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": as_json.SCHEMA,
        **report,
        "$defs": found,
    }


def markdown(report: Schema) -> str:
    """The schema in words."""
    lines = [
        "# Schema of a report",
        "",
        "Made by `scripts/report_schema.py`, like the JSON Schema in `report_schema.json`.",
        "",
        f"`speedbench report DIR... --format json` writes `{as_json.SCHEMA}`. Within a version,",
        "fields may be added and none changes its meaning.",
        "",
        "`--format csv` and `--format parquet` hold the same numbers, one per row: arm, run, base",
        "(of a comparison: the baseline's label), category (empty: the whole run), metric,",
        "definition, value, low, high, n, unit, why_not.",
        "",
        *_section("report", report),
    ]
    for name, one in report["$defs"].items():
        lines += _section(name, one)
    return "\n".join(lines).rstrip() + "\n"


def _section(name: str, one: Schema) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    if "description" in one:
        yield _escaped(one["description"])
        yield ""
    if fields := list(_fields(one)):
        yield "| field | type | what |"
        yield "|---|---|---|"
        yield from (f"| {path} | {kind} | {_escaped(about)} |" for path, kind, about in fields)
        yield ""


def _fields(one: Schema, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, type, description) of every field, of objects within it, too."""
    for name, field in one.get("properties", {}).items():
        path = f"{prefix}{name}"
        yield f"`{path}`", _kind(field), field.get("description", "")
        inner = field.get("items", field) if field.get("type") == "array" else field
        if isinstance(inner, dict):
            yield from _fields(inner, f"{path}[]." if inner is not field else f"{path}.")


def _kind(field: Schema) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_kind(one) for one in field["anyOf"])
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field.get("type", "anything")
    if kind == "array":
        items = field.get("prefixItems")
        inner = ", ".join(_kind(one) for one in items) if items else _kind(field["items"])
        return f"array of {inner}"
    if kind == "object" and isinstance(field.get("additionalProperties"), dict):
        return f"object of {_kind(field['additionalProperties'])}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _escaped(about: str) -> str:
    return about.replace("|", "\\|").replace("<", "&lt;")


def files() -> dict[Path, str]:
    found = schema()
    return {
        DOCS / "report_schema.json": json.dumps(found, indent=1, ensure_ascii=False) + "\n",
        DOCS / "report_schema.md": markdown(found),
    }


if __name__ == "__main__":
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path}")
