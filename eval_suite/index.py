"""Search among one's own pictures: an index of their embeddings, and queries by text or picture.

    python -m eval_suite.index build PICTURES --checkpoint RUN --out INDEX   # a folder, any nesting, or shards
    python -m eval_suite.index query INDEX "a red bicycle" "two dogs" --html found.html
    python -m eval_suite.index query INDEX --image photo.jpg --k 50
    python -m eval_suite.index query INDEX --queries queries.txt             # one query a line

Single vectors go to FAISS (exact, or approximate with its recall measured), sets to the exact two-stage search. Queries
are encoded by the model that made the index; any other is refused. A killed build started again goes on.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from eval_suite.embed import EmbedSettings, embed
from eval_suite.embed_files import Embeddings
from eval_suite.embed_source import Source, open_source
from eval_suite.encode import EncodeImage, EncodeText, encode_functions, encode_images, encode_texts, joined
from eval_suite.feature_similarity import similarity_options_of
from eval_suite.fingerprint import model_identity, model_words
from eval_suite.images import FolderImages, image_batches
from eval_suite.index_files import INDEX_NAME, SearchIndex, VectorSearch, write_index
from eval_suite.indexed_pictures import IndexedPictures
from eval_suite.model import model_to_evaluate
from eval_suite.preprocess import model_pictures
from eval_suite.search_page import SearchHit, SearchQuery, write_search_page
from setclip.config import command, parse_recipe
from setclip.errors import InputError
from setclip.files import remove
from setclip.hashing import permutation
from setclip.images import Transform
from setclip.log import say, warn

EMBEDDINGS_FOLDER = "embeddings"  # in the index's folder while it is built


# --- build


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What is indexed, with which model, and where the index goes."""

    place: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of pictures (any nesting) or of shards."""
    checkpoint: str | None = None
    """A run, a run's name, a checkpoint folder, or an open_clip NAME:TAG. Default: the newest run under runs/."""
    out: Path | None = None
    """Folder for the index."""
    split: str | None = None
    """Shards of this split alone. Default: all."""
    embeddings: Path | None = None
    """Take these, written by eval_suite.embed, instead of embedding PICTURES."""
    search: VectorSearch = field(default_factory=VectorSearch)
    similarity: str | None = None
    """Of sets of vectors; single ones are compared by their cosine. Default: what the checkpoint names, or smooth_chamfer."""
    similarity_options: tuple[str, ...] = ()
    """Its options, as alpha=16."""
    recall_queries: Path | None = None
    """Texts, one a line, with which the recall of an approximate index is measured. Default: captions, of shards."""
    batch_size: int = 128
    """Images a batch."""
    max_bad: float = 0.05
    """Largest share of pictures that may be bad."""
    workers: int | None = None
    """Processes that decode images; 0: none beside this one. Default: by the number of cores."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""


def build(
    source: Source,
    out: Path,
    encode_image: EncodeImage,
    encode_text: EncodeText,
    transform: Transform,
    model: dict[str, Any],
    search: VectorSearch | None = None,
    similarity: str | None = None,
    similarity_options: Mapping[str, Any] | None = None,
    recall_texts: Sequence[str] | None = None,
    **options: Any,
) -> SearchIndex:
    """Embeds the pictures of `source` and writes their index to `out`; started again it goes on.

    The first six parameters, and `options` (`max_bad`, `workers`, `show_progress`, `settings`), are those of `embed`.
    """
    settings = options.pop("settings", EmbedSettings(texts=False))
    embeddings = embed(
        source, out / EMBEDDINGS_FOLDER, encode_image, encode_text, transform, model, settings, **options
    )
    assert embeddings is not None, "one job does all parts"
    show_progress = options.get("show_progress", True)
    index = write_index(
        embeddings,
        out,
        search,
        similarity,
        similarity_options,
        texts=_recall_features(source, encode_text, search, recall_texts, show_progress),
    )
    remove(out / EMBEDDINGS_FOLDER)
    return index


def _recall_features(
    source: Source,
    encode_text: EncodeText,
    search: VectorSearch | None,
    texts: Sequence[str] | None,
    show_progress: bool,
    most: int = 1000,
) -> Tensor | None:
    """Returns features of texts to measure an approximate index with: the given ones, or captions of the source."""
    if search is None or search.kind == "exact":
        return None
    if texts is None:
        drawn = sorted(permutation(len(source), 0)[:most].tolist())
        texts = [captions[0] for captions in map(source.captions, drawn) if captions]
    return encode_texts(encode_text, list(texts), show_progress=show_progress) if texts else None


def run_build(config: BuildConfig) -> SearchIndex:
    """Does what the command does."""
    if config.out is None or (config.place is None) == (config.embeddings is None):
        raise InputError(
            "expected --out and either a folder of pictures or shards or --embeddings, found "
            f"{config.place or 'no folder'}, --embeddings {config.embeddings} and --out {config.out}; for example "
            "`python -m eval_suite.index build photos --out photos-index`"
        )
    if (config.out / INDEX_NAME).exists():
        raise InputError(
            f"expected no index at {config.out}, found one; query it, give another --out, or remove the folder to build it anew"
        )
    options = similarity_options_of(config.similarity_options)
    given = None if config.recall_queries is None else read_queries(config.recall_queries)
    if config.embeddings is not None:
        if given is not None:
            raise InputError(
                "expected --recall-queries only where the model is at hand, found it with --embeddings; leave one out"
            )
        index = write_index(Embeddings.open(config.embeddings), config.out, config.search, config.similarity, options)
    else:
        assert config.place is not None
        source = open_source(config.place, config.split)
        loaded = model_to_evaluate(config.checkpoint, config.device)
        index = build(
            source,
            config.out,
            *encode_functions(loaded),
            model_pictures(loaded),
            model_identity(loaded),
            config.search,
            config.similarity,
            options,
            given,
            settings=EmbedSettings(texts=False, batch_size=config.batch_size),
            max_bad=config.max_bad,
            workers=config.workers,
        )
    content = index.description
    say(f"index: {summary(content)}")
    if content["bad"]:
        say(f"left out: {', '.join(f'{count:,} {reason}' for reason, count in content['bad'].items())}")
    for kind in ("pictures", "texts") if "recall" in content else ():
        if content["recall"][kind] is not None:
            say(f"recall of the exact top {content['recall']['k']}, {kind} as queries: {content['recall'][kind]:.2f} %")
    say(f'in {config.out}; try: python -m eval_suite.index query {config.out} "a dog" --html found.html')
    return index


def summary(content: Mapping[str, Any]) -> str:
    """Returns what index.json says, for the terminal: "1,000 pictures, 192 dimensions, exact search"."""
    *elements, width = content["shape"]
    pictures = f"{content['pictures']:,} pictures"
    if elements:
        size = f"sets of {elements[0]:,} × {width:,} dimensions"
        return f"{pictures}, {size}, compared by {content['similarity']}, exact search"
    how = {"exact": "exact search", "hnsw": "approximate search (hnsw)", "ivf": "approximate search (ivf)"}
    return f"{pictures}, {width:,} dimensions, {how[content['kind']]}"


# --- query


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """What is looked for, in which index."""

    index: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of the index."""
    texts: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Queries in words."""
    image: tuple[Path, ...] = ()
    """Queries by picture."""
    queries: Path | None = None
    """Text file with one query a line."""
    k: int = 20
    """Pictures a query."""
    html: Path | None = None
    """Write a gallery here."""
    checkpoint: str | None = None
    """The model of the index. Default: from where it was loaded for the build."""
    pictures: Path | None = None
    """Where the pictures lie now, if they were moved."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes CUDA where there is one."""


def query(
    index: SearchIndex,
    encode_image: EncodeImage,
    encode_text: EncodeText,
    transform: Transform,
    texts: Sequence[str] = (),
    images: Sequence[Path] = (),
    k: int = 20,
    place: Path | None = None,
) -> list[SearchQuery]:
    """Returns what each query finds, texts first, with the pictures as they are now.

    `transform` and the encode functions are those of the index. `place`: where the pictures lie, if not where they
    were. Raises InputError on a picture that is not there or cannot be decoded.
    """
    features = []
    for path in images:
        if not path.is_file():
            raise InputError(f"expected a picture at {path}, found no such file; give its place with --image")
    if texts:
        features.append(encode_texts(encode_text, list(texts), show_progress=False))
    if images:
        batches = image_batches(FolderImages(images, transform), batch_size=32, workers=0)
        features.append(encode_images(encode_image, batches, len(images), show_progress=False))
    if len({one.ndim for one in features}) > 1:  # texts are sets and pictures are not, or the other way round
        features = [one.unsqueeze(1) if one.ndim == 2 else one for one in features]
    found = index.search(joined(features), k) if features else []
    source = index.description["source"]
    pictures = IndexedPictures(source["kind"], place or Path(source["place"]))
    asked = [*((text, None) for text in texts), *((path.name, path.read_bytes()) for path in images)]
    return [
        SearchQuery(text, [_hit(index, pictures, row, score) for row, score in hits], data)
        for (text, data), hits in zip(asked, found, strict=True)
    ]


def _hit(index: SearchIndex, pictures: IndexedPictures, row: int, score: float) -> SearchHit:
    path, key = index.paths[row], index.keys[row]
    shown = path if pictures.kind == "folder" else f"{path} {key}"
    return SearchHit(shown, score, pictures.read(path, key))


def read_queries(path: Path) -> list[str]:
    """Returns the lines of a file that are not blank. Raises InputError where there are none."""
    if not path.is_file():
        raise InputError(f"expected a text file with one query a line at {path}, found no such file; give its place")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    queries = [line for line in lines if line]
    if not queries:
        raise InputError(f"{path}: expected one query a line, found none; write some")
    return queries


def run_query(config: QueryConfig) -> list[SearchQuery]:
    """Does what the command does."""
    texts = [*config.texts, *(read_queries(config.queries) if config.queries else ())]
    if config.index is None or not (texts or config.image):
        raise InputError(
            f"expected an index and a query, found {'no index' if config.index is None else 'no query'}; for example "
            '`python -m eval_suite.index query INDEX "a red bicycle"`, or --image FILE'
        )
    if config.k < 1:
        raise InputError(f"expected at least one picture a query, found --k {config.k}; give 1 or more")
    index = SearchIndex.open(config.index)
    loaded = model_to_evaluate(config.checkpoint or index.description["model"].get("where"), config.device)
    identity = model_identity(loaded)
    index.check_model(identity["fingerprint"], model_words(identity))
    start = time.monotonic()
    transform = model_pictures(loaded)
    found = query(index, *encode_functions(loaded), transform, texts, config.image, config.k, config.pictures)
    seconds = time.monotonic() - start
    for one in found:
        say(f"\n{table(one)}")
    problems = sum(bool(hit.picture.problem) for one in found for hit in one.hits)
    if problems:
        shown = sum(len(one.hits) for one in found)
        warn(
            f"{problems:,} of {shown:,} pictures are missing or changed since the index was built; if they were moved, "
            "give their place with --pictures, else build the index again"
        )
    say(
        f"\n{len(found):,} {'query' if len(found) == 1 else 'queries'} among {len(index):,} pictures in {seconds:.2f} s"
    )
    if config.html is not None:
        place = str(config.pictures or index.description["source"]["place"])
        write_search_page(config.html, found, index.description, Path(place).name)
        say(f"gallery: {config.html}")
    return found


def table(found: SearchQuery) -> str:
    """Returns a query and its pictures for the terminal."""
    lines = [found.text if found.picture is None else f"picture {found.text}"]
    for place, hit in enumerate(found.hits, 1):
        notes = [*hit.picture.captions[:1], *([f"({hit.picture.problem})"] if hit.picture.problem else [])]
        lines.append("  ".join([f"{place:>5}", f"{hit.score:6.3f}", hit.path, *notes]))
    return "\n".join(lines)


def main() -> None:
    """Runs the command."""
    _, config = parse_recipe({"build": BuildConfig, "query": QueryConfig}, description=__doc__ or "", what="command")
    if isinstance(config, BuildConfig):
        run_build(config)
    else:
        run_query(config)


if __name__ == "__main__":
    command(main)
