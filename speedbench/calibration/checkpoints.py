"""Builds the calibration checkpoints: real models whose greedy answers are a chosen function.

What their weights are is in `weights`; here are the folders, configurations and tokenizers.
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

from speedbench.calibration import weights
from speedbench.calibration.closed_form import (
    KNOWN_ANSWER_FILE,
    KNOWN_DRAFT_FILE,
    next_token_logits,
)
from speedbench.calibration.tokenizers import TokenizerFiles, bpe_tokenizer, word_tokenizer
from speedbench.calibration.words import DENSITIES, prompt_rows, words
from speedbench.types import UserError

VERSION = 3
"""Raise it whenever a built file would differ."""
PAIRS = ("word", "bpe")
EAGLE_FORMS = {"eagle": "LlamaForCausalLM", "eagle-sglang": "LlamaForCausalLMEagle"}
"""Folder -> architecture: vLLM and SGLang read EAGLE heads under different names."""
BUILD_FILE = "build.json"
PROMPTS_FILE = "calibration_prompts.jsonl"
CORPUS = Path(__file__).parents[2] / "data" / "mini" / "prompts.jsonl"
"""What the byte-level tokenizer is trained on."""

N_HEADS = 4
MTP_HEADS = 12  # Qwen2 wants HIDDEN / HEAD_DIM of them
N_LAYERS = {"target": 2, "draft": 1}
MEDUSA_HEADS = 5  # the largest K that has a known answer
EXPERT_SIZE = 64
MAX_TOKENS = 4096
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

    The word pair comes with more drafters (eagle, eagle3, medusa, pard, dflash) and with targets
    that have a head to predict further (mtp) or routed experts (moe).

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
    table = weights.embedding(_before(pair))
    for role, function in (("target", pair.target_next), ("draft", pair.draft_next)):
        found = weights.bigram(table, function, N_LAYERS[role], N_HEADS)
        _write_model(folder / role, pair, _config(pair, N_LAYERS[role]), found)
        _check(folder / role, function)
    _write_answer(folder / "target", pair)
    if pair.name == "word":
        _write_drafters(folder, pair, table)
        _write_mixture(folder / "moe", pair, table)


def _before(pair: _Pair) -> list[int]:
    """For every token x, a token whose successor (by f) is what the drafter says after x."""
    successor_of: dict[int, int] = {}
    for token, following in enumerate(pair.target_next):
        successor_of.setdefault(following, token)
    return [
        token if following == pair.target_next[token] else successor_of[following]
        for token, following in enumerate(pair.draft_next)
    ]


def _write_drafters(folder: Path, pair: _Pair, table: NDArray[np.float32]) -> None:
    """Everything that drafts for the word target with more than a second model."""
    head = _config(pair, 1, n_heads=N_HEADS)
    for name, architecture in EAGLE_FORMS.items():
        config = {**head, "architectures": [architecture]}
        _write_model(
            folder / name, pair, config, weights.eagle(N_HEADS, biased=name == "eagle-sglang")
        )
    _write_eagle3(folder / "eagle3", pair, table, None)
    _write_eagle3(folder / "eagle3-pruned", pair, table, _kept(pair))
    _write_medusa(folder / "medusa", pair, table)
    _write_pard(folder / "pard", pair, table)
    _write_dflash(folder / "dflash", pair, table)
    config = {
        **_config(pair, N_LAYERS["target"], n_heads=MTP_HEADS),
        # Not MiMo's own model_type, which transformers lacks, nor qwen2, for which it replaces the
        # checkpoint's tokenizer by its own.
        "architectures": ["MiMoForCausalLM"],
        "num_nextn_predict_layers": 1,
        "use_sliding_window": False,
    }
    found = weights.mtp(table, pair.target_next, N_LAYERS["target"], MTP_HEADS)
    _write_model(folder / "mtp", pair, config, found)
    _check(folder / "mtp", pair.target_next)
    _write_answer(folder / "mtp", pair)


def _kept(pair: _Pair) -> list[int]:
    """The pruned draft vocabulary: three quarters of all tokens."""
    return [token for token in range(len(pair.target_next)) if token % 4 != 0]


def _write_eagle3(
    folder: Path, pair: _Pair, table: NDArray[np.float32], kept: Sequence[int] | None
) -> None:
    n_tokens = len(pair.target_next)
    config = {
        **_config(pair, 1, n_heads=weights.EAGLE3_HEADS),
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": n_tokens if kept is None else len(kept),
        "eagle_aux_hidden_state_layer_ids": [0, 1],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1], "use_aux_hidden_state": True},
    }
    found = weights.eagle3(table, pair.target_next, kept)
    extra = {} if kept is None else weights.draft_vocabulary(kept, n_tokens)
    _write_model(folder, pair, config, found, extra)
    if kept is not None:
        # What it says after x is the best of the tokens it has, the target's choice or not.
        logits = table[:, weights.BEFORE].astype(np.float64) @ (
            found["lm_head.weight"][:, weights.NOW].T.astype(np.float64)
        )
        best = np.asarray(kept)[logits.argmax(axis=1)]
        _write_json(folder / KNOWN_DRAFT_FILE, {"draft_next": best.tolist()})


def _write_medusa(folder: Path, pair: _Pair, table: NDArray[np.float32]) -> None:
    config = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": weights.HIDDEN,
        "vocab_size": len(pair.target_next),
        "num_heads": MEDUSA_HEADS,
        "num_hidden_layers": 1,
        "torch_dtype": "float32",
    }
    found = weights.medusa(table, pair.target_next, pair.draft_next, MEDUSA_HEADS)
    _write_model(folder, pair, config, found)


def _write_pard(folder: Path, pair: _Pair, table: NDArray[np.float32]) -> None:
    """A draft model that is asked for all drafts at once, mask tokens in place of the later ones:
    a bigram says the same after every mask."""
    mask = pair.tokenizer.pad
    config = {**_config(pair, N_LAYERS["draft"]), "pard_token": mask}
    found = weights.bigram(table, pair.draft_next, N_LAYERS["draft"], N_HEADS)
    _write_model(folder, pair, config, found)
    _check(folder, pair.draft_next)
    _write_json(folder / KNOWN_DRAFT_FILE, {"after_mask": pair.draft_next[mask]})


def _write_dflash(folder: Path, pair: _Pair, table: NDArray[np.float32]) -> None:
    """Block diffusion's interface: like PARD, but in one block with attention to its other end."""
    mask = pair.tokenizer.pad
    config = {
        **_config(pair, 1),
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dflash_config": {"mask_token_id": mask, "target_layer_ids": [0]},
    }
    found = weights.dflash(table, pair.draft_next, mask, N_HEADS)
    _write_model(folder, pair, config, found)
    _write_json(folder / KNOWN_DRAFT_FILE, {"after_mask": pair.draft_next[mask]})


def _write_mixture(folder: Path, pair: _Pair, table: NDArray[np.float32]) -> None:
    config = {
        **_config(pair, weights.N_ROUTED_LAYERS),
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": weights.N_EXPERTS,
        "num_experts_per_tok": weights.TOP_K,
        "moe_intermediate_size": EXPERT_SIZE,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "use_sliding_window": False,
    }
    found = weights.mixture(table, pair.target_next, N_HEADS, EXPERT_SIZE)
    _write_model(folder, pair, config, found)
    _check(folder, pair.target_next)
    experts = [weights.experts_of(token) for token in range(len(pair.target_next))]
    _write_answer(folder, pair, {"experts": experts})


def _write_answer(folder: Path, pair: _Pair, more: Mapping[str, object] | None = None) -> None:
    """Beside a target: its functions, and the prompts in its language."""
    answer = {
        "name": pair.name,
        "version": VERSION,
        "eos_token_ids": pair.tokenizer.eos,
        "densities": pair.densities,
        "next": pair.target_next,
        "draft_next": pair.draft_next,
        **(more or {}),
    }
    _write_json(folder / KNOWN_ANSWER_FILE, answer)
    if pair.prompts:
        lines = "".join(json.dumps(row) + "\n" for row in pair.prompts)
        (folder / PROMPTS_FILE).write_text(lines, encoding="utf-8")


def _write_model(
    folder: Path,
    pair: _Pair,
    config: Mapping[str, object],
    found: weights.Weights,
    extra: Mapping[str, NDArray[np.generic]] | None = None,
) -> None:
    """Weights (checked to be the same in bfloat16), other tensors, configuration and tokenizer."""
    from safetensors.numpy import save_file

    for name, values in found.items():
        if not np.array_equal(values, weights.bfloat16(values)):
            raise ValueError(f"{folder}: {name} changes when rounded to bfloat16")
    folder.mkdir(parents=True)
    # transformers refuses a file that does not say which framework's layout it has.
    tensors = {**found, **(extra or {})}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    tokenizer = pair.tokenizer
    generation = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.eos)}
    _write_json(folder / "generation_config.json", generation)
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer_json, encoding="utf-8")
    text = tokenizer.tokenizer_config_json
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _config(pair: _Pair, n_layers: int, n_heads: int = N_HEADS) -> dict[str, object]:
    tokenizer = pair.tokenizer
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokenizer.vocabulary_size,
        "hidden_size": weights.HIDDEN,
        "intermediate_size": weights.INTERMEDIATE,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_heads,
        "head_dim": weights.HEAD_DIM,
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


def _check(folder: Path, function: Sequence[int]) -> None:
    """Greedy decoding of what was written must be `function`, by a wide margin."""
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
