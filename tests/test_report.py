"""setclip.report, setclip.plots and the demo's report: one file, no network, honest figures, everything escaped."""

import base64
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from markupsafe import Markup
from material import NOUNS, picture, write_shards

from setclip import plots, report
from setclip.demo_record import ARMS, SLOTS, DemoFolder, DemoRecord, StepRecord
from setclip.demo_report import comparison, write_report
from setclip.errors import InputError
from setclip.manifest import Manifest
from setclip.objects import ObjectTable, write_objects
from setclip.shards import Shard

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "img", "link", "br", "hr"}


class Elements(HTMLParser):
    """Collects the start tags of a page and checks that tags are closed in order."""

    def __init__(self, html):
        super().__init__()
        self.found, self.open = [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


def metric(value, unit="%", interval=(1.0, 60.0)):
    chance = 100.0 if unit == "rank" else 1.25
    return {"value": value, "unit": unit, "samples": 31, "chance": chance, "interval_95": interval}


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo's folder as the steps leave it, with made-up numbers."""
    root = tmp_path_factory.mktemp("demo")
    folder = DemoFolder(root)
    write_shards(folder.scenes, (40,), "train")
    train = Manifest.load(folder.scenes)
    write_shards(folder.scenes, (31,), "test")
    test = Manifest.load(folder.scenes)
    Manifest(
        source="scenes",
        shards=train.shards + test.shards,
        pairs_listed=142,
        pairs_present=142,
        parsers={"pos": "test 1"},
        credits=["Pictures: Somebody, CC BY 4.0"],
    ).save(folder.scenes)
    counts = {name: 50 // (rank + 1) for rank, name in enumerate(NOUNS)}
    write_objects(folder.scenes / "objects.parquet", [ObjectTable.from_counts(counts, "pos", 80)])

    samples = list(Shard(folder.scenes / "test-00000.tar"))
    keys = [sample.key for sample in samples]
    text_query = {
        "query": {"caption": "<script>alert('a caption')</script>", "key": keys[3]},
        "rank": 2,
        "answers": [{"key": key, "score": 0.5, "is_right": key == keys[3]} for key in keys[2:7]],
    }
    picture_query = {
        "query": {"key": keys[5], "captions": samples[5].captions},
        "rank": 4,
        "answers": [{"caption": f"answer {n}", "key": keys[n], "score": 0.5, "is_right": n == 5} for n in range(2, 7)],
    }
    for number, arm in enumerate(ARMS):
        accuracy = {
            f"top1_{group}": metric(20.5 + number, interval=(10.0, 30.0)) for group in ("head", "middle", "tail")
        }
        checkpoint = {"model": "conv", "loss": {"name": arm, "target": "budget", "beta": 0.25}}
        write_json(
            folder.results("zeroshot", arm),
            {
                "dataset": {"images": 31, "classes": 80},
                "metrics": {"top1": metric(12.3 + number), **accuracy},
                "headline": ["top1", *accuracy],
                "checkpoint": checkpoint,
            },
        )
        recalls = {"i2t_r5": metric(45.6 + number), "i2t_medr": metric(7.0, "rank", None), "rsum": metric(99.0, "")}
        write_json(
            folder.results("retrieval", arm),
            {
                "dataset": {"images": 31, "captions": 62},
                "metrics": recalls,
                "headline": list(recalls),
                "checkpoint": checkpoint,
            },
        )
        directions = {"t2i": {"chosen": [text_query], "worst": [text_query]}}
        directions["i2t"] = {"chosen": [picture_query], "worst": [picture_query]}
        write_json(folder.gallery(arm), directions)
        lines = []
        for step in (2, 4, 6):
            lines.append({"step": step, "kl": 5 - step / 2, "samples_per_second": 900 + step})
            lines.append({"step": step, "zeroshot_top1": step, "i2t_r5": 2 * step})
        folder.run(arm).mkdir(parents=True)
        (folder.run(arm) / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(
        folder.results("retrieval", SLOTS),
        {"metrics": {**recalls, "rsum": metric(140.0, "", (130.0, 150.0))}, "checkpoint": {"step": 77}},
    )
    head = {
        "elements": {"image": {"inputs_looked_at": [1.5, 2.5]}},
        "words": [{"caption": "a <dog>", "elements": [[["dog", 0.8], ["a", 0.2]], [["a", 0.6], ["dog", 0.4]]]}],
    }
    looked = {"variance_image_log_of_mean": metric(-1.234, ""), "slots_image_overlap": metric(55.0)}
    write_json(folder.results("diagnostics", SLOTS), {"metrics": looked, "details": {"head": head}})
    src = "data:image/jpeg;base64," + base64.b64encode(picture(1)).decode()
    cards = [{"src": src, "alt": f"picture {n}", "caption": f"slot {n}", "note": "row <1>"} for n in range(3)]
    write_json(folder.looks(SLOTS), [cards, cards])
    size = {"scenes": 40, "test_scenes": 31, "nouns": 8, "global_batch_size": 16}
    config = {"steps": 6, "seed": 0, "fast": False, "size": size}
    DemoRecord(config=config, steps=[StepRecord(title="draw", commands=["python -m this 'a<b'"], seconds=61.0)]).save(
        root
    )
    return root


@pytest.fixture(scope="module")
def html(demo):
    return write_report(demo).read_text(encoding="utf-8")


# --- the demo's report


def test_every_picture_is_a_data_uri_with_alternative_text(html):
    pictures = Elements(html).of("img")
    assert len(pictures) > 12
    assert all(p["src"].startswith("data:image/jpeg;base64,") and p["alt"].strip() for p in pictures)


def test_nothing_but_links_to_licences_leads_out_of_the_page(html):
    elements = Elements(html)
    outward = [
        (tag, value)
        for tag, attributes in elements.found
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data") and re.match(r"(https?:)?//", value or "")
    ]
    assert outward == [("a", "https://creativecommons.org/licenses/by/4.0/")]
    assert not elements.of("script")
    assert not elements.of("link")
    assert "url(http" not in html
    assert "@import" not in html
    (policy,) = [m["content"] for m in elements.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_menu_links_lead_to_sections_and_ids_are_unique(html):
    elements = Elements(html)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    targets = [a["href"][1:] for a in elements.of("a") if a["href"].startswith("#")]
    assert len(targets) == 8
    assert set(targets) <= set(ids)
    sections = [attributes["id"] for attributes in elements.of("section")]
    assert len(set(sections)) == len(sections) == 8


def test_headings_start_with_one_title_and_skip_no_level(html):
    levels = [int(tag[1]) for tag, _ in Elements(html).found if re.fullmatch(r"h[1-6]", tag)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_figures_of_both_arms_stand_beside_chance(html):
    html = html.replace("\N{NO-BREAK SPACE}", " ")
    for text in (
        "12.3 %",
        "13.3 %",
        "1.2 %",
        "45.6 %",
        "46.6 %",
        "20.5 [10.0, 30.0]",
        "object_iou, target budget, β 0.25",
    ):
        assert text in html


def test_the_section_on_sets_shows_where_slots_look_and_says_who_is_ahead(html):
    section = html.split('<section id="sets"')[1].split("</section>")[0].replace("\N{NO-BREAK SPACE}", " ")
    assert section.count("<img") == 6
    for text in (
        "77 steps only",
        "sets are ahead here",
        "a &lt;dog&gt;",
        "dog 80 %",
        "-1.23",
        "row &lt;1&gt;",
        "2 slots compete",
    ):
        assert text in section, text


def test_caveats_and_credits_are_there(html):
    for text in ("false negatives", "One seed is no evidence", "docs/results.md", "Pictures: Somebody, "):
        assert text in html
    assert "Made with --fast True" not in html


def test_right_answers_are_marked_in_words_too(html):
    assert html.count('<li class="right') == 4
    assert html.count('<span class="unseen-label"> right</span>') == 4


def test_captions_and_commands_are_escaped(html):
    assert "&lt;script&gt;alert(" in html
    assert "<script" not in html
    assert "a&lt;b" in html


def test_the_same_folder_gives_the_same_report(demo, html):
    assert write_report(demo).read_text(encoding="utf-8") == html


def test_each_figure_is_labelled_for_those_who_do_not_see_it(html):
    labels = [attributes.get("aria-label", "") for attributes in Elements(html).of("svg")]
    assert len(labels) == 5
    assert all(len(label) > 30 for label in labels)


def test_a_folder_that_is_no_demo_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected a demo's folder .* `python -m setclip.demo` makes one"):
        write_report(tmp_path)


def test_a_step_that_is_missing_is_named(demo, tmp_path):
    copy = shutil.copytree(demo, tmp_path / "demo")
    DemoFolder(copy).results("zeroshot", "hard").unlink()
    with pytest.raises(InputError, match=r"zeroshot_hard\.json, found none"):
        write_report(copy)


@pytest.mark.parametrize(
    ("ours", "hard", "says"),
    [
        ((20.0, (18.0, 22.0)), (21.0, (19.0, 23.0)), "do not tell the arms apart"),
        ((30.0, (28.0, 32.0)), (21.0, (19.0, 23.0)), "Object-IoU lead"),
        ((21.0, (19.0, 23.0)), (30.0, (28.0, 32.0)), "hard labels lead"),
    ],
)
def test_the_headline_claims_a_difference_only_where_intervals_are_apart(ours, hard, says):
    first, second = ({"value": value, "interval_95": interval} for value, interval in (ours, hard))
    assert says in comparison(first, second)


# --- building blocks


def test_a_picture_book_finds_each_key_and_its_caption(tmp_path):
    shards = [Shard(tmp_path / f"train-{n:05d}.tar") for n in range(2)]
    write_shards(tmp_path, (3, 4))
    book = report.PictureBook(shards)
    for sample in (sample for shard in shards for sample in shard):
        assert book.picture(sample.key, "alt") == report.picture(sample.image, "jpg", "alt")
        assert book.caption(sample.key) == sample.captions[0]


def test_a_table_escapes_its_cells_and_heads_its_rows():
    html = report.table(report.Table("a & b", ["", "<x>"], [["row", "1 < 2"]]))
    assert "<caption>a &amp; b</caption>" in html
    assert '<th scope="row">row</th><td>1 &lt; 2</td>' in html


def test_timings_are_bars_of_the_longest_step():
    html = report.timings([("one", 5.0, "5 s"), ("two", 20.0, "20 s")])
    assert re.findall(r"width:([\d.]+)%", html) == ["25.0", "100.0"]


def test_a_page_has_no_id_twice(tmp_path):
    svg = plots.curves([plots.Curve("a", [1, 2], [3, 4])], "x", "y", "first")
    other = plots.curves([plots.Curve("a", [1, 2], [3, 4])], "x", "y", "second")
    ids = re.findall(r' id="([^"]+)"', svg + other)
    assert len(ids) == len(set(ids))


def test_plots_take_the_colours_of_the_page_and_escape_names():
    bars = {"one": [plots.Bar(2.0, (1.0, 3.0))], "<two>": [plots.Bar(0.0)]}
    svg = plots.grouped_bars(["head"], bars, "y", 'a "label"', chance=1.0)
    assert isinstance(svg, Markup)
    assert svg.startswith('<svg role="img" aria-label="a &#34;label&#34;"')
    assert {"var(--series-1)", "var(--series-2)", "var(--chance)"} <= set(re.findall(r"var\(--[\w-]+\)", svg))
    assert "#0" not in re.sub(r'"#\w+"|url\(#\w+\)', "", svg)
    assert "&lt;two&gt;" in svg


def test_rank_frequency_marks_head_and_tail():
    svg = plots.rank_frequency([f"noun {n}" for n in range(10)], [100 // (n + 1) for n in range(10)], 2, 3, "ranks")
    assert "head: 2" in svg
    assert "tail: 3" in svg
    assert "noun 0" in svg


# --- in a browser


def dumped(page, folder):
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run --disable-dev-shm-usage"
    )
    return subprocess.run(
        [
            CHROMIUM,
            *flags.split(),
            f"--user-data-dir={folder}",
            "--enable-logging=stderr",
            "--v=0",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_a_browser_decodes_every_picture_and_complains_of_nothing(html, tmp_path):
    whole = tmp_path / "report.html"
    whole.write_text(html, encoding="utf-8")
    assert "CONSOLE" not in dumped(whole, tmp_path / "profile").stderr

    # The page's own policy forbids scripts: this copy has none, and counts.
    count = (
        "<script>onload = () => { const all = [...document.images]; document.body.dataset.seen = "
        "all.filter(i => i.complete && i.naturalWidth).length + ' of ' + all.length; "
        "document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth }</script></body>"
    )
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html).replace("</body>", count)
    copy = tmp_path / "copy.html"
    copy.write_text(free, encoding="utf-8")
    dom = dumped(copy, tmp_path / "profile").stdout
    number = len(Elements(html).of("img"))
    assert f'data-seen="{number} of {number}"' in dom
    assert 'data-wide="false"' in dom


def test_the_stand_in_pictures_are_jpegs():
    assert report.picture(picture(1), "jpg", "").src.startswith("data:image/jpeg;base64,/9j/")
