"""Text encoders that learn with a transformer: flux-mini's own, in front of a small one."""

from dataclasses import replace

import pytest
import torch
from golden_files import distance
from safetensors.torch import load_file
from small import PARAMS
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from flux_core.errors import UsageError
from flux_core.hub.places import embedded_folder
from flux_core.lora import attach
from flux_core.model import Flux
from flux_core.text import TrainedWords, load_text_encoders
from flux_core.training import Example, Recipe, adapt, train
from flux_core.training.loop import identity, loss_of
from flux_core.training.text_encoders import NAMES, TextForm, adapt_text, encoders_of, read_live, token_of
from flux_core.training.text_plan import cost_of
from flux_core.variants import VARIANTS

MINI = VARIANTS["flux-mini"]
RECIPE = Recipe(steps=4, lr=1e-2, batch=2, seed=5, ema=0.5)
TEXTS = ("a red apple", "two green pigs")
TEXT = "a photo of a red pig"
WAYS = [["clip"], ["t5"], ["clip", "t5"]]


def encoders():
    t5, clip = load_text_encoders(MINI, dtype=torch.float32)
    return {"clip": clip, "t5": t5}


def transformer():
    draw = torch.Generator().manual_seed(0)
    model = Flux(replace(PARAMS, vec_in_dim=128, context_in_dim=256))
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.2 * torch.randn(x.shape, generator=draw))
    return model


def adapter_of(learns, rate=None, rank=3, token=None, targets=("to_q",), **how):
    draw, every = torch.Generator().manual_seed(1), encoders()
    own = adapt(transformer(), targets, 2, 2, draw, **how)
    read = {name: every[name] for name in read_live(learns, token)}
    word = None if token is None else token_of(read, token, "red apple", 2)
    return adapt_text(own, read, learns, TextForm(rank, rank, how.get("rslora", False), rate), draw, word)


def examples(live):
    """Two pictures, whose texts are ids for encoders that read, and encoded for the others."""
    draw, found = torch.Generator().manual_seed(2), []
    every = encoders()
    for i, text in enumerate(TEXTS):
        read = [every[key].tokens([text]) if key in live else every[key]([text]) for key in ("t5", "clip")]
        found.append(Example(f"{i}.png", torch.randn(16, 4, 6, generator=draw), *(x[0].detach() for x in read)))
    return found


@torch.no_grad()
def embedded(every):
    """What the encoders make of a text that was not trained on."""
    return {name: encoder([TEXT]) for name, encoder in every.items()}


@pytest.mark.parametrize("learns", WAYS)
def test_before_the_first_step_a_step_is_that_of_texts_encoded_once(learns):
    adapter, plain = adapter_of(learns), adapt(transformer(), ["to_q"], 2, 2, torch.Generator().manual_seed(1))
    losses = [
        loss_of(one, some, RECIPE, 0) for one, some in ((adapter, examples(adapter.encoders)), (plain, examples([])))
    ]
    assert distance(*(x.detach() for x in losses)) <= 1e-6  # of a batch, and one by one
    before = embedded(encoders())
    assert all(torch.equal(x, before[name]) for name, x in embedded(adapter.encoders).items())


@pytest.mark.parametrize("learns", WAYS)
def test_the_file_gives_the_embeddings_that_training_saw(learns, tmp_path):
    adapter, every = adapter_of(learns), encoders()
    plain = embedded(every)
    train(adapter, examples(adapter.encoders), RECIPE)
    with adapter.averaged():
        path, learned = adapter.save(tmp_path), embedded(adapter.encoders)
    assert {name for name, x in learned.items() if not torch.equal(x, plain[name])} == set(learns)
    assert {key.partition(".")[0] for key in load_file(path)} == {"transformer", *(NAMES[x].prefix for x in learns)}
    with adapter.off():
        assert all(torch.equal(x, plain[name]) for name, x in embedded(adapter.encoders).items())
    attach(transformer(), path, text={name: encoder.model for name, encoder in every.items()})
    assert all(distance(embedded(every)[name], x) <= 1e-6 for name, x in learned.items())
    other = adapter_of(learns)
    other.load(load_file(path))
    with adapter.averaged():
        assert all(torch.equal(x, other.named_parameters()[name]) for name, x in adapter.named_parameters().items())
    adapter.remove()
    assert all(torch.equal(x, plain[name]) for name, x in embedded(adapter.encoders).items())


def test_a_gradient_reaches_every_factor_and_is_the_difference_quotient():
    adapter = adapter_of(["clip", "t5"])
    some, text = examples(adapter.encoders), {x: p for x, p in adapter.named_parameters().items() if "text" in x}
    loss_of(adapter, some, RECIPE, 0).backward()
    assert all(p.grad.abs().max() > 0 for name, p in text.items() if name.endswith((".up", "lora_B.weight")))
    assert len(text) == 2 * 4 * (2 + 3)
    for prefix in ("text_encoder.", "text_encoder_2."):
        name = max((x for x in text if x.startswith(prefix)), key=lambda x: text[x].grad.norm())
        x, way = text[name], text[name].grad / text[name].grad.norm()
        with torch.no_grad():
            ends = []
            for step in (1e-2, -2e-2):
                x += step * way
                ends.append(loss_of(adapter, some, RECIPE, 0))
            x += 1e-2 * way
        assert float((ends[0] - ends[1]) / 2e-2) == pytest.approx(float(x.grad.norm()), rel=2e-2)


def test_a_run_that_was_stopped_goes_on_to_the_bit_with_a_rate_of_its_own(tmp_path):
    some, states = examples(["clip", "t5"]), []
    for folder, stops in (("whole", ()), ("parts", (1, 3))):
        for stop in (*stops, RECIPE.steps):
            adapter = adapter_of(["clip", "t5"], 3e-3)
            train(adapter, some, RECIPE, tmp_path / folder, on_step=lambda done, stop=stop: done.step == stop)
        states.append(adapter.state())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    with pytest.raises(UsageError, match="was trained with text"):
        train(adapter_of(["clip"], 3e-3), examples(["clip"]), RECIPE, tmp_path / "whole")


def test_text_lr_is_the_step_of_the_text_encoders():
    """Adam's first step is the rate, whatever the gradient."""
    adapter = adapter_of(["clip", "t5"], 3e-3)
    train(adapter, examples(adapter.encoders), replace(RECIPE, steps=1, ema=0.0, max_grad_norm=1e9))
    for name, x in adapter.named_parameters().items():
        if name.endswith((".up", "lora_B.weight")):
            assert float(x.detach().abs().max()) == pytest.approx(
                3e-3 if name.startswith("text") else 1e-2, rel=1e-2
            ), name
    plain = adapt(transformer(), ["to_q"], 2, 2)
    assert plain.factors_of_rate(1e-2) == {} and "text" not in identity(RECIPE, [], plain)


@torch.no_grad()
def test_diffusers_reads_clips_factors(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    adapter = adapter_of(["clip", "t5"], rslora=True)
    for x in adapter.parameters():
        x.add_(0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))
    path, learned = adapter.save(tmp_path), embedded(adapter.encoders)["clip"]
    adapter.remove()
    clip = CLIPTextModel.from_pretrained(embedded_folder(MINI) / "clip").float()
    state, metadata = diffusers.FluxPipeline.lora_state_dict(path, return_lora_metadata=True)
    diffusers.FluxPipeline.load_lora_into_text_encoder(state, None, clip, "text_encoder", metadata=metadata)
    assert distance(clip(input_ids=encoders()["clip"].tokens([TEXT])).pooler_output, learned) <= 1e-6


def test_names_of_encoders():
    assert encoders_of(" t5, clip ") == ["clip", "t5"] and encoders_of("") == []
    assert [read_live(x) for x in ([], *WAYS)] == [[], ["clip"], ["clip", "t5"], ["clip", "t5"]]
    with pytest.raises(UsageError, match="--train-text is clip or t5, or both with a comma between them, not 'clipl'"):
        encoders_of("t5,clipl")


def test_the_plan_counts_what_learns_and_what_is_kept():
    adapter = adapter_of(["clip", "t5"], rank=5)
    cost = cost_of(MINI, "float32", None, ["clip", "t5"], ["clip", "t5"], 5, 0, 2, 1)
    assert cost.numbers == sum(x.numel() for name, x in adapter.named_parameters().items() if "text" in name)
    assert cost.weights == sum(x.nbytes for encoder in encoders().values() for x in encoder.parameters())
    preserved = cost_of(MINI, "float32", None, ["clip", "t5"], ["clip", "t5"], 5, 0, 2, 1, (2, 1))
    assert preserved.tera == pytest.approx(2.5 * cost.tera)  # two that are learned from, and one without a backward
    word = cost_of(MINI, "float32", None, ["clip", "t5"], [], 5, 3, 2, 1)
    assert word.numbers == 3 * (128 + 256) and word.weights == cost.weights and word.tera == cost.tera
    some, kept = examples(adapter.encoders), {}

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    own = {x.untyped_storage()._cdata for e in adapter.encoders.values() for x in e.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = adapter.encoded(torch.stack([x.txt for x in some]), torch.stack([x.vec for x in some]))
    seen = sum(x.nbytes() for key, x in kept.items() if key not in own)
    assert len(found) == 2 and cost.kept == pytest.approx(seen, rel=0.05)


# Textual inversion -------------------------------------------------------------------------------------


WORD = "<zwx>"


def learned_word(learns=(), **how):
    """An adapter whose word has learned, and what its pictures say."""
    adapter, every, draw = adapter_of(learns, token=WORD, **how), encoders(), torch.Generator().manual_seed(2)
    for name, encoder in every.items():
        encoder.trained = TrainedWords({WORD: torch.empty(2, adapter.token.vectors[name].shape[1])})
    read = [(every["t5"].tokens([text])[0], every["clip"].tokens([text])[0]) for text in (WORD, f"a {WORD} on grass")]
    return adapter, [Example(f"{i}.png", torch.randn(16, 4, 6, generator=draw), *ids) for i, ids in enumerate(read)]


@torch.no_grad()
def said(every, text):
    return {name: encoder([text]) for name, encoder in every.items()}


def test_a_word_begins_as_the_words_that_it_is_said_to_be():
    adapter, _ = learned_word()
    named, plain = said(adapter.encoders, f"a {WORD} on grass"), said(encoders(), "a red apple on grass")
    assert all(torch.equal(x, plain[name]) for name, x in named.items())
    with pytest.raises(UsageError, match="--token-init ' ' has no words"):
        token_of(encoders(), WORD, " ", 1)


@pytest.mark.parametrize("learns", [[], ["clip"]])
def test_the_file_of_a_word_gives_what_training_saw(learns, tmp_path):
    adapter, some = learned_word(learns)
    first = said(adapter.encoders, f"big {WORD}")
    train(adapter, some, replace(RECIPE, ema=0.0))
    path, learned = adapter.save(tmp_path), said(adapter.encoders, f"big {WORD}")
    assert not any(torch.equal(x, first[name]) for name, x in learned.items())
    with adapter.off():
        assert all(torch.equal(x, first[name]) for name, x in said(adapter.encoders, f"big {WORD}").items())
    bundle, alone = load_file(path), load_file(tmp_path / "learned_embeds.safetensors")
    assert {x for x in bundle if "emb" in x} == {f"bundle_emb.{WORD}.clip_l", f"bundle_emb.{WORD}.t5"}
    assert alone.keys() == {"clip_l", "t5", "t5xxl"} and torch.equal(alone["t5"], alone["t5xxl"])
    assert all(torch.equal(alone[key], bundle[f"bundle_emb.{WORD}.{key}"]) for key in ("clip_l", "t5"))
    for file in (path, tmp_path / "learned_embeds.safetensors")[: 1 if learns else 2]:
        every = encoders()
        handle = attach(transformer(), file, text={name: encoder.model for name, encoder in every.items()})
        for name, encoder in every.items():
            encoder.trained = TrainedWords(handle.tokens[name])
        assert all(distance(said(every, f"big {WORD}")[name], x) <= 1e-6 for name, x in learned.items())


@pytest.mark.parametrize("how", [{}, {"preserve": "blank"}, {"accumulation": 2, "ema": 0.5}])
def test_texts_without_the_word_have_a_loss_and_no_gradient(how, tmp_path):
    """Of a word that learns alone; also where no text of a step has it, and where a run goes on from there."""
    recipe = replace(RECIPE, **{"ema": 0.0, "batch": 1, "steps": 6, **how})

    def run(folder, stop=0):
        adapter, (one, other) = learned_word(targets=())
        bare = [adapter.encoders[name].tokens(["on grass"])[0] for name in ("t5", "clip")]
        some = [one._replace(others={"empty": bare}), other._replace(txt=bare[0], vec=bare[1], others={"empty": bare})]
        seen = []
        losses = train(adapter, some, recipe, folder, on_step=lambda done: seen.append(done) or done.step == stop)
        return losses, seen, adapter.state()

    losses, seen, state = run(tmp_path / "whole")
    assert [done.loss for done in seen] == losses and min(losses) > 0
    assert {done.norm > 0 for done in seen} == ({True, False} if recipe.accumulation == 1 else {True})
    run(tmp_path / "parts", stop=1)
    again = run(tmp_path / "parts")
    assert again[0] == losses and all(torch.equal(x, state[name]) for name, x in again[2].items())


def test_a_word_that_was_stopped_goes_on_to_the_bit(tmp_path):
    states = []
    for folder, stops in (("whole", ()), ("parts", (2,))):
        for stop in (*stops, RECIPE.steps):
            adapter, some = learned_word()
            train(adapter, some, RECIPE, tmp_path / folder, on_step=lambda done, stop=stop: done.step == stop)
        states.append(adapter.state())
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())


@torch.no_grad()
def test_diffusers_reads_a_words_vectors(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    adapter, _ = learned_word(["clip"])
    for x in adapter.parameters():
        x.add_(0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))
    adapter.save(tmp_path)
    folder = embedded_folder(MINI)
    clip, t5 = (kind.from_pretrained(folder / x) for kind, x in ((CLIPTextModel, "clip"), (T5EncoderModel, "t5")))
    kinds = {"clip": CLIPTokenizer, "t5": T5TokenizerFast}
    words = {name: kind.from_pretrained(folder / name) for name, kind in kinds.items()}
    every = {"clip": clip.float(), "t5": t5.float()}
    nothing = dict.fromkeys(("scheduler", "vae", "transformer"))
    pipeline = diffusers.FluxPipeline(
        text_encoder=clip, tokenizer=words["clip"], text_encoder_2=t5, tokenizer_2=words["t5"], **nothing
    )
    state, metadata = pipeline.lora_state_dict(tmp_path, return_lora_metadata=True)
    pipeline.load_lora_into_text_encoder(state, None, clip, "text_encoder", metadata=metadata)
    found = load_file(tmp_path / "learned_embeds.safetensors")
    for key, name in (("clip_l", "clip"), ("t5", "t5")):
        pipeline.load_textual_inversion(
            found[key], token=["<s0>", "<s1>"], text_encoder=every[name], tokenizer=words[name]
        )
    ids = words["t5"]("big <s0><s1>", padding="max_length", max_length=32, return_tensors="pt").input_ids
    theirs = t5(ids).last_hidden_state
    assert distance(theirs, said(adapter.encoders, f"big {WORD}")["t5"]) <= 1e-6
