"""What the config.json of a local checkpoint tells before an engine loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from speedbench.types import EngineSettings, UserError


def checkpoint_config(folder: str) -> dict[str, Any] | None:
    """config.json of a local checkpoint; None where there is none to be read."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def refuse_other_vocabulary(settings: EngineSettings) -> None:
    """A separate draft model must share the target's vocabulary (checked for local folders)."""
    sizes = [vocab_size(d) for d in (settings.model_dir, settings.draft_model_dir or "")]
    if None not in sizes and sizes[0] != sizes[1]:
        raise UserError(
            f"the draft model {settings.draft_model_dir} has a vocabulary of {sizes[1]} tokens, "
            f"the target {settings.model_dir} one of {sizes[0]}: use a draft model made for it"
        )


def vocab_size(folder: str) -> int | None:
    """Token IDs of a local checkpoint are below this; None where its config.json does not say."""
    config = checkpoint_config(folder) or {}
    try:
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
        return int(size) if size is not None else None
    except (ValueError, AttributeError, TypeError, OverflowError):
        return None
