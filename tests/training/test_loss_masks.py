"""Masks on the loss: whose they are, how they are cut, and which cannot be used."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import fixed, picture

from flux_core.errors import FileError, UsageError
from flux_core.training.data import read_folder
from flux_core.training.masks import cut_mask, open_mask
from flux_core.training.sizes import Size, cuts


def levels(width, height):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(256, (height, width), dtype=torch.uint8, generator=draw).numpy()


def read(folder, **how):
    return read_folder(folder, fixed(32, 32), **how)


def test_a_mask_is_cut_as_its_picture():
    pixels, size = levels(48, 32), Size(32, 32)
    mask = Image.fromarray(pixels)
    for cut in cuts(Size(48, 32), size, "random", 3, flip=True):
        box = pixels[cut.top : cut.top + 32, cut.left : cut.left + 32]
        box = box[:, ::-1] if cut.flip else box
        expected = box.reshape(4, 8, 4, 8).mean(axis=(1, 3)) / 255
        found = cut_mask(cut, mask)
        assert found.shape == (4, 4) and found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def test_a_mask_that_is_resized_stays_within_its_bounds():
    mask = Image.new("L", (90, 64))
    mask.paste(255, (45, 0, 90, 64))
    (cut,) = cuts(Size(90, 64), Size(32, 32))
    found = cut_mask(cut, mask)
    assert found.min() == 0 and found.max() == 1 and torch.equal(found, found[:1].expand(4, 4))
    assert found[0].tolist() == sorted(found[0].tolist()) and abs(float(found.mean()) - 0.5) < 0.05


def test_masks_are_files_of_the_pictures_names(tmp_path):
    picture(tmp_path / "d" / "x" / "a.jpg", caption="a")
    picture(tmp_path / "d" / "masks" / "x" / "a.png", colour=(255, 255, 255))
    found = read(tmp_path / "d", masks=str(tmp_path / "d" / "masks"))
    assert [one.mask[0].name for one in found.pictures] == ["a.png"] and not found.skipped
    assert open_mask(found.pictures[0].mask[0], alpha=False)[0].getextrema() == (255, 255)


def test_alpha_is_a_mask(tmp_path):
    alpha = levels(40, 32)
    image = Image.new("RGB", (40, 32), (1, 2, 3))
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    found = read(tmp_path, trigger="noto", masks="alpha")
    assert [one.path.name for one in found.pictures] == ["a.png"]
    assert list(found.skipped.values()) == ["it has no alpha channel to be its mask"]
    assert found.pictures[0].mask == (tmp_path / "a.png", found.pictures[0].sha256)
    assert np.array_equal(np.asarray(open_mask(tmp_path / "a.png", alpha=True)[0]), alpha)


def test_masks_of_metadata(tmp_path):
    rows = []
    for i, extra in enumerate([{"mask": "m.png"}, {}, {"mask": "gone.png"}]):
        picture(tmp_path / f"{i}.png", colour=(i, 0, 0))
        rows.append({"file_name": f"{i}.png", "text": "x", **extra})
    picture(tmp_path / "m.png", colour=(255, 255, 255))
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read(tmp_path, masks="metadata")
    assert [one.mask[0].name for one in found.pictures] == ["m.png"]
    reasons = {path.name: reason for path, reason in found.skipped.items()}
    assert reasons["1.png"] == "metadata.jsonl names no mask for it" and "gone.png does not exist" in reasons["2.png"]
    assert [one.mask for one in read(tmp_path).pictures] == [None] * 3  # which is not asked for
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x", "mask": "../m.png"}')
    with pytest.raises(FileError, match="is outside of the folder"):
        read(tmp_path, masks="metadata")


def test_a_mask_that_cannot_be_used_leaves_its_picture_out(tmp_path):
    """Row 48: none, of another size, damaged, black everywhere."""
    masks = tmp_path / "masks"
    for i in range(4):
        picture(tmp_path / "d" / f"{i}.png", colour=(i, 0, 0), caption="x")
    picture(masks / "1.png", (32, 40), colour=(255, 255, 255))
    (masks / "2.png").write_bytes(b"no picture")
    picture(masks / "3.png", colour=(0, 0, 0))
    picture(tmp_path / "d" / "4.png", colour=(4, 0, 0), caption="x")
    picture(masks / "4.png", colour=(9, 9, 9))
    reasons = list(read(tmp_path / "d", masks=str(masks)).skipped.values())
    for reason, said in zip(reasons, ["has no file of its name", "its mask 1.png has 32x40 pixels, not 40x32",
                                      "is no picture that can be read", "its mask 3.png is black everywhere"],
                            strict=True):  # fmt: skip
        assert said in reason
    (masks / "4.png").unlink()
    with pytest.raises(UsageError, match="has no picture to train on"):
        read(tmp_path / "d", masks=str(masks))
