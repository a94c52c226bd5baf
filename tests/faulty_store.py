"""A store that fails on purpose: an fsspec file system in memory, under faulty:// and, to be taken
for an object store, under oss://."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

Fault = Callable[[str, str], None]
"""Called with what is done (put, get, list, info, move, remove) and to which path; it may raise."""


class FaultyStore(MemoryFileSystem):
    """`fault` is asked before everything; `spoil` changes what a write stores."""

    protocol = ("faulty", "oss")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    calls: ClassVar[list[tuple[str, str]]] = []
    fault: ClassVar[Fault] = staticmethod(lambda _what, _path: None)
    spoil: ClassVar[Callable[[str, bytes], bytes]] = staticmethod(lambda _path, data: data)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.partition("://")[2 if "://" in path else 0].strip("/")

    @classmethod
    def reset(cls) -> None:
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.calls.clear()
        cls.fault = staticmethod(lambda _what, _path: None)
        cls.spoil = staticmethod(lambda _path, data: data)

    @classmethod
    def files(cls, below: str = "/bucket/run") -> dict[str, bytes]:
        """Everything that is listed: name -> bytes."""
        return {
            path[len(below) + 1 :]: file.getvalue()
            for path, file in sorted(cls.store.items())
            if path.startswith(f"{below}/") and "/." not in path
        }

    def _ask(self, what: str, path: str) -> None:
        type(self).calls.append((what, path))
        type(self).fault(what, path)

    def put_file(self, lpath: str, rpath: str, *_args: Any, **_kwargs: Any) -> None:
        with open(lpath, "rb") as file:  # noqa: PTH123
            self.pipe_file(rpath, file.read())

    def pipe_file(self, path: str, value: bytes, *_args: Any, **_kwargs: Any) -> None:
        path = self._strip_protocol(path)
        self._ask("put", path)
        super().pipe_file(path, type(self).spoil(path, value))

    def get_file(self, rpath: str, lpath: str, *_args: Any, **_kwargs: Any) -> None:
        self._ask("get", self._strip_protocol(rpath))
        super().get_file(rpath, lpath)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._ask("list", self._strip_protocol(path))
        return super().ls(path, detail=detail, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        self._ask("info", self._strip_protocol(path))
        return super().info(path, **kwargs)

    def mv(self, path1: str, path2: str, *_args: Any, **_kwargs: Any) -> None:
        self._ask("move", self._strip_protocol(path2))
        store = type(self).store
        store[self._strip_protocol(path2)] = store.pop(self._strip_protocol(path1))

    def rm_file(self, path: str) -> None:
        self._ask("remove", self._strip_protocol(path))
        type(self).store.pop(self._strip_protocol(path), None)


for name in FaultyStore.protocol:
    fsspec.register_implementation(name, FaultyStore, clobber=True)
