"""Captioners are transformers' own models, of every kind of question, and answer as transformers does."""

import pytest
import tiny_captioners as tiny
import torch
import transformers
from PIL import Image

from flux_core.captioning.vision_language import Ask, load_vision_language
from flux_core.captioning.words import STYLES
from flux_core.errors import FileError, UsageError
from flux_core.linears.formats import FORMATS
from flux_core.linears.frozen import Frozen

CPU = torch.device("cpu")
KINDS = {
    "llava": tiny.llava,
    "idefics3": tiny.idefics3,
    "qwen3": tiny.qwen,
    "qwen2.5": lambda folder: tiny.qwen(folder, "Qwen2_5_VL"),
    "internvl": tiny.internvl,
    "florence2": tiny.florence,
}
PICTURES = [
    Image.radial_gradient("L").convert("RGB"),
    Image.linear_gradient("L").resize((64, 40)).convert("RGB"),
    *(Image.new("RGB", (40, 60), colour) for colour in ("red", "white", "black", "blue")),
]
KEYS = ["a", "b", "c", "d", "e", "f"]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("captioners")
    return {kind: make(root / kind) for kind, make in KINDS.items()}


def load(folder, format=None, **ask):
    settings = {"style": STYLES["short"], "max_new_tokens": 6} | ask
    return load_vision_language(str(folder), Ask(**settings), CPU, torch.float32, format)


@every_kind
def test_a_batch_is_answered_as_each_picture_alone_and_as_by_transformers(folders, kind, one_thread):
    captioner = load(folders[kind])
    answers = captioner(PICTURES, KEYS)
    assert answers == [captioner([picture], [key])[0] for picture, key in zip(PICTURES, KEYS, strict=True)]
    assert len(set(answers)) > 1 and all(len(answer) == 6 for answer in answers)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folders[kind], dtype=torch.float32).eval()
    inputs = captioner.inputs(PICTURES[:1])
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False, num_beams=1)
    begin = 0 if kind == "florence2" else inputs["input_ids"].shape[1]
    assert captioner.processor.tokenizer.decode(tokens[0, begin:], skip_special_tokens=True) == answers[0]


@every_kind
def test_there_is_one_first_token_and_the_whole_question(folders, kind):
    captioner = load(folders[kind])
    ids = captioner.inputs(PICTURES[:1])["input_ids"][0]
    assert (ids == captioner.processor.tokenizer.bos_token_id).sum() == (not kind.startswith("qwen"))
    text = captioner.processor.tokenizer.decode(ids)
    assert ("What does the image describe?" if kind == "florence2" else STYLES["short"].prompt) in text


@pytest.mark.parametrize(
    "template", ["<s>{{ messages[-1]['content'] | trim }}:", "<s>{{ '<image>' + messages[-1]['content'] }}:"]
)
def test_templates_that_take_texts_alone_get_them(folders, tmp_path, template):
    tiny.llava(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
    captioner = load(tmp_path, prompt="What is it?")
    assert captioner.text.count("<image>") == 1 and captioner.text.endswith("What is it?:")
    assert (captioner.inputs(PICTURES[:1])["input_ids"] == 1).sum() == 1
    assert captioner(PICTURES, KEYS) == [captioner([picture], "a")[0] for picture in PICTURES]


def test_what_is_drawn_is_of_the_seed_and_the_picture_alone(folders, one_thread):
    draw = {"temperature": 1.0, "max_new_tokens": 12}
    captioner = load(folders["qwen3"], **draw)
    both = captioner(PICTURES, KEYS)
    assert both[1:] == captioner(PICTURES[1:], KEYS[1:]) == load(folders["qwen3"], **draw)(PICTURES[1:], KEYS[1:])
    assert both[0] != captioner(PICTURES[:1], ["other"])[0]
    assert both != load(folders["qwen3"], seed=1, **draw)(PICTURES, KEYS) != load(folders["qwen3"])(PICTURES, KEYS)


def test_what_is_drawn_has_the_probabilities_of_the_softmax():
    """2000 draws of three tokens at temperature 2, to four standard deviations."""
    from flux_core.captioning.vision_language import Drawn

    scores = torch.tensor([0.0, 1.0, 3.0, -torch.inf], dtype=torch.float32)
    drawn = Drawn(Ask(style=STYLES["short"], temperature=2.0), [str(i) for i in range(2000)])
    found = drawn(None, scores.expand(2000, 4)).argmax(-1).bincount(minlength=4) / 2000
    wanted = (scores / 2).softmax(-1)
    assert ((found - wanted).abs() <= 4 * (wanted * (1 - wanted) / 2000).sqrt()).all()


@pytest.mark.parametrize(("kind", "format"), [*((kind, "int8") for kind in KINDS), ("llava", "nf4")])
def test_only_the_language_model_is_in_few_bits(folders, kind, format, one_thread):
    captioner = load(folders[kind], format)
    found = {name for name, one in captioner.model.named_modules() if isinstance(one, FORMATS[format].kind)}
    linears = {name for name, one in captioner.model.named_modules() if isinstance(one, torch.nn.Linear | Frozen)}
    assert found == {name for name in linears if ".language_model." in name or ".text_model." in name}
    assert all(len(answer) == 6 for answer in captioner(PICTURES, KEYS))


def test_what_florence_does_not_take_is_told(folders):
    with pytest.raises(UsageError, match=r"takes no tags\. Next: another --model, as qwen3-vl"):
        load(folders["florence2"], style=STYLES["tags"])
    with pytest.raises(UsageError, match="takes no prompt of your own"):
        load(folders["florence2"], prompt="What is it?")


def test_what_cannot_be_loaded_is_told(folders, tmp_path, monkeypatch):
    with pytest.raises(
        FileError, match="there is no captioner 'nothing': give florence2, qwen3-vl, joycaption, sprites"
    ):
        load("nothing")
    with pytest.raises(FileError, match="holds no model"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "other", "auto_map": {"AutoModel": "a.B"}}')
    with pytest.raises(FileError, match="has nothing that asks a 'other' model"):
        load(tmp_path)
    tiny.llava(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(FileError, match="no chat template that takes a picture"):
        load(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileError, match="the captioner could not be read"):
        load(tmp_path)


def test_the_hub_s_errors_are_those_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileError, match="the captioner of florence-community/Florence-2-large is not on this disk"):
        load("florence2")
