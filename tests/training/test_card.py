"""The card of a trained adapter: read by a YAML parser, by Python and by a shell whatever the texts are."""

import ast
import hashlib
import re
import shlex
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from flux_core.training.card import SHOWN, Facts, model_card, table
from flux_core.variants import VARIANTS

NASTY = (
    "noto",
    "a \"b\" 'c': {d} [e] #f",
    "line\nline\r\nline\ttab",
    "--- \n---\n",
    "日本 🎨 é",
    "a\x85b\u2028c\x7fd\ufeffe\x07",
    "yes",
    "\\n \\ \\u0041",
    "```\n# head `` ~~~",
    "| a | b |",
    "$HOME `id` !1 $(id)",
)
FACTS = Facts(
    variant=VARIANTS["flux-mini"],
    base="ab" * 32,
    pictures=["2" * 64, "1" * 64],
    trigger="noto",
    prompt="noto a castle",
    settings={"rank": 4, "lr": 1e-4, "targets": ["attn.*", "a|b"], "dora": False, "ema": 0.0, "crop": ""},
    losses=[0.75, 0.25],
    validated={0: 0.5, 1: 0.375, 2: 0.4},
    files=["loss.png", "ab.png", "pytorch_lora_weights.safetensors"],
)


def header(facts):
    """The front matter, as the hub's client reads it."""
    return ModelCard(model_card(facts), ignore_metadata_errors=False).data.to_dict()


def code(card, language):
    """A block of code, by its fences' length."""
    found = re.search(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, re.DOTALL | re.MULTILINE)
    return found[2]


def cells(line):
    """A row's cells: a pipe behind an odd number of backslashes is no border."""
    return [re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.findall(r"((?:\\.|[^|\\])*)\|", line)[1:]]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("flux-mini", {"license": "apache-2.0"}),
        (
            "flux-schnell",
            {
                "base_model": "black-forest-labs/FLUX.1-schnell",
                "base_model_relation": "adapter",
                "license": "apache-2.0",
            },
        ),
        (
            "flux-dev",
            {
                "base_model": "black-forest-labs/FLUX.1-dev",
                "base_model_relation": "adapter",
                "license": "other",
                "license_name": "flux-1-dev-non-commercial-license",
                "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-dev/blob/main/LICENSE.md",
            },
        ),
        (
            "flux-dev-krea",
            {
                "base_model": "black-forest-labs/FLUX.1-Krea-dev",
                "base_model_relation": "adapter",
                "license": "other",
                "license_name": "flux-1-dev-non-commercial-license",
                "license_link": "https://huggingface.co/black-forest-labs/FLUX.1-Krea-dev/blob/main/LICENSE.md",
            },
        ),
    ],
)
def test_the_hub_reads_base_and_licence(name, fields):
    assert header(replace(FACTS, variant=VARIANTS[name])) == {
        **fields,
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "flux", "diffusers", "text-to-image"],
        "instance_prompt": "noto",
    }


@pytest.mark.parametrize("text", NASTY)
def test_every_text_stays_what_it_is(text):
    facts = replace(FACTS, trigger=text, prompt=text, settings={text: text, "after": 1})
    card, on_one_line = model_card(facts), " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", " ", text).split())
    assert header(facts)["instance_prompt"] == text
    assert shlex.split(code(card, "bash"))[-1] == on_one_line
    calls = [node for node in ast.walk(ast.parse(code(card, "python"))) if isinstance(node, ast.Call)]
    assert [one.args[0].value for one in calls if isinstance(one.func, ast.Name)] == [on_one_line]
    rows = card.split("## Settings\n\n")[1].split("\n\n")[0].split("\n")
    assert [cells(row) for row in rows[2:]] == [[on_one_line, on_one_line], ["after", "1"]]


def test_without_a_trigger_there_is_none():
    facts = replace(FACTS, trigger="")
    assert "instance_prompt" not in header(facts)
    assert "Trigger" not in model_card(facts)


def test_settings_are_in_words():
    assert table(("setting", "value"), FACTS.settings).split("\n") == [
        "| setting | value |",
        "| --- | --- |",
        "| rank | 4 |",
        "| lr | 0.0001 |",
        r"| targets | attn.\*, a\|b |",
        "| dora | no |",
        "| ema | 0 |",
        "| crop | none |",
    ]


def test_data_base_and_results():
    card = model_card(FACTS)
    whole = hashlib.sha256(f"{'1' * 64}\n{'2' * 64}".encode()).hexdigest()
    for row in (
        "| pictures | 2 |",
        f"| SHA-256 of their sorted SHA-256 | {whole} |",
        f"| SHA-256 of the base | {'ab' * 32} |",
        "| licence of flux-mini | Apache-2.0 (trained on Microsoft Fluent Emoji, MIT) |",
        "| steps | 2 |",
        "| mean loss of the last 1 | 0.2500 |",
        "| best validation loss | 0.3750 at step 1 |",
    ):
        assert row in card.split("\n")
    assert "validation" not in model_card(replace(FACTS, validated={}))


def test_pictures_that_are_there_are_shown():
    for files in ([], ["loss.png"], list(SHOWN)):
        found = re.findall(r"^!\[.+\]\((.+)\)$", model_card(replace(FACTS, files=files)), re.MULTILINE)
        assert found == files


def test_order_of_pictures_does_not_count():
    assert model_card(FACTS) == model_card(replace(FACTS, pictures=FACTS.pictures[::-1]))


def uses(**settings):
    """A card, and the lines of its program for diffusers that load something; none where it has no program."""
    card = model_card(replace(FACTS, settings=settings))
    found = re.search("```python", card) and code(card, "python")
    if found:
        ast.parse(found)
    return card, [line for line in (found or "").splitlines() if line.startswith("pipe.load")]


def test_diffusers_loads_what_it_can():
    lora, program = 'pipe.load_lora_weights("OUT")', uses()[1]
    assert program == [lora]
    card, program = uses(lokr=8)
    assert not program and "--lora OUT" in card and "LyCORIS" in card
    assert "diffusers draws with all of them" in uses(rank_min=1)[0]
    assert "which diffusers leaves out" in uses(train_text="clip,t5")[0]
    words = [line for line in uses(token="<zwx>")[1] if line != lora]
    assert [line.count('token="<zwx>"') for line in words] == [1, 1]
    assert uses(token="<zwx>", targets="none")[1] == words
    assert uses(token="<zwx>", targets="none", train_text="clip")[1] == [lora, *words]


@pytest.mark.parametrize("takes", ["reference", "canny", "control"])
def test_what_sees_pictures_is_drawn_otherwise(takes):
    card, program = uses(takes=takes)
    assert not program and "--lora OUT" not in card and "FLUX_LORA=OUT/pytorch_lora_weights.safetensors" in card
