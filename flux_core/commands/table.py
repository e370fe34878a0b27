"""The commands: for each its help, the function that runs it, and its flags.

Flags of several commands are in `request/fields.py`, a command's own flags here. This is plain data, so that help and
errors in flags appear before pydantic or torch are imported; the function is imported when its command runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from ..files import expand_home
from ..request.fields import (
    DEVICE,
    FIELDS,
    FILES,
    GIVEN,
    LOADING,
    LORAS,
    MACHINE,
    MAX_ROWS,
    MAX_SEED,
    MAX_SEEDS,
    MEMORY,
    NAME,
    NUDGE,
    OUTPUT_DIR,
    PICTURES,
    PLAN,
    REQUEST,
    STEPWISE_DIR,
    THREADS,
    Field,
)  # fmt: skip
from ..request.training import EXAMPLES, SETTINGS


def of_request(*names: str) -> tuple[Field, ...]:
    """These fields of the request."""
    return tuple(FIELDS[name] for name in names)


FILE = Field("file", str, "", path=True)
IMAGE = Field(
    "image",
    str,
    "the picture for the model: as --init-image, or for those that take one as --control or --reference",
    flags=("--img-cond-path",),
    metavar="FILE",
    path=True,
)
BATCH = Field(
    "batch", int, "pictures drawn at once, as rows of one batch, on which last bits depend (default: 1)",
    minimum=1, maximum=MAX_ROWS,
)  # fmt: skip
RUN = (
    Field("from_image", str, "repeat a picture that flux_core made; other flags change it", metavar="FILE", path=True),
    Field(
        "prompt_file",
        str,
        "draw every line of a text file (-: standard input), a CSV, TSV, JSON or JSONL",
        metavar="FILE",
        path=True,
    ),
    IMAGE,
    Field("aspect_ratio", str, "shape in place of width and height, as in 16:9", metavar="W:H"),
    Field("loop", bool, "then read prompts and /w /h /g /s /n /c /np /q from standard input", default=False),
    BATCH,
    OUTPUT_DIR,
    STEPWISE_DIR,
    DEVICE,
    *MEMORY,
    *LOADING,
    Field("compile", bool, "torch.compile for the blocks; gains little where our own kernels run", default=False),
    THREADS,
)
_GIVEN_AGAIN = (
    replace(PLAN[0], help="the Python or JSON file of a plan, where a function of your own is needed again"),
    replace(PLAN[2], help="the Python file of a function of your own, likewise", metavar="FILE.py"),
)
_AXES = ("name", "prompt", "num_steps", "guidance", "num_images", "seed")
EXPLORE = (
    NAME,
    *FILES,
    Field("prompt", str, "what to draw", flags=("-p",)),
    Field("prompts", str, "explore every line of a text file (-: standard input)", metavar="FILE", path=True),
    Field("seeds", str, "as in 1,2,3; auto:8 draws eight (default: auto:1)", multiple=True, metavar="LIST"),
    Field(
        "steps", str, "numbers of denoising steps, as in 4,8,28", flags=("--num-steps",), multiple=True, metavar="LIST"
    ),
    Field("guidance", str, "as in 1.5,2.5,3.5", multiple=True, metavar="LIST"),
    Field("cross", bool, "draw all combinations, not one axis at a time around the first values", default=False),
    *(field for field in REQUEST if field.name not in _AXES),
    IMAGE,
    *LORAS,
    Field(
        "lora_scales",
        str,
        "as in 0,0.5,1: scales of those LoRAs that have none of their own",
        multiple=True,
        metavar="LIST",
    ),
    Field(
        "save_latents",
        str,
        "keep each picture's latents in a file of its name: of the last step, or of every step",
        choices=("last", "every"),
        metavar="STEPS",
        const="last",
    ),
    STEPWISE_DIR,
    Field("no_metadata", bool, "no metadata.csv, and pictures without their request", default=False),
    *PLAN,
    BATCH,
    Field("resume", str, "draw what is missing in a session's folder", metavar="FOLDER", path=True),
    OUTPUT_DIR,
    *MACHINE,
)
REPEAT = (
    Field("row", int, "row of the table; 1 is the first below the header", minimum=1, maximum=1_000_000),
    Field("from_latents", bool, "decode the latents beside the picture; nothing is denoised", default=False),
    replace(FIELDS["lora"], help="where a LoRA of the picture is, if its file has moved; may be repeated"),
    *_GIVEN_AGAIN,
    *FILES,
    *of_request("force", "allow_empty_prompt"),
    OUTPUT_DIR,
    *MACHINE,
)
SITES = (NAME,)
EDIT = (
    NAME,
    *FILES,
    Field("source", str, "what the source shows (with --image: what the photograph shows)"),
    Field("edit", str, "what an edit should show; several texts make several edits", multiple=True),
    Field(
        "image",
        str,
        f"photograph to edit ({', '.join(PICTURES)}), or for a model that paints as --init-image; without it the "
        "source is drawn",
        metavar="FILE",
        path=True,
    ),
    *GIVEN,
    Field(
        "layers",
        str,
        "blocks to inject in: vital, non-vital, all, none, a JSON file, or blocks as in layer.3-5",
        path=True,
    ),
    Field(
        "source_guidance",
        float,
        "guidance of the source (default: as --guidance; with --image 1, and --guidance 3)",
        minimum=0,
        maximum=100,
    ),
    Field(
        "nudge",
        float,
        "factor for a photograph's latent before its inversion",
        minimum=0,
        maximum=10,
        default=NUDGE,
    ),
    Field(
        "replay",
        str,
        "the path that the photograph follows: exact, or released as in the released code",
        choices=("exact", "released"),
        default="exact",
        metavar="NAME",
    ),
    *of_request("width", "height", "num_steps", "guidance", "dtype", "t5_dtype", "force"),
    *LORAS,
    *PLAN,
    Field("seed", int, "seed of the start noise (default: random)", minimum=0, maximum=MAX_SEED),
    OUTPUT_DIR,
    *MACHINE,
)
IMPORTANCE = (
    NAME,
    *FILES,
    Field(
        "prompts",
        str,
        "JSON, a list of prompt and seed (default: 64 that are included)",
        metavar="FILE",
        path=True,
    ),
    Field("limit", int, "take the first N prompts", minimum=1, maximum=1_000_000),
    Field("seeds", int, "seeds of each prompt: its own and the next", minimum=1, maximum=MAX_SEEDS, default=1),
    Field("num_steps", int, "denoising steps", flags=("--steps",), minimum=1, maximum=10_000, default=15),
    *of_request("width", "height", "guidance", "dtype", "t5_dtype", "force"),
    IMAGE,
    *GIVEN,
    *LORAS,
    *PLAN,
    replace(BATCH, help="pictures drawn at once, as rows of one batch (default: what fills the device)", maximum=1024),
    Field(
        "scorer", str, "a DINOv2: dinov2-mini, a folder or a hub id (default: by the model)", metavar="NAME", path=True
    ),
    Field("pooling", str, "the picture's feature: cls or mean", choices=("cls", "mean"), default="cls", metavar="NAME"),
    Field("top", int, "call N blocks vital (default: a sixth, as Stable Flow)", minimum=1, maximum=1000),
    Field("threshold", float, "call the blocks above this importance vital", minimum=0, maximum=2),
    replace(OUTPUT_DIR, help="the study's folder (default: output/importance-NAME)", default=None),
    *MACHINE,
)
CACHE_SEARCH = (
    Field("forwards", int, "how many of the steps may run", minimum=2, maximum=9999),
    NAME,
    *FILES,
    Field("prompts", str, "JSON, a list of prompt and seed (default: 64 that are included)", metavar="FILE", path=True),
    Field("limit", int, "search on the first N prompts", minimum=1, maximum=100_000, default=8),
    Field("held_out", int, "judge on the N prompts behind those", minimum=1, maximum=100_000, default=16),
    Field("seeds", int, "seeds of each prompt: its own and the next", minimum=1, maximum=MAX_SEEDS, default=1),
    Field("tries", int, "candidates that are drawn", minimum=1, maximum=100_000, default=60),
    *of_request("num_steps", "width", "height", "guidance", "dtype", "t5_dtype", "force"),
    Field("output", str, "new file for --cache (default: output/cache-NAME-NofSTEPS-WxH.json)", metavar="FILE",
          path=True),
    *MACHINE,
)  # fmt: skip
GGUF_DTYPES = ("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0")
"""types of blocks that `save --format gguf` writes"""
MERGED_DTYPES = ("bf16", "fp16", "fp32")
SAVED_DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "fp32": "float32",
    **dict.fromkeys(("fp8", "int8", "nf4", *GGUF_DTYPES, "mixed"), "bfloat16"),
}  # fmt: skip
"""values of `save --dtype` -> torch's dtype of the saved weights; of those that are not quantized"""
SAVE = (
    NAME,
    *FILES,
    Field(
        "format",
        str,
        "official (single files), diffusers (a folder; default for bf16, fp16, fp32), or gguf (default for its types)",
        choices=("official", "diffusers", "gguf"),
        metavar="NAME",
    ),
    Field(
        "dtype",
        str,
        f"precision of the saved weights: {', '.join(SAVED_DTYPES)}",
        choices=tuple(SAVED_DTYPES),
        default="bf16",
        metavar="NAME",
    ),
    Field(
        "calibrate",
        str,
        "draw these prompts: with --dtype fp8 to round by GPTQ, with mixed to measure blocks (default: 4 of our own)",
        metavar="FILE",
        path=True,
    ),
    Field("budget", str, "with --dtype mixed: bytes of the transformer's file, as in 7GB", metavar="SIZE"),
    Field(
        "importance",
        str,
        "with --dtype mixed: the importance.json of a study, by which blocks' errors are weighted",
        metavar="FILE",
        path=True,
    ),
    Field("output", str, "new folder to write to (default: output/NAME-FORMAT-DTYPE)", metavar="FOLDER", path=True),
)
TRAIN = (
    *SETTINGS,
    Field("example", str, "noto, zib: train a style, a character, that ship; style: print a file of settings to fill "
          "in", choices=EXAMPLES, metavar="NAME"),
    Field("from_config", str, "settings of another trainer: kohya's TOML, ai-toolkit's YAML, SimpleTuner's JSON; flags "
          "win", metavar="FILE", path=True),
    Field("dry_run", bool, "print the plan, and do nothing", default=False),
)  # fmt: skip
CAPTION = (
    Field("model", str, "what captions: florence2 (Florence-2-large: 0.8 B, 1.6 GB, MIT), qwen3-vl (Qwen3-VL-4B: 9 GB, "
          "Apache-2.0), joycaption (8 B, 17 GB), sprites (flux-mini's world, ships), a folder, or a hub id of a "
          "model that transformers asks about pictures", default="florence2", metavar="NAME", path=True),
    Field("style", str, "what it is asked for: straight (as a prompt), descriptive (a paragraph), tags, short (a "
          "sentence)", choices=("straight", "descriptive", "tags", "short"), default="straight", metavar="NAME"),
    Field("prompt", str, "your own question in place of a style's; not for Florence-2"),
    Field("trigger", str, "a word for what is learned, put in front of captions that lack it, or where they say "
          "[trigger]", default="", metavar="WORD"),
    Field("prefix", str, "text in front of each caption", default=""),
    Field("suffix", str, "text behind each caption", default=""),
    Field("existing", str, "what happens to a caption that is there: skip (none is made), overwrite, append, prepend",
          choices=("skip", "overwrite", "append", "prepend"), default="skip", metavar="NAME"),
    Field("to", str, "where captions go: txt (a file beside each picture), jsonl (metadata.jsonl), parquet "
          "(metadata.parquet)", choices=("txt", "jsonl", "parquet"), default="txt", metavar="NAME"),
    Field("batch", int, "pictures at once", minimum=1, maximum=1024, default=1),
    Field("max_side", int, "pixels to which a picture's longer side is scaled down first", minimum=28, maximum=8192,
          default=512),
    Field("max_new_tokens", int, "the longest answer", minimum=1, maximum=4096, default=256),
    Field("temperature", float, "0: the likeliest answer; above: one that is drawn by --seed", minimum=0, maximum=10,
          default=0.0),
    Field("seed", int, "of answers that are drawn", minimum=0, maximum=MAX_SEED, default=0),
    Field("dtype", str, "of the captioner: bfloat16, float32; int8 or nf4: its language model in few bits (default: "
          "bfloat16 on CUDA, else float32)", choices=("auto", "bfloat16", "float32", "int8", "nf4"), metavar="NAME"),
    Field("name", str, "the model to be trained, whose T5 counts tokens (default: flux-dev, for sprites flux-mini)",
          metavar="NAME"),
    DEVICE,
)  # fmt: skip
SERVE = (
    NAME,
    *FILES,
    Field("host", str, "address to listen on; others than this machine need the key in FLUX_CORE_KEY "
          "(default: 127.0.0.1)", metavar="ADDRESS"),
    Field("port", int, "port to listen on", minimum=1, maximum=65_535, default=7801),
    Field("queue", int, "requests that may wait", minimum=1, maximum=100_000, default=1000),
    Field("loras", str, "folder of LoRAs that requests may name", metavar="FOLDER", path=True),
    Field("taef1", str, "a tiny decoder for previews, for models with FLUX.1's autoencoder: safetensors of taef1",
          metavar="PATH", path=True),
    *of_request("dtype", "t5_dtype"),
    OUTPUT_DIR,
    *MACHINE,
    next(field for field in RUN if field.name == "compile"),
)  # fmt: skip
PAGE = (*SERVE, Field("no_browser", bool, "open no browser", default=False))
DOWNLOAD = (
    Field(
        "source",
        str,
        "where from: hub (huggingface.co) or modelscope (modelscope.cn)",
        choices=("hub", "modelscope"),
        default="hub",
        metavar="NAME",
    ),
    Field(
        "endpoint",
        str,
        "address of the source or of a mirror (default: for the hub the environment's, else the source's own)",
        metavar="URL",
    ),
    replace(OUTPUT_DIR, help="with --source modelscope: the folder (default: beside the hub's cache)", default=None),
)

DOCTOR = (
    Field("name", str, "a model to plan for (default: flux-dev)", metavar="NAME"),
    Field(
        "memory", str, "plan for so much of a card's memory, as in 12GB; with --device cpu, of a CPU's", metavar="SIZE"
    ),
    replace(DEVICE, help="cpu: plan for a CPU (default: a card)"),
    next(field for field in MEMORY if field.name == "vae_tiling"),
    *of_request("width", "height", "dtype", "t5_dtype"),
)
LORA_DIALECTS = ("official", "diffusers", "kohya")
"""dialects that LoRA files are written in (`lora/spell.py`)"""
_PARTIAL = Field("allow_partial", bool, "leave out what cannot be written, and list it", default=False)
LORA_CONVERT = (
    Field("to", str, f"dialect: {', '.join(LORA_DIALECTS)}", choices=LORA_DIALECTS, metavar="NAME"),
    _PARTIAL,
)
LORA_MERGE = (
    NAME,
    *FILES,
    Field("scale", float, "factor of each LoRA: one for all, or as many as files (default: 1)", multiple=True),
    replace(_PARTIAL, help="merge what matches where some modules name nothing in the model"),
    Field("format", str, "official (single files) or diffusers (a folder)",
          choices=("official", "diffusers"), default="diffusers", metavar="NAME"),
    Field("dtype", str, f"precision of the saved weights: {', '.join(MERGED_DTYPES)}", choices=MERGED_DTYPES,
          default="bf16", metavar="NAME"),
    replace(SAVE[-1], help="new folder to write to (default: output/NAME-FORMAT-DTYPE-merged)"),
)  # fmt: skip
LORA_EXTRACT = (
    Field("base", str, "the transformer before: a file, a folder or a model's name", metavar="PATH", path=True),
    Field("tuned", str, "the transformer after, of the same sizes", metavar="PATH", path=True),
    Field("rank", int, "of each module", minimum=1, maximum=4096),
    Field("output", str, "new file to write to, .safetensors", metavar="FILE", path=True),
    replace(LORA_CONVERT[0], default="official"),
    Field("dtype", str, f"precision of the factors: {', '.join(MERGED_DTYPES)}", choices=MERGED_DTYPES, default="bf16",
          metavar="NAME"),
    DEVICE,
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command: the first word or words of the command line."""

    help: str
    function: str
    """`module:function`, the module in this package"""
    fields: tuple[Field, ...] = ()
    positional: tuple[Field, ...] = ()
    """values without a flag; the last may be several"""

    def run(self, **flags: Any) -> None:
        """Import the function and call it with the flags, `~` in paths expanded. UsageError for an unknown home."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(import_module(f".{module}", __package__), name)
        function(**self.with_whole_paths(flags))

    def with_whole_paths(self, flags: dict[str, Any]) -> dict[str, Any]:
        """The flags, with `~` in paths expanded."""
        paths = {field.name: field.flag for field in self.fields if field.path}
        paths |= {field.name: field.name for field in self.positional if field.path}
        return flags | {key: _whole(flags[key], flag) for key, flag in paths.items() if key in flags}


def _whole(value: Any, named: str) -> Any:
    """A path, several, or the first of each group of values, with `~` expanded."""
    if isinstance(value, str):
        return expand_home(value, named)
    if value and isinstance(value[0], list):
        return [[expand_home(words[0], named), *words[1:]] for words in value]
    return [expand_home(path, named) for path in value]


COMMANDS = {
    "generate": Command(
        "draw pictures (this command's name may be left out)", "generate:generate", REQUEST + LORAS + FILES + PLAN + RUN
    ),
    "explore": Command("draw over seeds, steps and guidance, with grids and a record", "explore:explore", EXPLORE),
    "repeat": Command(
        "draw a recorded picture again: a row of metadata.csv, a PNG, latents", "repeat:repeat", REPEAT, (FILE,)
    ),
    "edit": Command("change what the words say and keep the rest (Stable Flow)", "edit:edit", EDIT),
    "importance": Command("measure how important each block is, by DINOv2", "importance:importance", IMPORTANCE),
    "info": Command(
        "print the request that drew a picture, or what a file of weights holds", "info:print_info", positional=(FILE,)
    ),
    "verify": Command(
        "check a file of weights for damage, NaN and infinity", "verify:print_verdict", positional=(FILE,)
    ),
    "sites": Command("list the named values of a model's forward, which plans use", "sites:print_sites", SITES),
    "run": Command("run the commands in a job file (JSON)", "run:run", positional=(FILE,)),
    "train": Command(
        "train a LoRA from pictures and captions",
        "train:train",
        TRAIN,
        (Field("config", str, "settings as a TOML file; flags win", metavar="CONFIG.toml", path=True, default=""),),
    ),
    "caption": Command(
        "write a caption for each picture of a folder, for train",
        "caption:caption",
        CAPTION,
        (Field("folder", str, "pictures, in folders inside it, too", metavar="DIR", path=True),),
    ),
    "serve": Command("answer other programs on an address of this machine (OpenAI's endpoints)", "serve:serve", SERVE),
    "page": Command("draw and see inside in a page of the browser", "serve:page", PAGE),
    "save": Command("write a model's weights to a folder", "save:print_saved", SAVE),
    "download": Command(
        "fetch an official model's files from the hub or ModelScope",
        "download:download",
        DOWNLOAD,
        (Field("name", str, ""),),
    ),
    "lora info": Command(
        "print what a LoRA holds, and which models it fits",
        "lora:print_info",
        positional=(replace(FILE, help="a safetensors file, or a trainer's folder"),),
    ),
    "lora convert": Command(
        "write a LoRA in another dialect, without a loss",
        "lora:print_converted",
        LORA_CONVERT,
        (
            Field("source", str, "the LoRA to read", metavar="IN", path=True),
            Field("target", str, "the new file", metavar="OUT", path=True),
        ),
    ),
    "lora merge": Command(
        "write a model with LoRAs merged into its weights",
        "lora:print_merged",
        LORA_MERGE,
        (Field("loras", str, "one LoRA, or several", metavar="FILE", path=True, multiple=True),),
    ),
    "lora extract": Command("write the difference of two models as a LoRA", "lora:print_extracted", LORA_EXTRACT),
    "cache search": Command(
        "search which steps run when others are left out, for --cache", "cache:print_found", CACHE_SEARCH
    ),
    "doctor": Command(
        "print what this machine has, and what would fit; with --memory how a model would lie in it",
        "doctor:print_report",
        DOCTOR,
    ),
}
GROUPS = {
    "lora": "LoRA files: what they hold, other dialects, merged into a model, extracted from one",
    "cache": "steps that are left out: which ones",
}
"""the first words of commands of two words, with their help"""
