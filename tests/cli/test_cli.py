"""Bad input at the command line: one sentence, exit code 2, no traceback."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_flax.apply.experiment import train
from resnet_flax.cli import main
from resnet_flax.errors import UserError
from resnet_flax.models import VARIANTS
from resnet_flax.weights.catalog import CATALOG
from resnet_flax.weights.files import read_weights

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no verb 'trian'; did you mean train?"),
        (["train", "stray"], "there is no argument 'stray'"),
        (["train", "--workdri=x"], "there is no flag '--workdri=x'"),
        (["train", "--workdri", "x"], "there is no flag '--workdri'; did you mean --workdir"),
        (
            ["train", "--workdir=gs://bucket/run"],
            "--workdir must be a path: gs:// is not",
        ),
        (["sweep", "--workdir=s3://b/run"], "--workdir must be a path: s3:// is not"),
        (
            ["eval", "gs://bucket/run"],
            "error: gs:// is not supported, in gs://bucket/run; give",
        ),
        (["eval", "x", "--out=gs://b/x.json"], "--out must be a path: gs:// is not supported"),
        (["train", "--workdir"], "--workdir needs a value; see resnet-flax train --help"),
        (["train", "--workdir", "--config.steps=3"], "--workdir needs a value"),
        (["train", "--print_config=yes"], "--print_config takes no value; see"),
        (["--workdir=x", "train"], "the flag --workdir=x must come after resnet-flax train"),
        (["models", "--config.steps=3"], "there is no flag '--config.steps=3'; see"),
        (["reproduce"], "resnet-flax reproduce needs an action: list, run or show; see"),
        (["eval", "x", "--scales=224"], "--scales needs --protocol=multiscale"),
        (["eval", "x", "--exact"], "error: --exact needs --protocol=multiscale"),
        (["eval"], "MODEL must be given; see resnet-flax eval --help"),
        (["summary", "resnet18", "--size=0"], "--size must be a whole number from 1 to"),
        (["train", "--config=configs/nope.py"], "there is no config file configs/nope.py"),
        (["train", "--config.optim.learning_rat=1"], "did you mean optim.learning_rate"),
        (["train", "--config.steps=many"], "config key steps must be a whole number, not 'many'"),
        (["train", "--config.optim.learning_rate=-1"], "must be more than 0, not -1.0"),
        (["train", "--config.steps"], "config key steps needs a value"),
        (["train", "--config.steps", "--print_config"], "config key steps needs a value"),
        (
            ["sweep", "--seeds=1,x"],
            "--seeds must be whole numbers from 0 to 2147483647 separated by commas, such as",
        ),
        (["sweep", "--seeds=0,3,0"], "--seeds names 0 twice"),
        (["sweep", "--config.seed=3"], "use --seeds instead of --config.seed"),
        (["sweep", "--out=b.txt"], "--out must be a file that ends in .json, not 'b.txt'"),
        (["eval", "x", "--out=b.txt"], "--out must be a file that ends in .json, not 'b.txt'"),
        (["eval", "x", "--confusion=b.txt"], "--confusion must be a file that ends in .csv"),
        (
            ["eval", "x", "--config.data.size=8"],
            "'--config.data.size=8'; did you mean --size?",
        ),
        (["eval", "x", "--workdir=y"], "'--workdir=y'; give the workdir itself, as MODEL"),
        (
            ["eval", "folder:x", "y"],
            "MODEL must be a network with weights, not the data set",
        ),
        (
            ["export", "configs/cifar10.py:resnet20", "x.safetensors"],
            "MODEL must be a network with weights, such as the workdir of a run, not a config",
        ),
        (["eval", "x", "folder:y"], "no argument 'folder:y'; did you mean --data=folder:y?"),
        (["eval", "x", "--data=."], "such as tfds:cifar10, not '.'; did you mean folder:.?"),
        (["eval", "ResNet50.TV_in1k"], "published weights; did you mean resnet50.tv_in1k? (resn"),
        (
            ["eval", "x", "--model=resnet50.tv3_in1k"],
            "'resnet50.tv3_in1k'; did you mean resnet50.t",
        ),
        (["train", "x/y.py:z"], "there is no argument 'x/y.py:z'; did you mean --config=x/y.py:z?"),
        (["train", "."], "there is no argument '.'; did you mean --workdir=.?"),
        (["train", "--config=/"], "error: / is a directory, not a config file; a run continues by"),
        (["train", "--data=tfds:x"], "did you mean --config.data.source or --config.mesh.data?"),
        (["train", "--overrides=stem=deep"], "did you mean --config.model.overrides?"),
        (["reproduce", "table6"], "no action 'table6'; it must be list, run or show"),
        (["summary", "/"], "summary needs the name of a network, such as resnet50, not /, a file"),
        (["summary", "resnet50.tv3_in1k"], "'resnet50.tv3_in1k'; did you mean resnet50.tv"),
        (
            ["summary", "resnet18", "--overrides=num_classes=3"],
            "--overrides cannot set num_classes",
        ),
        (
            ["summary", "resnet18", "--overrides=stem deep"],
            "--overrides are written name=value wit",
        ),
        (
            ["summary", "resnet18", "--overrides=stem=deep", "--overrides=stem=cifar"],
            "error: stem is given twice in --overrides",
        ),
        ([], "resnet-flax needs a verb: data, eval, export, models, reproduce, summary, sweep or"),
        (["help", "trian"], "there is no verb 'trian'; did you mean train?"),
        (["train", "--steps=10"], "'--steps=10'; did you mean --config.steps?"),
        (["train", "--momentum=1"], "did you mean --config.optim.momentum?"),
        (["train", "--lr", "1"], "did you mean --config.optim.learning_rate?"),
        (["models", "--steps=10"], "there is no flag '--steps=10'"),
        (["train", "--config.optim.lr=1"], "'optim.lr'; did you mean optim.learning_rate?"),
        (["train", "--config.foo=1"], "key 'foo'; see resnet-flax train --help"),
        (["train", "--config="], "error: --config needs a value"),
        (["train", "--config=:resnet20"], "error: --config needs a value"),
        (["models", "--published", "resnet5O"], "no published weights' name contains 'resnet5O'"),
        (
            ["train", "--config=configs/digits_resnet20.py:foo"],
            "error: configs/digits_resnet20.py has no variants; leave ':foo' out",
        ),
    ],
)
def test_bad_input_is_one_sentence(capsys, arguments, message):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{'optim': 3}", "error: "),
        ("{'optimm': {}}", "there is no config key 'optimm'"),
        ("{1: 2}", "error: "),
        ("{'seed': {'a': 1}}", "there is no config key 'seed.a'"),
    ],
)
def test_a_config_of_an_odd_form_is_one_sentence(tmp_path, capsys, body, message):
    file = tmp_path / "odd.py"
    text = f"import ml_collections as m\ndef get_config(): return m.ConfigDict({body})\n"
    file.write_text(text)
    assert main(["train", f"--config={file}", "--config.optim.momentum=0.5"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_models_and_summary_print_tables(capsys):
    assert main(["models", "cifar_resnet20"]) == 0
    assert "cifar_resnet20            269,722    0.041      20     32" in capsys.readouterr().out
    assert main(["summary", "resnet18", "--size=64", "--classes=5"]) == 0
    out = capsys.readouterr().out
    assert "stage2_block1/shortcut/conv" in out
    assert "18 layers, 11,179,077 parameters" in out
    assert "c5 2x2x512" in out
    assert main(["summary", "resnet18", "--axes=stem=deep stage_sizes=1,1,1,1"]) == 0
    assert "resnet18 stem=deep stage_sizes=1,1,1,1: 12 layers" in capsys.readouterr().out
    assert main(["summary", "resnet19"]) == 2
    assert main(["summary", "resnet18", "--size=16"]) == 2
    assert "smaller than the network's stride" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *VARIANTS,
        "resnet50 --classes=1000000",
        "resnet152d --size=2048 --overrides='norm=group se_ratio=16 output_stride=8'",
        "resnet50 --size=4096 --overrides='width_per_group=1024 stem=deep avg_down=True'",
        "cifar_resnet20 --overrides='stage_sizes=30,30,30 shortcut=C preactivation=True'",
    ],
)
def test_a_summary_is_aligned_in_80_columns(capsys, arguments):
    assert main(["summary", *shlex.split(arguments)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert max(map(len, [head, *lines])) <= 80
    assert head.split("  ")[0] == "layer"
    rows = [line for line in lines if re.match("stem|stage|head", line)]
    ends = {re.match(r"\S+ +\S+ +", row).end() for row in rows}
    assert ends == {head.index("output")}
    assert {len(row) for row in rows} == {len(head)}
    assert {re.match(r"(\S+ +){3}\d+", row).end() for row in rows} == {head.index("times") + 5}


def test_published_weights_are_listed(capsys):
    assert main(["models", "--published"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CATALOG)
    assert max(map(len, [head, *lines])) <= 80
    assert main(["models", "--published", "50_v1.caffe"]) == 0
    (_, line) = capsys.readouterr().out.splitlines()
    assert line.split() == [*("resnet50_v1.caffe_in1k", "1000", "224"), "github.com,", "by", "hand"]


def test_help_is_a_verb_too(capsys):
    for verb in ([], ["train"], ["reproduce", "show"]):
        assert main([*verb, "--help"]) == 0
        page = capsys.readouterr().out
        assert main(["help", *verb]) == 0
        assert capsys.readouterr().out == page


@pytest.mark.parametrize("inside", ["", "/run"])
def test_a_workdir_that_is_a_file_is_told(config, tmp_path, inside):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file, not a directory; give one that can be written"):
        train(config, Path(f"{tmp_path}/file{inside}"))


def test_data_is_checked_and_prepared(capsys, tmp_path):
    assert main(["data", "prepare", "tfds:digits", f"--data_dir={tmp_path}"]) == 0
    assert main(["data", "check", "tfds:digits", f"--data_dir={tmp_path}", "--all"]) == 0
    out = capsys.readouterr().out
    assert "train: 1,437 images, 10 classes (0, 1, 2, 3, 4, ...)" in out
    assert "test: 360 images" in out
    for split, number in (("train", 3), ("val", 1)):
        (tmp_path / "folder" / split / "a").mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (4, 4)).save(tmp_path / "folder" / split / "a" / f"{i}.png")
    (tmp_path / "folder" / "train" / "a" / "3.png").write_bytes(b"no image")
    assert main(["data", "check", f"folder:{tmp_path / 'folder'}", "--all"]) == 2
    out, err = capsys.readouterr()
    assert "val: 1 images, 1 classes (a)" in out
    assert "a/3.png cannot be decoded" in out
    assert err.startswith("error: 1 image of folder:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chek", "tfds:digits"], "there is no action 'chek'; did you mean check?"),
        (["check", "digits"], "SOURCE must be tfds:NAME or folder:DIR, such as tfds:cifar10, not"),
        (["check", "folder:/nowhere"], "/nowhere cannot be read: No such file or directory"),
        (
            ["prepare", "folder:/x"],
            "SOURCE must be tfds:NAME, such as tfds:cifar10, not 'folder:/x'",
        ),
        (["check", "tfds:cifar100"], "prepare it with `resnet-flax data prepare tfds:cifar100`"),
        (["prepare", "tfds:cifa10"], "no data set called 'cifa10'; did you mean cifar10"),
    ],
)
def test_bad_data_arguments_are_one_sentence(capsys, tmp_path, arguments, message):
    assert main(["data", *arguments, f"--data_dir={tmp_path}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_print_config_shows_the_resolved_config_and_stops(capsys):
    flags = ["--print_config", "--config.optim.momentum", "0.8", "--config.data.mean=0.5,"]
    assert main(["train", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "optim.momentum = 0.8" in lines
    assert "data.mean = (0.5,)" in lines
    assert "model.name = 'cifar_resnet20'" in lines


def test_settings_may_stand_anywhere_and_apart_from_their_value(capsys):
    flags = ["--config.data.mean", "-1,2", "--print_config", "--config.seed", "3"]
    assert main(["train", *flags, "--config", "configs/digits_resnet20.py"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "data.mean = (-1, 2)" in lines
    assert "seed = 3" in lines


def test_help_imports_nothing_that_is_slow():
    # What takes time is importing JAX, NumPy and other packages: a help page takes 0.2 s without.
    def imported(program):
        code = f"import sys; {program}; print(*sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True
        )
        return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}

    page = "from resnet_flax.cli import main; main(['train', '--help'])"
    found = imported(page) - imported("pass") - sys.stdlib_module_names
    assert found == {"resnet_flax"}


def _sentence(process):
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


def test_a_workdir_that_cannot_be_written_is_named(command, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    workdir.chmod(0o555)
    wrapper = ()
    if os.geteuid() == 0:  # root ignores permissions unless it drops that capability
        if shutil.which("setpriv") is None:
            pytest.skip("root without setpriv writes everywhere")
        wrapper = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    err = _sentence(command(f"--workdir={workdir}", wrapper=wrapper))
    assert f"cannot write to the workdir {workdir}: Permission denied" in err


@pytest.mark.long
def test_a_full_disk_is_one_sentence(command, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        flags = (f"--workdir={disk / 'run'}", "--config.log.every=1", "--config.steps=200")
        # Too small for a checkpoint, then for the metrics.
        assert "cannot save the checkpoint of step 5" in _sentence(
            command(*flags, "--config.checkpoint.every=5")
        )
        (disk / "filler").write_bytes(b"x" * (shutil.disk_usage(disk).free - 8192))
        assert "No space left on device" in _sentence(command(*flags))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_weights_are_exported(shared_data, tmp_path, capsys):
    weights = str(shared_data / "weights/resnet20-12fca82f.th")
    assert main(["export", weights, str(tmp_path / "w.safetensors")]) == 0
    assert "cifar_resnet20.akamaster_cifar10, in akamaster's names" in capsys.readouterr().out
    ours, theirs = (read_weights(path).arrays for path in (tmp_path / "w.safetensors", weights))
    counters = {name for name in ours if name.endswith("num_batches_tracked")}
    assert ours.keys() - counters == {n for n in theirs if not n.endswith("num_batches_tracked")}
    for name in ours.keys() - counters:
        np.testing.assert_array_equal(ours[name], theirs[name])
    assert main(["export", weights, str(tmp_path / "w.pth")]) == 2
    assert "must be a file that ends in .safetensors, not '" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["export", weights, str(tmp_path / "file" / "x.safetensors")]) == 2
    assert "file that can be written, not '" in capsys.readouterr().err
