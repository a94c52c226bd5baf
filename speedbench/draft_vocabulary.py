"""Draft vocabulary: which of the target's tokens a pruned drafter can propose at all.

EAGLE3 checkpoints (SafeAILab/EAGLE, SpecForge, speculators, ModelOpt) that draft from fewer tokens
than the target knows hold `d2t`, int64, one offset per draft token: target id = i + d2t[i], and
mostly `t2d`, bool, one flag per target token. vLLM, SGLang and TensorRT-LLM read `d2t` alone, so it
is what counts here; `t2d` is taken where there is no `d2t`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from speedbench import store as run_store
from speedbench.columns import Bools, Ints
from speedbench.types import UserError

NAMES = ("d2t", "t2d")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
EXACT_TYPES = frozenset({"I64", "I32", "I16", "I8", "U8", "BOOL"})
"""Types, as safetensors names them, in which token ids are what they were. An offset cast to
bfloat16 with the rest of a checkpoint is not."""


@dataclass(frozen=True, slots=True)
class DraftVocabulary:
    """Target token ids that can be drafted, ascending: (V',), and where that was read.

    n_tokens  size of the target's vocabulary; None where the checkpoint does not tell
    """

    token_ids: Ints
    n_tokens: int | None
    source: str

    @property
    def is_pruned(self) -> bool:
        return self.n_tokens is None or len(self.token_ids) < self.n_tokens

    def lacks(self, token_ids: npt.NDArray[Any]) -> Bools:
        """Which of the tokens (T,) cannot be drafted."""
        size = int(max(self.token_ids.max(initial=-1), token_ids.max(initial=-1))) + 1
        known = np.zeros(size, bool)
        known[self.token_ids] = True
        return np.asarray(~known[token_ids], bool)


def read(checkpoint: Path | str) -> DraftVocabulary | None:
    """The draft vocabulary of a checkpoint, its other weights left on the disk; None if it drafts
    from the target's whole vocabulary. Raises UserError where it cannot be told."""
    folder = _folder(checkpoint)
    config = _config(folder)
    n_tokens = _vocabulary_size(config)
    maps = _tensors(folder)
    if "d2t" in maps:
        ids = maps["d2t"].astype(np.int64)
        found = ids + np.arange(len(ids))
        source = "d2t"
    elif "t2d" in maps:
        found, source = np.flatnonzero(maps["t2d"]), "t2d"
    else:
        n_draft = config.get("draft_vocab_size")
        if type(n_draft) is int and n_tokens is not None and n_draft < n_tokens:
            raise UserError(
                f"{folder} drafts from {n_draft} of {n_tokens} tokens (config.json) but holds "
                "neither d2t nor t2d, which say from which: export the checkpoint with its "
                "vocabulary map"
            )
        return None
    if "t2d" in maps:
        n_tokens = n_tokens or len(maps["t2d"])
    limit = run_store.MOST_TOKENS if n_tokens is None else min(n_tokens, run_store.MOST_TOKENS)
    if found.min(initial=0) < 0 or found.max(initial=-1) >= limit:
        raise UserError(
            f"{folder}: {source} names target tokens {found.min()} to {found.max()}, expected 0 to "
            f"{'the last one' if n_tokens is None else n_tokens - 1}: it must hold offsets, target "
            "id = draft id + d2t[draft id]"
        )
    return DraftVocabulary(np.unique(found), n_tokens, source)


def store(directory: Path, draft_model_dir: str | None) -> str:
    """Keep the drafter's vocabulary in a run's directory; '' or why there is nothing to keep.

    Never fails: a run must not end because this cannot be read.
    """
    if draft_model_dir is None:
        return "there is no draft checkpoint"
    if (directory / run_store.DRAFT_VOCABULARY_FILE).exists():
        return ""  # a resumed run: its checkpoints are known to be the same
    try:
        found = read(draft_model_dir)
        if found is None or not found.is_pruned:
            return "the drafter's vocabulary is not pruned"
        about = {"n_tokens": found.n_tokens, "source": found.source}
        run_store.write_draft_vocabulary(directory, found.token_ids, about)
    except UserError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever a stranger's checkpoint does to a reader
        return f"the draft vocabulary could not be kept ({type(error).__name__}: {error})"
    return ""


def load(directory: Path) -> DraftVocabulary | None:
    """What `store` kept; None if nothing was. Raises UserError if it cannot be read."""
    found = run_store.load_draft_vocabulary(directory)
    if found is None:
        return None
    token_ids, about = found
    return DraftVocabulary(token_ids, about.get("n_tokens"), str(about.get("source")))


# ---------------------------------------------------------------- checkpoints


def _folder(checkpoint: Path | str) -> Path:
    """The checkpoint's folder; of a hub id, the copy that the engine has downloaded."""
    path = Path(checkpoint)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(checkpoint), local_files_only=True))
    except Exception as error:  # noqa: BLE001 - no such package, no such copy, no hub id
        raise UserError(
            f"{checkpoint} is neither a folder nor a hub id with a copy on this machine "
            f"({type(error).__name__}): name the folder of the draft checkpoint"
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _vocabulary_size(config: dict[str, Any]) -> int | None:
    """The target's; speculators checkpoints have it one level down."""
    inner = config.get("transformer_layer_config")
    for one in (config, inner if isinstance(inner, dict) else {}):
        if type(size := one.get("vocab_size")) is int and size > 0:
            return size
    return None


def _tensors(folder: Path) -> dict[str, npt.NDArray[Any]]:
    """The checkpoint's d2t and t2d, under these names, as far as it has them."""
    files = _files(folder)
    if not files:
        raise UserError(
            f"{folder} holds no weights (*.safetensors or *.bin): name the folder of the draft "
            "checkpoint"
        )
    found: dict[str, npt.NDArray[Any]] = {}
    for file in files:
        inside = _of_safetensors(file) if file.suffix == ".safetensors" else _of_pickle(file)
        for name, values in inside.items():
            if values.ndim != 1:
                raise UserError(
                    f"{file}: {name} has shape {values.shape}, expected one row: export the "
                    "checkpoint again"
                )
            found[name] = values
    return found


def _files(folder: Path) -> list[Path]:
    """The files that may hold the maps: those of the index that names them, or all weights."""
    for name in INDEXES:
        index = folder / name
        if index.is_file():
            places = _places(index)
            named = {file for tensor, file in places.items() if _short(tensor) in NAMES}
            # Without any, one file is opened all the same, to see that there is a checkpoint.
            return [folder / file for file in sorted(named or set(list(places.values())[:1]))]
    tensors = sorted(folder.glob("*.safetensors"))
    return tensors or sorted(folder.glob("*.bin"))


def _places(index: Path) -> dict[str, str]:
    """Tensor -> the file beside the index that holds it."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index} cannot be read ({error}): restore it") from None
    if not isinstance(found, dict) or not found:
        raise UserError(f"{index} has no weight_map that names files: restore it")
    for tensor, file in found.items():
        is_name = isinstance(file, str) and file.isprintable() and file not in ("", ".", "..")
        if not is_name or Path(file).name != file:
            raise UserError(
                f"{index} says that {tensor} is in {file!r:.80}, expected a file beside it: "
                "restore it"
            )
    return found


def _short(tensor: str) -> str:
    return tensor.rpartition(".")[2]


def _of_safetensors(file: Path) -> dict[str, npt.NDArray[Any]]:
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            for tensor in opened.keys():  # noqa: SIM118 - the file is no mapping
                name = _short(tensor)
                if name in NAMES:
                    _refuse_inexact(file, name, opened.get_slice(tensor).get_dtype())
                    found[name] = opened.get_tensor(tensor)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): restore it from a copy") from None
    return found


def _of_pickle(file: Path) -> dict[str, npt.NDArray[Any]]:
    """From a torch file; only tensors are unpickled, and the other weights are not read."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{file} needs torch to be read: install it, or save the checkpoint as safetensors"
        ) from None
    try:
        try:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format of before torch 1.6 cannot be mapped
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a pickle can fail in any way
        first = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(f"{file} cannot be read ({first}): save it as safetensors") from None
    found = {}
    for tensor, values in tensors.items() if isinstance(tensors, dict) else ():
        name = _short(str(tensor))
        if name in NAMES and hasattr(values, "numpy"):
            kinds = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
                     torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
            _refuse_inexact(file, name, kinds.get(values.dtype, str(values.dtype)))
            found[name] = values.numpy()
    return found


def _refuse_inexact(file: Path, name: str, kind: str) -> None:
    if kind not in EXACT_TYPES:
        raise UserError(
            f"{file}: {name} is stored as {kind}, in which token ids are not exact: export the "
            "checkpoint with integers"
        )
