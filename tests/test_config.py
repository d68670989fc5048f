"""Commands from dataclasses: recipes, flags, YAML files, and what a wrong one says."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from pretrain.config import RECIPES, PretrainConfig
from setclip import config as configuration
from setclip.config import command, parse, parse_recipe, save
from setclip.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    """Learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    warmup_steps: int = 100


@dataclass(frozen=True, kw_only=True)
class Config:
    out: Path | None = None
    names: tuple[str, ...] = ("a", "b")
    compile: bool = True
    precision: Literal["bf16", "fp32"] = "fp32"
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self) -> None:
        if self.optim.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, found {self.optim.warmup_steps}")


def small() -> Config:
    """A recipe."""
    return Config(optim=Optim(lr=5e-4))


def written(folder: Path, text: str) -> str:
    path = folder / "values.yaml"
    path.write_text(text)
    return str(path)


def exit_message(capsys, args: list[str]) -> str:
    """Returns what a call that must fail prints to standard error, in one line without the box's drawing."""
    with pytest.raises(SystemExit) as stopped:
        parse(Config, args)
    assert stopped.value.code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


# --- recipes


def test_a_recipe_gives_the_defaults_of_the_flags():
    assert parse_recipe({"small": small}, ["small", "--optim.warmup-steps", "7"]) == (
        "small",
        Config(optim=Optim(lr=5e-4, warmup_steps=7)),
    )


def test_an_unknown_recipe_names_the_nearest_one():
    with pytest.raises(InputError, match=r"unknown recipe 'smal', perhaps 'small'; known: large, small"):
        parse_recipe({"small": small, "large": small}, ["smal"])


def test_a_flag_in_the_place_of_the_recipe_is_refused():
    with pytest.raises(InputError, match=r"expected a recipe first, found '--optim.lr'; known: small"):
        parse_recipe({"small": small}, ["--optim.lr", "1"])


def test_without_arguments_the_recipes_are_listed(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_recipe({"small": small, "large": small}, [], "Trains.")
    assert stopped.value.code == 2
    assert "recipes: small, large" in capsys.readouterr().out


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_of_pretraining_can_be_built(name):
    assert parse_recipe(RECIPES, [name])[1] == RECIPES[name]()


# --- flags


def test_booleans_take_true_and_false():
    assert parse(Config, ["--compile", "False"]).compile is False
    assert parse(Config(compile=False), ["--compile", "True"]).compile is True


def test_a_bare_boolean_flag_means_true():
    assert parse(Config(compile=False), ["--compile"]) == Config()
    assert parse(Config(compile=False), ["--compile", "--optim.lr", "1"]) == Config(optim=Optim(lr=1.0))


def test_an_unknown_flag_exits_with_2_and_names_the_nearest(capsys):
    message = exit_message(capsys, ["--optim.lrr", "1"])
    assert "--optim.lrr" in message
    assert "Perhaps you meant" in message
    assert "--optim.lr" in message.partition("Perhaps you meant")[2]


def test_a_value_that_is_no_choice_lists_the_choices(capsys):
    message = exit_message(capsys, ["--precision", "fp16"])
    assert "bf16" in message
    assert "fp32" in message


def test_a_rule_across_fields_is_shown_with_its_values(capsys):
    assert "warmup_steps must not be negative, found -1" in exit_message(capsys, ["--optim.warmup-steps", "-1"])


# --- files


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = written(tmp_path, "optim: {lr: 3e-4, warmup_steps: 5}\ncompile: false\nnames: [x, y, z]\n")
    for args in (["--config", path, "--optim.warmup-steps", "9"], ["--optim.warmup-steps", "9", f"--config={path}"]):
        found = parse(Config, args)
        # 3e-4 without a dot is a string to YAML; as a flag it is a number.
        assert found == Config(compile=False, names=("x", "y", "z"), optim=Optim(lr=3e-4, warmup_steps=9))


def test_the_last_of_equal_flags_wins():
    assert parse(Config, ["--optim.lr", "1", "--optim.lr", "2"]).optim.lr == 2


def test_a_saved_config_is_read_back_equal(tmp_path):
    config = Config(out=Path("runs/a b"), names=("one",), compile=False, precision="bf16", optim=Optim(lr=1e-7))
    save(tmp_path / "saved.yaml", config)
    assert parse(Config, ["--config", str(tmp_path / "saved.yaml")]) == config


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_recipe_of_pretraining_is_read_back_equal(tmp_path, name):
    save(tmp_path / "saved.yaml", RECIPES[name]())
    assert parse(PretrainConfig, ["--config", str(tmp_path / "saved.yaml")]) == RECIPES[name]()


def test_a_wrong_key_in_a_file_is_told_like_a_wrong_flag(tmp_path, capsys):
    message = exit_message(capsys, ["--config", written(tmp_path, "optim: {lrr: 1}\n")])
    assert "--optim.lrr" in message
    assert "Perhaps you meant" in message


@pytest.mark.parametrize(
    ("text", "found"),
    [("- a\n- b\n", "expected a mapping of sections to values, found list"), ("a: [1\n", "expected YAML, found")],
)
def test_a_file_of_another_form_is_refused(tmp_path, text, found):
    with pytest.raises(InputError, match=found):
        parse(Config, ["--config", written(tmp_path, text)])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"expected a YAML file at .*none\.yaml, found none"):
        parse(Config, ["--config", str(tmp_path / "none.yaml")])
    with pytest.raises(InputError, match="expected a YAML file after --config, found nothing"):
        parse(Config, ["--config"])


# --- commands


def refuse() -> None:
    raise InputError("expected a dog, found a cat; choose another")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_an_input_error_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.delenv("SETCLIP_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        command(refuse)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err == "error: expected a dog, found a cat; choose another\n"
    assert printed.out == ""


def test_the_traceback_of_an_input_error_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("SETCLIP_TRACEBACK", "1")
    with pytest.raises(InputError, match="found a cat"):
        command(refuse)


def test_an_interrupted_command_ends_without_traceback(capsys):
    with pytest.raises(SystemExit) as stopped:
        command(interrupt)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        command(lambda: print(1 // 0))


def test_paths_and_tuples_become_plain_values():
    assert configuration.to_dict(Config(out=Path("a")))["out"] == "a"
    assert configuration.to_dict(Config())["optim"]["betas"] == [0.9, 0.98]
