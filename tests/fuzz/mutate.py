"""Mutation: one damaged form of a file's bytes, decided by a random generator alone."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import PurePath
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

HOSTILE_NAMES: tuple[str, ...] = (
    "",
    " ",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "a\x00b",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "]]><!--",
    "a|b|c",
    "line\nbreak",
    "carriage\rreturn",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07",
    "\x9b2Jc1",
    "\u202egnp.exe",
    "\u2028\u2029\x85",
    "=HYPERLINK(1)",
    "+1",
    "-1",
    "@SUM(1)",
    "[x](javascript:alert(1))",
    "`code` **bold** _it_ #1 @all",
    "\ufffe\uffff\ufeff",
    "\U0001f600" * 3,
    "x" * 5000,
    "%s%n{0}{x}$HOME",
    "nan",
    "NUL",
)
"""Names that are taken for something else where they are not quoted."""

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 65536, 2**31 - 1, -(2**31), 2**31, 2**63 - 1, -(2**63),
    2**63, 2**200,
    0.0, -0.5, 0.1, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf, [], {}, [[]],
    [None], {"": None}, [1, "a"], "0", "1", "true", "none", "\ud800",
)  # fmt: skip

SPLICES: tuple[bytes, ...] = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b"\t", b'"', b"'", b"{", b"}", b"[",
    b"]", b":", b",", b"#", b"\\u0000", b"\\ud800", b"-1", b"1e999", b"NaN", b"Infinity",
    b"9" * 5000,
    b"[" * 3000, b'{"a":' * 3000, b"<script>", b"../", b"\x1b[2J", b"\xc3\x28", b"\xed\xa0\x80",
    b"\xe2\x80\xa8", b"\x80" * 64, b"\x00" * 64, b"PAR1", b"null", b"true", b'""', b"[]", b"{}",
)  # fmt: skip

YAML_SPLICES: tuple[bytes, ...] = (
    b"\n!!python/object/apply:os.system ['true']\n",
    b"\nx: !!python/name:os.system\n",
    b"\nx: !!binary 'AAAA'\n",
    b"\nx: !unknown {a: 1}\n",
    b"\na: &a [*a]\n",
    b"\na: &a {b: *a}\n",
    b"\n<<: 3\n",
    b"\n<<: *nowhere\n",
    b"\n? [a, b]\n: c\n",
    b"\n? {a: b}\n: c\n",
    b"\n2020-01-01: 2020-01-01T00:00:00Z\n",
    b"\nx: .nan\ny: -.inf\n",
    b"\nx: 190:20:30\ny: 0b1_1\nz: 0o7\n",
    b"\n---\nsecond: document\n",
    b"\n%YAML 9.9\n",
    b"\nx: |\n\ttab\n",
    b"\n~: 1\n1: 2\ntrue: 3\n",
    b"\na: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9))
               for i in range(9)),
)  # fmt: skip
"""The last one is 9^10 values once its aliases are followed."""

TEMPLATE_SPLICES: tuple[bytes, ...] = (
    b"{{ 1/0 }}", b"{{ undefined.x.y }}", b"{% for i in messages %}", b"{% endfor %}", b"{{", b"}}",
    b"{% raise %}", b"{{ raise_exception('no') }}", b"{{ messages[99]['content'] }}",
    b"{{ ''.__class__.__mro__ }}", b"{{ messages|tojson }}", b"{% include 'x' %}",
    b"{% import 'x' as y %}", b"{% extends 'x' %}", b"{{ (1,)|sum(start='a') }}", b"{{ self }}",
    b"{{ messages.append(1) }}", b"{% set x = x + 1 %}", b"{{ strftime_now(1) }}",
    b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", b"{{ '%d'|format('a') }}", b"{%- break %}",
    b"{{ range(10**9)|list }}", b"{{ 'a' * 10**14 }}",
)  # fmt: skip
"""None of them computes for ever: what a template computes, the model's own engine would, too."""


def mutated(random: Random, name: str, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """One damaged form of a file; its name's ending says which structure it has.

    others: bytes of other files, which pieces are taken from.
    """
    of_structure = STRUCTURES.get(PurePath(name).suffix)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if of_structure is not None and random.random() < 0.6:
            try:
                data = of_structure(random, data)
                continue
            except (ValueError, RecursionError, pa.ArrowException, OSError, yaml.YAMLError):
                pass  # an earlier round left nothing that has a structure
        data = _bytes(random, data, others)
    return data


def mutate_stream(random: Random, name: str, data: bytes) -> bytes:
    """Server-sent events: one event's JSON, or the bytes."""
    lines = data.split(b"\n")
    events = [i for i, line in enumerate(lines) if line.startswith(b"data: {")]
    if not events or random.random() < 0.4:
        return _bytes(random, data, ())
    at = random.choice(events)
    if random.random() < 0.2:
        lines.insert(at, lines[random.choice(events)])
    else:
        lines[at] = b"data: " + _json(random, lines[at][6:])
    return b"\n".join(lines)


def _bytes(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    size = len(data)
    kind = random.randrange(9)
    at = random.randrange(size + 1)
    if kind == 0 and size:  # bits
        changed = bytearray(data)
        for _ in range(random.choice((1, 1, 2, 8))):
            changed[random.randrange(size)] ^= 1 << random.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + random.choice(SPLICES) + data[at:]
    if kind == 3:  # a hole
        return data[:at] + data[min(size, at + random.randrange(1, 65)) :]
    if kind == 4:  # a piece twice
        piece = data[at : at + random.randrange(1, 257)]
        return data[:at] + piece * random.choice((2, 3, 50)) + data[at + len(piece) :]
    if kind == 5:
        other = random.choice(others) if others else random.randbytes(64)
        return data[:at] + other[random.randrange(len(other) + 1) :]
    if kind == 6:
        return data[:at] + random.randbytes(random.randrange(1, 33)) + data[at + 8 :]
    if kind == 7:
        return random.choice((b"", b"\n", b"null", b"[]", b"{}", b"0", random.randbytes(200)))
    return data[:at] + random.choice(SPLICES) + data[min(size, at + random.randrange(1, 17)) :]


# ---------------------------------------------------------------- JSON, YAML


def _json(random: Random, data: bytes) -> bytes:
    changed = _value(random, json.loads(data))
    text = json.dumps(changed)
    if random.random() < 0.05:  # a key twice: the second has the last word
        text = text.replace("{", '{"format": 1, "status": "complete", "id": "a", ', 1)
    return text.encode("utf-8", "surrogatepass")


def _json_lines(random: Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    kind = random.randrange(6)
    if kind == 0:
        lines.insert(at, lines[random.randrange(len(lines))])
    elif kind == 1:
        del lines[at]
    elif kind == 2:
        random.shuffle(lines)
    else:
        filled = [i for i, line in enumerate(lines) if line.strip()]
        if not filled:
            raise ValueError("no line")
        at = random.choice(filled)
        lines[at] = _json(random, lines[at])
    return b"\n".join(lines)


def _yaml(random: Random, data: bytes) -> bytes:
    if random.random() < 0.4 or b"&" in data:  # what aliases stand for may fit in no memory
        lines = data.split(b"\n")
        at = random.randrange(len(lines) + 1)
        lines.insert(at, random.choice(YAML_SPLICES))
        return b"\n".join(lines)
    changed = _value(random, yaml.safe_load(data))
    return yaml.safe_dump(changed, allow_unicode=True).encode("utf-8", "surrogatepass")


def _template(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(TEMPLATE_SPLICES) + data[at:]


def _value(random: Random, value: Any) -> Any:
    """A copy of plain values, changed at one place."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return odd(random)
    holder, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[odd_name(random)] = holder.pop(key)
    elif kind == 2 and isinstance(holder, list):
        holder.extend([holder[key]] * random.choice((1, 2, 300)))
    elif kind == 3:
        other, place = random.choice(places)
        holder[key] = copy.deepcopy(other[place])
    elif kind == 4:
        nested: Any = holder[key]
        for _ in range(random.choice((1, 2, 400))):
            nested = [nested]
        holder[key] = nested
    elif kind == 5 and isinstance(holder[key], str):
        text = holder[key]
        at = random.randrange(len(text) + 1)
        holder[key] = text[:at] + odd_name(random) + text[at:]
    else:
        holder[key] = odd(random)
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(dict or list, key or index) of every value inside."""
    if not isinstance(value, (dict, list)):
        return []
    found: list[tuple[Any, Any]] = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found += [(value, key), *_places(inner)]
    return found


def odd(random: Random) -> Any:
    """A value that nobody wrote."""
    return odd_name(random) if random.random() < 0.35 else copy.copy(random.choice(ODD_VALUES))


def odd_name(random: Random) -> str:
    return random.choice(HOSTILE_NAMES)


# ---------------------------------------------------------------- parquet


def _parquet(random: Random, data: bytes) -> bytes:
    table = pq.read_table(io.BytesIO(data))
    change: Callable[[Random, pa.Table], pa.Table] = random.choice(
        (_dropped, _renamed, _cast, _with_nulls, _with_odd, _with_odd, _with_odd, _rows, _rows,
         _swapped, _metadata)
    )  # fmt: skip
    out = io.BytesIO()
    pq.write_table(
        change(random, table), out, compression=random.choice(("zstd", "none", "snappy"))
    )
    return out.getvalue()


def _column(random: Random, table: pa.Table) -> int:
    if not table.num_columns:
        raise ValueError("no column")
    return random.randrange(table.num_columns)


def _dropped(random: Random, table: pa.Table) -> pa.Table:
    return table.remove_column(_column(random, table))


def _renamed(random: Random, table: pa.Table) -> pa.Table:
    at = _column(random, table)
    names = list(table.column_names)
    names[at] = random.choice((odd_name(random).replace("\x00", "0"), names[at].upper(), names[0]))
    return table.rename_columns(names)


def _cast(random: Random, table: pa.Table) -> pa.Table:
    at = _column(random, table)
    kind = random.choice(
        (pa.string(), pa.float64(), pa.int64(), pa.int16(), pa.uint64(), pa.binary(), pa.null(),
         pa.bool_(), pa.list_(pa.int64()), pa.struct([("a", pa.int64())]), pa.timestamp("ns"),
         pa.decimal128(38, 3), pa.large_string())
    )  # fmt: skip
    try:
        column = table.column(at).cast(kind, safe=False)
    except (pa.ArrowException, ValueError):
        column = pa.nulls(table.num_rows, kind)
    return table.set_column(at, table.column_names[at], column)


def _with_nulls(random: Random, table: pa.Table) -> pa.Table:
    at = _column(random, table)
    values = table.column(at).to_pylist()
    for _ in range(random.choice((1, 1, 3, len(values)))):
        if values:
            values[random.randrange(len(values))] = None
    column = pa.array(values, table.schema.field(at).type)
    return table.set_column(at, table.column_names[at], column)


def _with_odd(random: Random, table: pa.Table) -> pa.Table:
    """Other values in a column, of its own type or of one that holds them."""
    at = _column(random, table)
    kind = table.schema.field(at).type
    values = table.column(at).to_pylist()
    for _ in range(random.choice((1, 1, 3, len(values)))):
        if values:
            values[random.randrange(len(values))] = _odd_of(random, kind)
    try:
        column = pa.array(values, kind)
    except (pa.ArrowException, OverflowError, ValueError, TypeError):
        column = pa.array(
            [None if v is None else float(v) if isinstance(v, (int, float)) else math.nan
             for v in values], pa.float64(),
        )  # fmt: skip
    return table.set_column(at, table.column_names[at], column)


def _odd_of(random: Random, kind: pa.DataType) -> Any:
    if pa.types.is_integer(kind):
        return random.choice((-1, -2, 0, 1, 9, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), math.nan))
    if pa.types.is_string(kind):
        return odd_name(random)
    if pa.types.is_list(kind):
        inner = kind.value_type
        return random.choice(([], None, [_odd_of(random, inner)], [_odd_of(random, inner)] * 99))
    if pa.types.is_binary(kind):
        return random.choice((b"", b"\x00", random.randbytes(7), random.randbytes(1000)))
    if pa.types.is_boolean(kind):
        return random.random() < 0.5
    return None


def _rows(random: Random, table: pa.Table) -> pa.Table:
    n = table.num_rows
    rows = list(range(n))
    kind = random.randrange(5)
    if kind == 0:
        rows = rows + rows
    elif kind == 1 and n:
        rows.insert(random.randrange(n), random.randrange(n))
    elif kind == 2 and n:
        del rows[random.randrange(n)]
    elif kind == 3:
        random.shuffle(rows)
    else:
        rows = []
    return table.take(pa.array(rows, pa.int64()))


def _swapped(random: Random, table: pa.Table) -> pa.Table:
    """Two columns under each other's names."""
    a, b = _column(random, table), _column(random, table)
    names = list(table.column_names)
    names[a], names[b] = names[b], names[a]
    return table.rename_columns(names)


def _metadata(random: Random, table: pa.Table) -> pa.Table:
    about = dict(table.schema.metadata or {})
    if not about:
        return table.replace_schema_metadata({"speedbench": random.choice(SPLICES)})
    key = random.choice(sorted(about))
    if random.random() < 0.3:
        del about[key]
    else:
        try:
            about[key] = _json(random, about[key])
        except (ValueError, RecursionError):
            about[key] = _bytes(random, about[key], ())
    return table.replace_schema_metadata(about or None)


STRUCTURES: dict[str, Callable[[Random, bytes], bytes]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".jinja": _template,
    ".parquet": _parquet,
}
