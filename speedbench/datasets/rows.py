"""Rows: a record of any file becomes a Conversation here, or one sentence saying why not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from speedbench.datasets.files import Record
from speedbench.types import Conversation, UserError

SENTINEL = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
"""How a turn begins whose source forbids shipping its text: the publisher's own words."""

_CONFIG_NAME = re.compile(r"qualitative|agentic|throughput_\w+")


@dataclass(frozen=True, slots=True)
class Schema:
    """How a format spells a row; of several spellings the first that a row has is taken.

    default_id        an id may be missing: the row is then called by its number in the file
    default_category  stands in where the category is missing (None: it must not be)
    loose_turns       fields whose turns may also be one string, or a list of user messages
    """

    ids: tuple[str, ...] = ("question_id",)
    category: str = "category"
    turns: tuple[str, ...] = ("turns",)
    default_id: bool = False
    default_category: str | None = None
    loose_turns: tuple[str, ...] = ()


def to_conversations(records: Iterable[Record], schema: Schema) -> tuple[Conversation, ...]:
    """Every record as a Conversation, ids unique."""
    rows: dict[str, Conversation] = {}
    first: dict[str, str] = {}
    for record in records:
        row = to_conversation(record, schema)
        if row.id in rows:
            raise UserError(
                f"{record.where} repeats the id {_shown(row.id)} of {first[row.id]}: "
                "give every row an id of its own"
            )
        rows[row.id], first[row.id] = row, record.where
    return tuple(rows.values())


def to_conversation(record: Record, schema: Schema) -> Conversation:
    sub_category = record.values.get("sub_category")
    return Conversation(
        id=_id(record, schema),
        category=_category(record, schema),
        turns=_turns(record, schema),
        sub_category="" if sub_category is None else _text(record, "sub_category", sub_category),
    )


def _id(record: Record, schema: Schema) -> str:
    name = _present(record.values, schema.ids)
    if name is None and schema.default_id:
        return record.place.rpartition(" ")[2]
    if name is None:
        raise _lacks(record, " or ".join(schema.ids), "give every row an id")
    value = record.values[name]
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(record, name, value, "a string or a whole number")


def _category(record: Record, schema: Schema) -> str:
    if record.values.get(schema.category) is not None:
        return _text(record, schema.category, record.values[schema.category])
    if schema.default_category is None:
        raise _lacks(record, schema.category, "give every row a category")
    return schema.default_category


def _turns(record: Record, schema: Schema) -> tuple[str, ...]:
    name = _present(record.values, schema.turns)
    if name is None:
        raise _lacks(record, " or ".join(schema.turns), "give the row its user turns")
    value = record.values[name]
    if isinstance(value, str) and name in schema.loose_turns:
        value = [value]
    if not isinstance(value, list):
        raise UserError(
            f"{record.where} has {_shown(value)} as '{name}', expected a list of strings, one per "
            "user turn: mend the row"
        )
    if not value:
        raise UserError(
            f"{record.where} has no turns ('{name}' is empty), expected at least one: give the "
            "row a turn or remove it"
        )
    loose = name in schema.loose_turns
    return tuple(_turn(record, number, turn, loose) for number, turn in enumerate(value, 1))


def _turn(record: Record, number: int, turn: object, loose: bool) -> str:
    if loose and isinstance(turn, Mapping):
        if turn.get("role") != "user":
            raise UserError(
                f"{record.where}, message {number} has the role {_shown(turn.get('role'))}, "
                "expected 'user' only, because replies come from the measured model: remove "
                "the other messages"
            )
        turn = turn.get("content")
    text = _text(record, f"turn {number}", turn)
    if not text.strip():
        raise UserError(
            f"{record.where}, turn {number} is blank ({_shown(text)}), expected text: fill it in "
            "or remove the row"
        )
    if text.lstrip().startswith(SENTINEL):
        raise UserError(
            f"{record.where}, turn {number} is still a placeholder for text that its source does "
            "not let anyone ship: run `speedbench prepare --dataset speed --config "
            f"{_config_name(record)}`"
        )
    return text


def _text(record: Record, name: str, value: object, expected: str = "a string") -> str:
    """`value`, if it is text that can be stored and tokenized."""
    if not isinstance(value, str):
        raise UserError(
            f"{record.where} has {_shown(value)} as '{name}', expected {expected}: mend the row"
        )
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{record.where} has the lone surrogate {value[error.start]!a} in '{name}', "
                "expected Unicode text: write the whole character"
            ) from None
    return value


def _present(values: Mapping[str, object], names: tuple[str, ...]) -> str | None:
    """The first of `names` that has a value; a null is no value."""
    return next((name for name in names if values.get(name) is not None), None)


def _lacks(record: Record, name: str, remedy: str) -> UserError:
    found = ", ".join(key for key, value in record.values.items() if value is not None)
    return UserError(f"{record.where} has no {name} (found: {found or 'nothing'}): {remedy}")


def _config_name(record: Record) -> str:
    """The benchmark's configuration that a file belongs to, by the name of its folder."""
    name = record.path.resolve().parent.name
    return name if _CONFIG_NAME.fullmatch(name) else "qualitative"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
