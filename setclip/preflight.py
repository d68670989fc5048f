"""Checks the nodes of a Slurm job before anything is built on them; takes seconds, and ends the job where one does not fit.

    srun --ntasks-per-node=1 python -m setclip.preflight --gpus 8 --dataset cc12m --out runs/cc12m -- FLAGS OF THE COMMAND

One process a node. Each looks at its own node (GPUs, free disk, shards) and tells the first node what it has; the first one
compares commit, source code, libraries and manifest, and all end alike: status 0, or 2 with the nodes and reasons. Behind
`--` stand the flags of the command that follows, of which --data.shards, --data.split (pretraining), --data, --val, --test,
--regions (fine-tuning), --dataset, --out and --config are heeded. Started by slurm/common.sh.
"""

import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import setclip
from setclip.config import command, flags_of, parse, words_of
from setclip.datasets import prepared_or_located
from setclip.errors import InputError
from setclip.files import sha256_of
from setclip.hashing import hash_u64
from setclip.log import say
from setclip.manifest import MANIFEST_NAME, Manifest
from setclip.provenance import git_commit
from setclip.shards import Shard, ShardInfo

SHARDS_READ = 16  # on each node, of which a sample is read; of all others the size is checked
_PORTS = 5  # tried one after the other, should something else listen there
_NAMED = 5  # differences that a message lists
_PACKAGES = ("setclip", "data_prep", "eval_suite", "pretrain", "finetune")


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What every node must have."""

    gpus: int | None = None
    """GPUs that each node must have, at least one, every one of them able to compute; None: none are looked for."""
    dataset: str | None = None
    """Dataset by name under $SETCLIP_DATA, whose shards are read."""
    shards: tuple[str, ...] = ()
    """Folders of shards that are read. Addresses are left to the command, which looks at them in its first seconds."""
    split: str | None = None
    """Which of them; None: all."""
    others: tuple[str, ...] = ()
    """Folders of shards that are read too, but not trained on."""
    folders: tuple[str, ...] = ()
    """Folders of something else than shards (features of regions), which must be there."""
    out: Path | None = None
    """Folder that will be written; a run in it must have been trained on these shards."""
    is_anew: bool = False
    """Whether a run in that folder will be removed, so that it does not matter what it was trained on."""
    min_free_gb: float = 0.0
    """Free disk there, in 10⁹ bytes, below which nothing starts."""
    run_file: Path | None = None
    """File into which the first node writes the folder that --out comes to, for scripts."""
    seconds: float = 25.0
    """How long the nodes wait for each other."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node tells the first one."""

    node: str
    commit: str
    """Of the source tree, "+changes" behind it where there are some; "unknown" outside of git."""
    code: str
    """Hash of our own source files."""
    python: str
    versions: dict[str, str] = field(default_factory=dict)
    """Installed distribution to version."""
    manifest: str = ""
    """SHA-256 of the shards' manifest.json, one behind the other where there are several folders."""
    faults: list[str] = field(default_factory=list)
    """What is wrong with this node by itself."""


def preflight(config: PreflightConfig, node: str, nodes: Sequence[str], ports: Sequence[int], token: str) -> None:
    """Checks this node, and with the others that all are alike. Raises InputError.

    `nodes`: names of all, the first one being where they meet; `ports`: of it, tried in order; `token`: of this job, so that
    another job's nodes are not taken for ours. Where another node than the first one is at fault, the first one says so.
    """
    start = time.monotonic()
    own = look_at_node(config, node)
    # A slow file system slows all nodes alike: some of the time is for the network alone.
    ends = max(start + config.seconds, time.monotonic() + min(5.0, config.seconds))
    if node != nodes[0]:
        if not _tell(nodes[0], ports, token, own, ends):
            raise SystemExit(2)
        return
    with _listen(node, ports if len(nodes) > 1 else []) as server:
        answers = _hear(server, token, len(nodes) - 1, ends)
        faults = judge([own, *(facts for facts, _ in answers)], nodes, config.seconds)
        for _, connection in answers:
            with connection:
                connection.sendall(json.dumps(not faults).encode() + b"\n")
    if faults:
        raise InputError("\n".join(faults))


def look_at_node(config: PreflightConfig, node: str) -> NodeFacts:
    """Returns what this node has, and what is wrong with it."""
    faults: list[str] = []
    manifest = ""
    for check in (_gpu_faults, _disk_faults, _folder_faults):
        faults += check(config)
    try:
        places = config.shards or ((str(prepared_or_located(config.dataset)),) if config.dataset else ())
        folders = [Path(place) for place in places if "://" not in place]
        for folder in dict.fromkeys([*folders, *map(Path, config.others)]):
            faults += _shard_faults(folder, config)
            manifest += sha256_of(folder / MANIFEST_NAME)
        if len(folders) == len(places):
            faults += _run_faults(folders, config)
    except (InputError, OSError) as error:
        faults.append(str(error))
    return NodeFacts(
        node=node,
        commit=git_commit() or "unknown",
        code=code_digest(),
        python=platform.python_version(),
        versions={d.name.lower(): d.version for d in importlib.metadata.distributions() if d.name},
        manifest=manifest,
        faults=faults,
    )


def judge(found: Sequence[NodeFacts], nodes: Sequence[str], seconds: float) -> list[str]:
    """Returns all that is wrong, each with the node: the nodes' own faults, those that are silent, and differences."""
    first = next(facts for facts in found if facts.node == nodes[0])
    told = {facts.node for facts in found}
    lines = [f"{facts.node}: {fault}" for facts in found for fault in facts.faults]
    lines += [
        f"{node}: expected to hear of it within {seconds:.0f} s at {nodes[0]}, found nothing; look at its network, its name "
        f"service and its slurmd, or leave it out: sbatch --exclude={node}"
        for node in nodes
        if node not in told
    ]
    for facts in found:
        if facts is first:
            continue
        differences = [
            f"{what} {getattr(first, name)[:20]} as on {first.node}, found {getattr(facts, name)[:20] or 'none'}"
            for name, what in (
                ("commit", "commit"),
                ("code", "source files with the hash"),
                ("python", "Python"),
                ("manifest", "a manifest with the hash"),
            )
            if getattr(facts, name) != getattr(first, name)
        ]
        differences += _version_differences(first.versions, facts.versions, first.node)
        lines += [f"{facts.node}: expected {text}; give all nodes the same files" for text in differences]
    return lines


def code_digest() -> str:
    """Returns a hash of the source files that this process would run, whether they are committed or not."""
    root = Path(setclip.__file__).parents[1]
    total = hashlib.sha256()
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py")):
        total.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def with_command(config: PreflightConfig, words: Sequence[str]) -> PreflightConfig:
    """Returns `config` with what the flags of the command that follows say of shards and run folder."""
    said = flags_of(words)
    folders = {name: said[name] for name in ("data", "val", "test") if said.get(name, "None") != "None"}
    shards = words_of(words, "data.shards") or ([folders.pop("data")] if "data" in folders else [])
    dataset = said.get("dataset", "None")
    others: tuple[str, ...] = (*config.others, *folders.values())
    regions: tuple[str, ...] = ()
    if said.get("regions", "None") != "None":
        # --val and --test are such folders too then, and --dataset is a name of counts
        regions, others = (said["regions"], *folders.values()), config.others
        config = replace(config, dataset=None, shards=())
    elif shards:
        config = replace(config, shards=tuple(shards))
    elif dataset != "None":
        config = replace(config, dataset=dataset)
    return replace(
        config,
        others=others,
        folders=(*config.folders, *regions),
        is_anew=config.is_anew or said.get("overwrite", "False") != "False",
        split=said.get("data.split", config.split),
        out=Path(said["out"]) if "out" in said else config.out,
    )


# --- one node


def _gpu_faults(config: PreflightConfig) -> list[str]:
    if config.gpus is None:
        return []
    count, wanted = _gpus_of_driver(), max(1, config.gpus)
    if count:
        import torch  # takes seconds: only where there is something to look for

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    faults = []
    if config.gpus == 0:
        faults.append(
            f"expected GPUs, found that this job was given none and sees {count}; ask for them (sbatch --gpus-per-node=8), or "
            "say that this is a machine without: SETCLIP_DEVICE=cpu in slurm/site.env"
        )
    elif count != wanted:
        faults.append(
            f"expected {wanted} GPUs, as Slurm gave this job, found {count} that CUDA can use; look at nvidia-smi there, or "
            "leave the node out (sbatch --exclude); a machine without GPUs: SETCLIP_DEVICE=cpu in slurm/site.env"
        )
    for number in range(count):
        try:
            torch.zeros(1, device=f"cuda:{number}").item()
        except RuntimeError as error:
            faults.append(
                f"expected to compute on GPU {number}, found {str(error).splitlines()[0]}; leave the node out"
            )
    return faults


def _gpus_of_driver() -> int:
    """Returns how many GPUs this process may use, as the driver itself says; 0 without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def _disk_faults(config: PreflightConfig) -> list[str]:
    if config.out is None:
        return []
    place = next(folder for folder in (config.out, *config.out.absolute().parents) if folder.is_dir())
    faults = []
    free = shutil.disk_usage(place).free / 1e9
    if free < config.min_free_gb:
        faults.append(
            f"expected {config.min_free_gb:g} GB free at {place}, found {free:.1f} GB; make room, or lower MIN_FREE_GB in "
            "slurm/site.env"
        )
    if not os.access(place, os.W_OK):
        faults.append(f"expected to write to {place}, found that this is not allowed; mount or permit it")
    return faults


def _folder_faults(config: PreflightConfig) -> list[str]:
    return [
        f"expected a folder at {folder}, found {'a file' if Path(folder).exists() else 'none'}; mount it, or name another"
        for folder in config.folders
        if not Path(folder).is_dir()
    ]


def _shard_faults(folder: Path, config: PreflightConfig) -> list[str]:
    """Returns which shards are not there as the manifest says, or cannot be read."""
    manifest = Manifest.load(folder)
    infos = manifest.of_split(config.split) if config.split else manifest.shards
    wrong = [text for info in infos if (text := _size_fault(folder, info))]
    whole = [info for info in infos if not _size_fault(folder, info)]
    for info in whole[:: max(1, -(-len(whole) // SHARDS_READ))]:
        try:
            shard = Shard(folder / info.name)
            shard.read_raw(int(hash_u64(time.time_ns()) % max(1, info.samples)))
        except (InputError, OSError, ValueError, IndexError) as error:
            wrong.append(f"{info.name}: {error}")
    if wrong:
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        return [
            f"expected the {len(infos):,} shards of {folder / MANIFEST_NAME}, found {'; '.join(wrong[:_NAMED])}{more}; copy them "
            f"again (`python -m data_prep.verify {folder}` reads all)"
        ]
    return []


def _run_faults(folders: Sequence[Path], config: PreflightConfig) -> list[str]:
    """Returns whether a run in `out` was trained on other data than that of all folders."""
    trained = None if config.out is None or config.is_anew else _data_of_run(config.out)
    if trained is None or not folders:
        return []
    manifests = [Manifest.load(folder) for folder in folders]
    together = replace(manifests[0], shards=[shard for manifest in manifests for shard in manifest.shards])
    here = together.identity()["digest"]
    if trained == here:
        return []
    return [
        f"expected the data that {config.out} was trained on (digest {trained}), found {here} in "
        f"{' + '.join(str(folder / MANIFEST_NAME) for folder in folders)}: it has changed since; put the former shards back, or "
        "train anew with another --out"
    ]


def _size_fault(folder: Path, info: ShardInfo) -> str:
    path = folder / info.name
    for each in (path, path.with_suffix(".idx")):
        if not each.exists():
            return f"{each.name}: missing"
    size = path.stat().st_size
    return "" if size == info.bytes else f"{info.name}: {size} bytes, manifest says {info.bytes}"


def _data_of_run(out: Path) -> str | None:
    """Returns the digest of the data that the newest checkpoint of a run, or of one of its seeds, was trained on."""
    for pattern in ("checkpoints", "seed-*/checkpoints"):
        for path in sorted(out.glob(f"{pattern}/step-*/setclip_config.json"), reverse=True):
            return json.loads(path.read_text(encoding="utf-8")).get("data", {}).get("digest")
    return None


def _version_differences(expected: Mapping[str, str], found: Mapping[str, str], first: str) -> list[str]:
    other = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if not other:
        return []
    named = ", ".join(
        f"{name} {expected.get(name, 'absent')} (here {found.get(name, 'absent')})" for name in other[:_NAMED]
    )
    return [f"the libraries of {first}: {named}" + (f" and {len(other) - _NAMED} more" if len(other) > _NAMED else "")]


# --- between nodes


class _NoServer:
    """Stands in for a socket where there is one node."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def _listen(node: str, ports: Sequence[int]) -> Any:
    if not ports:
        return _NoServer()
    for port in ports:
        try:
            return socket.create_server(("", port), reuse_port=False)
        except OSError:
            continue
    raise InputError(f"{node}: expected a free port of {ports[0]} to {ports[-1]}, found none; start the job again")


def _hear(server: socket.socket | None, token: str, number: int, ends: float) -> list[tuple[NodeFacts, socket.socket]]:
    """Returns what the other nodes tell, and the connections on which they wait for the verdict."""
    heard: list[tuple[NodeFacts, socket.socket]] = []
    while server is not None and len(heard) < number and (left := ends - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            break
        connection.settimeout(max(0.1, ends - time.monotonic()))
        try:
            said = json.loads(_line(connection))
        except (OSError, ValueError):
            connection.close()
            continue
        if said.pop("token", None) != token:
            connection.close()
            continue
        heard.append((NodeFacts(**said["facts"]), connection))
    return heard


def _tell(first: str, ports: Sequence[int], token: str, facts: NodeFacts, ends: float) -> bool:
    """Tells the first node; returns whether it finds that all is well. Raises InputError where it is out of reach."""
    message = json.dumps({"token": token, "facts": facts.__dict__}).encode() + b"\n"
    reason: Exception = TimeoutError("no answer")
    while time.monotonic() < ends:
        for port in ports:
            try:
                with socket.create_connection((first, port), timeout=2) as connection:
                    connection.settimeout(ends - time.monotonic() + 5)
                    connection.sendall(message)
                    return json.loads(_line(connection))
            except (OSError, ValueError) as error:
                reason = error
        time.sleep(0.2)
    raise InputError(
        f"{facts.node}: expected to reach the first node, {first}, at port {ports[0]}, found {reason}; look at the network "
        f"between them, or leave one out: sbatch --exclude={facts.node}"
    )


def _line(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as file:
        line = file.readline()
    if not line.endswith(b"\n"):
        raise OSError("the connection ended")
    return line


def _place_in_job() -> tuple[str, list[str], list[int], str]:
    """Returns (this node, all nodes, ports, token) from Slurm's variables; one node outside of Slurm."""
    listed = os.environ.get("SLURM_STEP_NODELIST", "")
    if not listed or int(os.environ.get("SLURM_STEP_NUM_NODES", 1)) == 1:
        node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        return node, [node], [], ""
    shown = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    job, step = int(os.environ["SLURM_JOB_ID"]), os.environ["SLURM_STEP_ID"]
    first = 40_000 + job * 7 % 20_000
    return os.environ["SLURMD_NODENAME"], shown.stdout.split(), list(range(first, first + _PORTS)), f"{job}.{step}"


def main() -> None:
    """The command."""
    start = time.monotonic()
    words = sys.argv[1:]
    behind = words[words.index("--") + 1 :] if "--" in words else []
    config = parse(PreflightConfig, words[: len(words) - len(behind) - ("--" in words)], description=__doc__)
    config = with_command(config, behind)
    node, nodes, ports, token = _place_in_job()
    try:
        preflight(config, node, nodes, ports, token)
    except InputError as error:
        raise InputError("\n  ".join(["preflight of " + node, *str(error).splitlines()])) from error
    if config.run_file is not None and config.out is not None and node == nodes[0]:
        config.run_file.write_text(f"{config.out}\n", encoding="utf-8")
    say(f"preflight: {len(nodes)} node{'s' * (len(nodes) > 1)} alike, in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    command(main)
