"""What suffix decoding drafts (arctic-inference, as vLLM uses it) from a request's own tokens.

Oliaro et al. 2024, arXiv 2411.04975: a trie of all substrings with their counts; the draft follows
the most frequent continuation of the best matching suffix. Written from the paper and compared
with the library's drafts; valid where nothing is kept from other requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

DEPTH = 24  # longest substring that is kept
SPEC_FACTOR = 1.0  # draft at most so many tokens per token matched
MIN_PROBABILITY = 0.1


@dataclass(slots=True)  # mutable: it counts
class _Node:
    """A substring: how often it occurred, and its continuations, the most frequent first."""

    count: int = 0
    children: list[tuple[int, _Node]] = field(default_factory=list)

    def add(self, token: int) -> _Node:
        """Count `token` after this substring. Among equals the one counted first stays in front."""
        at = next((i for i, (t, _) in enumerate(self.children) if t == token), None)
        if at is None:
            child = _Node(1)
            self.children.append((token, child))
            return child
        child = self.children[at][1]
        child.count += 1
        if at > 0 and self.children[at - 1][1].count <= child.count:
            ahead = self.children[at - 1][1].count
            to = next(i for i, (_, other) in enumerate(self.children) if other.count == ahead)
            self.children.insert(to, self.children.pop(at))
        return child


class SuffixText:
    """One request's prompt and output so far."""

    def __init__(self) -> None:
        self._root = _Node()
        self._open: list[_Node] = []  # substrings that end at the last token, the longest first
        self._tokens: list[int] = []

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self._tokens.append(token)
            self._root.count += 1
            self._open = [*self._open, self._root][-DEPTH:]
            self._open = [node.add(token) for node in self._open]

    @property
    def n_tokens(self) -> int:
        return len(self._tokens)

    def draft(self, draft_length: int) -> list[int]:
        """The continuation with the highest sum of probabilities over all matching suffixes; the
        longest suffix wins a tie."""
        context = self._tokens[-DEPTH:]
        best: list[int] = []
        best_score = np.float32(0)
        for n_matched in range(1, len(context)):
            node = self._root
            for token in context[-n_matched:]:  # every one of its own suffixes is in the trie
                node = next(child for t, child in node.children if t == token)
            tokens, score = self._follow(node, min(draft_length, int(n_matched * SPEC_FACTOR)))
            if score >= best_score:
                best, best_score = tokens, score
        return best

    def _follow(self, node: _Node, limit: int) -> tuple[list[int], np.float32]:
        """Likeliest tokens after a substring while their probability lasts, and its sum. In
        float32, as the library computes it."""
        tokens: list[int] = []
        score, probability = np.float32(0), np.float32(1)
        while len(tokens) < limit and node.children:
            token, child = node.children[0]
            probability *= np.float32(child.count) / np.float32(node.count)
            if probability < np.float32(MIN_PROBABILITY):
                break
            tokens.append(token)
            score += probability
            node = child
        return tokens, score
