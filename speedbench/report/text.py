"""Text: token IDs to text, and back, with the tokenizer that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from speedbench.types import UserError


class Text:
    """A tokenizer of a local folder or of the hub, loaded when it is first needed."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._tokenizer: Any = None

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._loaded().decode(list(token_ids)))

    def encode(self, text: str) -> list[int]:
        """Without special tokens of the tokenizer's own."""
        return [int(token) for token in self._loaded().encode(text, add_special_tokens=False)]

    def _loaded(self) -> Any:
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self._source)
            except (OSError, ValueError, KeyError) as error:
                reason = (str(error).strip().splitlines() or ["unreadable"])[0]
                raise UserError(
                    f"the tokenizer {self._source} cannot be loaded ({reason}): give its folder as "
                    "--tokenizer"
                ) from None
        return self._tokenizer
