"""README and docs/: links lead somewhere, commands and configs are accepted, Python runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_flax.apply.tables import check, keys, override
from resnet_flax.cli import VERBS, build_parser
from resnet_flax.cli.model_flags import overrides_of
from resnet_flax.config import load_config
from resnet_flax.models import VARIANTS, create_model
from resnet_flax.paper.targets import TARGETS
from resnet_flax.weights.catalog import CATALOG

ROOT = Path(__file__).parent.parent
HISTORY = "decisions.md"  # says what was, with the commands of its day
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
CURRENT = [page for page in PAGES if page.name not in (HISTORY, "CHANGELOG.md")]
IDS = {"ids": lambda page: page.name}


def _anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def _commands(page, program):
    """Arguments of the commands in code, in blocks and in lines, that begin with `program`."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in [*lines, *(code.replace("\n", " ") for code in inline)]:
        found = re.match(rf"(?:[A-Z_]+=\S+ |srun )*{program}\s+(.+)", line.strip())
        if found and not re.search(r"\b(VERB|TARGET|MODEL|SOURCE|NAME)\b", found[1]):
            yield shlex.split(found[1], comments=True)


@pytest.mark.parametrize("page", PAGES, **IDS)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+://", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in _anchors(linked), target


@pytest.mark.parametrize("page", CURRENT, **IDS)
def test_files_that_are_named_are_there(page):
    text = page.read_text()
    for path in re.findall(
        r"(?:docs|configs|benchmarks|results|tests|notebooks|resnet_flax)/[\w/.]+\.\w+", text
    ):
        assert "TARGET" in path or (ROOT / path).exists(), path


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", (ROOT / "README.md").read_text()))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 80 for line in lines if not line.startswith(("|", "![")))


@pytest.mark.parametrize("page", CURRENT, **IDS)
def test_commands_are_accepted(page):
    for program in ("resnet-flax", r"python -m resnet_flax", r"python train\.py"):
        for arguments in _commands(page, program):
            if len(arguments) == 1 and arguments[0] in VERBS:
                continue  # in a sentence about the verb
            verb = ["train"] if program.endswith("py") else []
            if arguments[-1] not in ("--help", "--version"):
                _accept(build_parser().parse([*verb, *arguments]))


def _accept(parsed):
    """Checks what a command names: a config and its keys, a network, weights, a target."""
    settings = getattr(parsed, "settings", None) or []
    if getattr(parsed, "config", None):
        config = load_config(parsed.config)
        override(config, settings)
        check(config)
    if hasattr(parsed, "target"):
        rows = {row.name for row in TARGETS[parsed.target].rows}
        assert {*filter(None, (getattr(parsed, "only", "") or "").split(","))} <= rows
    if hasattr(parsed, "overrides"):
        overrides = overrides_of(parsed)
        if hasattr(parsed, "name"):
            create_model(parsed.name, **overrides)
    name = getattr(parsed, "model_name", None)
    if name and not name.startswith("runs/") and name != "ckpt.pth":
        assert name in {*CATALOG, *VARIANTS}


@pytest.mark.parametrize("page", CURRENT, **IDS)
def test_config_keys_are_accepted(page):
    for setting in re.findall(r"--config\.([\w.]+=[^\s`]+)", page.read_text()):
        if "VALUE" not in setting and "model.overrides" not in setting:
            override(load_config("configs/digits_resnet20.py"), [setting.strip('",;)')])


def test_keys_that_may_change_when_a_run_is_resumed_are_listed():
    text = (ROOT / "docs" / "configs.md").read_text()
    listed = re.findall(r"`([\w.]+)`", text.partition("## What may change")[2])
    assert sorted(listed) == sorted(key for key, entry in keys().items() if entry.resume_safe)


@pytest.mark.parametrize("page", CURRENT, **IDS)
def test_targets_of_make_and_scripts_are_there(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for arguments in _commands(page, "make"):
        names = [word for word in arguments if "=" not in word]
        assert names[0] in targets, arguments
    for script, *arguments in _commands(page, r"python(?= benchmarks)"):
        source = (ROOT / script).read_text()
        for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            assert f'"{flag}"' in source or flag.startswith("--config."), (script, flag)


def _blocks():
    for page in CURRENT:
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
        for number, code in enumerate(blocks):
            slow = pytest.mark.long if page.stem in ("models", "training") else ()
            yield pytest.param(code, id=f"{page.stem}-{number}", marks=slow)


@pytest.mark.parametrize("code", list(_blocks()))
def test_python_runs(code, shared_data, tmp_path):
    if "def get_config" in code:
        (tmp_path / "mine.py").write_text(code)
        assert check(load_config(str(tmp_path / "mine.py"))).model.name == "resnet18"
        return
    weights = tmp_path / "weights"
    weights.mkdir()
    name = "cifar_resnet20.akamaster_cifar10"
    shutil.copy(shared_data / "weights/resnet20-12fca82f.th", weights / f"{name}.th")
    (tmp_path / "tfds").mkdir()
    for prepared in (shared_data / "tfds").iterdir():
        (tmp_path / "tfds" / prepared.name).symlink_to(prepared)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "RESNET_FLAX_WEIGHTS": str(weights),
            "TFDS_DATA_DIR": str(tmp_path / "tfds"),
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
