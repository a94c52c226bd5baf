"""Builds the calibration pairs: real Llama checkpoints whose greedy answers are a chosen function.

Attention and MLP add nothing, embedding rows are random signs, and row j of the head is the sum of
the embeddings of all x with f(x) = j. Every weight is a small multiple of a power of two, so
float32, bfloat16 and float16 compute the same logits to the last bit that matters.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from speedbench.calibration.closed_form import KNOWN_ANSWER_FILE, next_token_logits
from speedbench.calibration.tokenizers import TokenizerFiles, bpe_tokenizer, word_tokenizer
from speedbench.calibration.words import DENSITIES, prompt_rows, words
from speedbench.types import UserError

VERSION = 1
"""Raise it whenever a built file would differ."""
PAIRS = ("word", "bpe")
BUILD_FILE = "build.json"
PROMPTS_FILE = "calibration_prompts.jsonl"
CORPUS = Path(__file__).parents[2] / "data" / "mini" / "prompts.jsonl"
"""What the byte-level tokenizer is trained on."""

HIDDEN = 256  # a power of four: signs / sqrt(HIDDEN) are exact
N_HEADS = 8
HEAD_DIM = 64  # GPU kernels take 64
INTERMEDIATE = 512
N_LAYERS = {"target": 2, "draft": 1}
MAX_TOKENS = 4096
HEAD_SCALE = 9 / 16
"""Puts the logit of f(x) at 9: at temperature 1 its probability is about 0.8."""
MIN_MARGIN = 1.5  # in logits, between f(x) and the next best token
BPE_AGREEMENT = 0.7
BPE_TOKENS_PER_EOS = 150


@dataclass(frozen=True, slots=True)
class _Pair:
    """What is needed to write target and draft of one pair."""

    name: str
    tokenizer: TokenizerFiles
    target_next: tuple[int, ...]
    draft_next: tuple[int, ...]
    densities: Mapping[str, float]
    prompts: Sequence[Mapping[str, object]] = ()


def build(out: Path, corpus: Path = CORPUS) -> None:
    """Write `out`/word and `out`/bpe, each with target and draft; seconds, the same every time.

    Does nothing if this version, trained on this corpus, is already there.
    """
    try:
        text = corpus.read_bytes()
    except OSError as error:
        raise UserError(
            f"{corpus} cannot be read ({error}), expected the prompts that come with speedbench: "
            "run from a checkout of the repository"
        ) from None
    stamp = json.dumps({"version": VERSION, "corpus_sha256": hashlib.sha256(text).hexdigest()})
    stamp_file = out / BUILD_FILE
    complete = all((out / pair / "target" / KNOWN_ANSWER_FILE).is_file() for pair in PAIRS)
    if complete and stamp_file.is_file() and stamp_file.read_text(encoding="utf-8") == stamp:
        return
    out.mkdir(parents=True, exist_ok=True)
    stamp_file.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".building-") as temporary:
        for pair in (_word_pair(), _bpe_pair(text.decode("utf-8"))):
            built = Path(temporary) / pair.name
            _write_pair(built, pair)
            shutil.rmtree(out / pair.name, ignore_errors=True)
            built.replace(out / pair.name)
        unfinished = Path(temporary) / BUILD_FILE
        unfinished.write_text(stamp, encoding="utf-8")
        unfinished.replace(stamp_file)


def _word_pair() -> _Pair:
    language = words()
    tokenizer = word_tokenizer(language.vocabulary, MAX_TOKENS)
    ids = {word: i for i, word in enumerate(language.vocabulary)}
    return _Pair(
        name="word",
        tokenizer=tokenizer,
        target_next=tuple(ids[language.target_next[word]] for word in language.vocabulary),
        draft_next=tuple(ids[language.draft_next[word]] for word in language.vocabulary),
        densities=DENSITIES,
        prompts=prompt_rows(),
    )


def _bpe_pair(corpus: str) -> _Pair:
    """f: one random cycle through all text tokens, but every 150th or so ends the answer."""
    rows = [json.loads(line) for line in corpus.splitlines() if line.strip()]
    tokenizer = bpe_tokenizer((turn for row in rows for turn in row["turns"]), MAX_TOKENS)
    rng = random.Random("bpe")
    cycle = [i for i in range(tokenizer.vocabulary_size) if i not in tokenizer.specials]
    rng.shuffle(cycle)
    target = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    for i, token in enumerate(rng.sample(cycle, round(len(cycle) / BPE_TOKENS_PER_EOS))):
        target[token] = tokenizer.eos[i % len(tokenizer.eos)]
    wrong = rng.sample(cycle, round((1 - BPE_AGREEMENT) * len(cycle)))
    draft = target | _exchanged({token: target[token] for token in wrong})
    # Drafts run past the end of an answer, so special tokens have a successor too.
    specials = dict(
        zip(tokenizer.specials, rng.sample(cycle, len(tokenizer.specials)), strict=True)
    )
    target, draft = target | specials, draft | specials
    return _Pair(
        name="bpe",
        tokenizer=tokenizer,
        target_next=tuple(target[i] for i in range(tokenizer.vocabulary_size)),
        draft_next=tuple(draft[i] for i in range(tokenizer.vocabulary_size)),
        densities={"": 1 - len(wrong) / len(cycle)},
    )


def _exchanged(values: Mapping[int, int]) -> dict[int, int]:
    """The same values moved along by the smallest distance that changes every one of them."""
    keys, old = list(values), list(values.values())
    for distance in range(1, len(old)):
        new = old[distance:] + old[:distance]
        if all(a != b for a, b in zip(old, new, strict=True)):
            return dict(zip(keys, new, strict=True))
    raise ValueError(f"{len(old)} values cannot be exchanged so that each changes")


def _write_pair(folder: Path, pair: _Pair) -> None:
    embedding = _embedding(pair.tokenizer.vocabulary_size)
    functions = {"target": pair.target_next, "draft": pair.draft_next}
    for role, function in functions.items():
        _write_checkpoint(folder / role, pair.tokenizer, embedding, function, N_LAYERS[role])
    answer = {
        "name": pair.name,
        "version": VERSION,
        "eos_token_ids": pair.tokenizer.eos,
        "densities": pair.densities,
        "next": pair.target_next,
        "draft_next": pair.draft_next,
    }
    _write_text(folder / "target" / KNOWN_ANSWER_FILE, json.dumps(answer))
    if pair.prompts:
        lines = "".join(json.dumps(row) + "\n" for row in pair.prompts)
        _write_text(folder / "target" / PROMPTS_FILE, lines)


def _write_checkpoint(
    folder: Path,
    tokenizer: TokenizerFiles,
    embedding: NDArray[np.float32],
    function: Sequence[int],
    n_layers: int,
) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    weights = _weights(embedding, function, n_layers)
    # transformers refuses a file that does not say which framework's layout it has.
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_text(folder / "config.json", json.dumps(_config(tokenizer, n_layers), indent=2))
    generation = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.eos)}
    _write_text(folder / "generation_config.json", json.dumps(generation, indent=2))
    _write_text(folder / "tokenizer.json", tokenizer.tokenizer_json)
    _write_text(folder / "tokenizer_config.json", tokenizer.tokenizer_config_json)
    _check(folder, weights, function)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _config(tokenizer: TokenizerFiles, n_layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.vocabulary_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": n_layers,
        "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos[0],
        "pad_token_id": tokenizer.pad,
        "torch_dtype": "float32",
    }


def _embedding(n_tokens: int) -> NDArray[np.float32]:
    """(V, HIDDEN) unit rows of random signs: nearly orthogonal, and exact in any float format.

    Raw generator output, because numpy keeps that the same in all its versions.
    """
    raw = np.random.PCG64(7).random_raw(n_tokens * HIDDEN // 64)
    bits = np.unpackbits(np.asarray(raw, dtype="<u8").view(np.uint8)).reshape(n_tokens, HIDDEN)
    signs = bits.astype(np.float32) * 2 - 1
    return np.asarray(signs / np.sqrt(HIDDEN), dtype=np.float32)


def _weights(
    embedding: NDArray[np.float32], function: Sequence[int], n_layers: int
) -> dict[str, NDArray[np.float32]]:
    head = np.zeros_like(embedding)
    np.add.at(head, np.asarray(function), embedding * np.float32(HEAD_SCALE))
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": np.ones(HIDDEN, dtype=np.float32),
        "lm_head.weight": head,
    }
    inner = N_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (inner, HIDDEN),
        "self_attn.k_proj": (inner, HIDDEN),
        "self_attn.v_proj": (inner, HIDDEN),
        "self_attn.o_proj": (HIDDEN, inner),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        for name, shape in shapes.items():
            weights[f"{prefix}{name}.weight"] = np.zeros(shape, dtype=np.float32)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = np.ones(HIDDEN, dtype=np.float32)
    return weights


def _check(
    folder: Path, weights: Mapping[str, NDArray[np.float32]], function: Sequence[int]
) -> None:
    """Greedy decoding of what was written must be `function`, by a wide margin, in bfloat16 too."""
    for name, values in weights.items():
        if not np.array_equal(values, _bfloat16(values)):
            raise ValueError(f"{folder}: {name} changes when rounded to bfloat16")
    logits = next_token_logits(folder)
    rows = np.arange(len(logits))
    chosen = logits[rows, np.asarray(function)]
    logits[rows, np.asarray(function)] = -np.inf
    margin = float((chosen - logits.max(axis=1)).min())
    if margin < MIN_MARGIN:
        raise ValueError(
            f"{folder}: the chosen token leads by {margin:.2f} logits only, expected at least "
            f"{MIN_MARGIN}: change the seed of the embedding"
        )


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """float32 rounded to bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.asarray(rounded & np.uint32(0xFFFF0000)).view(np.float32)
