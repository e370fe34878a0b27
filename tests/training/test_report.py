"""The report on a data set: what it finds, and that it finds nothing in the one that ships."""

from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from flux_core.training.data import read_folder
from flux_core.training.report import BLURRED, findings, look_at, near
from flux_core.training.sizes import parse_resolution

NOTO = Path(__file__).parents[2] / "weights" / "noto" / "pictures"


@pytest.fixture(scope="module")
def noto():
    return read_folder(NOTO, parse_resolution("256x256").size_of, "noto")


def opened(name):
    return Image.open(NOTO / f"{name}.png").convert("RGB")


def test_nothing_is_found_in_the_pictures_that_ship(noto):
    assert len(noto.pictures) == 52 and findings(noto) == []


def test_copies_are_near_and_blur_is_seen(noto):
    """What changes a picture hardly, and what takes its detail."""
    for one in noto.pictures[:12]:
        image = Image.open(one.path).convert("RGB")
        for other in (image.resize((180, 190)), image.resize((512, 512)), image.filter(ImageFilter.GaussianBlur(1))):
            copy = one._replace(look=look_at(other))
            assert [bits <= 2 for *_, bits in near([one, copy])] == [True], one.path.name
        for size in (256, 512, 768):  # of whatever size it is, as much of the picture
            blurred = image.filter(ImageFilter.GaussianBlur(4)).resize((size, size))
            assert look_at(blurred).sharpness < BLURRED < one.look.sharpness
        paler = image.point([200 + i // 5 for i in range(256)] * 3)
        assert look_at(paler).sharpness == pytest.approx(one.look.sharpness, rel=0.2)


def test_each_kind_of_finding_is_a_line(tmp_path):
    names = ["airplane", "alien", "bicycle", "broom"]
    for name in names:
        opened(name).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a thing", encoding="utf-8")
    (tmp_path / "broom.txt").write_text("a [trigger] broom", encoding="utf-8")
    opened("alien").save(tmp_path / "copy.jpg", quality=90)
    opened("ambulance").filter(ImageFilter.GaussianBlur(4)).save(tmp_path / "soft.png")
    Image.new("RGB", (90, 70)).save(tmp_path / "small.png")
    for name in ("copy", "soft", "small"):
        (tmp_path / f"{name}.txt").write_text(f"a noto {name}", encoding="utf-8")
    found = read_folder(tmp_path, parse_resolution("256x256").size_of, "noto")
    assert [line.replace("(1 of", "(0 of") for line in findings(found)] == [
        "near duplicates: 1: alien.png and copy.jpg (0 of 64 bits)",
        "blurred, or without detail: 1: soft.png",
        "too small: 1 pictures, of 90x70 and more; a smaller --resolution keeps them",
        "trigger: 3 of 6 captions were without it; it stands in front of them",
        "equal captions: 1: 3 pictures have 'noto a thing'",
    ]


def test_pictures_of_other_colours_are_no_duplicates():
    """Of one colour, a hash of differences sees nothing."""
    red, blue = (look_at(Image.new("RGB", (64, 64), colour)) for colour in ("red", "blue"))
    assert red.bits == blue.bits and red.colour != blue.colour and red.sharpness == 0
    found = read_folder(NOTO, parse_resolution("256x256").size_of, "noto").pictures[:2]
    assert near([found[0]._replace(look=red), found[1]._replace(look=blue)]) == []
