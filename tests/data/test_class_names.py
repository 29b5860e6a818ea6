"""Names of classes: their order, and which are of the same class."""

import pytest

from resnet_flax.data.class_names import (
    numbers,
    ordered,
    other_orders,
    positions,
    reordering,
    same,
    unusable,
)
from resnet_flax.errors import shown

NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["0", "1", "10", "11", "2"], ("0", "1", "2", "10", "11")),
        (["010", "08", "9"], ("08", "9", "010")),
        (["\u0662", "\u0661\u0660"], ("\u0662", "\u0661\u0660")),  # Arabic digits
        (["10", "2", "x"], ("10", "2", "x")),
        (["10", "2", "02"], ("02", "10", "2")),  # two of one number are names
        (["12345678901", "2"], ("12345678901", "2")),
        (["1.5", "-1", "1"], ("-1", "1", "1.5")),
        (["tea", NFD, NFC], (NFC, "tea")),
        ([], ()),
    ],
)
def test_the_order_of_classes(names, expected):
    assert ordered(names) == expected
    assert ordered(names[::-1]) == expected


def test_the_same_classes():
    assert positions(["7", "10"], ["07", "8"]) == [0, None]
    assert positions(["7", "x"], ["07", "7"]) == [1, None]
    assert positions([NFD], ["tea", NFC]) == [1]
    assert same(["7", NFD], ["7", NFC])
    assert same(["7"], ["07"])
    assert not same(["7", "8"], ["8", "7"])
    assert reordering(["2", "10"], ["10", "2"]) == [1, 0]
    assert reordering([NFD, "a"], ["a", NFC]) == [1, 0]
    for other in (["a"], ["a", "b"], ["a", "a"], ["a", NFC, "b"], [NFC, "a"]):
        assert reordering([NFD, "a"], other) is None
    assert numbers(["9" * 5000]) is None


def test_the_orders_of_other_programs():
    assert other_orders(["a", "b"]) == {}
    assert other_orders(["c1", "c2", "c10"]) == {
        "as text, as torchvision does": ("c1", "c10", "c2")
    }
    (natural,) = other_orders(["B10", "B9", "a"]).values()
    assert natural == ("a", "B9", "B10")


def test_names_that_break_a_line_or_have_no_encoding():
    for bad in ("a\nb", "a\rb", "a\x85b", "a\u2028b", "\x1b", "\x00", "d\udcff"):
        assert unusable(bad)
        assert shown(bad).isascii()
        assert bad[-2:] not in shown(bad)
    for good in (
        "a b",
        "a\u202fb",
        "a\u00a0b",
        "\u0915\u094d\u200d\u0937",
        "\U0001f469\u200d\U0001f52c",
        "\ue000",
    ):
        assert not unusable(good)
        assert shown(good) == good
    assert shown("a\u202egpj.exe") == "a\\u202egpj.exe"  # shown as written, not turned around
