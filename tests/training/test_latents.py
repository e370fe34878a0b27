"""The cache of latents: what is in it, when a file is made again, and that nothing is there by half."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from random_model import random_weights, small_variant
from safetensors.torch import load_file

from flux_core.device.oom import OomFallback
from flux_core.errors import FileError, NonFiniteError
from flux_core.images.pictures import as_rgb, open_picture
from flux_core.model import AutoEncoder
from flux_core.pipeline import Components
from flux_core.pipeline.codec import Codec
from flux_core.pipeline.placement import Placement
from flux_core.sampling import unpack
from flux_core.training.data import Picture
from flux_core.training.latents import LatentCache, encoding
from flux_core.training.sizes import Size, apply, cuts

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = Size(48, 32)


@pytest.fixture(scope="module")
def codec():
    ae, none = random_weights(AutoEncoder(small_variant().ae_params)), torch.nn.Identity()
    return Codec(Placement(Components(none, none, none, ae), OomFallback(torch.device("cpu"))), torch.float32)


def colours(width=70, height=40, mode="RGB"):
    draw = torch.Generator().manual_seed(0)
    size = (height, width, len(mode))
    return Image.fromarray(torch.randint(256, size, dtype=torch.uint8, generator=draw).numpy(), mode)


def saved(path, image=None, **how):
    (image or colours()).save(path, **how)
    return Picture(path, "a caption", open_picture(path)[1], Size(0, 0))


def cache_of(folder, *pictures, autoencoder="abc float32", **how):
    how = {"crop": "random", "count": 2, "flip": True} | how
    of = {one: cuts(Size(*as_rgb(open_picture(one.path)[0]).size), SIZE, key=one.sha256, **how) for one in pictures}
    return LatentCache(folder, autoencoder, of)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(image):
    raise AssertionError("nothing is to be encoded")


def test_latents_are_those_of_every_cut_to_the_bit(tmp_path, codec):
    picture = saved(tmp_path / "a.png")
    cache = cache_of(tmp_path / "cache", picture)
    assert cache.missing() == [picture] and len(cache.cuts[picture]) == 4
    cache.add(picture, encoding(codec))
    assert cache.missing() == []
    for number, cut in enumerate(cache.cuts[picture]):
        found = cache.get(picture, number)
        with torch.inference_mode():
            expected = unpack(codec.encode(apply(cut, colours()), *SIZE), SIZE.height, SIZE.width)[0]
        assert found.shape == (16, 4, 6) and torch.equal(found, expected)
    assert not torch.equal(cache.get(picture, 0), cache.get(picture, 1))  # its mirror image


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_picture_is_upright(tmp_path, codec, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = colours(*((40, 70) if orientation == 6 else (70, 40)))
    way = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation]
    upright, plain = saved(tmp_path / "a.png", turned, exif=exif), saved(tmp_path / "b.png", turned.transpose(way))
    cache = cache_of(tmp_path / "cache", upright, plain, crop="centre")
    for one in cache.missing():
        cache.add(one, encoding(codec))
    assert torch.equal(cache.get(upright, 0), cache.get(plain, 0))


def test_transparency_is_over_white(tmp_path, codec):
    clear = Image.new("RGBA", (48, 32), (9, 9, 9, 0))
    one, white = saved(tmp_path / "a.png", clear), saved(tmp_path / "b.png", Image.new("RGB", (48, 32), "white"))
    cache = cache_of(tmp_path / "cache", one, white)
    for picture in cache.missing():
        cache.add(picture, encoding(codec))
    assert torch.equal(cache.get(one, 0), cache.get(white, 0))


def test_a_file_is_named_by_all_that_latents_depend_on(tmp_path):
    picture, other = saved(tmp_path / "a.png"), saved(tmp_path / "b.png", colours(71, 40))
    caches = [
        cache_of(tmp_path, picture, other),
        cache_of(tmp_path, picture, autoencoder="abd float32"),
        cache_of(tmp_path, picture, seed=1),
        cache_of(tmp_path, picture, flip=False),
        cache_of(tmp_path, picture, crop="centre"),
    ]
    assert len({caches[0].path(other), *(cache.path(picture) for cache in caches)}) == 6
    moved = picture._replace(path=tmp_path / "c.png", caption="another")
    assert LatentCache(tmp_path, "abc float32", {moved: caches[0].cuts[picture]}).path(moved) == caches[0].path(picture)


def test_what_is_there_is_not_made_again(tmp_path, codec):
    pictures = [saved(tmp_path / f"{i}.png", colours(60 + i)) for i in range(3)]
    first = cache_of(tmp_path / "cache", *pictures)
    first.add(pictures[1], encoding(codec))
    again = cache_of(tmp_path / "cache", *pictures)
    assert again.missing() == [pictures[0], pictures[2]]
    assert cache_of(tmp_path / "cache", *pictures, autoencoder="other").missing() == pictures


def cut_short(data):
    return data[:-5]


def one_bit(data):
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


@pytest.mark.parametrize("damage", [cut_short, one_bit, lambda data: b"", lambda data: b"\xff" * 100])
def test_a_damaged_file_is_told_and_made_again(tmp_path, codec, capsys, damage):
    picture = saved(tmp_path / "a.png")
    cache = cache_of(tmp_path / "cache", picture)
    cache.add(picture, encoding(codec))
    path = cache.path(picture)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(FileError, match=r"Next: start again, and it is made again"):
        cache.get(picture, 0)
    assert cache.missing() == [picture]
    assert f"{path} is damaged, or could not be read: a.png is encoded again" in capsys.readouterr().err
    cache.add(picture, encoding(codec))
    assert path.read_bytes() == whole and cache.missing() == [] and capsys.readouterr().err == ""


def test_a_file_that_is_gone_is_said(tmp_path):
    picture = saved(tmp_path / "a.png")
    with pytest.raises(FileError, match=r"could not be read: .* Next: start again"):
        cache_of(tmp_path / "cache", picture).get(picture, 0)


def test_a_picture_that_was_changed_is_refused(tmp_path):
    picture = saved(tmp_path / "a.png")
    cache = cache_of(tmp_path / "cache", picture)
    saved(tmp_path / "a.png", colours(90, 80))
    with pytest.raises(FileError, match=r"a\.png was changed since it was found\. Next"):
        cache.add(picture, refused)
    assert not (tmp_path / "cache").exists()


def test_latents_that_are_not_finite_are_not_kept(tmp_path):
    picture = saved(tmp_path / "a.png")
    cache = cache_of(tmp_path / "cache", picture)
    with pytest.raises(NonFiniteError, match=r"latents of .*a\.png are not finite\. Next"):
        cache.add(picture, lambda image: torch.full((16, 4, 6), float("nan")))
    assert not (tmp_path / "cache").exists()


def test_bf16_stays_bf16(tmp_path):
    picture = saved(tmp_path / "a.png")
    cache = cache_of(tmp_path / "cache", picture)
    cache.add(picture, lambda image: torch.ones(16, 4, 6, dtype=torch.bfloat16))
    assert cache.get(picture, 3).dtype == torch.bfloat16
    assert load_file(cache.path(picture)).keys() == {"0", "1", "2", "3", "sha256"}


def test_a_full_disk_leaves_nothing_by_half(tmp_path):
    """RLIMIT_FSIZE stands for it, in a process of its own: no file may grow past the limit."""
    saved(tmp_path / "a.png")
    code = """
import resource, sys, torch
from pathlib import Path
from flux_core.errors import DiskError
from flux_core.images.pictures import open_picture
from flux_core.training.data import Picture
from flux_core.training.latents import LatentCache
from flux_core.training.sizes import Size, cuts
folder = Path(sys.argv[1])
picture = Picture(folder / "a.png", "", open_picture(folder / "a.png")[1], Size(0, 0))
cache = LatentCache(folder / "cache", "abc", {picture: cuts(Size(70, 40), Size(48, 32), flip=True)})
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
try:
    cache.add(picture, lambda image: torch.ones(16, 4, 6))
except DiskError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 6 and "files may not grow so large here" in done.stdout, done.stderr
    assert names(tmp_path / "cache") == []
