"""What SGLang's n-gram lookup drafts for requests asked one after another, computed apart from it.

Read in SGLang 0.5.23 (ngram_worker.py, ngram_corpus/trie.cpp) at breadth 1. One trie serves all
requests. It learns the last tokens of a request after each of its verifications, without those
that the verification itself added, and the insertion has ended before the next lookup.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from speedbench.calibration.closed_form import ExpectedStep

MAX_DEPTH = 18
"""speculative_ngram_max_trie_depth, SGLang's default."""


@dataclass(eq=False, slots=True)  # mutable: it learns
class _Node:
    """`children` are in order of use, the latest last."""

    children: dict[int, _Node] = field(default_factory=dict)

    def use(self, token: int) -> _Node:
        child = self.children.pop(token, None) or _Node()
        self.children[token] = child
        return child

    def latest(self) -> tuple[int, _Node] | None:
        return next(reversed(self.children.items()), None)


class _Lookup:
    """The nodes that a request's latest tokens lead to, by how many of them: 1, 2, ...

    SGLang moves these along with each new token instead of looking them up again, so a suffix that
    was unknown stays unknown though the trie has learned it since.
    """

    def __init__(self, root: _Node, context: Sequence[int]) -> None:
        self._root = root
        self.n_seen = len(context)
        self.anchors: list[_Node | None] = []
        for depth in range(1, min(len(context), MAX_DEPTH) + 1):
            node: _Node | None = root
            for token in context[-depth:]:
                node = node.children.get(token) if node is not None else None
            self.anchors.append(node)

    def advance(self, context: Sequence[int]) -> None:
        for token in context[self.n_seen :]:
            before = [self._root, *self.anchors][:MAX_DEPTH]
            self.anchors = [n.children.get(token) if n is not None else None for n in before]
        self.n_seen = len(context)


Tree = dict[int, "Tree"]


def _draft(anchors: Sequence[_Node | None], draft_length: int) -> Tree:
    """K tokens below the last one: what last followed the longest match, then shorter ones, which
    share what they have in common. What is left of K is token 0, below the last one."""
    tree: Tree = {}
    n = 0
    for anchor in reversed(anchors):
        node, branch = anchor, tree
        while node is not None and n < draft_length and (found := node.latest()) is not None:
            token, node = found
            n += token not in branch
            branch = branch.setdefault(token, {})
    if n < draft_length:
        tree.setdefault(0, {})
    return tree


def _learn(root: _Node, tokens: Sequence[int]) -> None:
    for start in range(len(tokens)):
        node = root
        for token in tokens[start:]:
            node = node.use(token)


def sglang_ngram_steps(
    prompts_in_order: Sequence[Sequence[int]],
    target_next: Sequence[int],
    draft_length: int,
    max_tokens: int,
    stop_ids: Collection[int],
) -> Iterator[list[ExpectedStep]]:
    """The steps of each request, of all since SGLang's trie was last emptied, in order."""
    root = _Node()
    for prompt in prompts_in_order:
        context, end = list(prompt), len(prompt) + max_tokens
        context.append(target_next[context[-1]])
        steps = [ExpectedStep((context[-1],), 0, 0)]
        lookup: _Lookup | None = None
        while len(context) < end and context[-1] not in stop_ids:
            if lookup is None:
                lookup = _Lookup(root, context)
            else:
                lookup.advance(context)
            tree = _draft(lookup.anchors, draft_length)
            block = [target_next[context[-1]]]
            while (branch := tree.get(block[-1])) is not None:
                tree = branch
                block.append(target_next[block[-1]])
            kept = block[: end - len(context)]
            stop = next((i for i, token in enumerate(kept) if token in stop_ids), len(kept))
            kept = kept[: stop + 1]
            _learn(root, context[-MAX_DEPTH:])
            steps.append(ExpectedStep(tuple(kept), len(block) - 1, draft_length))
            context += kept
        yield steps
