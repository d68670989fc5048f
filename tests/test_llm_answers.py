"""Answers of language models: what is repaired by rule, what is bad and why, and which objects come of it."""

import pytest

from data_prep.llm import description_answers, object_answers
from data_prep.llm.account import Account
from data_prep.llm.jsonl import Answer
from data_prep.llm.names import NameParser
from data_prep.llm.prompts import (
    DESCRIPTION_FIRST,
    DESCRIPTION_SECOND,
    OBJECTS_FIRST,
    OBJECTS_SECOND,
    cut,
    request_id,
)
from data_prep.llm.synonyms import Synonyms
from data_prep.pos_config import PosConfig
from setclip.errors import InputError

CAPTION = "A dog plays with a frisbee on the grass near two children."


def answered(text: str, finish_reason: str = "stop", error: str | None = None) -> Answer:
    return Answer("0" * 16, text, finish_reason, 10, 5, error)


def objects(text: str, caption: str = CAPTION, **changes):
    return object_answers.check(caption, answered(text, **changes))


def description(text: str, name: str = "teapot", **changes):
    return description_answers.check(name, answered(text, **changes))


def second_description(text: str, name: str):
    answer = Answer(request_id(DESCRIPTION_SECOND, name), text, "stop", 10, 5, None)
    return description_answers.check(name, answer)


@pytest.fixture(scope="module")
def parser():
    return NameParser()


# --- lists of objects


@pytest.mark.parametrize(
    ("text", "repairs"),
    [
        ("dog, frisbee, grass", ()),
        ("dog, frisbee, grass.", ("full stop",)),
        ("dog, frisbee, and grass", ("and",)),
        ("dog, frisbee and grass", ("and",)),
        ("dog; frisbee; grass", ("separators",)),
        ("dog，frisbee，grass", ("separators",)),
        ("dog、frisbee、grass。", ("separators", "full stop")),
        ("dog；frisbee；grass", ("separators",)),
        ("dog\tfrisbee\tgrass", ("separators",)),
        ("| dog | frisbee | grass |", ("separators",)),
        ("dog • frisbee • grass", ("separators",)),
        ("dog\nfrisbee\ngrass\n", ("one a line",)),
        ("1. dog\n2. frisbee\n3. grass", ("numbering", "one a line")),
        ("(1) dog, (2) frisbee, (3) grass", ("numbering", "one a line")),
        ("1.dog 2.frisbee 3.grass", ("numbering", "one a line")),
        ("- dog\n- frisbee\n- grass", ("bullets", "one a line")),
        ("• dog\n• frisbee\n• grass", ("bullets", "one a line")),
        ("**dog**, `frisbee`, *grass*", ("markdown",)),
        ("```\ndog, frisbee, grass\n```", ("markdown",)),
        (
            "* **dog**: an animal\n* **frisbee**: a toy\n* **grass**",
            ("markdown", "bullets", "explanations", "one a line"),
        ),
        ('"dog", "frisbee", "grass"', ("quotes",)),
        ("dog (brown), frisbee, grass", ("brackets",)),
        ("[dog], [frisbee], [grass]", ("brackets",)),
        ("[dog] [frisbee] and [grass].", ("brackets",)),
        ("[dog, frisbee, grass]", ("brackets",)),
        ("(dog, frisbee, grass).", ("brackets",)),
        ("{dog (brown), frisbee, grass}", ("brackets",)),
        ("dog (brown)\n(red) frisbee\ngrass", ("brackets", "one a line")),
        ("['dog', 'frisbee', 'grass']", ("brackets", "quotes")),
        ('["dog","frisbee","grass"]', ("json",)),
        ('{"objects": ["dog", "frisbee", "grass"]}', ("json",)),
        ('{"caption": "a dog", "objects": ["dog", "frisbee", "grass"]}', ("json",)),
        ('```json\n[\n  "dog",\n  "frisbee",\n  "grass"\n]\n```', ("markdown", "json")),
        (
            'Here are the objects:\n```json\n{"objects": ["dog", "frisbee", "grass"]}\n```',
            ("markdown", "lead-in", "json"),
        ),
        ("| Object |\n|---|\n| dog |\n| frisbee |\n| grass |", ("table",)),
        ("| # | **Objects** |\n|:-|-:|\n| 1 | dog |\n| 2 | frisbee |\n| 3 | grass |", ("markdown", "table")),
        ("dog, frisbee, grass<|im_end|>", ("special tokens",)),
        ("<s>dog, frisbee, grass</s>", ("special tokens",)),
        ("<|im_start|>assistant\ndog, frisbee, grass", ("special tokens",)),
        ("dog, frisbee, grass, etc", ("and more",)),
        ("dog, frisbee, grass etc.", ("and more",)),
        ("dog, frisbee, grass, and more.", ("and more",)),
        ("dog, frisbee, grass and other things", ("and more",)),
        ("dog. frisbee. grass.", ("full stop", "full stops")),
        ("dog, frisbee, grass, none", ()),
        ("Objects: dog, frisbee, grass", ("lead-in",)),
        ("Objects\n\n- dog\n- frisbee\n- grass", ("lead-in", "bullets", "one a line")),
        (
            "The caption contains the following objects:\n\n1. dog\n2. frisbee\n3. grass",
            ("lead-in", "numbering", "one a line"),
        ),
        ("Based on the caption, the objects are: dog, frisbee, grass", ("lead-in",)),
        ("In the image: dog, frisbee, grass", ("lead-in",)),
        ("Based on the caption, dog, frisbee, grass", ("lead-in",)),
        ("Here's the list: dog, frisbee, grass", ("lead-in",)),
        ("Item 1: dog\nItem 2: frisbee\nItem 3: grass", ("lead-in", "numbering", "one a line")),
        ("In the image, there are dog, frisbee, grass", ("lead-in",)),
        ("The image contains the following objects: dog, frisbee, grass", ("lead-in",)),
        ("The following objects are in the caption: dog, frisbee, grass", ("lead-in",)),
        ("The objects contained in the caption are dog, frisbee, grass", ("lead-in",)),
        ("Sure! Here are the objects in the image:\n\ndog, frisbee, grass", ("lead-in",)),
        ("dog, frisbee, dog, grass", ("duplicates",)),
    ],
)
def test_what_a_rule_can_set_right_is_set_right_and_named(text, repairs):
    checked = objects(text)
    assert checked.value == ["dog", "frisbee", "grass"]
    assert checked.repairs == repairs


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", object_answers.EMPTY),
        ("  \n", object_answers.EMPTY),
        ("None.", object_answers.EMPTY),
        ("no objects mentioned", object_answers.EMPTY),
        ("No specific objects", object_answers.EMPTY),
        ("None mentioned", object_answers.EMPTY),
        ("There are no objects in the caption.", object_answers.EMPTY),
        ("It does not mention objects", object_answers.EMPTY),
        ("The caption doesn't mention any objects.", object_answers.EMPTY),
        ("<|im_end|>", object_answers.EMPTY),
        ("[]", object_answers.EMPTY),
        ('{"objects": []}', object_answers.EMPTY),
        ('{"objects": ["dog", "frisbee"', object_answers.SENTENCE),
        ('{"objects": ["dog", "frisbee",]}', object_answers.SENTENCE),
        ('{"objects":\n  ["dog", "frisbee",]}', object_answers.SENTENCE),
        ("A dog runs fast. Grass grows.", object_answers.SENTENCE),
        (CAPTION, object_answers.ECHO),
        ("a dog plays with a frisbee on the grass near two children", object_answers.ECHO),
        ("dog plays with a frisbee", object_answers.ECHO),
        ("dog, a frisbee on the grass near, child", object_answers.ECHO),
        ("Please directly indicate the objects contained in it, separated by commas.", object_answers.PROMPT_ECHO),
        ("I'm sorry, but I cannot see the image.", object_answers.REFUSAL),
        ("As an AI language model, I can't view images.", object_answers.REFUSAL),
        ("Please provide the caption.", object_answers.REFUSAL),
        ("dog, frisbee, " * 8, object_answers.LOOP),
        ("the dog and the dog and the dog and the dog and the dog", object_answers.LOOP),
        ("The dog is happily playing. It is a sunny day.", object_answers.SENTENCE),
        ("a very happy and playful dog that runs", object_answers.SENTENCE),
        ("dog, frisbee\n\nExplanation: the caption mentions these", object_answers.SENTENCE),
        (", ".join("abcdefghijklmnopqrstuvwxyz"), object_answers.TOO_MANY),
    ],
)
def test_a_bad_list_is_refused_with_its_reason(text, reason):
    checked = objects(text)
    assert (checked.value, checked.reason) == (None, reason)


def test_brackets_without_end_stop_nothing():
    assert objects('["dog", ' + "[" * 3000).value == ["dog"]


def test_an_answer_that_did_not_end_by_itself_is_bad():
    assert objects("dog, frisbee, gra", finish_reason="length").reason == object_answers.LENGTH
    assert objects("dog", finish_reason="content_filter").reason == object_answers.FINISH
    assert objects("", finish_reason="error", error="too long").reason == object_answers.ERROR


def test_a_loop_that_met_the_limit_is_counted_as_a_loop():
    assert objects("dog, " * 60, finish_reason="length").reason == object_answers.LOOP


def test_a_caption_that_is_a_list_is_its_own_right_answer():
    assert objects("sofa, cat, computer", caption="sofa, cat, computer").value == ["sofa", "cat", "computer"]
    assert objects("Cat.", caption="A cat.").value == ["Cat"]


@pytest.mark.parametrize(
    ("caption", "text", "expected"),
    [
        ("Route 66 sign", "Route 66, sign", ["Route 66", "sign"]),
        ("Table, chairs, big red umbrella", "Table, chairs, big red umbrella", ["Table", "chairs", "big red umbrella"]),
        ("A dog runs", "A dog\nruns", ["A dog", "runs"]),
        ("A dog runs", "A dog runs", None),
        ("A dog runs, while the children play", "A dog runs, while the children play", None),
    ],
)
def test_a_caption_cut_into_names_is_no_echo(caption, text, expected):
    checked = objects(text, caption)
    assert (checked.value, checked.reason) == (expected, "" if expected else object_answers.ECHO)


def test_a_caption_without_spaces_has_room_for_objects_but_not_for_any_number():
    many = "狗, 飞盘, 草地, 孩子, 树, 天空"
    assert objects(many, caption="一只狗和两个孩子在草地上玩飞盘").value == many.split(", ")
    assert objects(many, caption="狗").reason == object_answers.TOO_MANY


# --- names become objects


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"objects": ["dog", "frisbee"]}', ["dog", "frisbee"]),
        ("The caption contains the following objects:\n\n1. Dog\n2. Frisbee\n3. Children", ["dog", "frisbee", "child"]),
        ("The caption describes a dog, a frisbee, and grass.", ["dog", "frisbee", "grass"]),
        ("Dog. Frisbee. Grass.", ["dog", "frisbee", "grass"]),
        ("St. Bernard dog, snow", ["st bernard dog", "snow"]),
        ("Mt. Fuji, lake", ["mt fuji", "lake"]),
        ("list box, items shelf, wall", ["list box", "items shelf", "wall"]),
        ("no parking sign, street", ["parking sign", "street"]),
    ],
)
def test_an_answer_becomes_objects(parser, text, expected):
    assert parser.objects([objects(text).value]) == [expected]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a dog", "Dogs", "two dogs"], ["dog"]),
        (["teddy bears", "Wine glasses"], ["teddy bear", "wine glass"]),
        (["train", "fork", "orange", "remote", "fire hydrant"], ["train", "fork", "orange", "remote", "fire hydrant"]),
        (["red car", "the old man"], ["car", "man"]),
        (["photo", "12", "x", "a background", ""], []),
        (["man riding a horse", "dog and frisbee"], ["man", "horse", "dog", "frisbee"]),
    ],
)
def test_names_become_the_objects_that_a_caption_of_them_has(parser, names, expected):
    assert parser.objects([names]) == [expected]


def test_names_follow_the_settings_of_the_parser_by_part_of_speech():
    apart = NameParser(PosConfig(compound=False, stop_words=("dog",)))
    assert apart.objects([["teddy bear", "dog", "photo"]]) == [["teddy", "bear", "photo"]]


def test_objects_do_not_depend_on_the_other_names(parser):
    names = ["a dog", "wine glasses", "train", "green", "stop sign"]
    together = parser.objects([[name] for name in names])
    fresh = NameParser()
    assert [fresh.objects([[name]])[0] for name in reversed(names)][::-1] == together


def test_an_object_is_mentioned_in_singular_plural_or_as_part_of_a_word(parser):
    caption = "Two young children ride a snow board past sunflowers and geese"
    said = ["child", "snowboard", "snow board", "flower", "goose"]
    assert parser.unmentioned(caption, [*said, "sports car", "dog", "car"]) == ["sports car", "dog", "car"]


WORDNET = """  1 This is a licence.
02958343 06 n 05 car 0 auto 0 automobile 0 machine 6 motorcar 0 003 @ 03791235 n 0000 | a motor vehicle with four wheels
04379243 06 n 01 table 1 001 @ 00001740 n 0000 | a piece of furniture
03623556 06 n 02 knife 0 table_knife 0 001 @ 00001740 n 0000 | edge tool
"""


def test_a_synonym_counts_as_mentioned_where_wordnet_is_at_hand(tmp_path):
    (tmp_path / "data.noun").write_text(WORDNET)
    knowing = NameParser(synonyms=Synonyms(tmp_path))
    caption = "two automobiles and a table knife"
    assert knowing.unmentioned(caption, ["car", "knife", "lorry"]) == ["lorry"]
    assert NameParser().unmentioned(caption, ["car", "lorry"]) == ["car", "lorry"]


def test_a_folder_without_wordnet_says_where_it_comes_from(tmp_path):
    with pytest.raises(InputError, match=r"found none; name the folder that has it .*wordnet-base"):
        Synonyms(tmp_path)


# --- descriptions


@pytest.mark.parametrize(
    ("text", "expected", "repairs"),
    [
        ("A teapot is a round pot.", "A teapot is a round pot.", ()),
        ('"A teapot is a round pot."', "A teapot is a round pot.", ("quotes",)),
        ("A **teapot** is a round\npot.", "A teapot is a round pot.", ("markdown",)),
        ("Sure! Here is a brief description: A teapot is a round pot.", "A teapot is a round pot.", ("lead-in",)),
        (
            "A teapot is a round pot.\n\nLet me know if you need more!",
            "A teapot is a round pot.",
            ("closing words",),
        ),
        ("A teapot is a round pot.<|im_end|>", "A teapot is a round pot.", ("special tokens",)),
        ("1. A teapot is round\n2. It has a spout", "A teapot is round; It has a spout", ("list",)),
    ],
)
def test_a_description_is_made_one_plain_paragraph(text, expected, repairs):
    checked = description(text)
    assert (checked.value, checked.repairs, checked.flags) == (expected, repairs, ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", description_answers.EMPTY),
        ("teapot", description_answers.SHORT),
        ("I'm sorry, but I can't help with that.", description_answers.REFUSAL),
        ("Please briefly introduce the appearance of teapot in ordinary language", description_answers.PROMPT_ECHO),
        ("As an AI, I have not seen it.", description_answers.REFUSAL),
        ("I'm currently unable to describe a teapot.", description_answers.REFUSAL),
        ("Unable to see the teapot.", description_answers.REFUSAL),
        ("<|im_end|>", description_answers.EMPTY),
        ("It is good to be alive, and we love this day.", description_answers.OFF_TOPIC),
        ("a teapot is a teapot is a teapot is a teapot is", description_answers.LOOP),
        (" ".join(f"teapot{number}" for number in range(200)), description_answers.LONG),
    ],
)
def test_a_bad_description_is_refused_with_its_reason(text, reason):
    checked = description(text)
    assert (checked.value, checked.reason) == (None, reason)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plane", "A plane, also known as an airplane, has two wings."),
        ("cane", "A cane is a long stick, used as an aid when walking."),
        ("wall", "A wall may have a pattern such as a textured surface."),
        ("plant", "A plant such as an artificial one is green."),
        ("robot", "A robot, also known as an AI machine, is made of metal."),
        ("blindfold", "A blindfold covers the eyes so that the wearer is unable to see."),
        ("stork", "A stork is a white bird that looks like a heron, with a red beak."),
    ],
)
def test_words_of_a_refusal_or_an_example_do_not_make_one(name, text):
    checked = description(text, name)
    assert (checked.value, checked.flags) == (text, ())


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("stork", "A stork is a white bird that looks like a heron, with a red beak.", ""),
        ("heron", "Herons are tall grey birds with long thin legs.", ""),
        ("dog", "A dog is a tall grey bird with long thin legs.", description_answers.EXAMPLE),
        ("dog", "Herons are big, but the dog is small.", description_answers.EXAMPLE),
        ("dog", "A long, thin neck that is often used to describe a heron.", description_answers.EXAMPLE),
    ],
)
def test_after_examples_an_answer_about_one_of_them_is_bad(name, text, reason):
    assert second_description(text, name).reason == reason


@pytest.mark.parametrize(
    ("name", "text", "is_named"),
    [
        ("foot", "Feet have five toes and soft skin.", True),
        ("goose", "Geese are large birds with long necks.", True),
        ("city", "Cities have tall buildings.", True),
        ("knife", "Knives are sharp and long.", True),
        ("dog", "The dog's fur is brown.", True),
        ("polar bear", "These bears are large and white.", True),
        ("sea shore", "A seashore is flat and wide.", True),
        ("city", "A citizen wears a hat.", False),
        ("city", "Electricity comes from a metal box.", False),
        ("car", "A card is a flat piece of paper.", False),
    ],
)
def test_a_class_is_named_by_whole_words_in_the_singular_or_plural(name, text, is_named):
    assert description(text, name).flags == (() if is_named else (description_answers.UNNAMED,))


def test_a_description_that_met_the_limit_is_cut_at_its_last_full_sentence_or_bad():
    cut_off = description("A teapot is a round pot. It has a lid! And a sp", finish_reason="length")
    assert (cut_off.value, cut_off.flags) == ("A teapot is a round pot. It has a lid!", (description_answers.CUT,))
    assert description("A teapot is a round p", finish_reason="length").reason == description_answers.LENGTH


def test_a_description_that_only_names_or_only_describes_is_kept_with_a_flag():
    assert description("They are small and round, with a handle.").flags == (description_answers.UNNAMED,)
    assert description("A teapot is what people take tea from.").flags == (description_answers.NO_LOOKS,)


# --- questions


def test_the_prompts_are_the_paper_s_word_by_word():
    (objects_first,) = OBJECTS_FIRST.messages("a dog")
    assert objects_first == {
        "role": "user",
        "content": "The following is a caption for an image. Please directly indicate the objects contained in it, "
        "separated by commas.\na dog",
    }
    (description_first,) = DESCRIPTION_FIRST.messages("polar bear")
    expected = "Please briefly introduce the appearance of polar bear in ordinary language"
    assert description_first == {"role": "user", "content": expected}


@pytest.mark.parametrize("question", [OBJECTS_SECOND, DESCRIPTION_SECOND])
def test_the_second_question_shows_two_examples_whose_answers_pass_the_check(question):
    roles = [message["role"] for message in question.messages("a dog")]
    assert roles == ["user", "assistant"] * 2 + ["user"]
    for text, good in question.examples:
        check = object_answers.check if question is OBJECTS_SECOND else description_answers.check
        checked = check(text, answered(good))
        assert (checked.reason, checked.repairs, checked.flags) == ("", (), ())


@pytest.mark.parametrize("text", ["dog " * 5000, "犬" * 5000, "a" * 5000, "é " * 900])
@pytest.mark.parametrize("question", [OBJECTS_FIRST, OBJECTS_SECOND])
def test_a_long_caption_is_cut_so_that_everything_fits_however_few_bytes_a_token_has(text, question):
    room = question.room(max_model_len=2048, max_tokens=128)
    messages = question.messages(cut(text, room))
    used = sum(len(message["content"].encode()) for message in messages)
    assert used <= 2048 - 128
    assert cut(text, room)
    assert cut(cut(text, room), room) == cut(text, room)


def test_a_model_that_is_too_short_for_the_question_is_refused_with_the_length_that_does():
    with pytest.raises(InputError, match="found --max-model-len 256; give at least") as error:
        OBJECTS_FIRST.room(max_model_len=256, max_tokens=128)
    enough = int(str(error.value).rsplit(" ", 1)[1])
    assert OBJECTS_FIRST.room(max_model_len=enough, max_tokens=128) == 64


def test_ids_are_of_question_and_text():
    ids = {request_id(question, text) for question in (OBJECTS_FIRST, OBJECTS_SECOND) for text in ("a dog", "a cat")}
    assert len(ids) == 4
    assert all(len(each) == 16 and int(each, 16) < 2**64 for each in ids)
    assert request_id(OBJECTS_FIRST, "a dog") == request_id(OBJECTS_FIRST, "a dog")


def test_accounts_add_up_and_survive_json():
    one, other = Account(asked=3, objects=5), Account(asked=4, unsaid=1)
    one.first_bad["loop"] += 2
    other.first_bad.update({"loop": 1, "empty": 1})
    one.add(other)
    assert Account.from_dict(one.to_dict()) == one
    assert (one.asked, one.objects, one.unsaid, one.first_bad["loop"]) == (7, 5, 1, 3)
    assert one.rows() == [("first answer bad", "loop", 3), ("first answer bad", "empty", 1)]
