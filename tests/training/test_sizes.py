"""Training sizes and cuts: the golden rules of the known trainers, and what ours promises."""

import json
import math
import subprocess
import sys

import pytest
from golden_files import FOLDER
from PIL import Image

from flux_core.errors import FileError, UsageError
from flux_core.training.sizes import (
    RULES,
    Cut,
    Resolution,
    Size,
    _list,
    _shapes,
    apply,
    covering,
    cuts,
    least_area,
    parse_resolution,
)

GOLDEN = json.loads((FOLDER / "train" / "buckets.json").read_text())
KOHYA = {rule: [one for one in GOLDEN["kohya"]["sets"] if one["bucket_no_upscale"] == flag]
         for rule, flag in {"kohya": False, "kohya_no_upscale": True}.items()}  # fmt: skip
EDGES = (32, 100, 200, 256, 384, 512, 640, 768, 800, 1000, 1024, 1536)


def geometry(picture, size):
    """Bucket, resized size and centre crop, as a golden row has them."""
    (cut,) = cuts(picture, size)
    return [*size, *cut.resized, cut.left, cut.top]


@pytest.mark.parametrize("rule", KOHYA)
def test_kohyas_buckets_are_golden(rule):
    assert len(KOHYA[rule]) == 3
    for case in KOHYA[rule]:
        resolution = Size(*case["resolution"])
        if case["buckets"] is not None:
            assert [list(one) for one in _list(resolution.width, 256, 2048, 64)] == case["buckets"]
        for w, h, *found in case["rows"]:
            picture = Size(w, h)
            if found[0] is None:
                with pytest.raises(FileError, match=f"it has {w}x{h} pixels"):
                    RULES[rule](picture, resolution)
                continue
            size = RULES[rule](picture, resolution)
            assert list(size) == found[:2], picture
            if rule == "kohya" or w * h > math.prod(resolution):  # else kohya crops without resizing
                assert geometry(picture, size) == found, picture


def test_diffusers_buckets_are_golden():
    golden = GOLDEN["diffusers"]
    pairs = [one.split(",") for one in golden["aspect_ratio_buckets"].split(";")]
    sizes = tuple(Size(int(w), int(h)) for h, w in pairs)
    for w, h, *found in golden["rows"]:
        assert list(least_area(Size(w, h), sizes)) == found
    generated = {one["resolution"]: one["buckets_height_width"] for one in golden["generated"][:3]}
    assert generated.keys() == {512, 768, 1024}
    for edge, found in generated.items():
        assert [[h, w] for w, h in _shapes(edge)] == found
        assert RULES["diffusers"](Size(2000, 1000), Size(edge, edge)) == Size(*found[-1][::-1])


@pytest.mark.parametrize("edge", EDGES)
def test_our_buckets_are_as_the_rule_says(edge):
    """By trying every size: the ones that are there, and which a picture gets."""
    step = 64 if edge >= 256 else 16
    sides = [side for side in range(step, 4 * edge, step) if edge <= 2 * side <= 4 * edge]
    allowed = {(w, h) for w in sides for h in sides if w * h <= edge * edge}
    tallest = {(w, max(h for v, h in allowed if v == w)) for w, _ in allowed}
    sizes = tallest | {(h, w) for w, h in tallest} | {max((w, h) for w, h in allowed if w == h)}
    for picture in [(6000, 6000), (6000, 5800), (5900, 4425), (3000, 6000), (2999, 9000), (12000, 3000), (7001, 4999)]:
        found = RULES["buckets"](Size(*picture), Size(edge, edge))
        far = {one: abs(math.log(one[0] / one[1]) - math.log(picture[0] / picture[1])) for one in sizes}
        assert found in sizes and far[found] == pytest.approx(min(far.values()), abs=1e-12)
        assert sum(distance < far[found] + 1e-9 for distance in far.values()) == 1
        assert RULES["buckets"](Size(*picture[::-1]), Size(edge, edge)) == found[::-1]


def test_of_several_resolutions_the_largest_that_a_picture_fills():
    sizes = parse_resolution("512, 1024,768")
    assert sizes == Resolution("buckets", (Size(1024, 1024), Size(768, 768), Size(512, 512)))
    for side, edge in [(3000, 1024), (1024, 1024), (1023, 768), (767, 512), (512, 512)]:
        assert sizes.size_of(Size(side, side)) == (edge, edge)
    with pytest.raises(FileError, match=r"^it has 300x500 pixels, fewer than 384x640$"):
        sizes.size_of(Size(300, 500))


def test_a_picture_that_no_size_suits_is_left_out_with_its_reason():
    fixed, free = parse_resolution("512x768"), parse_resolution("512")
    for resolution, picture, said in [
        (fixed, (511, 2000), "it has 511x2000 pixels, fewer than 512x768"),
        (free, (0, 700), "it has no pixels"),
        (free, (511, 511), "it has 511x511 pixels, fewer than 512x512"),
        (free, (9000, 1000), "it has 9000x1000 pixels, a shape beyond every bucket: the nearest is 1024x256"),
        (parse_resolution("512", "kohya_no_upscale"), (600, 60), "it has 600x60 pixels: a side of its bucket"),
    ]:
        with pytest.raises(FileError, match=f"^{said}"):
            resolution.size_of(Size(*picture))
    assert free.size_of(Size(8000, 1000)) == (1024, 256)
    assert fixed.size_of(Size(9000, 1000)) == (512, 768)


def test_a_resolution_is_read():
    assert parse_resolution("512x768") == Resolution("fixed", (Size(512, 768),))
    assert parse_resolution("512", "fixed") == Resolution("fixed", (Size(512, 512),))
    assert parse_resolution("768", "kohya") == Resolution("kohya", (Size(768, 768),))


@pytest.mark.parametrize(
    ("text", "rule", "said"),
    [
        ("large", "", "'large' is no size. Next: write 512x768"),
        ("", "", "is no size"),
        ("1x2x3", "", "is no size"),
        ("512x760", "", "not one size in multiples of 16. Next"),
        ("512,768", "fixed", "not one size"),
        ("512x768", "buckets", "rule buckets takes squares. Next"),
        ("0", "", "sides have 16 to 8192"),
        ("-64x64", "", "sides have 16 to 8192"),
        ("63", "kohya", "sides have 64 to 8192"),
        ("512", "bucket", "Did you mean buckets"),
    ],
)
def test_a_wrong_resolution_says_what_is_right(text, rule, said):
    with pytest.raises(UsageError, match=said):
        parse_resolution(text, rule)


# Cuts ----------------------------------------------------------------------------------------------------

PICTURES = [Size(512, 768), Size(1000, 777), Size(777, 3001), Size(64, 64), Size(5000, 65)]
SIZE = Size(48, 64)


def test_the_centre_is_one_cut_and_its_mirror_image():
    assert cuts(Size(200, 128), SIZE) == [Cut(SIZE, Size(100, 64), 26, 0, False)]
    assert [one.flip for one in cuts(Size(200, 128), SIZE, flip=True)] == [False, True]


@pytest.mark.parametrize("picture", PICTURES)
def test_every_cut_is_within_the_smallest_cover(picture):
    found = cuts(picture, SIZE, "random", 20, flip=True, seed=3, key="ab")
    assert len(found) == len(set(found)) and {one.flip for one in found} == {False, True}
    for one in found:
        assert one.resized == covering(picture, SIZE) and 0 in (one.resized[0] - 48, one.resized[1] - 64)
        assert 0 <= one.left <= one.resized.width - 48 and 0 <= one.top <= one.resized.height - 64
    assert found[::2] == cuts(picture, SIZE, "random", 20, seed=3, key="ab")


def test_random_boxes_reach_both_ends_and_depend_on_seed_and_key():
    def lefts(seed, key):
        return [one.left for one in cuts(Size(56, 64), SIZE, "random", 200, seed=seed, key=key)]

    assert sorted(lefts(0, "a")) == list(range(9))  # equal boxes once
    assert lefts(0, "a") != lefts(0, "b") and lefts(0, "a") != lefts(1, "a")


def test_cuts_are_equal_in_another_process():
    code = (
        "from flux_core.training.sizes import Size, cuts\n"
        "print(cuts(Size(1000, 64), Size(48, 64), 'random', 5, True, 7, 'cd'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(cuts(Size(1000, 64), SIZE, "random", 5, True, 7, "cd"))


@pytest.mark.parametrize("picture", PICTURES)
def test_a_cut_has_no_border_and_is_mirrored(picture):
    image = Image.new("RGB", picture, (200, 100, 50))
    for one in cuts(picture, SIZE, "random", 3, flip=True):
        found = apply(one, image)
        assert found.size == SIZE and found.getcolors() == [(48 * 64, (200, 100, 50))]
    image.putpixel((0, 0), (0, 0, 0))
    plain, mirrored = (apply(one, image) for one in cuts(picture, SIZE, flip=True))
    assert plain.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes() == mirrored.tobytes()


def test_wrong_crops_are_refused():
    with pytest.raises(UsageError, match="crop must be centre or random, not 'middle'"):
        cuts(SIZE, SIZE, "middle")
    with pytest.raises(UsageError, match="at least 1, not 0"):
        cuts(SIZE, SIZE, "random", 0)
