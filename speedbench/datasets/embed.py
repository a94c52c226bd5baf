"""Embeddings: one vector per text, from a file, a model, an endpoint or TF-IDF.

Packages that only this needs are imported where they are used; a missing one is one sentence.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from speedbench.types import UserError
from speedbench.words import first_line

API_KEY = "OPENAI_API_KEY"
"""The environment variable that an endpoint's key is read from; it is never stored."""

BATCH_TEXTS = 64
N_TRIES = 5
FIRST_WAIT_S = 1.0
TIMEOUT_S = 300.0

MAX_TFIDF_BYTES = 1 << 30
"""Of the vectors. Words beyond what that holds share dimensions, with random signs: cosines keep
their expectation, with an error of about 1 / sqrt(dimensions)."""

WORD = (
    r"(?u)[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+"
)
"""What TF-IDF counts: a run of letters and digits, or one character of scripts without spaces."""


@dataclass(frozen=True, slots=True)
class Embeddings:
    """vectors (N, D) and how they were made, for the report; `file`: what they are mapped from."""

    vectors: NDArray[Any]
    made_by: Mapping[str, object]
    file: Path | None = None

    def of(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Those of `rows` (n,), ascending: a view where the rows are neighbours, else a copy.

        A file is mapped anew, so that what was read of it for other rows may be forgotten.
        """
        vectors = self.vectors if self.file is None else open_array(self.file)
        first, last = int(rows[0]), int(rows[-1])
        if last - first + 1 == len(rows):
            return vectors[first : last + 1]
        return np.asarray(vectors[rows])


def embed(
    source: str, texts: Sequence[str], endpoint_model: str | None = None, seed: int = 0
) -> Embeddings:
    """`source` is a .npy file, an http(s) URL, "tfidf", or the name of a model."""
    is_url = source.startswith(("http://", "https://"))
    if endpoint_model is not None and not is_url:
        raise UserError(
            f"--embedding_model {endpoint_model} is only asked of an endpoint, but --embeddings is "
            f"{source}: give its URL, or remove --embedding_model"
        )
    if source.endswith(".npy"):
        path = Path(source)
        return Embeddings(open_array(path), {"kind": "file", "file": path.name}, path)
    if is_url:
        return _from_endpoint(source, texts, endpoint_model)
    if source == "tfidf":
        return _from_tfidf(texts, seed)
    return _from_model(source, texts)


def open_array(path: Path) -> NDArray[Any]:
    """The file as a memory map: nothing is read yet."""
    if not path.is_file():
        raise UserError(f"--embeddings {path} does not exist: give a .npy file")
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"--embeddings {path} cannot be read as a .npy array ({first_line(error)}): write it "
            "with numpy.save"
        ) from None
    return array


def save_array(path: Path, vectors: NDArray[Any]) -> None:
    """Written whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("wb") as handle:
            np.save(handle, vectors)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _from_tfidf(texts: Sequence[str], seed: int) -> Embeddings:
    text = _package("sklearn.feature_extraction.text", "scikit-learn", "--embeddings tfidf")
    sparse = importlib.import_module("scipy.sparse")
    # Own words, not scikit-learn's: those drop "2", "x" and take a Chinese sentence for one word.
    vectorizer = text.TfidfVectorizer(token_pattern=WORD, dtype=np.float32)
    try:
        weights = vectorizer.fit_transform(texts)  # (N, V) sparse
    except ValueError:
        raise UserError("no text of the pool has a word: TF-IDF has nothing to count") from None
    n_words, n_held = weights.shape[1], max(1, MAX_TFIDF_BYTES // (4 * len(texts)))
    if n_words > n_held:
        generator = np.random.default_rng(seed)
        columns = generator.integers(n_held, size=n_words)
        signs = generator.choice(np.array([-1, 1], dtype=np.float32), n_words)
        shape = (n_words, n_held)
        weights = weights @ sparse.csr_matrix((signs, (np.arange(n_words), columns)), shape=shape)
    vectors = np.empty(weights.shape, dtype=np.float32)
    for start in range(0, len(texts), 4096):
        vectors[start : start + 4096] = weights[start : start + 4096].toarray()
    made_by = {"kind": "tfidf", "words": n_words, "words_share_dimensions": n_words > n_held}
    return Embeddings(vectors, made_by)


def _from_model(name: str, texts: Sequence[str]) -> Embeddings:
    package = _package("sentence_transformers", "sentence-transformers", f"--embeddings {name}")
    try:
        model = package.SentenceTransformer(name)
    except Exception as error:  # noqa: BLE001 - a damaged or missing model raises anything
        raise UserError(
            f"--embeddings {name} gives no sentence-transformers model ({first_line(error)}): "
            "give a folder, a hub id that can be reached, a .npy file, a URL, or tfidf"
        ) from None
    vectors = model.encode(
        list(texts), batch_size=BATCH_TEXTS, convert_to_numpy=True, show_progress_bar=False
    )
    longest = getattr(model, "max_seq_length", None)  # tokens; the rest of a text is not seen
    made_by = {"kind": "model", "model": name, "max_seq_length": longest}
    return Embeddings(np.asarray(vectors, dtype=np.float32), made_by)


def _from_endpoint(url: str, texts: Sequence[str], model: str | None) -> Embeddings:
    if model is None:
        raise UserError(f"--embeddings {url} is an endpoint: add --embedding_model NAME")
    parts = urllib.parse.urlsplit(url)
    if "@" in parts.netloc or parts.query:  # the report holds the address
        raise UserError(
            f"--embeddings is a URL with a user or a query in it: give the plain URL, and a key in "
            f"{API_KEY}"
        )
    address = url.rstrip("/")
    address += "" if address.endswith("/embeddings") else "/embeddings"
    vectors: NDArray[np.float32] | None = None
    for start in range(0, len(texts), BATCH_TEXTS):
        batch = list(texts[start : start + BATCH_TEXTS])
        found = _answer(_post(address, {"model": model, "input": batch}), len(batch), address)
        if vectors is None:
            vectors = np.empty((len(texts), found.shape[1]), dtype=np.float32)
        if found.shape[1] != vectors.shape[1]:
            raise UserError(
                f"{address} answered with {found.shape[1]} dimensions after {vectors.shape[1]}: "
                "use one model for all rows"
            )
        vectors[start : start + len(batch)] = found
    assert vectors is not None  # a pool has at least one row
    return Embeddings(vectors, {"kind": "endpoint", "url": address, "model": model})


def _post(address: str, body: Mapping[str, object]) -> Any:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(API_KEY):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for attempt in range(N_TRIES):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            fault = f"HTTP {error.code} {error.reason}"
            if error.code != 429 and error.code < 500:
                break
        except (OSError, http.client.HTTPException, ValueError) as error:
            fault = first_line(error)
        if attempt + 1 < N_TRIES:
            time.sleep(FIRST_WAIT_S * 2**attempt)
    raise UserError(
        f"{address} gave no embeddings ({fault}): check the URL, --embedding_model and {API_KEY}"
    )


def _answer(values: Any, n: int, address: str) -> NDArray[np.float32]:
    """{"data": [{"index": i, "embedding": [...]}, ...]} in the order of the index: (n, D)."""
    n_found, vectors = 0, np.empty(0, dtype=np.float32)
    with contextlib.suppress(KeyError, TypeError, ValueError):
        by_index = {item["index"]: item["embedding"] for item in values["data"]}
        n_found = len(by_index)
        vectors = np.array([by_index[i] for i in range(n)], dtype=np.float32)
    if vectors.ndim != 2 or n_found != n:
        raise UserError(
            f"{address} did not answer with one embedding for each of {n} texts: give the base URL "
            "of an OpenAI-compatible endpoint, such as http://localhost:8000/v1"
        )
    return vectors


def mean_entropies(source: str, texts: Sequence[str], n_tokens: int) -> list[float]:
    """A causal language model's mean entropy per predicted token of each text, in nats.

    Over the first `n_tokens` tokens of the model's own tokenizer. NaN for a text of fewer than two.
    """
    torch = _package("torch", "torch", f"--entropy {source}")
    transformers = _package("transformers", "transformers", f"--entropy {source}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    except Exception as error:  # noqa: BLE001 - a damaged or missing model raises anything
        raise UserError(
            f"--entropy {source} is neither a column of the rows nor a language model "
            f"({first_line(error)}): give either"
        ) from None
    entropies = []
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text, verbose=False)["input_ids"][:n_tokens]
            if len(ids) < 2:
                entropies.append(math.nan)
                continue
            logits = model(torch.tensor([ids])).logits[0, :-1].float()  # predicts tokens 1, 2, ...
            entropies.append(float(torch.distributions.Categorical(logits=logits).entropy().mean()))
    return entropies


def _package(module: str, package: str, what: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs the package {package}, which is not there ({first_line(error)}): "
            f"pip install {package}"
        ) from None
