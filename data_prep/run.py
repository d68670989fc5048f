"""Makes shards with parsed objects, statistics and a manifest from a source of images and captions.

    python -m data_prep.run scenes --out data/scenes
    python -m data_prep.run folder --images DIR_OR_TAR --captions FILE.jsonl --out data/mine

`python -m data_prep.run SOURCE --help` lists the flags of a source. To add a source: a module in data_prep/sources with
a config and a `plan` function, and one entry in SOURCES.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from data_prep import output, parse_pos, statistics
from data_prep.parallel import run_tasks
from data_prep.parse_pos import PosConfig, PosParser
from data_prep.plan import PrepareConfig, ShardPlan
from data_prep.sources import folder, scenes
from setclip.config import command, parse_recipe, to_dict
from setclip.errors import InputError
from setclip.log import say
from setclip.lookup import look_up
from setclip.manifest import Manifest
from setclip.shards import ShardInfo, ShardWriter

_PARSED_AT_ONCE = 512  # samples held in memory while their captions are parsed

# Flags without influence on the samples: they stay out of the manifest, so that equal data has equal manifests.
_NOT_DATA = ("out", "overwrite", "processes")


@dataclass(frozen=True)
class Source:
    """One entry of SOURCES."""

    config: type[Any]
    """A dataclass derived from PrepareConfig."""
    plan: Callable[[Any], Any]
    """Config to `data_prep.plan.Plan`."""


SOURCES: Mapping[str, Source] = {
    "scenes": Source(scenes.ScenesConfig, scenes.plan),
    "folder": Source(folder.FolderConfig, folder.plan),
}


def prepare(source: str, config: PrepareConfig) -> Manifest:
    """Carries out a source's plan in `config.out` and returns the manifest, which is written last."""
    if config.shard_size < 1 or config.processes < 0 or not 0 <= config.max_bad <= 1:
        raise InputError(
            f"expected shard_size of at least 1, processes of at least 0 and max_bad from 0 to 1, found "
            f"{config.shard_size}, {config.processes} and {config.max_bad}; choose other values"
        )
    plan = look_up(SOURCES, source, "source").plan(config)
    output.claim(config.out, plan, config.overwrite)
    pos = PosConfig(compound=config.compound, stop_words=tuple(config.stop_words))
    made = run_tasks(
        [partial(make_shard, shard, config.out, pos) for shard in plan.shards],
        config.processes,
        description="making shards",
        sizes=[shard.samples for shard in plan.shards],
    )
    infos = [info for info, _ in made]
    (version,) = {version for _, version in made}
    for name, fill in plan.folders.items():
        pictures = fill(config.out / name)
        say(f"{name}: {pictures:,} held-out pictures in class folders")
    counts = statistics.write_statistics(config.out, statistics.counted_shards(infos))
    settings = {k: v for k, v in to_dict(config).items() if k not in _NOT_DATA}
    manifest = Manifest(
        source=source,
        shards=infos,
        dropped=plan.dropped,
        pairs_listed=plan.pairs_listed,
        pairs_present=sum(info.captions for info in infos),
        config={**settings, "class_folders": list(plan.folders)},
        parsers={parse_pos.NAME: version},
        credits=plan.credits,
    )
    manifest.save(config.out)
    output.release(config.out)
    _say_summary(config.out, manifest, counts)
    return manifest


def make_shard(shard: ShardPlan, out: Path, pos: PosConfig) -> tuple[ShardInfo, str]:
    """Writes one shard with parsed objects; returns its entry for the manifest and the parser's version."""
    parser = pos_parser(pos)
    with ShardWriter(out / shard.name, split=shard.split) as writer:
        samples = iter(shard.make())
        while block := list(itertools.islice(samples, _PARSED_AT_ONCE)):
            parsed = iter(parser.parse([caption for sample in block for caption in sample.captions]))
            for sample in block:
                objects = {parse_pos.NAME: list(itertools.islice(parsed, len(sample.captions)))}
                writer.add(dataclasses.replace(sample, objects={**sample.objects, **objects}))
    return writer.info, parser.version


@lru_cache(maxsize=1)
def pos_parser(config: PosConfig) -> PosParser:
    """Returns this process's parser: loading the language model takes a second."""
    return PosParser(config)


def _say_summary(out: Path, manifest: Manifest, counts: Mapping[str, statistics.ObjectCounts]) -> None:
    for split, total in manifest.totals().items():
        say(
            f"{split}: {total['samples']:,} samples, {total['captions']:,} captions, {total['bytes'] / 1e6:,.1f} MB "
            f"in {total['shards']:,} shards"
        )
    for reason, number in sorted(manifest.dropped.items(), key=lambda item: -item[1]):
        say(f"dropped: {number:,} {reason}")
    for parser, total in counts.items():
        say(statistics.describe(parser, total))
    say(f"{manifest.pairs_present:,} of {manifest.pairs_listed:,} pairs present")
    say(f"shards, manifest and statistics: {out}")


def main() -> None:
    """The command."""
    configs = {name: source.config for name, source in SOURCES.items()}
    prepare(*parse_recipe(configs, description=__doc__ or "", what="source"))


if __name__ == "__main__":
    command(main)
