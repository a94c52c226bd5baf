"""Written: a report in a file, or behind a URL, where nothing but a report is ever overwritten."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from speedbench import remote
from speedbench.report import as_csv
from speedbench.types import UserError

Form = Literal["console", "markdown", "json", "csv", "parquet", "html", "matrix"]

MARKS: Mapping[Form, tuple[bytes, ...]] = {
    "console": (b"speedbench: ",),
    "markdown": (b"# speedbench: ",),
    "json": (b'{\n "schema": "speedbench.report/', b'{\n "schema": "speedbench.aiperf/'),
    "csv": (",".join(as_csv.HEADER).encode() + b"\n",),
    "parquet": (b"PAR1",),
    "html": (b"<!doctype html>", b"<!DOCTYPE html>"),
    "matrix": (b"Model,",),
}
"""How a report of each form begins."""

HEAD = 1 << 16
"""Bytes within which an HTML page says by what it was made."""


def save(data: bytes, place: str, form: Form) -> None:
    """Write a report whole. Raises UserError where something else is there."""
    found = _existing(place)
    if found is not None and not is_report(found, form):
        raise UserError(
            f"{place} exists and is no {form} report: choose another --out, or remove it first"
        )
    remote.write_bytes(place, data)


def is_report(data: bytes, form: Form) -> bool:
    """Whether an earlier report of this form would be lost, and nothing else."""
    if not data:
        return True
    if not data.startswith(MARKS[form]):
        return False
    if form == "html":
        return b"speedbench" in data[:HEAD]
    if form == "parquet":
        return b"speedbench" in data[-HEAD:]
    return True


def _existing(place: str) -> bytes | None:
    if remote.is_url(place):
        folder, _, name = remote.canonical(place).rpartition("/")
        return remote.Store(folder).read(name)
    path = Path(place)
    if path.is_dir():
        raise UserError(f"{place} is a folder: give the path of a file as --out")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(
            f"{place} cannot be read ({error.strerror}): give another path as --out"
        ) from None
