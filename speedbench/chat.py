"""Chat messages: what a server is sent that takes only text, and makes token IDs of it itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from speedbench.types import Conversation, Prompt, UserError


def prompt(
    row: Conversation, turn: int, replies: Sequence[str], token_ids: Sequence[int]
) -> Prompt:
    """A turn as messages, with the fingerprint of these. `token_ids` are what it would be as
    encoded here: their number bounds its length, and the server may make others of it. Raises
    UserError for a row that is token IDs."""
    if not row.turns:
        raise UserError(
            "--endpoint chat sends text, and the rows of this dataset are token IDs: use "
            "--endpoint completions"
        )
    messages: list[tuple[str, str]] = []
    for text, reply in zip(row.turns[:turn], replies, strict=False):
        messages += [("user", text), ("assistant", reply)]
    messages.append(("user", row.turns[turn]))
    text = json.dumps([row.id, turn, messages], ensure_ascii=True)
    sha256 = hashlib.sha256(b"chat " + text.encode("ascii")).hexdigest()
    return Prompt(token_ids, sha256, tuple(messages))
