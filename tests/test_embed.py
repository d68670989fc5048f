"""Bulk export of embeddings: against the encode functions, killed and resumed, bad pictures, and the command."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_samples import (
    color_of_image,
    color_of_text,
    jpeg,
    small_model,
    write_class_folders,
    write_run,
    write_shards,
)

from eval_suite import embed as module
from eval_suite.embed import EmbedSettings, embed
from eval_suite.embed_files import Embeddings
from eval_suite.embed_source import open_source
from eval_suite.encode import encode_functions
from eval_suite.fingerprint import model_identity
from eval_suite.preprocess import pillow_transform
from setclip.errors import InputError
from setclip.images import decode_tensor, eval_transform

MODEL = {"where": "colours", "fingerprint": "0123456789abcdef"}


def set_of_image(images):
    """Sets of two elements: the colour, and the colour with its channels turned round."""
    colors = color_of_image(images)
    return torch.stack([colors, colors.flip(1)], 1)


def export(place, out, encode_image=color_of_image, model=MODEL, part_size=5, split=None, max_bad=0.05, **options):
    job = {name: options.pop(name) for name in ("part", "parts") if name in options}
    return embed(
        open_source(place, split, part_size),
        out,
        encode_image,
        color_of_text,
        eval_transform(32),
        model,
        EmbedSettings(**{"batch_size": 2, **options}),
        max_bad=max_bad,
        workers=0,
        show_progress=False,
        **job,
    )


def rows_of(found, what="images"):
    columns, vectors = {}, []
    for part, array in found.parts(what):
        for name, values in part.items():
            columns.setdefault(name, []).extend(values)
        vectors.append(array)
    return columns, np.concatenate(vectors)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def nested(folder):
    write_class_folders(folder, 3)
    (folder / "red" / "deeper").mkdir()
    (folder / "red" / "deeper" / "x.JPG").write_bytes(jpeg((220, 30, 30), 77))
    (folder / "top.jpg").write_bytes(jpeg((30, 40, 220), 78))
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.jpg").write_bytes(b"")
    return folder


# --- what is written


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_a_nested_folder_gives_each_picture_its_unit_feature_in_the_order_of_the_paths(tmp_path, file_format):
    place = nested(tmp_path / "in")
    found = export(place, tmp_path / "out", format=file_format)
    columns, vectors = rows_of(found)
    paths = sorted(p.relative_to(place).as_posix() for p in place.rglob("*") if p.suffix.lower() == ".jpg")
    paths.remove(".hidden.jpg")
    assert columns["path"] == paths
    assert len(paths) == 14
    transform = eval_transform(32)
    images = torch.stack([transform(decode_tensor((place / path).read_bytes())) for path in paths])
    expected = torch.nn.functional.normalize(color_of_image(images).double(), dim=-1)
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-6)
    assert found.description["source"]["other_files"] == {".txt": 1}
    assert [part["images"] for part in found.description["parts"]] == [5, 5, 4]


def test_shards_give_a_file_each_with_their_keys_and_every_caption_under_its_number(tmp_path):
    place = write_shards(tmp_path / "shards", num_samples=7, captions_each=3)
    found = export(place, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"{what}-test-0000{i}.parquet" for what in ("images", "texts") for i in (0, 1)),
        "embeddings.json",
        "bad.jsonl",
    }
    images, _ = rows_of(found)
    texts, vectors = rows_of(found, "texts")
    assert texts["key"] == [key for key in images["key"] for _ in range(3)]
    assert texts["caption"] == [0, 1, 2] * 7
    expected = torch.nn.functional.normalize(color_of_text(texts["text"]), dim=-1)
    np.testing.assert_allclose(vectors, expected.numpy(), atol=1e-6)
    assert (found.description["images"], found.description["texts"]) == (7, 21)


def test_a_picture_has_the_same_key_in_a_folder_and_in_shards(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(jpeg((220, 30, 30), 0))
    shards, _ = rows_of(export(write_shards(tmp_path / "shards", num_samples=2), tmp_path / "b"))
    folder, _ = rows_of(export(tmp_path / "in", tmp_path / "a"))
    assert folder["key"] == shards["key"][:1]


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_sets_of_vectors_keep_their_shape(tmp_path, file_format):
    found = export(write_class_folders(tmp_path / "in"), tmp_path / "out", set_of_image, format=file_format)
    _, sets = rows_of(found)
    assert sets.shape == (12, 2, 3)
    np.testing.assert_array_equal(sets[:, 0], sets[:, 1, ::-1])
    np.testing.assert_allclose(np.linalg.norm(sets, axis=-1), 1, atol=1e-6)


def test_float16_is_the_float32_export_rounded(tmp_path):
    place = write_class_folders(tmp_path / "in")
    _, exact = rows_of(export(place, tmp_path / "a"))
    half = export(place, tmp_path / "b", dtype="float16")
    assert (
        str(pq.read_schema(tmp_path / "b" / "images-00000.parquet").field("embedding").type.value_type) == "halffloat"
    )
    np.testing.assert_array_equal(rows_of(half)[1], exact.astype(np.float16).astype(np.float32))


def test_other_tools_read_the_parquet_files(tmp_path):
    found = export(write_class_folders(tmp_path / "in"), tmp_path / "out")
    query = f"select path, embedding[1] from '{tmp_path}/out/images-*.parquet' order by path"
    rows = duckdb.sql(query).fetchall()
    columns, vectors = rows_of(found)
    assert rows == [(path, float(vector[0])) for path, vector in zip(columns["path"], vectors, strict=True)]
    column = pq.read_table(tmp_path / "out" / "images-00000.parquet").column("embedding")
    assert str(column.type).startswith("fixed_size_list")


# --- killed and resumed


class Killed(BaseException):
    pass


@pytest.mark.parametrize("file_format", ["parquet", "npy"])
def test_an_export_stopped_before_any_rename_goes_on_to_the_same_bytes(tmp_path, file_format, monkeypatch):
    place = write_shards(tmp_path / "shards", num_samples=7)
    export(place, tmp_path / "whole", format=file_format)
    expected = bytes_of(tmp_path / "whole")
    replace, renames = os.replace, 0

    def counted(*args):
        nonlocal renames
        renames += 1
        if renames == stop_at:
            shutil.copy(args[0], str(args[0]).replace(".partial", "0.partial"))  # as a kill would leave it
            raise Killed
        replace(*args)

    stops = 0
    for stop_at in range(1, 50):
        renames, out = 0, tmp_path / f"out{stop_at}"
        with monkeypatch.context() as patch:
            patch.setattr("setclip.files.os.replace", counted)
            try:
                export(place, out, format=file_format)
            except Killed:
                stops += 1
            else:
                break
        assert list(out.rglob(".*.partial*"))
        assert not (out / "embeddings.json").exists()
        export(place, out, format=file_format)
        assert bytes_of(out) == expected, f"stopped before rename {stop_at}"
    assert (
        stops == {"parquet": 9, "npy": 13}[file_format]
    )  # plan, files and report of two parts, bad.jsonl, embeddings.json


def test_finished_parts_are_not_encoded_again(tmp_path):
    place, pictures = write_class_folders(tmp_path / "in"), []

    def failing_encoder(images):
        pictures.append(len(images))
        if sum(pictures) > 7:
            raise Killed
        return color_of_image(images)

    with pytest.raises(Killed):
        export(place, tmp_path / "out", failing_encoder)
    pictures.clear()
    export(place, tmp_path / "out", lambda images: (pictures.append(len(images)), color_of_image(images))[1])
    assert sum(pictures) == 7  # of 12, one part of five was done


@pytest.mark.slow
def test_an_export_killed_by_the_system_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    write_class_folders(tmp_path / "in", 4)
    run = write_run(tmp_path / "runs", "small")
    kill = "import os, signal, sys\nfrom setclip.config import command\nfrom eval_suite import embed, embed_files\n"
    kill += "from setclip import files\nreplace, seen = os.replace, []\n"
    kill += "def killing(a, b):\n    seen.append(b)\n"
    kill += "    os.kill(os.getpid(), signal.SIGKILL) if len(seen) == 4 else replace(a, b)\n"
    kill += "files.os.replace = killing\ncommand(embed.main)\n"
    arguments = [str(tmp_path / "in"), "--checkpoint", str(run), "--part-size", "5", "--batch-size", "3", "--out"]
    call = [sys.executable, "-c", kill, *arguments, str(tmp_path / "killed")]
    assert subprocess.run(call, cwd=Path(__file__).parents[1]).returncode == -9
    assert list((tmp_path / "killed").glob(".*.partial*"))
    for out in ("killed", "whole"):
        monkeypatch.setattr(sys, "argv", ["embed", *arguments, str(tmp_path / out)])
        module.main()
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")


def test_jobs_that_share_the_work_give_the_folder_of_one_and_the_last_completes_it(tmp_path):
    place = write_class_folders(tmp_path / "in")
    export(place, tmp_path / "one")
    for part in (1, 0):
        assert export(place, tmp_path / "three", part=part, parts=3) is None
    assert export(place, tmp_path / "three", part=2, parts=3) is not None
    assert bytes_of(tmp_path / "three") == bytes_of(tmp_path / "one")


def test_a_complete_export_started_again_encodes_nothing(tmp_path):
    place = write_class_folders(tmp_path / "in")
    export(place, tmp_path / "out")
    before = bytes_of(tmp_path / "out")

    def encode_nothing(images):
        raise AssertionError

    assert export(place, tmp_path / "out", encode_nothing).description["images"] == 12
    assert bytes_of(tmp_path / "out") == before


# --- what does not fit


@pytest.mark.parametrize("is_complete", [True, False])
def test_another_model_changed_inputs_or_settings_are_errors_that_say_which(tmp_path, is_complete):
    place, out = write_class_folders(tmp_path / "in"), tmp_path / "out"
    if is_complete:
        export(place, out)
    else:
        assert export(place, out, part=0, parts=2) is None
    with pytest.raises(InputError, match=r"expected the model .* colours \(fingerprint 0123456789ab…\), found other"):
        export(place, out, model={"where": "other", "fingerprint": "ff"})
    with pytest.raises(InputError, match="found dtype float16 instead of float32; give another --out"):
        export(place, out, dtype="float16")
    (place / "blue" / "0.jpg").write_bytes(jpeg((1, 2, 3), 5))
    with pytest.raises(InputError, match=r"found changed ones \(12 pictures; 1 parts differ, first 00000\)"):
        export(place, out)
    (place / "zebra.jpg").write_bytes(jpeg((1, 2, 3), 6))
    with pytest.raises(InputError, match=r"\(12 pictures\), found changed ones \(13 pictures; 2 parts"):
        export(place, out)


def test_the_same_model_at_another_place_goes_on(tmp_path):
    place, out = write_class_folders(tmp_path / "in"), tmp_path / "out"
    export(place, out, part=0, parts=2)
    assert export(place, out, model=MODEL | {"where": "moved"}).description["model"] == MODEL


def test_bad_pictures_are_counted_by_reason_and_listed_and_their_captions_left_out(tmp_path):
    place = write_class_folders(tmp_path / "in", 10)
    (place / "green" / "3.jpg").write_bytes(b"")
    (place / "red" / "5.jpg").write_bytes(b"not a picture at all")
    whole = export(place, tmp_path / "out", max_bad=0.05)
    assert whole.description["bad"] == {"empty file": 1, "not an image": 1}
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad.jsonl").read_text().splitlines()]
    assert [(entry["path"], entry["reason"]) for entry in listed] == [
        ("green/3.jpg", "empty file"),
        ("red/5.jpg", "not an image"),
    ]
    columns, _ = rows_of(whole)
    assert len(columns["path"]) == 38
    assert "green/3.jpg" not in columns["path"]


def test_more_bad_pictures_than_allowed_are_an_error_with_the_table_and_a_higher_ceiling_goes_on(tmp_path):
    place = write_class_folders(tmp_path / "in")
    (place / "blue" / "1.jpg").write_bytes(b"")
    with pytest.raises(
        InputError, match=r"at most 5.0% bad pictures, found 1 of 12 \(8.3%\), first blue/1.jpg:\n +1 +empty"
    ):
        export(place, tmp_path / "out")
    assert not (tmp_path / "out" / "embeddings.json").exists()
    assert export(place, tmp_path / "out", max_bad=0.1).description["images"] == 11


def test_a_part_whose_pictures_are_all_bad_has_no_file(tmp_path):
    place = write_class_folders(tmp_path / "in")
    for path in (place / "blue").iterdir():
        path.write_bytes(b"")
    found = export(place, tmp_path / "out", part_size=3, max_bad=1.0)
    assert found.description["parts"][0]["files"] == {}
    assert len(rows_of(found)[1]) == 9


def test_a_linked_folder_is_followed_once_and_a_circle_ends(tmp_path):
    place = write_class_folders(tmp_path / "in", 1, ("red", "green"))
    (place / "red" / "back").symlink_to(place)
    (place / "same").symlink_to(write_class_folders(tmp_path / "other", 1, ("blue",)))
    columns, _ = rows_of(export(place, tmp_path / "out"))
    assert columns["path"] == ["green/0.jpg", "red/0.jpg", "same/blue/0.jpg"]


def test_a_missing_or_empty_folder_and_foreign_files_are_said(tmp_path):
    with pytest.raises(InputError, match=r"expected a folder of pictures or shards at .*nowhere, found no such folder"):
        open_source(tmp_path / "nowhere")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    with pytest.raises(InputError, match=r"found only other files \(1 .txt\)"):
        open_source(tmp_path / "texts")
    place = write_class_folders(tmp_path / "in")
    with pytest.raises(InputError, match="for --split test, found none"):
        open_source(place, "test")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images-00000.npy").write_bytes(b"")
    with pytest.raises(InputError, match="found embeddings of other work"):
        export(place, tmp_path / "out")


def test_a_missing_or_cut_file_of_a_complete_export_is_found_on_opening(tmp_path):
    export(write_class_folders(tmp_path / "in"), tmp_path / "out")
    path = tmp_path / "out" / "images-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"images-00001.parquet: expected [\d,]+ bytes as embeddings.json says, found"):
        Embeddings.open(tmp_path / "out")
    path.unlink()
    with pytest.raises(InputError, match="found no file; copy the folder again"):
        Embeddings.open(tmp_path / "out")
    with pytest.raises(InputError, match="found no folder; make them with"):
        Embeddings.open(tmp_path / "nowhere")


def test_a_feature_that_is_not_finite_stops_the_export(tmp_path):
    with pytest.raises(InputError, match="expected finite features"):
        export(
            write_class_folders(tmp_path / "in"), tmp_path / "out", lambda images: color_of_image(images) * torch.nan
        )


# --- the command


def test_the_command_exports_what_the_encode_functions_of_the_checkpoint_give(tmp_path, monkeypatch, capsys):
    place = write_shards(tmp_path / "shards")
    loaded = small_model(tmp_path)
    arguments = [str(place), "--split", "test", "--checkpoint", str(tmp_path / "runs" / "small"), "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["embed", *arguments, "--out", str(tmp_path / "out")])
    module.main()
    assert "embeddings: 12 pictures, 24 captions, 16 float32" in capsys.readouterr().out
    found = Embeddings.open(tmp_path / "out")
    assert found.description["model"]["fingerprint"] == model_identity(loaded)["fingerprint"]
    assert found.description["model"]["recipe"] == "tiny"
    encode_image, encode_text = encode_functions(loaded)
    source, transform = open_source(place), pillow_transform(32)  # as the command resizes
    with torch.no_grad():
        images = encode_image(torch.stack([transform(decode_tensor(source.read(row)[1])) for row in range(12)]))
        texts = encode_text([text for row in range(12) for text in source.captions(row)])
    np.testing.assert_allclose(rows_of(found)[1], images.numpy(), atol=1e-5)
    np.testing.assert_allclose(rows_of(found, "texts")[1], texts.numpy(), atol=1e-5)


def test_a_model_that_was_trained_on_has_another_fingerprint_and_one_that_was_moved_the_same(tmp_path):
    loaded = small_model(tmp_path)
    before = model_identity(loaded)
    loaded.identity["where"] = "elsewhere"
    assert model_identity(loaded)["fingerprint"] == before["fingerprint"]
    with torch.no_grad():
        next(loaded.model.parameters()).flatten()[0] += 1e-3
    assert model_identity(loaded)["fingerprint"] != before["fingerprint"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a folder of pictures or shards and --out"),
        (["x", "--out", "y", "--part", "1"], "expected --part I and --parts N together"),
        (["x", "--out", "y", "--max-bad", "5"], "expected --max-bad from 0 to 1"),
    ],
)
def test_wrong_flags_are_said_before_anything_is_loaded(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["embed", *arguments])
    with pytest.raises(InputError, match=message):
        module.main()
