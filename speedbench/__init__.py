"""speedbench: measures speculative decoding inside the engine, from stored records alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speedbench.api import LoadedRun as LoadedRun
    from speedbench.api import compare as compare
    from speedbench.api import load as load

__version__ = "0.1.0"
__all__ = ("LoadedRun", "__version__", "compare", "load")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """The public API, imported when it is asked for: `import speedbench` stays light."""
    if name in ("LoadedRun", "compare", "load"):
        from speedbench import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
