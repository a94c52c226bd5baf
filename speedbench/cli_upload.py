"""The command that puts stored runs behind a URL, or completes what is there. It prints."""

from __future__ import annotations

from pathlib import Path

from speedbench.cli_base import FAILED, OK, Parser
from speedbench.types import UserError


def upload_command(argv: list[str], prog: str) -> int:
    parser = Parser(
        prog=prog,
        description="Put a run directory, or a folder of such, behind a URL (s3://, gs://, ...), "
        "each file verified; what is there already is left.",
    )
    parser.add_argument("directory", metavar="DIR", help="run directory, or a folder of such")
    parser.add_argument("url", metavar="URL", help="where its files go, as s3://bucket/run")
    given = parser.parse(argv)
    from speedbench import mirror

    if not Path(given.directory).is_dir():
        raise UserError(f"{given.directory} is no folder: name the --save_dir of a run")
    uploaded = mirror.upload(Path(given.directory), given.url)
    print(mirror.verdict(uploaded, given.url, Path(given.directory)))
    return FAILED if uploaded.missing else OK
