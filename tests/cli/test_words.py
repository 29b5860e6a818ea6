"""Errors name the flags and keys that the verb has in which they are told."""

import argparse
import ast
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from photographs import make_folder

import resnet_flax
from resnet_flax.cli import VERBS, build_parser, main
from resnet_flax.cli.words import ENSEMBLE, WORDS, told
from resnet_flax.errors import SettingError

PACKAGE = Path(resnet_flax.__file__).parent
FLAG = re.compile(r"--[a-z_]+\b(?!\.py)")
KEY = re.compile(r"(?<![\w.])(?:data|model|optim|eval|mesh|checkpoint|log)\.[a-z_]{3,}")

# The verbs that can reach the errors of a package or module. All have the flags named there.
REACHED_BY = {
    "training": ("train", "sweep", "reproduce"),
    "config.py": ("train", "sweep", "reproduce"),
    "runtime/storage/lock.py": ("train", "sweep", "reproduce"),
    "runtime/distributed.py": ("train", "eval"),
    "evaluation": ("eval",),
    "data/preprocessing.py": ("eval",),
    "paper": ("reproduce",),
}
# Errors which name config keys, and which only runs with a config reach.
OF_RUNS = (
    *("data/in_memory.py", "data/readers.py", "data/sources/parts.py"),
    "models/resnet.py",
)


def _flags(verb):
    """The flags of a verb and its actions."""

    def of(parser):
        found = {flag for action in parser._actions for flag in action.option_strings}
        for action in parser._actions:
            if action.nargs == argparse.PARSER:
                for inner in action.choices.values():
                    found |= of(inner)
        return found

    (verbs,) = (a for a in build_parser()._actions if a.nargs == argparse.PARSER)
    return of(verbs.choices[verb])


# `--config.KEY`, which one of them has without `--config`, is found as that.
FLAGS = {verb: {flag.partition(".")[0] for flag in _flags(verb)} for verb in VERBS}


def _errors(name):
    """Where errors are raised: the module, and the strings in their arguments."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == name:
                texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                yield file.relative_to(PACKAGE).as_posix(), [t for t in texts if type(t) is str]


def test_the_words_of_a_verb_name_its_flags():
    assert WORDS.keys() == VERBS.keys()
    for verb, words in WORDS.items():
        for text in words.values():
            assert {*FLAG.findall(text)} <= FLAGS[verb], (verb, text)
            assert not KEY.findall(re.sub(r"--config\.\S+", "", text)), (verb, text)
    assert {*FLAG.findall(" ".join(ENSEMBLE.values()))} <= FLAGS["eval"] | FLAGS["export"]
    settings = {text for _, texts in _errors("SettingError") for text in texts}
    assert {setting for words in WORDS.values() for setting in words} <= settings


def test_no_other_error_names_a_flag_or_a_key_that_the_verb_may_lack():
    for module, texts in _errors("UserError"):
        text = " ".join(texts)
        package = module.partition("/")[0]
        verbs = REACHED_BY.get(module, REACHED_BY.get(package))
        if "--workdir" in text and module == "runtime/distributed.py":
            verbs = ("train",)  # the only one of several processes that writes a workdir
        if package != "cli":
            for flag in FLAG.findall(re.sub("resnet-flax [a-z]+ --[a-z]+", "", text)):
                assert verbs, (module, text)
                assert all(flag in FLAGS[verb] for verb in verbs), (module, text)
        if package in ("data", "evaluation", "models", "runtime", "weights"):
            assert module in OF_RUNS or not KEY.findall(text), (module, text)


def test_an_error_survives_a_reader_process():
    error = SettingError("too much;", "data.size", "set data.size")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == "too much; set data.size"
    assert told(again, {"data.size": "pass --size"}) == "too much; pass --size"
    assert str(SettingError("give it as", "data.data_dir")) == "give it as data.data_dir"


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_mixed_sizes_are_told_in_the_words_of_eval(tmp_path, capsys, workers):
    from variables import drawn

    from resnet_flax import create_model
    from resnet_flax.weights.torch_layout import export_torch

    folder = make_folder(tmp_path / "a", train=1, val=1)
    make_folder(tmp_path / "b", train=1, val=1, size=12)
    (tmp_path / "b/val/red/000.png").rename(folder / "val/red/000.png")
    model = create_model("cifar_resnet8", num_classes=3)
    variables = drawn(model, np.zeros((1, 8, 8, 3), np.float32))
    np.savez(tmp_path / "w.npz", **export_torch(variables, model, "akamaster"))
    flags = ["--model=cifar_resnet8", f"--data=folder:{folder}", "--mean=0.5", "--std=0.5"]
    command = ["eval", str(tmp_path / "w.npz"), *flags, f"--workers={workers}"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "different sizes ((12, 12, 3), (8, 8, 3), ...); pass --size=PIXELS, so that they" in said
    assert "data." not in said
    if not workers:
        assert main([*command, "--size=8"]) == 0


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("data check tfds:cifar100 --data_dir={}", "--data_dir"),
        ("reproduce run table6 --data_dir={}", "--data_dir"),
        (
            "train --workdir={0}/run --config.data.source=tfds:cifar100 --config.data.data_dir={0}",
            "--config.data.data_dir",
        ),
    ],
)
def test_a_directory_of_data_is_named_by_the_flag_of_the_verb(tmp_path, capsys, command, flag):
    assert main(command.format(tmp_path).split()) == 2
    assert f"or give its directory as {flag}\n" in capsys.readouterr().err.replace("; ", "\n")
