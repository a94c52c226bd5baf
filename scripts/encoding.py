#!/usr/bin/env python
"""How fast prompts are encoded, and in how much memory: ours, the library's own batch call, and one
by one, in one session.

    python scripts/encoding.py [--rows 1536] [--tokens 32000]

Prints ratios; each way runs in a process of its own, so that peaks do not mix.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("text alone", "library batch", "speedbench", "one by one")


def texts(n_rows: int, n_tokens: int) -> list[str]:
    """Prompts of about so many tokens, sentences of the shipped prompts in random order."""
    lines = (Path(__file__).parent.parent / "data/mini/prompts.jsonl").read_text().splitlines()
    words = [word for line in lines for turn in json.loads(line)["turns"] for word in turn.split()]
    rng = random.Random(0)
    pieces = [" ".join(rng.choices(words, k=200)) for _ in range(400)]
    per_piece = 200 * 1.9  # tokens of a word under the byte-level tokenizer below
    n_pieces = max(1, round(n_tokens / per_piece))
    return [f"{i} " + " ".join(rng.choices(pieces, k=n_pieces)) for i in range(n_rows)]


def measure(way: str, folder: str, n_rows: int, n_tokens: int) -> dict[str, float]:
    """Seconds of encoding, tokens, and the peak of the process's memory (GB)."""
    from transformers import AutoTokenizer

    from speedbench.config import from_dict
    from speedbench.prompts import PromptEncoder
    from speedbench.types import Conversation

    prompts = texts(n_rows, n_tokens)
    config = from_dict({"engine": "NULL", "tokenizer": folder, "completions": True})
    encoder = PromptEncoder(config)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [Conversation(str(i), "c", (text,)) for i, text in enumerate(prompts)]
    started_s = time.perf_counter()
    if way == "speedbench":
        found = encoder.encode_first_turns(rows)
    elif way == "library batch":
        found = tokenizer(prompts, add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
    elif way == "one by one":
        found = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    else:
        found = []
    took_s = time.perf_counter() - started_s
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": took_s, "tokens": sum(map(len, found)), "peak_gb": peak_gb}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=32000)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.folder, given.rows, given.tokens)))
        return
    from speedbench.calibration import checkpoints

    with tempfile.TemporaryDirectory() as temporary:
        checkpoints.build(Path(temporary))
        results = {}
        for way in WAYS:
            done = subprocess.run(
                [sys.executable, __file__, "--way", way, "--folder", f"{temporary}/bpe/target",
                 "--rows", str(given.rows), "--tokens", str(given.tokens)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            results[way] = json.loads(done.stdout.splitlines()[-1])
    base, text_gb = results["library batch"], results["text alone"]["peak_gb"]
    print(f"{given.rows} prompts, {base['tokens'] / given.rows:.0f} tokens each on average")
    for way in WAYS[1:]:
        found = results[way]
        print(
            f"{way:<14} {found['seconds']:7.1f} s, {base['seconds'] / found['seconds']:.2f} of the "
            f"batch call's speed, peak {found['peak_gb']:.2f} GB ({text_gb:.2f} GB before encoding)"
        )


if __name__ == "__main__":
    main()
