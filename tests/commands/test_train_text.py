"""`train --train-text` and `--token`: texts that are encoded at each step, from flags to a file that `--lora` reads."""

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from test_train import ADAPTER, FEW, digest, losses, pictures, train

from flux_core import load_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = [*FEW, "--train-text=clip,t5", "--text-rank=3", "--text-lr=0.02", "--trigger=noto", "--caption-dropout=0.3",
        "--sample-prompts", "a red apple", "--sample-steps=1", "--sample-every=2", "--ema=0.5"]  # fmt: skip


@pytest.fixture
def work(tmp_path, monkeypatch):
    pictures(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_samples_are_what_the_file_draws(small, work, capsys):
    assert train(*TEXT) == 0
    said = capsys.readouterr().out
    assert "captions: 15 texts to encode at each step" in said and "texts are read at each step, by CLIP and T5" in said
    assert not list((work / "out/texts").glob("*.parquet"))
    assert sum("text_encoder_2." in key for key in load_file(work / "out" / ADAPTER)) == 2 * 4 * len(
        load_pipeline("flux-mini").t5.model.encoder.block
    )
    assert farthest(work / "out/samples/step-0000004-0.png", "a red apple", "out") <= 1


def farthest(sample, prompt, file):
    """Between a sample and what is drawn with the file, in levels."""
    pipeline = load_pipeline("flux-mini")
    with pipeline.load_lora(file), Image.open(sample) as image:
        drawn = pipeline.generate(prompt, 1, width=32, height=32, num_steps=1, force=True)[0]
        return int(np.abs(np.asarray(image, np.int16) - np.asarray(drawn, np.int16)).max())


def test_a_word_alone_is_learned_and_drawn_from_either_file(small, work, capsys):
    word = ["--token=<zwx>", "--token-init=red pig", "--token-vectors=2", "--token-lr=0.1", "--targets=none"]
    few = [x for x in FEW if not x.startswith("--rank")]
    assert train(*few, *word, "--sample-prompts", "a <zwx>", "--sample-steps=1", "--sample-every=4") == 0
    assert {key.partition(".")[0] for key in load_file(work / "out" / ADAPTER)} == {"bundle_emb"}
    for file in ("out", "out/learned_embeds.safetensors"):
        assert farthest(work / "out/samples/step-0000004-0.png", "a <zwx>", file) == 0
    text = (work / "out/README.md").read_text(encoding="utf-8")
    assert "zwx" in text and "changes.png" not in text
    assert train(*few, *word, "--sample-prompts", "a <zwx>", "--sample-steps=1", "--sample-every=4") == 0
    assert capsys.readouterr().out.endswith(f"finished: out/{ADAPTER}\n")


@pytest.mark.slow
def test_clip_alone_takes_t5s_tokens_from_the_cache_and_equal_runs_are_equal(small, work, capsys):
    clip = [x for x in TEXT if "train-text" not in x] + ["--train-text=clip"]
    assert train(*clip) == train(*clip, "--output_dir=other") == 0
    assert digest(work / "out" / ADAPTER) == digest(work / "other" / ADAPTER)
    assert losses(work / "out") == losses(work / "other")
    assert {key.partition(".")[0] for key in load_file(work / "out" / ADAPTER)} == {"transformer", "text_encoder"}


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--text-rank=3"], "--text-rank goes with --train-text"),
        (["--token-init=a dog"], "--token-init goes with --token"),
        (["--token=my dog"], "--token is one word without spaces, as in <thing>, not 'my dog'"),
        (["--token=<a>", "--trigger=dog"], "no caption has <a> as a word of its own, so no picture would teach it"),
        (["--token=<a>", "--token-init= "], "--token-init ' ' has no words to begin as"),
        (["--token=<>"], "--token '<>' has no words to begin as. Next: --token-init, as in a dog"),
        (["--ema=1"], "--ema must be less than 1, not 1"),
        (["--targets=none"], "--targets none goes with --token"),
        (["--train-text=clip_l"], "--train-text is clip or t5, or both with a comma between them, not 'clip_l'"),
    ],
)
def test_what_does_not_go_together(small, work, capsys, flags, text):
    assert train(*FEW, *flags, "--dry-run") == 2
    assert text in capsys.readouterr().err


def test_captions_are_asked_for_the_word_as_prompts_are_read(small, work, capsys):
    """ "two zibs" has no word zib, and the trigger does not stand in front of it."""
    dry = [*FEW, "--token=zib", "--dry-run", "--held-out=0"]
    assert train(*dry) == 0 and "captions are without" not in capsys.readouterr().err
    for path in sorted((work / "data").glob("*.txt"))[:3]:
        path.write_text("two zibs")
    assert train(*dry) == 0
    assert "3 of 12 captions are without zib as a word of its own, and do not teach it" in capsys.readouterr().err
    for path in (work / "data").glob("*.txt"):
        path.write_text("two zibs")
    assert train(*dry) == 2 and "no caption has zib as a word of its own" in capsys.readouterr().err
    for path in (work / "data").glob("*.txt"):
        path.write_text("a zib, green")
    assert train(*dry, "--trigger=alien") == 0
