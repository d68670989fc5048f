"""The folder of a search index: index.json, written last, beside the vectors and the names of their pictures.

    INDEX/index.json       model, kind, counts, recall of an approximate index; its presence means complete
    INDEX/vectors.faiss    single vectors, a FAISS index
    INDEX/sets.npy         sets, (N, K, D) float32, searched exactly
    INDEX/pictures.parquet key and path of each, in the order of the vectors

Used by `eval_suite.index`. Letters: Q queries, N pictures, K elements of a set, D width.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval_suite.embed_files import Embeddings
from eval_suite.feature_similarity import OF_SETS, FeatureSimilarity, mask_of
from eval_suite.results import LIBRARIES
from eval_suite.two_stage import exact_top_k
from setclip.errors import InputError
from setclip.files import remove_partial, replacing, write_json
from setclip.hashing import permutation
from setclip.lookup import look_up
from setclip.models.matching import make_matching, score_matrix
from setclip.provenance import describe
from setclip.similarity import GridSimilarity, SetSimilarity, VectorSimilarity

INDEX_NAME = "index.json"
VECTORS_NAME, SETS_NAME, PICTURES_NAME = "vectors.faiss", "sets.npy", "pictures.parquet"
FORMAT_VERSION = 1

Kind = Literal["exact", "hnsw", "ivf"]
RECALL_K = 10


@dataclass(frozen=True, kw_only=True)
class VectorSearch:
    """How single vectors are searched. All but "exact" may miss neighbours; how many is measured and written down."""

    kind: Kind = "exact"
    """exact: all of them; hnsw: a graph of neighbours; ivf: the nearest of many cells."""
    neighbours: int = 32
    """hnsw: links of each vector."""
    build_width: int = 200
    """hnsw: candidates while it is built."""
    search_width: int = 128
    """hnsw: candidates of a query; more finds more and takes longer."""
    cells: int | None = None
    """ivf: cells; by default 4·√N, with at least 39 vectors each."""
    probes: int = 16
    """ivf: cells that a query looks into."""


def _exact(vectors: NDArray[np.float32], options: VectorSearch) -> Any:
    return faiss.IndexFlatIP(vectors.shape[1])


def _hnsw(vectors: NDArray[np.float32], options: VectorSearch) -> Any:
    index = faiss.IndexHNSWFlat(vectors.shape[1], options.neighbours, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = options.build_width
    index.hnsw.efSearch = options.search_width
    return index


def _ivf(vectors: NDArray[np.float32], options: VectorSearch) -> Any:
    num, width = vectors.shape
    cells = options.cells or max(1, min(int(4 * num**0.5), num // 39))  # FAISS warns below 39 a cell
    if cells > num:
        raise InputError(
            f"expected at most as many --search.cells as the {num:,} pictures, found {cells:,}; give fewer"
        )
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.nprobe = min(options.probes, cells)
    return index


_MAKERS: dict[str, Callable[[NDArray[np.float32], VectorSearch], Any]] = {"exact": _exact, "hnsw": _hnsw, "ivf": _ivf}


@dataclass(frozen=True)
class SearchIndex:
    """An index ready to search."""

    folder: Path
    description: dict[str, Any]
    """The content of index.json."""
    keys: list[str]
    paths: list[str]
    """Below the place of the pictures; of shards the name of the shard."""
    _faiss: Any = None
    _sets: Tensor | None = None

    @classmethod
    def open(cls, folder: Path) -> "SearchIndex":
        """Raises InputError where there is none, or an unfinished one, or a file is missing or cut."""
        path = folder / INDEX_NAME
        if not path.exists():
            found = "an unfinished index" if folder.exists() else "no such folder"
            raise InputError(
                f"expected a search index at {path}, found {found}; make it with `python -m eval_suite.index build "
                f"PICTURES --out {folder}`"
            )
        description = json.loads(path.read_text(encoding="utf-8"))
        if description.get("format_version") != FORMAT_VERSION:
            raise InputError(
                f"{path}: expected format_version {FORMAT_VERSION}, found {description.get('format_version')!r}; build again"
            )
        for name, size in description["files"].items():
            have = (folder / name).stat().st_size if (folder / name).exists() else None
            if have != size:
                raise InputError(
                    f"{folder / name}: expected {size:,} bytes as {INDEX_NAME} says, found "
                    f"{'no file' if have is None else f'{have:,}'}; copy the folder again, or build it again"
                )
        names = pq.read_table(folder / PICTURES_NAME)
        columns = names.column("key").to_pylist(), names.column("path").to_pylist()
        if VECTORS_NAME in description["files"]:
            return cls(folder, description, *columns, _faiss=faiss.read_index(str(folder / VECTORS_NAME)))
        # Mapped and not read; "c" because torch takes no array that cannot be written.
        return cls(folder, description, *columns, _sets=torch.from_numpy(np.load(folder / SETS_NAME, mmap_mode="c")))

    def __len__(self) -> int:
        return len(self.paths)

    def check_model(self, fingerprint: str, words: str) -> None:
        """Raises InputError where the model, `words` for people, is not the one whose embeddings the index holds."""
        own = self.description["model"]
        if own["fingerprint"] != fingerprint:
            raise InputError(
                f"{self.folder}: expected the model of the index, {own.get('where')} (fingerprint "
                f"{own['fingerprint'][:12]}…), found {words}; give that one with --checkpoint, or build the index again"
            )

    def search(self, queries: Tensor, k: int) -> list[list[tuple[int, float]]]:
        """Returns for each query (row, score) of its `k` best pictures, best first, and of equal scores the lower row.

        `queries`: (Q, D), or sets (Q, K, D), of unit norm. All pictures are returned where there are fewer than `k`.
        """
        shape = tuple(self.description["shape"])
        if self._sets is not None and queries.ndim == 2:
            queries = queries.unsqueeze(1)
        if queries.ndim != 1 + len(shape) or queries.shape[-1] != shape[-1]:
            raise InputError(
                f"expected queries of the index's shape, {' × '.join(map(str, shape))} each, found "
                f"{' × '.join(map(str, queries.shape[1:]))}; encode them with the model of the index"
            )
        k = min(k, len(self))
        if self._sets is not None:
            similarity = make_matching(self.description["similarity"], **self.description["similarity_options"])
            masks = mask_of(queries), mask_of(self._sets)
            # The gallery is pictures; a query by picture takes the place of a text, as similarities have one of each.
            if isinstance(similarity, GridSimilarity | VectorSimilarity):
                found = exact_top_k(similarity, queries.float(), self._sets, k, *masks, queries="texts")
            else:
                found = _all_scored(similarity, queries.float(), self._sets, k, *masks)
            scores, rows = (values.cpu().numpy() for values in found)
        else:
            scores, rows = self._faiss.search(np.ascontiguousarray(queries.numpy(), np.float32), k)
        return [
            sorted(((int(row), float(value)) for row, value in zip(*pair, strict=True) if row >= 0), key=_best_first)
            for pair in zip(rows, scores, strict=True)
        ]


@torch.no_grad()
def _all_scored(
    similarity: SetSimilarity,
    queries: Tensor,
    sets: Tensor,
    k: int,
    query_mask: Tensor | None,
    set_mask: Tensor | None,
    at_a_time: int = 64,
) -> tuple[Tensor, Tensor]:
    """Returns (scores, rows), (Q, k) each, by a similarity that matches fragments: every picture is scored in full."""
    similarity.eval()
    scores, rows = [], []
    for start in range(0, len(queries), at_a_time):
        own = slice(start, start + at_a_time)
        mask = None if query_mask is None else query_mask[own]
        values, places = score_matrix(similarity, sets, queries[own], set_mask, mask).T.sort(
            dim=1, descending=True, stable=True
        )
        scores.append(values[:, :k])
        rows.append(places[:, :k])
    return torch.cat(scores), torch.cat(rows)


def _best_first(hit: tuple[int, float]) -> tuple[float, int]:
    return -hit[1], hit[0]


def write_index(
    embeddings: Embeddings,
    out: Path,
    search: VectorSearch | None = None,
    similarity: str | None = None,
    similarity_options: Mapping[str, Any] | None = None,
    texts: Tensor | None = None,
    num_checked: int = 1000,
) -> SearchIndex:
    """Writes the index of the pictures of `embeddings` to `out`.

    Single vectors are searched as `search` says, sets exactly by `similarity` with its options, by default what the
    model's checkpoint names, or else smooth_chamfer. Single vectors that another similarity than the cosine compares (DH-Set's
    pictures, whose captions are sets) count as sets of one. Of an approximate index
    the recall is measured on `num_checked` of the pictures and, where given, on `texts`, (Q, D) of unit norm.
    """
    search = search or VectorSearch()
    if not embeddings.description["images"]:
        raise InputError(
            f"expected embeddings of pictures at {embeddings.folder}, found none; embed some that can be decoded"
        )
    out.mkdir(parents=True, exist_ok=True)
    remove_partial(out)
    (out / INDEX_NAME).unlink(missing_ok=True)
    columns: dict[str, list[str]] = {"key": [], "path": []}
    arrays = []
    for part, array in embeddings.parts():
        arrays.append(array)
        for name, values in columns.items():
            values += part[name]
    vectors = np.concatenate(arrays)
    del arrays
    described: dict[str, Any]
    # a wrong name is said before a file is written
    chosen = FeatureSimilarity(similarity, similarity_options, embeddings.description["model"])
    if vectors.ndim == 2 and chosen.name not in (None, "cosine"):
        vectors = vectors[:, None]
    if vectors.ndim == 2:
        index = look_up(_MAKERS, search.kind, "kind of index")(vectors, search)
        index.add(vectors)
        described = {"kind": search.kind, "similarity": "cosine", "similarity_options": {}}
        if search.kind != "exact":
            options = {"hnsw": ("neighbours", "build_width", "search_width"), "ivf": ("probes",)}[search.kind]
            described["options"] = {name: getattr(search, name) for name in options}
            if search.kind == "ivf":
                described["options"]["cells"] = index.nlist
            described["recall"] = measure_recall(index, vectors, texts, num_checked)
        vectors_path = out / VECTORS_NAME
        with replacing(vectors_path) as temporary:
            faiss.write_index(index, str(temporary))
    elif search.kind != "exact":
        raise InputError(
            f"expected the exact search for sets of vectors, found --search.kind {search.kind}; leave it out: the "
            "two-stage search of sets is exact"
        )
    else:
        described = {"kind": "sets", **chosen.described, "similarity": chosen.name or OF_SETS}
        vectors_path = out / SETS_NAME
        with replacing(vectors_path) as temporary:
            np.save(temporary, vectors)
    with replacing(out / PICTURES_NAME) as temporary:
        pq.write_table(pa.table(columns), temporary)
    content = embeddings.description
    write_json(
        out / INDEX_NAME,
        {
            "format_version": FORMAT_VERSION,
            **described,
            "model": content["model"],
            "source": content["source"],
            "provenance": describe(LIBRARIES),
            "pictures": len(vectors),
            "shape": list(vectors.shape[1:]),
            "dtype": content["settings"]["dtype"],
            "bad": content["bad"],
            "files": {path.name: path.stat().st_size for path in (vectors_path, out / PICTURES_NAME)},
        },
    )
    return SearchIndex.open(out)


def measure_recall(
    index: Any, vectors: NDArray[np.float32], texts: Tensor | None, num_checked: int, seed: int = 0
) -> dict[str, Any]:
    """Returns how much of the exact top 10 an approximate FAISS index finds, in percent, by kind of query.

    "pictures": `num_checked` of the indexed vectors, drawn by the seed, themselves left out of the answers; "texts":
    the given ones, which lie further from the pictures and are harder. A hit that ties with the tenth counts as found.
    """
    drawn = np.sort(permutation(len(vectors), seed)[:num_checked])
    recall: dict[str, Any] = {"k": RECALL_K, "pictures": _recall(index, vectors, vectors[drawn], drawn), "texts": None}
    recall["num_pictures"], recall["num_texts"] = len(drawn), 0
    if texts is not None and len(texts):
        queries = np.ascontiguousarray(texts.numpy(), np.float32)
        recall["texts"], recall["num_texts"] = _recall(index, vectors, queries, None), len(queries)
    return recall


def _recall(
    index: Any, vectors: NDArray[np.float32], queries: NDArray[np.float32], own: NDArray[np.int64] | None
) -> float | None:
    """Returns percent; `own`: row of each query among the vectors. None where nothing but the query is indexed."""
    k = min(RECALL_K, len(vectors) - (own is not None))
    if k < 1:
        return None
    shares = []
    _, found = index.search(queries, k + (own is not None))
    for start in range(0, len(queries), 256):
        rows = slice(start, start + 256)
        scores = queries[rows] @ vectors.T
        ids = found[rows]
        if own is not None:
            scores[np.arange(len(scores)), own[rows]] = -np.inf
        tenth = np.partition(scores, -k, axis=1)[:, -k]
        reached = np.take_along_axis(scores, np.maximum(ids, 0), axis=1)
        right = (ids >= 0) & (reached >= tenth[:, None] - 1e-6)  # a rounding error is no miss
        shares.append(np.minimum(right.sum(1), k) / k)
    return 100.0 * float(np.concatenate(shares).mean())
