"""A stand-in for the hub and for the publisher's repository: the real layout, served from here."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import subprocess
import sysconfig
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

SENTINEL = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"
CATEGORIES = (
    "coding", "humanities", "math", "multilingual", "qa", "rag", "reasoning", "roleplay", "stem",
    "summarization", "writing",
)  # fmt: skip
TIERS = ("low_entropy", "mixed", "high_entropy")
EARLY = "fd51e1f5c17d9071cc2aaa1f21df2ef79641e588"
LATER = "1" * 40

Row = dict[str, Any]


def qualitative_rows() -> list[Row]:
    """880 rows sorted by category: every tenth is a placeholder, every fifth has two turns."""
    return [_row(f"{c}-{i}", c, i) for c in CATEGORIES for i in range(80)]


def throughput_rows() -> list[Row]:
    return [_row(f"{t}-{i}", t, i, two_turns=False) for t in TIERS for i in range(512)]


def _row(name: str, category: str, i: int, two_turns: bool = True) -> Row:
    gated = i % 10 == 0
    turns = [f"{SENTINEL}\n\nSolve: {{question}}"] if gated else [f"question {name} é"]
    if two_turns and i % 5 == 1:
        turns.append(f"and again, {name}?")
    return {
        "question_id": name,
        "category": category,
        "sub_category": "easy",
        "turns": turns,
        "source": "https://huggingface.co/datasets/cais/hle" if gated else "made here",
        "src_id": str(i),
        "difficulty": "easy",
        "multiturn": len(turns) > 1,
    }


def parquet(rows: Sequence[Row]) -> bytes:
    kinds = [(n, pa.string()) for n in rows[0]]
    schema = pa.schema(kinds).set(3, pa.field("turns", pa.list_(pa.string())))
    schema = schema.set(7, pa.field("multiturn", pa.bool_()))
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema), buffer)
    return buffer.getvalue()


CARD = """\
---
license: other
license_name: nvidia-evaluation-dataset-license
configs:
- config_name: qualitative
  data_files:
  - split: test
    path: qualitative/test-*
---
"""


@dataclass
class Hub:
    """Datasets by name, commit and path. `wrong` holds bytes sent in place of a listed file's."""

    repositories: dict[str, dict[str, dict[str, bytes]]]
    branches: dict[str, str]
    gated: set[str] = field(default_factory=lambda: {"cais/hle"})
    token: str = "hf_a_token_that_was_accepted"
    wrong: dict[str, bytes] = field(default_factory=dict)
    cut_once: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    url: str = ""
    cdn: str = ""
    """Large files are on another host, as they are for the hub."""

    def paths(self, word: str) -> list[str]:
        return [request for request in self.requests if word in request]


def speed_hub() -> Hub:
    """SPEED-Bench at two commits (`main` is the later one, with other src_ids), and a source."""
    later = [{**row, "src_id": f"v1.1-{row['src_id']}"} for row in qualitative_rows()]
    common = {"README.md": CARD.encode()}
    name, bucket = "qualitative/test-00000-of-00001.parquet", "throughput_1k/test-00000-of-00001"
    early = {name: parquet(qualitative_rows()), f"{bucket}.parquet": parquet(throughput_rows())}
    return Hub(
        {
            "nvidia/SPEED-Bench": {
                EARLY: {**common, **early},
                LATER: {**common, name: parquet(later)},
            },
            "cais/hle": {"2" * 40: common},
        },
        {"nvidia/SPEED-Bench": LATER, "cais/hle": "2" * 40},
    )


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) for _ in range(2)]
    hub.url = f"http://127.0.0.1:{servers[0].server_port}"
    hub.cdn = f"http://localhost:{servers[1].server_port}"
    for server in servers:
        arguments = {"poll_interval": 0.02}
        threading.Thread(target=server.serve_forever, kwargs=arguments, daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _is_large(name: str) -> bool:
    return name.endswith(".parquet")


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if path.startswith("/cdn/"):
                self._blob(path.removeprefix("/cdn/"))
            elif path.startswith("/api/datasets/"):
                self._api(path.removeprefix("/api/datasets/").split("/"))
            elif not path.startswith("/datasets/"):
                self._error(404, "EntryNotFound", "no such page")
            else:
                self._resolve(path.removeprefix("/datasets/").split("/"))

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            parts = unquote(urlsplit(self.path).path).removeprefix("/api/datasets/").split("/")
            hub.requests.append(f"POST {self.path}")
            commit = self._commit("/".join(parts[:2]), parts[3])
            if commit is not None:
                files = hub.repositories["/".join(parts[:2])][commit]
                self._json([_entry(n, files[n]) for n in body["paths"] if n in files])

        def _api(self, parts: list[str]) -> None:
            name, rest = "/".join(parts[:2]), parts[2:]
            if name not in hub.repositories:
                return self._error(401, "RepoNotFound", "Invalid username or password.")
            if rest == ["auth-check"]:
                if name in hub.gated and not self._may():
                    return self._error(403, "GatedRepo", f"Access to {name} is restricted.")
                return self._json("ok")
            commit = self._commit(name, rest[1] if len(rest) > 1 else "main")
            if commit is None:
                return None
            files = hub.repositories[name][commit]
            if rest[:1] == ["tree"]:
                return self._json(_tree(files, "/".join(rest[2:]), "recursive=" in self.path))
            siblings = [{"rfilename": n, **_listing(n, c)} for n, c in files.items()]
            return self._json({"id": name, "sha": commit, "siblings": siblings, "private": False,
                               "gated": name in hub.gated, "downloads": 0, "likes": 0,
                               "tags": []})  # fmt: skip

        def _resolve(self, parts: list[str]) -> None:
            name, revision, path = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            if name in hub.gated and not self._may():
                return self._error(403, "GatedRepo", f"Access to {name} is restricted.")
            commit = self._commit(name, revision)
            if commit is None:
                return None
            content = hub.repositories[name][commit].get(path)
            if content is None:
                return self._error(404, "EntryNotFound", f"{path} does not exist")
            if not _is_large(path):
                headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(content)}"'}
                return self._send(200, content, headers)
            digest = sha256(content)
            return self._send(302, b"", {
                "Location": f"{hub.cdn}/cdn/{digest}", "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)),
            })  # fmt: skip

        def _blob(self, digest: str) -> None:
            contents = [c for commits in hub.repositories.values() for files in commits.values()
                        for c in files.values() if sha256(c) == digest]  # fmt: skip
            content = hub.wrong.get(digest, contents[0])
            start = 0
            if asked := self.headers.get("Range"):
                start = int(asked.removeprefix("bytes=").split("-")[0])
            if digest in hub.cut_once and self.command == "GET":
                hub.cut_once.discard(digest)
                self._send(200, content, {}, cut=len(content) // 2)
                self.close_connection = True
                return
            end = len(content)
            headers = {"Content-Range": f"bytes {start}-{end - 1}/{end}"} if start else {}
            self._send(206 if start else 200, content[start:], headers)

        def _commit(self, name: str, revision: str) -> str | None:
            commit = hub.branches.get(name, "") if revision == "main" else revision
            if commit in hub.repositories.get(name, {}):
                return commit
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None

        def _may(self) -> bool:
            return self.headers.get("Authorization") == f"Bearer {hub.token}"

        def _json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _error(self, status: int, code: str, message: str) -> None:
            body = json.dumps({"error": message}).encode()
            self._send(status, body, {"X-Error-Code": code, "X-Error-Message": message})

        def _send(
            self, status: int, body: bytes, headers: Mapping[str, str], cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:cut])

    return Handler


def _listing(name: str, content: bytes) -> dict[str, Any]:
    large = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
    listed: dict[str, Any] = {"size": len(content), "blobId": _blob_id(content)}
    return {**listed, "lfs": large} if _is_large(name) else listed


def _entry(name: str, content: bytes) -> dict[str, Any]:
    large = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
    entry = {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
    return {**entry, "lfs": large} if _is_large(name) else entry


def _tree(files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """What is in a folder; without `recursive`, what lies deeper is there as its folder only."""
    start = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        if not name.startswith(start):
            continue
        first, slash, _ = name.removeprefix(start).partition("/")
        if slash:
            path = start + first
            entries[path] = {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        if recursive or not slash:
            entries[name] = _entry(name, content)
    return list(entries.values())


# ---------------------------------------------------------------- the publisher's repository

PREPARER = '''\
"""The publisher's command line: rebuilds placeholder texts, writes <out>/speed/<config>."""
import argparse, os, pathlib, sys
import pyarrow as pa, pyarrow.parquet as pq
from datasets import load_dataset

parser = argparse.ArgumentParser()
parser.add_argument("--dataset", choices=["speed"])
parser.add_argument("--config")
parser.add_argument("--output_dir", type=pathlib.Path)
given = parser.parse_args()
print("Preparing config", given.config, end="\\r")
table = load_dataset("nvidia/SPEED-Bench", given.config, split="test")
rows = table.to_pylist()
for number, row in enumerate(rows):
    if row["turns"][0].startswith("FULL BENCHMARK DATA"):
        row["turns"] = [f"rebuilt text {number}"]
exec(os.environ.get("STAND_IN_FAULT", ""))
folder = given.output_dir / given.dataset / given.config
folder.mkdir(parents=True)
pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "test.parquet")
print("  -> Saved")
'''

DATASETS = '''\
"""The one call of the `datasets` library that the preparer makes."""
import io, os, urllib.request
import pyarrow.parquet as pq

def load_dataset(path, name, split, revision="main"):
    file = f"{name}/{split}-00000-of-00001.parquet"
    url = f"{os.environ['HF_ENDPOINT']}/datasets/{path}/resolve/{revision}/{file}"
    return pq.read_table(io.BytesIO(urllib.request.urlopen(url).read()))
'''


def publisher(folder: Path, preparer: str = PREPARER) -> tuple[str, str]:
    """A git repository with a stand-in preparer and its requirement; (URL, commit)."""
    part = folder / "examples" / "specdec_bench"
    part.mkdir(parents=True)
    (part / "prepare_data.py").write_text(preparer)
    (part / "requirements.txt").write_text("./datasets-3.1.0-py3-none-any.whl\n")
    _wheel(part / "datasets-3.1.0-py3-none-any.whl")
    (folder / "big.bin").write_text("not wanted\n")
    return commit_all(folder)


def commit_all(folder: Path) -> tuple[str, str]:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*who, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    run = subprocess.run(
        ["git", "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    return folder.as_uri(), run.stdout.strip()


def _wheel(path: Path) -> None:
    """The stand-in of `datasets`; pyarrow comes from this environment, by a .pth file."""
    site = sysconfig.get_paths()["purelib"]
    files = {
        "datasets.py": DATASETS,
        "stand_in.pth": f"{site}\n",
        "datasets-3.1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: datasets\n"
        "Version: 3.1.0\n",
        "datasets-3.1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\n"
        "Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={_digest(text)},{len(text.encode())}\n" for name, text in files.items()
    )
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr("datasets-3.1.0.dist-info/RECORD", record)


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
