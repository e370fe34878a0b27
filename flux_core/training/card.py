"""The card of a trained adapter: a README.md in Markdown, with the front matter in YAML that the hub reads.

There is no date, host or path in it, and no name of a picture's file: equal runs have equal cards.
"""

import json
import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from ..hub.client import HUB
from ..terminal import printable
from ..variants import Variant
from .charts import best_step, window_of

TAGS = ("lora", "flux", "diffusers", "text-to-image")
DEV_LICENCE = "flux-1-dev-non-commercial-license"
"""the hub's name of the licence that is not Apache's"""
SHOWN = {
    "ab.png": "the base above, the adapter below",
    "samples.png": "samples, by the steps done",
    "loss.png": "losses, and the rate",
    "changes.png": "how much each module changed",
}
"""pictures beside the card, in the order in which it shows them"""
SPECIAL = re.compile(r"[\\`*\[\]<>|~&#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""what Markdown may take for a mark"""
NOT_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
"""what JSON allows in a string, and YAML does not, or takes for the end of a line"""


@dataclass(frozen=True)
class Facts:
    """What a card tells."""

    variant: Variant
    base: str
    """SHA-256 of the base's file"""
    pictures: Sequence[str]
    """SHA-256 of each picture's file"""
    trigger: str
    """empty where there is none"""
    prompt: str
    """for the examples of use"""
    settings: Mapping[str, object]
    """by name: numbers, words, lists of them; no paths"""
    losses: Sequence[float]
    """of each step"""
    validated: Mapping[int, float]
    """losses of held-out pictures, by the steps done before"""
    files: Collection[str]
    """names of what lies beside the card"""


def model_card(facts: Facts) -> str:
    """The card, as Markdown. The same facts are the same text."""
    shown = {name: text for name, text in SHOWN.items() if name in facts.files}
    parts = [
        front_matter(facts),
        f"# A LoRA for {facts.variant.name}",
        *([f"Trigger: {plain(facts.trigger)}"] if facts.trigger else []),
        *(f"![{text}]({name})" for name, text in shown.items()),
        "## Use",
        *_use(facts),
        "## Settings",
        table(("setting", "value"), facts.settings),
        "## Data and base",
        table(("", ""), _origins(facts)),
        "## Results",
        table(("", ""), _results(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def _use(facts: Facts) -> list[str]:
    """How pictures are drawn with it: here, and with diffusers where that reads all of its file."""
    get = facts.settings.get
    if takes := get("takes"):
        what = "pictures" if takes == "reference" else "a map of the picture"
        return [
            f"With it the model sees {what}, too. With flux_core: `FLUX_LORA=OUT/pytorch_lora_weights.safetensors`, "
            f"where `OUT` is this folder, and the `--name` of a model of this kind that takes {what}."
        ]
    parts = [
        "`OUT` is this folder, or its id on the hub. With flux_core:",
        fenced("bash", f"python cli.py --name {facts.variant.name} --lora OUT --prompt {_in_shell(facts.prompt)}"),
    ]
    if get("lokr"):
        return [*parts, "It is a LoKr, in LyCORIS' keys."]
    parts += ["With diffusers:", fenced("python", diffusers_example(facts))]
    if get("rank_min"):
        parts.append("It is a T-LoRA: fewer ranks count where there is more noise. diffusers draws with all of them.")
    if "t5" in str(get("train_text", "")):
        parts.append("It has factors of T5's, which diffusers leaves out.")
    return parts


def front_matter(facts: Facts) -> str:
    """The part that the hub reads. A base that has no repository there is not named."""
    repo = facts.variant.repo
    fields: dict[str, object] = {
        **({"base_model": repo, "base_model_relation": "adapter"} if repo else {}),
        **licence_fields(facts.variant),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": list(TAGS),
        **({"instance_prompt": facts.trigger} if facts.trigger else {}),
    }
    return "\n".join(["---", *(f"{name}: {quoted(value)}" for name, value in fields.items()), "---"])


def licence_fields(variant: Variant) -> dict[str, object]:
    """The base's licence, which is the adapter's, too, under the hub's names of fields."""
    if variant.licence.startswith("Apache-2.0"):
        return {"license": "apache-2.0"}
    link = f"{HUB}/{variant.repo}/blob/main/LICENSE.md"
    return {"license": "other", "license_name": DEV_LICENCE, "license_link": link}


def quoted(value: object) -> str:
    """A text or a list of them as JSON, which YAML and Python read alike."""
    return NOT_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def diffusers_example(facts: Facts) -> str:
    """A program that draws a picture with diffusers."""
    variant = facts.variant
    base = variant.repo or f"output/{variant.name}-diffusers-bf16"
    tensors = "from safetensors.torch import load_file\n" if facts.settings.get("token") else ""
    made = "" if variant.repo else f"# the folder that this makes: python cli.py save --name {variant.name}\n"
    return f"""\
import torch
from diffusers import FluxPipeline
{tensors}
{made}pipe = FluxPipeline.from_pretrained({quoted(base)}, torch_dtype=torch.bfloat16)
{_loaded(facts)}
pipe.to("cuda" if torch.cuda.is_available() else "cpu")
picture = pipe(
    {quoted(_one_line(facts.prompt))},
    width={variant.width},
    height={variant.height},
    num_inference_steps={variant.num_steps},
    guidance_scale={variant.guidance},
    max_sequence_length={variant.max_text},
).images[0]
picture.save("picture.png")"""


def _loaded(facts: Facts) -> str:
    """The lines of a program that load it into diffusers' pipeline."""
    lines, get = ['pipe.load_lora_weights("OUT")'], facts.settings.get
    if token := get("token"):
        lines = [] if get("targets") == "none" and not get("train_text") else lines
        word = f"token={quoted(token)}, text_encoder=pipe.text_encoder"
        lines += [
            'vectors = load_file("OUT/learned_embeds.safetensors")',
            f'pipe.load_textual_inversion(vectors["clip_l"], {word}, tokenizer=pipe.tokenizer)',
            f'pipe.load_textual_inversion(vectors["t5"], {word}_2, tokenizer=pipe.tokenizer_2)',
        ]
    return "\n".join(lines)


def _origins(facts: Facts) -> dict[str, object]:
    digest = sha256("\n".join(sorted(facts.pictures)).encode()).hexdigest()
    return {
        "pictures": len(facts.pictures),
        "SHA-256 of their sorted SHA-256": digest,
        "base": facts.variant.name,
        "SHA-256 of the base": facts.base,
        f"licence of {facts.variant.name}": facts.variant.licence,
    }


def _results(facts: Facts) -> dict[str, object]:
    found: dict[str, object] = {"steps": len(facts.losses)}
    if facts.losses:
        last = facts.losses[-window_of(len(facts.losses)) :]
        found[f"mean loss of the last {len(last)}"] = f"{math.fsum(last) / len(last):.4f}"
    if facts.validated:
        best = best_step(facts.validated)
        found["best validation loss"] = f"{facts.validated[best]:.4f} at step {best}"
    return found


# Markdown ----------------------------------------------------------------------------------------------


def table(heads: tuple[str, str], rows: Mapping[str, object]) -> str:
    """A table with a row for each name and value."""
    lines = [heads, ("---", "---"), *((plain(name), plain(_told(value))) for name, value in rows.items())]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)


def _told(value: object) -> str:
    """A setting's value in words."""
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case Mapping():
            return ", ".join(f"{key} {_told(one)}" for key, one in value.items()) or "none"
        case list() | tuple():
            return ", ".join(map(_told, value)) or "none"
        case None | "":
            return "none"
    return str(value)


def plain(text: str) -> str:
    """The text on one line, none of which Markdown takes for a mark."""
    return SPECIAL.sub(lambda found: "\\" + found[0], _one_line(text))


def fenced(language: str, code: str) -> str:
    """A block of code, between fences that are longer than any in it."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", code)), 0)
    return f"{fence}{language}\n{code}\n{fence}"


def _in_shell(text: str) -> str:
    """The text as an argument of a shell, in double quotes where nothing in it has a meaning there."""
    line = _one_line(text)
    return shlex.quote(line) if set(line) & set('\\"$`!') else f'"{line}"'


def _one_line(text: str) -> str:
    return " ".join(printable(text).split())
