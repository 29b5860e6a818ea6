"""The table of published weights, and how their files are found."""

import dataclasses
import importlib.util
import shutil
import socket
import sys
import types

import pytest

from resnet_flax import VARIANTS
from resnet_flax.errors import UserError
from resnet_flax.weights.catalog import CATALOG, fetch
from resnet_flax.weights.loading import load


def test_every_entry_is_of_a_known_network_and_complete():
    assert {"resnet50.tv_in1k", "resnet50.tv2_in1k", "resnet50.a1_in1k"} <= CATALOG.keys()
    assert {"seresnet50.a1_in1k", "resnext50_32x4d.tv2_in1k"} <= CATALOG.keys()
    for name, published in CATALOG.items():
        assert published.variant in VARIANTS
        assert name.startswith(f"{published.variant}.")
        preprocessing = published.preprocessing
        assert preprocessing.interpolation in ("bilinear", "bicubic")
        assert len(preprocessing.mean) == 3
        assert published.address.startswith("https://")


def test_what_each_asks_of_images():
    def of(name):
        p = CATALOG[name].preprocessing
        return p.size, round(p.size / p.crop_fraction), p.interpolation, p.mean[0]

    # torchvision's ResNet50_Weights.IMAGENET1K_V1 and _V2; timm's a1 at its test size.
    assert of("resnet50.tv_in1k") == (224, 256, "bilinear", 0.485)
    assert of("resnet50.tv2_in1k") == (224, 232, "bilinear", 0.485)
    assert of("resnet50.a1_in1k") == (288, 288, "bicubic", 0.485)
    assert of("resnetv2_50.a1h_in1k") == (288, 288, "bicubic", 0.5)


def test_names_of_the_classes():
    assert CATALOG["cifar_resnet20.akamaster_cifar10"].class_names[3] == "cat"
    names = CATALOG["resnet50.tv_in1k"].class_names
    assert len(names) == 1000
    assert (names[0], names[217]) == ("n01440764", "n02102040")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and nothing downloaded before."""

    def refuse(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setenv("RESNET_FLAX_WEIGHTS", str(tmp_path / "by_hand"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "by_hand"


def test_without_a_network_the_file_to_fetch_and_its_place_are_named(offline):
    with pytest.raises(
        UserError,
        match=r"the weights resnet50.tv_in1k are not on this machine and cannot be downloaded "
        r"\(huggingface.co cannot be reached: .*\); get https://huggingface.co/timm/"
        r"resnet50.tv_in1k/resolve/main/model.safetensors and put it at "
        rf"{offline}/resnet50.tv_in1k.safetensors",
    ):
        fetch("resnet50.tv_in1k")
    with pytest.raises(UserError, match=r"downloaded \(.*github.com/akamaster.*put it at .*10.th$"):
        fetch("cifar_resnet20.akamaster_cifar10")
    with pytest.raises(
        UserError, match=r"have to be downloaded by hand; get .*-50-model.caffemodel"
    ):
        fetch("resnet50_v1.caffe_in1k")
    with pytest.raises(UserError, match=r"no published weights 'resnet50.tv3_in1k'; did you mean"):
        fetch("resnet50.tv3_in1k")


def test_the_hub_is_asked_where_there_is_a_network(offline, monkeypatch, tmp_path):
    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert fetch("resnet18.a1_in1k") == tmp_path / "model.safetensors"
    assert asked == [("timm/resnet18.a1_in1k", "model.safetensors")]


def test_what_the_hub_keeps_is_taken_without_asking(offline, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(tmp_path / "kept"))
    assert fetch("resnet18.a1_in1k") == tmp_path / "kept"


def test_a_file_fetched_by_hand_is_found_and_checked(offline, shared_data):
    offline.mkdir()
    name = "cifar_resnet20.akamaster_cifar10"
    shutil.copy(shared_data / "weights/resnet20-12fca82f.th", offline / f"{name}.th")
    found = load(name)
    assert (found.origin, found.model.stage_sizes) == (name, (3, 3, 3))
    assert found.preprocessing == CATALOG[name].preprocessing
    shutil.copy(shared_data / "weights/resnet56-4bfd9763.th", offline / f"{name}.th")
    (offline / f"{name}.th").chmod(0o644)
    with pytest.raises(UserError, match=r"is not the published file: .* 4bfd9763, not 12fca"):
        load(name)


def test_a_file_is_fetched_by_its_address_whole_or_not_at_all(offline, shared_data, monkeypatch):
    name = "cifar_resnet20.akamaster_cifar10"
    for file, fits in (("resnet56-4bfd9763.th", False), ("resnet20-12fca82f.th", True)):
        address = (shared_data / "weights" / file).resolve().as_uri()
        there = dataclasses.replace(CATALOG[name], address=address)
        monkeypatch.setitem(CATALOG, name, there)
        if fits:
            assert fetch(name) == offline / f"{name}.th"
        else:
            with pytest.raises(UserError, match="is not the published file"):
                fetch(name)
        assert [path.name for path in offline.iterdir()] == [f"{name}.th"] * fits
    assert load(name).class_names[0] == "airplane"


def test_a_published_file_is_recognized_by_its_digest(shared_data):
    found = load(str(shared_data / "weights/resnet56-4bfd9763.th"))
    assert found.origin == "cifar_resnet56.akamaster_cifar10"
    assert found.model.stage_sizes == (9, 9, 9)
    assert found.class_names[9] == "truck"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "torchvision", "timm"))),
    reason="needs torch, torchvision and timm",
)
def test_the_table_is_timm_s():
    sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("empty"))
    from timm.models import resnet, resnetv2

    seen = set()
    for module in (resnet, resnetv2):
        for variant, settings in module.default_cfgs.items():
            for recipe, theirs in settings.cfgs.items():
                name = f"{variant}.{recipe}"
                if name not in CATALOG:
                    continue
                seen.add(name)
                ours = CATALOG[name].preprocessing
                assert theirs.hf_hub_id == "timm/"
                assert theirs.crop_mode == "center"
                assert theirs.num_classes == CATALOG[name].classes
                assert ours.size == (theirs.test_input_size or theirs.input_size)[1], name
                assert ours.crop_fraction == (theirs.test_crop_pct or theirs.crop_pct), name
                assert ours.interpolation == theirs.interpolation, name
                assert (ours.mean, ours.std) == (tuple(theirs.mean), tuple(theirs.std)), name
    by_hand = {name for name in CATALOG if "akamaster" in name or "caffe" in name}
    assert seen == CATALOG.keys() - by_hand
