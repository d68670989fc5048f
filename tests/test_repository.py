"""What holds of the repository as a whole: the direction of imports, documents that fit the code, and torchvision."""

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from check_skips import unexpected_skips
from readme_commands import ELSEWHERE, blocks, chains, shortened
from readme_commands import commands as commands_of

from setclip import torchvision_cpu

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "setclip": set(),
    "data_prep": {"setclip"},
    "eval_suite": {"setclip"},
    "pretrain": {"setclip", "eval_suite"},
    "finetune": {"setclip", "eval_suite", "pretrain"},
}
"""Package to those of ours that it may import: the table of CONTRIBUTING.md."""

OURS = (*MAY_IMPORT, "benchmarks")
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path: Path, at_the_top_only: bool = False) -> set[str]:
    """Returns the names that a file imports: modules, and what is taken from them ("setclip.log.say")."""
    names: set[str] = set()
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write the package's name"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        if not (at_the_top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)
    return names


def our_modules() -> dict[str, Path]:
    return {module_name(path): path for package in OURS for path in files_of(package)}


# --- imports


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_those_below_it(package):
    allowed = MAY_IMPORT[package] | {package}
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files_of(package)
        for name in imports_of(path)
        if name.partition(".")[0] in set(OURS) - allowed
    }
    assert not wrong


def test_there_are_modules_to_look_at_in_each_package_that_is_built():
    for package in ("setclip", "data_prep", "eval_suite", "pretrain"):
        assert len(files_of(package)) > 1


def test_modules_do_not_import_each_other_in_a_circle():
    modules = our_modules()
    graph = {
        name: {imported for imported in imports_of(path) if imported in modules and imported != name}
        for name, path in modules.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_data_preparation_reaches_no_torch():
    modules = our_modules()
    waiting = [name for name in modules if name.startswith("data_prep")]
    reached: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        # In data_prep not even inside a function; elsewhere only what runs on import.
        imported = imports_of(modules[name], at_the_top_only=not name.startswith("data_prep"))
        heavy = {
            i for i in imported if i.partition(".")[0] in ("torch", "torchvision", "open_clip", "timm", "deepspeed")
        }
        assert not heavy, f"{name} imports {heavy}"
        waiting += [i for i in imported if i in modules]
    assert "setclip.shards" in reached


# --- documents


def links_of(document: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text)
    return [a or b for a, b in targets if not re.match(r"[a-z]+:|#", a or b)]


def named_modules() -> list[tuple[str, str]]:
    """Returns (document, module) for each `python -m MODULE` and `-m MODULE` of ours in the documents."""
    packages = "|".join(OURS)
    return sorted(
        {
            (document.relative_to(ROOT).as_posix(), module)
            for document in DOCUMENTS
            for module in re.findall(rf"-m ((?:{packages})[\w.]*\w)", document.read_text(encoding="utf-8"))
        }
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_to_something(document):
    missing = [link for link in links_of(document) if not (document.parent / link.partition("#")[0]).exists()]
    assert not missing


def test_documents_name_commands_at_all():
    assert {module for _, module in named_modules()} >= {"data_prep.run", "pretrain.run", "eval_suite.zeroshot"}


@pytest.mark.parametrize(("document", "module"), named_modules())
def test_a_command_in_a_document_is_a_module(document, module):
    assert importlib.util.find_spec(module) is not None


def commands() -> list[str]:
    is_command = 'if __name__ == "__main__":'
    return [name for name, path in our_modules().items() if is_command in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("module", commands())
def test_a_command_says_how_it_is_run(module):
    documentation = ast.get_docstring(ast.parse(our_modules()[module].read_text(encoding="utf-8"))) or ""
    named = re.escape(module.removesuffix(".__main__"))
    assert re.search(rf"(python |torchrun .*)-m {named}\b", documentation)


def test_the_file_tree_of_the_readme_names_every_package_and_no_other_file():
    tree = re.search(r"## Files\n.*?```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert tree is not None
    folder, named = "", set()
    for line in tree[1].splitlines():
        entry = line.split()[0]
        if line.startswith(" "):
            named.add(folder + entry)
        else:
            folder = entry if entry.endswith("/") else ""
            named.add(entry)
    assert not [name for name in named if not (ROOT / name).exists()]
    assert not [package for package in OURS if (ROOT / package).is_dir() and f"{package}/" not in named]


# --- continuous integration's own scripts


def test_the_readme_marks_commands_of_every_stage_to_be_run():
    text = [c for language, block in blocks(ROOT / "README.md") for c in commands_of(language, block)]
    for start in ("make demo", "python -m data_prep", "python -m pretrain", "python -m eval_suite", "torchrun"):
        assert any(command.startswith(start) for command in text), start


def test_blocks_without_the_mark_are_not_run(tmp_path):
    document = tmp_path / "a.md"
    document.write_text("```bash\nrm a\n```\n```console\n$ b\n```\n```bash run\n# note\nc \\\n    d  # why\ne\n```\n")
    ((language, block),) = blocks(document)
    assert commands_of(language, block) == ["c d", "e"]


def test_commands_that_train_are_shortened_behind_what_the_reader_types():
    assert shortened("python -m pretrain.run tiny --steps 500").endswith("--steps 500 --steps 3")
    assert shortened("python -m eval_suite.zeroshot scenes") == "python -m eval_suite.zeroshot scenes"
    assert shortened("make help") == f"make -C '{ROOT}' help"


def test_commands_that_are_left_out_are_run_by_a_test():
    for command, path in ELSEWHERE.items():
        words = ", ".join(f'"{word}"' for word in command.replace("make", "make -C {ROOT}").split())
        assert words.replace('"{ROOT}"', "ROOT") in (ROOT / path).read_text(encoding="utf-8"), command


def test_a_document_starts_from_the_first_ones_results_and_from_no_other_unless_it_says_so(tmp_path):
    texts = {
        "first": "```bash run\necho one > a.txt\n```\n",
        "second": "```bash run\ncat a.txt\necho two > b.txt\n```\n",
        "third": "<!-- commands run after second.md -->\n```bash run\ncat a.txt b.txt\n```\n",
        "fourth": "```bash run\ncat a.txt\n! test -e b.txt\n```\n",
        "none": "no commands\n",
    }
    paths = [tmp_path / f"{name}.md" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.write_text(text)
    assert [[path.stem for path in chain] for chain in chains(paths)] == [["first"], ["second", "third"], ["fourth"]]
    command = [sys.executable, ROOT / "tests/readme_commands.py", *paths, "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "6 commands" in done.stdout
    paths[3].write_text("```bash run\nfalse\n```\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: status 1 of a command in " in done.stdout


def test_only_listed_reasons_for_a_skip_pass(tmp_path):
    (tmp_path / "expected.txt").write_text("# a note\n.*GPU.*\n")
    (tmp_path / "junit.xml").write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"><skipped message="needs a GPU"/></testcase>'
        '<testcase classname="t" name="b"><skipped message="too tired"/></testcase><testcase name="c"/></testsuite></testsuites>'
    )
    assert unexpected_skips(tmp_path / "junit.xml", tmp_path / "expected.txt") == ["t.b: too tired"]


# --- torchvision without its extension


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def test_torchvision_can_be_imported_after_setclip():
    done = run_python("import setclip, torchvision; from torchvision.transforms import v2; v2.Resize(8); print('fine')")
    assert done.stdout == "fine\n", done.stderr


def test_importing_setclip_imports_neither_torch_nor_torchvision():
    done = run_python("import setclip, sys; print([m for m in ('torch', 'torchvision') if m in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


@pytest.fixture
def declared(monkeypatch):
    """The schemas that would be declared; the real ones of this process are left alone."""
    schemas: list[str] = []

    class Library:
        def __init__(self, namespace, kind):
            assert (namespace, kind) == ("torchvision", "FRAGMENT")

        def define(self, schema):
            schemas.append(schema)

    monkeypatch.setattr(torch.library, "Library", Library)
    monkeypatch.setattr(torchvision_cpu, "_library", None)
    return schemas


def test_nothing_is_declared_where_the_extension_loads(tmp_path, monkeypatch, declared):
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    (tmp_path / "_C.so").touch()
    assert torchvision_cpu.declare_missing_operators(tmp_path) is False
    assert loaded == [str(tmp_path / "_C.so")]
    assert declared == []


def test_both_operators_are_declared_once_where_the_extension_does_not_load(tmp_path, declared):
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert torchvision_cpu.declare_missing_operators(tmp_path) is True
    assert torchvision_cpu.declare_missing_operators(tmp_path) is True
    assert [schema.partition("(")[0] for schema in declared] == ["nms", "qnms"]


def test_both_operators_are_declared_where_there_is_no_extension(tmp_path, declared):
    assert torchvision_cpu.declare_missing_operators(tmp_path) is True
    assert len(declared) == 2


def test_installing_twice_waits_once():
    done = run_python(
        "import sys, setclip; from setclip import torchvision_cpu as t; t.install(); "
        "print(sum(isinstance(f, t._BeforeTorchvision) for f in sys.meta_path))"
    )
    assert done.stdout == "1\n", done.stderr
