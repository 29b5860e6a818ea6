"""Help pages: complete sentences in 80 columns, shown quickly, with examples that can be run."""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_flax.cli import VERBS, build_parser, eval_flags, main
from resnet_flax.config import load_config
from resnet_flax.data.transforms import FILTERS
from resnet_flax.evaluation.multi_view import PROTOCOLS, SCALES
from resnet_flax.models import VARIANTS
from resnet_flax.models.registry import ATTRIBUTES
from resnet_flax.paper.targets import find
from resnet_flax.schema import NETWORK_FIELDS, SCHEMA
from resnet_flax.weights.catalog import CATALOG

ROOT = Path(__file__).parents[2]
ACTIONS = {"data": ("check", "prepare"), "reproduce": ("list", "run", "show")}


def _parsers(parser=None):
    """All parsers, the outermost first."""
    parser = parser or build_parser()
    found = [parser]
    for action in parser._actions:
        if action.nargs == argparse.PARSER:
            for inner in action.choices.values():
                found += _parsers(inner)
    return found


PARSERS = {parser.prog.removeprefix("resnet-flax").strip(): parser for parser in _parsers()}
PAGES = list(PARSERS)


def test_every_verb_and_action_has_a_page():
    actions = [f"{verb} {action}" for verb, known in ACTIONS.items() for action in known]
    assert sorted(PAGES) == sorted(["", *VERBS, *actions])


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_80_columns(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*page.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: {' '.join(['resnet-flax', *page.split()])} ")
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""


def _is_sentence(text):
    return text[:1].isupper() and text.endswith(".")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_consists_of_sentences(page):
    parser = PARSERS[page]
    assert _is_sentence(parser.description)
    for group in parser._action_groups:
        assert group.description is None or _is_sentence(group.description)
    for action in parser._actions:
        if action.nargs == argparse.PARSER:
            for verb in action._get_subactions():
                assert _is_sentence(verb.help), verb
        else:
            assert _is_sentence(action.help), action


def test_config_keys_are_explained_in_sentences():
    for key, entry in SCHEMA.items():
        assert _is_sentence(entry.meaning), key


@pytest.mark.parametrize("page", PAGES)
def test_defaults_are_named(page):
    for action in PARSERS[page]._actions:
        switch = action.nargs in (0, argparse.PARSER) or action.required
        if switch or isinstance(action, argparse._AppendAction) or "default" in action.help:
            continue
        # Flags without a default.
        needed = {"--coordinator", "--num_processes", "--process_id", "--weights", "--model"}
        own = {f"--{name}" for name in eval_flags.PREPROCESSING}
        assert {*action.option_strings} <= needed | own, action


@pytest.mark.parametrize("page", PAGES)
def test_examples_can_be_parsed(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = PARSERS[page]
    title, *examples = (parser.epilog % {"prog": parser.prog}).splitlines()
    assert title == ("example:" if len(examples) == 1 else "examples:")
    for example in examples:
        program, *arguments = shlex.split(example)
        assert program == "resnet-flax"
        assert callable(build_parser().parse(arguments).run)


def test_examples_name_what_there_is(capsys, data_dir):
    for parser in PARSERS.values():
        for example in (parser.epilog % {"prog": parser.prog}).splitlines()[1:]:
            arguments = build_parser().parse(shlex.split(example)[1:])
            if hasattr(arguments, "config"):
                load_config(arguments.config)
            if hasattr(arguments, "target"):
                rows = {row.name for row in find(arguments.target).rows}
                assert {*filter(None, getattr(arguments, "only", "").split(","))} <= rows
            if hasattr(arguments, "name"):
                assert arguments.name in VARIANTS
            if hasattr(arguments, "model_name") and not arguments.model_name.startswith("runs/"):
                assert arguments.model_name in {*CATALOG, *VARIANTS}
    assert main(["summary", "resnet18", "--axes=shortcut=C stem=deep", "--size=160"]) == 0
    assert main(["data", "check", "tfds:digits", f"--data_dir={data_dir}"]) == 0
    assert main(["reproduce", "show", "degradation_digits"]) == 0
    assert main(["train", "--config.optim.learning_rate=0.05", "--print_config"]) == 0


def test_what_names_a_network_is_the_same_for_every_verb():
    flags = {
        page: {flag for action in parser._actions for flag in action.option_strings}
        for page, parser in PARSERS.items()
        if any(action.dest in ("model_name", "name") for action in parser._actions)
    }
    assert sorted(flags) == ["eval", "export", "summary"]
    assert all("--overrides" in known for known in flags.values())
    assert all({"--weights", "--model"} <= flags[verb] for verb in ("eval", "export"))


def test_choices_are_those_of_the_tables():
    assert tuple(PROTOCOLS) == eval_flags.PROTOCOLS
    assert tuple(FILTERS) == eval_flags.INTERPOLATIONS
    (scales,) = (a for a in PARSERS["eval"]._actions if a.dest == "scales")
    assert ",".join(map(str, SCALES)) in scales.help


def test_pages_name_their_actions_and_the_keys(capsys):
    for verb, actions in ACTIONS.items():
        assert main([verb, "--help"]) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {action} " in out for action in actions)
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in VERBS)
    for verb in ("train", "sweep"):
        assert main([verb, "--help"]) == 0
        out = capsys.readouterr().out
        assert "  optim.weight_decay = 0.0001\n      Weight decay" in out
        assert "with the values they have if the config file does not set them\n" in out
        assert "runs/FILE_VARIANT" in out or "runs/sweep/FILE_VARIANT" in out
        assert "Lists take commas (256,480), switches true or false." in " ".join(out.split())


def test_files_that_are_written_say_that_their_directory_is_created():
    kinds = [
        action
        for parser in PARSERS.values()
        for action in parser._actions
        if (action.metavar or "").startswith("FILE.")
        if action.type is not None and "output_file" in action.type.__qualname__
    ]
    assert len(kinds) == 7  # eval's two, export's, sweep's, and reproduce's three
    assert all("its directory is created if needed" in action.help for action in kinds)


def test_the_fields_of_networks_are_all_listed():
    decided = {"num_classes", "dtype", "param_dtype", "scan", "remat"}
    assert set(NETWORK_FIELDS) == set(ATTRIBUTES) - decided - {"ghost_batches", "norm_momentum"}
    (flag,) = (a for a in PARSERS["summary"]._actions if a.dest == "overrides")
    assert all(f" {field}" in flag.help for field in NETWORK_FIELDS)


def test_pages_import_no_jax():
    code = f"""
import sys
from resnet_flax.cli import main
for page in {PAGES}:
    assert main([*page.split(), "--help"]) == 0, page
    slow = {{"jax", "flax", "numpy", "PIL", "rich"}} & {{*sys.modules}}
    assert not slow, (page, slow)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def test_train_py_has_its_own_name(capfd):
    for flags, status in (["--help"], 0), (["--workdir"], 2):
        assert subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT).returncode == status
    out, err = capfd.readouterr()
    assert out.startswith("usage: python train.py [-h]")
    assert "\n  python train.py --workdir=" in out
    assert err == "error: --workdir needs a value; see python train.py --help\n"
