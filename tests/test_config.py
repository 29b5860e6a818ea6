import json
import pickle
import sys
from pathlib import Path

import ml_collections
import pytest

from resnet_flax import config as configs
from resnet_flax.apply.tables import check, default_config, keys, override
from resnet_flax.config import conflicts, flatten, load_config
from resnet_flax.errors import UserError

ROOT = Path(__file__).parent.parent
KEYS = keys()


def test_defaults_satisfy_the_schema():
    automatic = {"data.exif": "off", "data.alpha": "drop"}  # of the default source
    expected = {k: entry.default for k, entry in KEYS.items()} | automatic
    assert flatten(check(default_config())) == expected


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.name)
def test_every_config_resolves(file):
    config = check(load_config(str(file)))
    assert set(flatten(config)) == set(KEYS)


def test_a_partial_config_is_completed():
    config = check(ml_collections.ConfigDict({"optim": {"learning_rate": 1}}))
    assert config.optim.learning_rate == 1.0
    assert isinstance(config.optim.learning_rate, float)
    assert config.optim.momentum == 0.9


def test_overrides_take_the_type_of_the_key():
    config = default_config()
    override(
        config,
        ["steps=2e3", "data.mean=0.5,0.4,0.3", "data.std=(2,)", "data.flip=true", "model.name=7"],
    )
    assert config.steps == 2000
    assert isinstance(config.steps, int)
    assert config.data.mean == (0.5, 0.4, 0.3)
    assert config.data.std == (2,)
    assert config.data.flip is True
    assert config.model.name == "7"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.learning_rat=1", "no config key 'optim.learning_rat'; did you mean optim.learning"),
        ("optim=1", "no config key 'optim'"),
        ("steps", "config key steps needs a value"),
        ("steps=many", "config key steps must be a whole number, not 'many'"),
        ("steps=1.5", "config key steps must be a whole number, not 1.5"),
        ("steps=True", "config key steps must be a whole number, not True"),
        ("steps=0", "config key steps must be more than 0 and less than .*, not 0"),
        ("steps=1e30", "config key steps must be more than 0 and less than"),
        ("seed=4294967296", "config key seed must be at least 0 and less than"),
        ("optim.learning_rate=-0.1", "optim.learning_rate must be more than 0, not -0.1"),
        ("optim.learning_rate=1e999", "optim.learning_rate takes finite numbers, not inf"),
        ("optim.momentum=1", "optim.momentum must be at least 0 and less than 1"),
        ("data.flip=perhaps", "data.flip must be true or false, not 'perhaps'"),
        ("data.mean=('a',)", "data.mean must be numbers with commas between them, such as 0.3"),
        ("optim.drop=half", "optim.drop must be a number, not 'half'"),
        ("optim.lr=1", r"no config key 'optim.lr'; did you mean optim.learning_rate\?"),
        ("bs=1", r"no config key 'bs'; did you mean batch_size\?"),
        ("momentum=1", r"no config key 'momentum'; did you mean optim.momentum\?"),
        ("foo=1", "no config key 'foo'; see resnet-flax train --help"),
        ("data.mean=()", "data.mean must be one or more numbers"),
        ("data.std=0", "data.std must be one or more numbers, each more than 0"),
        ("model.dtype=float16", "model.dtype must be one of float32, bfloat16, not 'float16'"),
        (
            "model.bn_group_size=0",
            "model.bn_group_size must be global, device or a number of examples",
        ),
        ("optim.learning_rate=" + "9" * 400, "optim.learning_rate takes finite numbers"),
        ("data.mean=" + "9" * 400, "data.mean takes finite numbers"),
        ("model.bn_group_size=" + "9" * 5000, "model.bn_group_size must be global, device or"),
        ("optim.boundaries=5,5", "optim.boundaries must be whole numbers, each more than"),
        ("optim.boundaries=0.5,", "optim.boundaries must be whole numbers, each more than"),
        ("optim.boundaries=4294967296", "each more than the one before and less than 2**31"),
        ("data.pad=2147483648", "data.pad must be at least 0 and less than 32768"),
        ("data.eval_size=4e9", "data.eval_size must be at least 0 and less than 32768"),
        ("data.early_sizes=40000", "each more than 0 and less than 32768"),
        ("batch_size=2147483648", "batch_size must be less than 2**31, not 2147483648"),
        ("log.every=1e12", "log.every must be less than 2**31, not 1000000000000"),
        ("mesh.data=0", "mesh.data must be a number of devices, or -1"),
        ("data.jitter=480,256", "data.jitter must be two numbers more than 0, the first not more"),
        ("data.crop_area=0.5", "data.crop_area must be two numbers"),
        ("data.crop_fraction=0", "data.crop_fraction must be more than 0 and at most 1"),
        ("data.erase=1.5", "data.erase must be at least 0 and at most 1"),
        ("data.policy=auto", "data.policy must be one of none, randaugment, trivialaugment"),
        ("data.policy_magnitude=31", "data.policy_magnitude must be 0 to 30"),
    ],
)
def test_bad_overrides_are_explained(setting, message):
    def checked():
        config = default_config()
        override(config, [setting])
        return check(config)

    with pytest.raises(UserError, match=message.replace("(", r"\(").replace("**", r"\*\*")):
        checked()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mesh.fsdp=-1"], "only one of mesh.data and mesh.fsdp can be -1"),
        (["model.bn_group_size=48"], "batch_size=128 must be a multiple of model.bn_group_size=48"),
        (["optim.schedule=piecewise"], "piecewise needs optim.boundaries"),
        (["optim.warmup_steps=1000"], "optim.warmup_steps=1000 must be less than steps=1000"),
        (["data.crop=jitter"], "data.crop=jitter needs data.size"),
        (["data.size=224"], "data.size=224 needs data.crop"),
        (
            ["data.crop=jitter", "data.size=300"],
            "early_sizes, 300 at most, are more than",
        ),
        (
            ["data.crop=jitter", "data.size=64", "data.jitter=70.5,80"],
            "data.jitter must be whole numbers",
        ),
        (["data.early_sizes=128,"], "data.early_sizes and data.early_steps need the same number"),
        (
            ["data.resident=True", "data.policy=randaugment"],
            "data.resident needs images of one size that are augmented on the device only",
        ),
        (["steps_per_dispatch=4"], "steps_per_dispatch needs data.resident=True"),
        (["data.pixel_mean=True", "data.mean=0.5"], "data.pixel_mean replaces data.mean, which"),
        (
            ["data.pixel_mean=1", "data.crop=jitter", "data.size=64", "data.eval_size=96"],
            "data.pixel_mean needs images of one size",
        ),
        (["data.eval_split=holdout"], "data.eval_split=holdout needs data.holdout"),
        (["accumulation=3"], "batch_size=128 must be a multiple of accumulation=3$"),
        (
            ["accumulation=32", "model.bn_group_size=8"],
            "batch_size=128 in accumulation=32 parts must give complete groups of .*size=8",
        ),
        (["data.repeats=3"], "batch_size=128 must be a multiple of data.repeats=3"),
    ],
)
def test_what_cannot_go_together(settings, message):
    config = default_config()
    override(config, settings)
    with pytest.raises(UserError, match=message):
        check(config)


def test_unknown_key_in_a_config_file_is_named():
    with pytest.raises(UserError, match=r"no config key 'optim.lr'"):
        check(ml_collections.ConfigDict({"optim": {"lr": 0.1}}))


def test_conflicts_name_the_keys_and_pass_what_is_safe():
    config = check(default_config())
    saved = flatten(config)
    saved["data.mean"] = list(saved["data.mean"])  # as JSON returns it
    assert conflicts(config, saved, KEYS) == {}
    saved |= {"steps": 5, "mesh.data": 3, "optim.momentum": 0.5}
    del saved["optim.nesterov"]  # from before the key existed: its default
    assert conflicts(config, saved, KEYS) == {"optim.momentum": (0.5, 0.9)}


def test_config_files_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/digits_resnet20.py").model.name == "cifar_resnet20"
    assert load_config("digits_resnet20.py").model.name == "cifar_resnet20"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"no config file .*; did you mean|no config file .*known: configs/cifar10"),
        ("x = 1", r"odd.py defines no get_config\(\)"),
        ("def get_config():\n  return {}", "must return an ml_collections.ConfigDict"),
        ("def get_config(:", "cannot be used: SyntaxError"),
        ("import nonesuch", "cannot be used: ModuleNotFoundError"),
        ("import sys; sys.exit('bye')", "cannot be used: SystemExit: bye"),
    ],
)
def test_bad_config_files_are_explained(tmp_path, text, message):
    file = tmp_path / "odd.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(file))


def test_variants_that_a_config_file_does_not_have_are_explained(tmp_path):
    file = tmp_path / "odd.py"
    file.write_text("def get_config(): return 1")
    with pytest.raises(UserError, match=r"odd.py has no variants; leave ':foo' out"):
        load_config(f"{file}:foo")


def test_keys_and_defaults_are_kept():
    """Existing configs and checkpoints depend on them; new keys are added to the file."""
    golden = json.loads((ROOT / "tests" / "goldens" / "config_keys.json").read_text())
    defaults = {key: entry.default for key, entry in KEYS.items()}
    found = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}
    assert found == golden


@pytest.mark.parametrize("given", ["{}/of:day 1/own.py:small", "file://{}/of:day%201/own.py:small"])
def test_a_config_file_may_be_in_any_directory(tmp_path, given):
    (tmp_path / "of:day 1").mkdir()
    (tmp_path / "of:day 1" / "beside_own.py").write_text(
        "from resnet_flax.config import default_config\n"
    )
    (tmp_path / "of:day 1" / "own.py").write_text(
        "def get_config(variant=''):\n"
        "    from beside_own import default_config\n"
        "    config = default_config()\n"
        "    config.steps = len(variant)\n"
        "    return config\n"
    )
    assert load_config(given.format(tmp_path)).steps == 5
    assert configs.config_name(given.format(tmp_path)) == "own_small"
    assert load_config(given.format(tmp_path).removesuffix(":small")).steps == 0


def test_two_configs_import_files_of_one_name_each_from_beside_it(tmp_path):
    for steps in (3, 5):
        beside = tmp_path / str(steps)
        (beside / "family").mkdir(parents=True)
        (beside / "numbers_beside.py").write_text(f"STEPS = {steps}\n")
        (beside / "family" / "__init__.py").write_text("")
        (beside / "family" / "rates.py").write_text(f"RATE = {steps / 10}\n")
        (beside / "own.py").write_text(
            "from numbers_beside import STEPS\n"
            "from resnet_flax.config import default_config\n"
            "def get_config():\n"
            "    from family.rates import RATE\n"
            "    config = default_config()\n"
            "    config.steps, config.optim.learning_rate = STEPS, RATE\n"
            "    return config\n"
        )
    for steps in (3, 5, 3):
        config = load_config(f"{tmp_path}/{steps}/own.py")
        assert (config.steps, config.optim.learning_rate) == (steps, steps / 10)


def test_what_a_config_imported_from_beside_it_can_be_imported_later(tmp_path):
    (tmp_path / "values_beside.py").write_text("class Value: pass\n")
    (tmp_path / "later_beside.py").write_text(
        "import values_beside\n"
        "def value():\n"
        "    import values_beside\n"
        "    return values_beside.Value()\n"
    )
    (tmp_path / "own.py").write_text(
        "import later_beside\n"
        "from ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    return ConfigDict({'value': later_beside.value})\n"
    )
    path = list(sys.path)
    first, again = (load_config(f"{tmp_path}/own.py").value for _ in range(2))
    assert type(first()) is type(again())  # tables may have the first one
    assert type(pickle.loads(pickle.dumps(first()))) is type(first())
    assert sys.path == path
