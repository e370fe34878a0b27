"""`train` on several folders, with regularization sets, masks, wildcards and pairs by names of files."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from flux_core.main import main
from flux_core.training.latents import LatentCache
from flux_core.training.run import Cached, Run
from flux_core.training.settings import Settings, read_settings

ADAPTER = "pytorch_lora_weights.safetensors"
FEW = ["--resolution=32x32", "--rank=2", "--steps=3", "--seed=1", "--output_dir=out", "--lr=0.01", "--held-out=1",
       "--sample-steps=1"]  # fmt: skip
SETS = ["--data=a", "--data=b,weight=0.5,trigger=zwx,masks=masks", "--trigger=noto", "--regularization=class",
        "--prior-weight=0.5", "--mask-floor=0.25", "--wildcards=2", "--trigger-only=0.1"]  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def filled(folder, count, blue, caption=""):
    Path(folder).mkdir()
    for i in range(count):
        Image.new("RGB", (40, 32), (60 * i, 255 - 60 * i, blue)).save(f"{folder}/{i}.png")
        if caption:
            Path(folder, f"{i}.txt").write_text(caption.format(i), encoding="utf-8")


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled("a", 3, 0, "a {{red|green}} pig {}")
    filled("b", 2, 99, "a pig, [trigger] {}")
    filled("class", 4, 200, "an animal {}")
    filled("masks", 2, 0)
    for i in range(2):
        mask = Image.new("L", (40, 32))
        mask.paste(255, (20, 0, 40, 32))
        mask.save(f"masks/{i}.png")
    return tmp_path


def train(*flags):
    return main(["train", *FEW, *flags])


def made(stages=2, **values):
    """A run whose caches are full; with no stages they are empty."""
    run = Run(Settings({"resolution": "32x32", "rank": 2, "steps": 3, "held_out": 0, "output_dir": "out", **values}))
    run.find()
    run.load()
    for stage in (run.encode_captions, run.encode_pictures)[:stages]:
        stage()
    return run


def test_from_folders_to_an_adapter(small, work, capsys):
    assert train(*SETS, "--dry-run") == 0
    said = capsys.readouterr().out
    for line in ("regularization: 4 pictures: half of an epoch of ", "masks: on ", "blurred, or without detail: 9: ",
                 "trigger: 3 of 5 captions were without it"):  # fmt: skip
        assert line in said
    assert train(*SETS) == 0
    card = Path("out/README.md").read_text(encoding="utf-8")
    assert "noto, zwx" in card and "prior_weight" in card and "class" not in card


@pytest.mark.slow
def test_a_run_goes_on_to_the_bit(small, work, capsys):
    assert train(*SETS) == 0
    assert train(*SETS, "--steps=2", "--output_dir=again") == 0 and train(*SETS, "--output_dir=again") == 0
    assert Path("out", ADAPTER).read_bytes() == Path("again", ADAPTER).read_bytes()
    assert train(*SETS, "--prior-weight=1", "--steps=4") == 2
    assert "was trained with prior_weight 0.5, not 1.0. Next: go on with" in capsys.readouterr().err


def test_another_data_set_is_another_run(small, work):
    """By what the loop compares, a hash of each of an epoch's pictures."""
    values = {"data": ["a", "b,weight=0.5,masks=masks"], "regularization": "class", "trigger": "noto"}
    changes = [{}, {"prior_weight": 2.0}, {"mask_floor": 0.5}, {"wildcards": 1}, {"data": ["a", "b,masks=masks"]},
               {"data": ["a", "b,weight=0.5"]}, {"data": ["a", "b,weight=0.5,masks=masks,trigger=zwx"]}]  # fmt: skip
    first, found = made(stages=1, **values), []
    for change in changes:
        run = Run(Settings({"resolution": "32x32", "held_out": 0, **values, **change}))
        run.find()
        run.texts, run.latents = first.texts, LatentCache(Path("latents"), "the same", run.cuts)
        found.append(tuple(Cached(run, one, list(run.captions_of(one))).digest for one in run.epoch))
    assert len(set(found)) == len(changes)


def test_what_a_step_draws(small, work):
    """Masks and weights of the examples, and the texts, which are the folders' own."""
    run = made(data=["a", "b,weight=0.5,trigger=zwx,masks=masks"], trigger="noto", regularization="class",
               prior_weight=0.5, mask_floor=0.25, wildcards=2, trigger_only=0.5, caption_dropout=0.25)  # fmt: skip
    times = Counter(one.path.parent.name for one in run.epoch)
    assert times == {"a": 6, "b": 2, "class": 8}
    texts = {one.path.parent.name: set(run.captions_of(one).values()) for one in run.epoch}
    assert texts["a"] == {"noto a red pig 2", "noto a green pig 2", "", "noto"}
    assert texts["b"] == {"a pig, zwx 1", "", "zwx"} and texts["class"] == {"an animal 3", ""}
    encoded = {text: run.pipeline.prompts(text)[1][0] for text in ("noto", "zwx", "")}
    for one in dict.fromkeys(run.epoch):
        source, name = Cached(run, one, list(run.captions_of(one))), one.path.parent.name
        drawn = [source.draw(torch.Generator("cpu").manual_seed(i)) for i in range(24)]
        assert {example.weight for example in drawn} == {0.5 if name == "class" else 1.0}
        found = [text for text, vec in encoded.items() if any(torch.equal(vec, example.vec) for example in drawn)]
        assert found == {"a": ["noto", ""], "b": ["zwx", ""], "class": [""]}[name]
        if name != "b":
            assert drawn[0].mask is None
            continue
        mask = drawn[0].mask
        assert mask.shape == drawn[0].latents.shape[1:] and torch.equal(mask, mask[:1].expand(4, 4))
        assert mask[0].tolist() == [0.25, 0.25, 1.0, 1.0]  # the middle of 40 pixels is that of 32


def test_pairs_by_names_with_masks(small, work):
    filled("before", 3, 50)
    filled("style", 3, 51)
    filled("white", 3, 255)
    run = made(data="a,reference=before+style,masks=white", takes="reference")
    example = Cached(run, run.learned[0], ["caption"]).draw(None)
    assert example.seen.shape == (2, *example.latents.shape) and example.mask.shape == example.latents.shape[1:]


@pytest.mark.parametrize(("flags", "said"), [
    (["--data=a", "--prior-weight=2"], "--prior-weight goes with --regularization"),
    (["--data=a", "--preserve=regularization"], "--preserve regularization keeps what --regularization shows. Next"),
    (["--data=a", "--preserve=regularization", "--regularization=b", "--preserve-weight=2"],
     "--preserve-weight goes with --preserve differential or blank"),
    (["--data=a", "--mask-floor=0.5"], "--mask-floor goes with --masks"),
    (["--data=a", "--keep-separator=|"], "--keep-separator goes with --shuffles"),
    (["--data=a", "--regularization=b,weight=x"], "--regularization b,weight=x: weight must be a number"),
    (["--data=a,trigger=x", "--regularization=gone"], "gone is no folder"),
    (["--data=a", "--masks=masks", "--strict"], "1 pictures cannot be used"),
    (["--data=a", "--trigger-only=0.5"], "there is no trigger word"),
])  # fmt: skip
def test_what_is_wrong_is_said(small, work, capsys, flags, said):
    assert train(*flags) == 2 and said in capsys.readouterr().err and not Path("out").exists()


def test_a_list_in_a_file_and_repeated_flags_are_the_same(work):
    Path("c.toml").write_text('data = ["a", "b,weight=2"]\nregularization = "class"\n', encoding="utf-8")
    found = read_settings("c.toml", None, {})
    flags = read_settings(None, None, {"data": ["a", "b,weight=2"], "regularization": ["class"]})
    assert found.given == flags.given and [one.place for one in found.folders] == ["a", "b", "class"]
    assert read_settings(None, None, {"data": ["a"]}).given == {"data": "a"}  # as of versions that knew of one


def test_what_is_preserved_is_encoded_and_counts(small, work):
    """The class's captions are encoded with the others, and examples carry them; the loss of a step is larger."""
    plain = made(trigger="zwx", data="class")
    kept = made(trigger="zwx", data="class", preserve="differential", class_word="pig", contrast=2.0)
    texts = {text.kind: text.caption for text in kept.wanted() if text.kind == "class"}
    assert texts == {"class": "pig an animal 3"} and not any(text.kind == "class" for text in plain.wanted())
    one, other = (Cached(run, run.learned[0], ["caption"]) for run in (plain, kept))
    assert one.digest != other.digest
    draw = torch.Generator().manual_seed(1)
    found = other.draw(draw)
    assert set(found.others) == {"class", "empty"} and not one.draw(draw).others and not other.draw(None).others
    assert not torch.equal(found.others["class"][0], found.txt)
    assert kept.estimate.numbers().tera == pytest.approx(plain.estimate.numbers().tera * 3, rel=0.01)


def test_regularization_pictures_are_kept_or_learned(small, work):
    """Another run, whose examples say which they are."""
    values = {"data": "a", "regularization": "class", "trigger": "noto"}
    plain, kept = made(**values), made(**values, preserve="regularization")
    for one in (*kept.learned, *kept.priors):
        sources = [Cached(run, one, ["caption"]) for run in (plain, kept)]
        assert sources[1].draw(None).prior is one.prior
        assert (sources[0].digest != sources[1].digest) is one.prior
    assert kept.estimate.numbers().tera > plain.estimate.numbers().tera


def test_what_is_preserved_has_no_marks_of_wildcards(small, work):
    for path in Path("class").glob("*.txt"):
        path.write_text("a {zwx|zwx} ||| b, c", encoding="utf-8")
    marked = {"wildcards": 1, "keep_separator": "|||", "shuffles": 1}
    kept = made(trigger="zwx", data="class", preserve="differential", class_word="pig", **marked)
    assert {text.caption for text in kept.wanted() if text.kind == "class"} == {"a pig, b, c"}


def test_what_is_drawn_at_the_end_needs_no_t5_again(small, work, monkeypatch):
    """Without prompts of its own a run draws a caption, which it has encoded."""
    run = made(trigger="zwx", data="class", wildcards=2)
    run.load()
    run.encode_captions()
    (prompt,) = run.shown
    monkeypatch.setattr(type(run.pipeline.t5), "encode", None)
    assert torch.equal(run.pipeline.prompts(prompt)[0][0], run.text(*run.shown[prompt])[0])


def test_a_run_goes_on_with_more_prompts_than_it_began_with(small, work, capsys):
    flags = ["--data=class", "--lr=0.01", "--sample-every=1", "--sample-steps=1", "--sample-prompts", "a pig"]
    assert train(*flags, "--steps=1") == 0
    assert train(*flags, "a dog", "--steps=2") == 0, capsys.readouterr().err
    assert len(list(Path("out/samples").iterdir())) == 4


def test_what_goes_wrong_while_it_learns_is_told(small, work, capsys):
    assert train("--data=class", "--steps=10", "--lr=1e-9", "--sample-prompts=a pig", "--sample-every=5") == 0
    assert "samples are as they were without it (rate 1e-09). Next: a higher --lr" in capsys.readouterr().err


def test_an_adapter_without_effect_is_told_at_the_end_where_nothing_was_drawn_before(small, work, capsys):
    assert train("--data=class", "--steps=2", "--lr=1e-9", "--sample-steps=1") == 0
    err = capsys.readouterr().err
    assert err.count("samples are as they were without it (rate 1e-09)") == 1 and "step 2: samples" not in err
