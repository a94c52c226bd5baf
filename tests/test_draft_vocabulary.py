"""Draft vocabularies: reading checkpoints of every shape, and keeping one in a run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from speedbench import draft_vocabulary, store
from speedbench.calibration.closed_form import read_known_answer
from speedbench.types import UserError
from tests.builders import conversation, stored

KEPT = [0, 2, 3, 7]  # of 8 target tokens
OFFSETS = np.array([0, 1, 1, 4])
MASK = np.array([True, False, True, True, False, False, False, True])
BIG = np.zeros((64, 8), np.float32)


def checkpoint(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"lm_head.weight": BIG, **tensors}, folder / "model.safetensors")
    return folder


def ids_of(found: draft_vocabulary.DraftVocabulary | None) -> list[int]:
    assert found is not None
    return found.token_ids.tolist()


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "model."])
def test_offsets_of_d2t_are_added_to_draft_ids(tmp_path: Path, prefix: str) -> None:
    found = draft_vocabulary.read(
        checkpoint(tmp_path / "c", {f"{prefix}d2t": OFFSETS}, vocab_size=8, draft_vocab_size=4)
    )
    assert ids_of(found) == KEPT
    assert found is not None
    assert (found.n_tokens, found.source, found.is_pruned) == (8, "d2t", True)


def test_t2d_alone_is_a_mask_and_tells_the_size(tmp_path: Path) -> None:
    found = draft_vocabulary.read(checkpoint(tmp_path / "c", {"t2d": MASK}))
    assert ids_of(found) == KEPT
    assert found is not None
    assert (found.n_tokens, found.source) == (8, "t2d")


def test_d2t_goes_before_t2d_because_engines_read_it(tmp_path: Path) -> None:
    found = draft_vocabulary.read(
        checkpoint(tmp_path / "c", {"d2t": np.zeros(3, np.int64), "t2d": MASK})
    )
    assert ids_of(found) == [0, 1, 2]


def test_speculators_have_the_vocabulary_size_one_level_down(tmp_path: Path) -> None:
    folder = checkpoint(
        tmp_path / "c", {"d2t": OFFSETS}, transformer_layer_config={"vocab_size": 8}
    )
    found = draft_vocabulary.read(folder)
    assert found is not None
    assert found.n_tokens == 8


def test_a_zero_map_of_full_size_is_not_pruned(tmp_path: Path) -> None:
    found = draft_vocabulary.read(
        checkpoint(tmp_path / "c", {"d2t": np.zeros(8, np.int64)}, vocab_size=8)
    )
    assert found is not None
    assert not found.is_pruned


def test_no_map_is_the_whole_vocabulary(tmp_path: Path) -> None:
    assert draft_vocabulary.read(checkpoint(tmp_path / "c", {}, vocab_size=8)) is None


def test_a_pruned_drafter_without_its_map_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c", {}, vocab_size=8, draft_vocab_size=4)
    with pytest.raises(UserError, match=r"4 of 8 tokens.*neither d2t nor t2d"):
        draft_vocabulary.read(folder)


def test_token_ids_in_the_place_of_offsets_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "c", {"d2t": np.array(KEPT)}, vocab_size=8)
    with pytest.raises(UserError, match=r"tokens 0 to 10, expected 0 to 7: it must hold offsets"):
        draft_vocabulary.read(folder)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_a_map_cast_with_the_weights_is_refused(tmp_path: Path, kind: torch.dtype) -> None:
    """300 is not a bfloat16: the nearest ones are 300 +- 2 apart."""
    folder = tmp_path / "c"
    folder.mkdir()
    save_torch({"d2t": torch.tensor([300, 301]).to(kind)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="token ids are not exact"):
        draft_vocabulary.read(folder)


def test_a_matrix_is_no_map(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"d2t has shape \(2, 2\)"):
        draft_vocabulary.read(checkpoint(tmp_path / "c", {"d2t": OFFSETS.reshape(2, 2)}))


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before 1.6"])
def test_a_torch_file_is_read(tmp_path: Path, old: bool) -> None:
    torch.save(
        {"d2t": torch.from_numpy(OFFSETS), "t2d": torch.from_numpy(MASK), "w": torch.ones(9)},
        tmp_path / "pytorch_model.bin",
        _use_new_zipfile_serialization=not old,
    )
    assert ids_of(draft_vocabulary.read(tmp_path)) == KEPT


def test_a_torch_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"d2t": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        draft_vocabulary.read(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_of_a_sharded_checkpoint_only_the_part_with_the_map_is_opened(tmp_path: Path) -> None:
    save_file({"d2t": OFFSETS}, tmp_path / "model-00002-of-00002.safetensors")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("not a checkpoint")
    places = {
        "lm_head.weight": "model-00001-of-00002.safetensors",
        "d2t": "model-00002-of-00002.safetensors",
    }
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert ids_of(draft_vocabulary.read(tmp_path)) == KEPT


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"\xff" * 64])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        draft_vocabulary.read(tmp_path)


def test_a_folder_without_weights_and_a_name_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no weights"):
        draft_vocabulary.read(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        draft_vocabulary.read(tmp_path / "absent")


def test_the_calibration_drafter_lacks_every_fourth_token(models: Path) -> None:
    word = models / "word"
    known = read_known_answer(word / "target")
    n_tokens = len(known.target_next)
    found = draft_vocabulary.read(word / "eagle3-pruned")
    assert ids_of(found) == [token for token in range(n_tokens) if token % 4]
    assert found is not None
    assert found.n_tokens == n_tokens
    assert draft_vocabulary.read(word / "eagle3") is None


def test_lacks_tells_tokens_beyond_both_ends() -> None:
    found = draft_vocabulary.DraftVocabulary(np.array(KEPT), 8, "d2t")
    asked = np.array([0, 1, 7, 8, 99])
    assert found.lacks(asked).tolist() == [False, True, False, True, True]
    assert found.lacks(np.array([], np.int64)).tolist() == []


# --- in a run directory ---------------------------------------------------------------------------


def test_what_is_stored_comes_back(tmp_path: Path, models: Path) -> None:
    run = stored(tmp_path / "r", [conversation("a", "x", [1, 2])])
    drafter = models / "word" / "eagle3-pruned"
    assert draft_vocabulary.store(run.directory, str(drafter)) == ""
    loaded, read = draft_vocabulary.load(run.directory), draft_vocabulary.read(drafter)
    assert loaded is not None
    assert read is not None
    assert loaded.token_ids.tolist() == read.token_ids.tolist()
    assert (loaded.n_tokens, loaded.source) == (read.n_tokens, "d2t")
    assert store.load(run.directory).columns.n_requests == 1


def test_a_resumed_run_keeps_what_it_has(tmp_path: Path, models: Path) -> None:
    run = stored(tmp_path / "r", [conversation("a", "x", [1, 2])])
    assert draft_vocabulary.store(run.directory, str(models / "word" / "eagle3-pruned")) == ""
    before = (run.directory / store.DRAFT_VOCABULARY_FILE).read_bytes()
    assert draft_vocabulary.store(run.directory, str(tmp_path / "gone")) == ""
    assert (run.directory / store.DRAFT_VOCABULARY_FILE).read_bytes() == before


def test_whatever_cannot_be_stored_is_a_sentence_not_an_error(tmp_path: Path, models: Path) -> None:
    run = stored(tmp_path / "r", [conversation("a", "x", [1, 2])])
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "model.safetensors").write_bytes(b"\xff" * 64)
    for drafter, reason in (
        (None, "no draft checkpoint"),
        (str(models / "word" / "eagle3"), "not pruned"),
        (str(tmp_path / "bad"), "cannot be read"),
        (str(tmp_path / "absent"), "neither a folder nor a hub id"),
    ):
        assert reason in draft_vocabulary.store(run.directory, drafter)
    assert draft_vocabulary.load(run.directory) is None
    assert [p.name for p in run.directory.glob(".draft*")] == []


def test_a_disk_that_is_full_is_a_sentence(tmp_path: Path, models: Path) -> None:
    """A missing directory stands in for whatever the disk may do."""
    why = draft_vocabulary.store(tmp_path / "none", str(models / "word" / "eagle3-pruned"))
    assert "could not be kept" in why


def test_a_damaged_file_in_a_run_is_one_sentence(tmp_path: Path) -> None:
    run = stored(tmp_path / "r", [conversation("a", "x", [1, 2])])
    (run.directory / store.DRAFT_VOCABULARY_FILE).write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match="restore it from a copy"):
        draft_vocabulary.load(run.directory)
