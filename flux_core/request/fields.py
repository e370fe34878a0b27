"""The table of what can be asked: every flag of the command line and every field of a request, one row each.

The parser, its help, the request's bounds and the error texts all read this table, so they cannot disagree.
It holds plain data: a wrong flag is answered from here, before pydantic or torch are imported.
"""

from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from ..variants import DEFAULT, VARIANTS

MAX_SEED = 2**32 - 1
"""torch's CPU generator reads the low 32 bits of a seed; larger ones would silently repeat smaller ones"""
MAX_SEEDS = 1000
"""pictures or seeds that one flag may ask for"""

DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32", "fp8": "fp8"}
"""accepted spellings of a dtype, and the name that is recorded; no float16: FLUX overflows in it. fp8 is bfloat16 with
most of the transformer's Linears in eight bits"""

PERCENTILE = 99.5
"""of dynamic thresholding, as in Imagen"""
CFG_SCHEDULES = ("constant", "linear", "cosine")
"""as it is, or down to 1 at the last step: in a line, or by a quarter of a cosine"""


@dataclass(frozen=True)
class Field:
    """One thing that can be asked for. `kind` is int, float, str, or bool for a switch."""

    name: str
    kind: type
    help: str
    flags: tuple[str, ...] = ()
    """other spellings on the command line"""
    minimum: int | None = None
    maximum: int | None = None
    default: object = None
    """a value; None: found out when the request is built"""
    from_row: bool = False
    """whether the default stands in the variant's row, under the same name"""
    choices: tuple[str, ...] = ()
    many: bool = False
    """whether the flag takes several values"""
    word: str = ""
    """how help calls the value; by itself N, X or TEXT"""
    bare: str = ""
    """the value that the flag has where none follows it; empty: one has to follow"""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def nature(self) -> str:
        """What a value has to be, for error texts: "a whole number from 1 to 10000"."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        noun = {int: "a whole number", float: "a number", bool: "yes or no", str: "text"}[self.kind]
        return noun if self.minimum is None else f"{noun} from {self.minimum} to {self.maximum}"

    def parse(self, given: str | None, otherwise: Any = None) -> Any:
        """The value of a flag's text, or `otherwise` where it was not given. UsageError says what it has to be."""
        if given is None:
            return otherwise
        try:
            value = self.kind(given)
            right = self.minimum is None or self.maximum is None or self.minimum <= value <= self.maximum
        except ValueError:
            right = False
        if not right or (self.choices and given not in self.choices):
            raise UsageError(f"{self.flag} must be {self.nature}, not {given!a}")
        return value

    @property
    def metavar(self) -> str:
        return self.word or {int: "N", float: "X"}.get(self.kind, "TEXT")

    @property
    def default_text(self) -> str:
        """The default as help shows it; several where the variants differ."""
        if not self.from_row:
            return "" if self.default in (None, False) else f" (default: {self.default})"
        values = {name: getattr(row, self.name) for name, row in VARIANTS.items()}
        first = next(iter(values.values()))
        others = [f"{name} {value}" for name, value in values.items() if value != first]
        return f" (default: {', '.join([str(first), *others])})"


_NAME = Field("name", str, f"model: {', '.join(VARIANTS)}", default=DEFAULT, word="NAME")
THREADS = Field(
    "threads",
    int,
    "CPU threads; another number may change a picture's last bits (default: the cores this process may use)",
    (),
    1,
    1024,
)
FILES = (
    Field("model", str, "your own weights: a safetensors file or a folder; or as --name", ("-m",), word="PATH"),
    Field("ae", str, "your own autoencoder: a file or a folder", word="PATH"),
    Field("clip_l", str, "your own CLIP text encoder: a file or a folder", word="PATH"),
    Field("t5xxl", str, "your own T5 text encoder: a file or a folder", word="PATH"),
)
"""the parts of a model; keys of `Variant.files`"""

REQUEST = (
    _NAME,
    Field("prompt", str, "what to draw", ("-p",)),
    Field("negative_prompt", str, "what to steer away from; goes with --true-cfg-scale", ("-n",)),
    Field("width", int, "pixels", ("-W",), 1, 65536, from_row=True),
    Field("height", int, "pixels", ("-H",), 1, 65536, from_row=True),
    Field("num_steps", int, "denoising steps", ("--steps",), 1, 10_000, from_row=True),
    Field("guidance", float, "how closely to follow the prompt", (), 0, 100, from_row=True),
    Field(
        "true_cfg_scale",
        float,
        "steer from the negative (or empty) prompt towards the prompt; above 1 with two forwards a step (default: 1)",
        ("--cfg-scale",),
        1,
        100,
    ),
    Field(
        "cfg_zero",
        int,
        "CFG-Zero*: true CFG at its best scale, after N steps (1) that stand still",
        (),
        0,
        9999,
        bare="1",
    ),
    Field("mimic_scale", float, "dynamic thresholding: no more contrast than true CFG of this scale has", (), 1, 100),
    Field(
        "threshold_percentile", float, f"of the values that --mimic-scale bounds (default: {PERCENTILE})", (), 50, 100
    ),
    Field(
        "cfg_schedule",
        str,
        f"how the scales of true CFG go over the steps: {', '.join(CFG_SCHEDULES)} (default: constant)",
        choices=CFG_SCHEDULES,
        word="NAME",
    ),
    Field("num_images", int, "draw the seeds s, s+1, …", (), 1, MAX_SEEDS, default=1),
    Field("seed", int, f"0 to {MAX_SEED}, one or several; -1: random (default)", ("-s",), 0, MAX_SEED, many=True),
    Field("init_image", str, "picture to start from (PNG, JPEG, WebP)", word="FILE"),
    Field("strength", float, "how far to leave the init image; 1: all the way (default: 0.8)", (), 0, 1),
    Field(
        "dtype",
        str,
        "precision: bfloat16, float32 or fp8 (default: bfloat16 on CUDA, else float32)",
        choices=("auto", *DTYPES),
        word="NAME",
    ),
    Field("force", bool, "allow sizes that the model was not made for", default=False),
    Field("allow_empty_prompt", bool, "allow a prompt without words", default=False),
)
PLAN = (
    Field("plan", str, "interventions to draw with, as a JSON file (docs/hooks.md)", word="FILE"),
    Field("skip", str, "leave blocks out, as in layer.9 or layer.3-5@0-14 (steps)", many=True, word="BLOCKS"),
)
MEMORY = (
    Field("offload", bool, "keep on the device only the part that is at work: less memory, slower", default=False),
    Field("vae_tiling", bool, "autoencoder strip by strip: large pictures in less memory, no seams", default=False),
)
"""also taken by themselves where memory runs out"""
RUN = (
    Field("from_image", str, "repeat a picture that flux_core made; other flags change it", word="FILE"),
    Field("prompt_file", str, "draw every line of a text file (-: standard input), a CSV or JSONL", word="FILE"),
    Field("loop", bool, "then read prompts and /w /h /g /s /n /c /np /q from standard input", default=False),
    Field("output_dir", str, "folder for the pictures", default="output", word="FOLDER"),
    Field("stepwise_dir", str, "also write the picture after every step, and a sheet of them", word="FOLDER"),
    Field("device", str, "auto, cpu, cuda, cuda:1, …, mps", default="auto", word="NAME"),
    *MEMORY,
    Field("compile", bool, "torch.compile for the blocks; gains little where our own kernels run", default=False),
    THREADS,
)
_AXES = ("name", "prompt", "num_steps", "guidance", "num_images", "seed", "init_image", "strength")
EXPLORE = (
    _NAME,
    *FILES,
    Field("prompt", str, "what to draw", ("-p",)),
    Field("prompts", str, "explore every line of a text file (-: standard input)", word="FILE"),
    Field("seeds", str, "as in 1,2,3; auto:8 draws eight (default: auto:1)", many=True, word="LIST"),
    Field("steps", str, "numbers of denoising steps, as in 4,8,28", ("--num-steps",), many=True, word="LIST"),
    Field("guidance", str, "as in 1.5,2.5,3.5", many=True, word="LIST"),
    Field("cross", bool, "draw all combinations, not one axis at a time around the first values", default=False),
    *(field for field in REQUEST if field.name not in _AXES),
    Field(
        "save_latents",
        str,
        "keep each picture's latents in a file of its name: of the last step, or of every one",
        choices=("last", "every"),
        word="STEPS",
        bare="last",
    ),
    Field("stepwise_dir", str, "also write the picture after every step, and a sheet of them", word="FOLDER"),
    Field("no_metadata", bool, "no metadata.csv, and pictures that do not say how they were made", default=False),
    Field("resume", str, "finish what is missing in a session's folder", word="FOLDER"),
    Field("output_dir", str, "where the session makes its folder", default="output", word="FOLDER"),
    Field("device", str, "auto, cpu, cuda, cuda:1, …, mps", default="auto", word="NAME"),
    *MEMORY,
    THREADS,
)
REPEAT = (
    Field("row", int, "row of the table; 1 is the first one below the head", (), 1, 1_000_000),
    Field("from_latents", bool, "decode the latents that lie beside the picture: nothing is denoised", default=False),
    *FILES,
    *(field for field in REQUEST if field.name in ("force", "allow_empty_prompt")),
    Field("output_dir", str, "folder for the picture", default="output", word="FOLDER"),
    Field("device", str, "auto, cpu, cuda, cuda:1, …, mps", default="auto", word="NAME"),
    *MEMORY,
    THREADS,
)
SITES = (_NAME,)
EDIT = (
    _NAME,
    *FILES,
    Field("source", str, "what the source shows (with --image: what the photograph shows)"),
    Field("edit", str, "what an edit shall show; several make several edits", many=True),
    Field("image", str, "photograph to edit (PNG, JPEG, WebP); without it the source is drawn", word="FILE"),
    Field("layers", str, "blocks to inject in: vital, non-vital, all, none, a JSON file, or blocks as in layer.3-5"),
    Field("source_guidance", float, "guidance of the source (default: as --guidance; with --image 1)", (), 0, 100),
    Field("nudge", float, "what a photograph's latent is multiplied by before its inversion", (), 0, 10, 1.15),
    Field(
        "replay",
        str,
        "where the photograph is held: exact, or as the released code",
        (),
        choices=("exact", "released"),
        default="exact",
        word="NAME",
    ),
    *(field for field in REQUEST if field.name in ("width", "height", "num_steps", "guidance", "dtype", "force")),
    Field("seed", int, "seed of the start noise (default: random)", (), 0, MAX_SEED),
    Field("output_dir", str, "folder for the pictures", default="output", word="FOLDER"),
    Field("device", str, "auto, cpu, cuda, cuda:1, …, mps", default="auto", word="NAME"),
    *MEMORY,
    THREADS,
)
IMPORTANCE = (
    _NAME,
    *FILES,
    Field("prompts", str, "what to draw: JSON, a list of prompt and seed (default: 64 that ship)", word="FILE"),
    Field("limit", int, "take the first N prompts", (), 1, 1_000_000),
    Field("seeds", int, "seeds of each prompt: its own and those behind it", (), 1, MAX_SEEDS, default=1),
    Field("num_steps", int, "denoising steps", ("--steps",), 1, 10_000, default=15),
    *(field for field in REQUEST if field.name in ("width", "height", "guidance", "dtype", "force")),
    Field("batch", int, "pictures drawn at once (default: what fills the device)", (), 1, 1024),
    Field("scorer", str, "a DINOv2: dinov2-mini, a folder or a hub id (default: by the model)", word="NAME"),
    Field("pooling", str, "the picture's feature: cls or mean", choices=("cls", "mean"), default="cls", word="NAME"),
    Field("top", int, "call so many blocks vital (default: a sixth, as Stable Flow)", (), 1, 1000),
    Field("threshold", float, "call the blocks above this importance vital", (), 0, 2),
    Field("output_dir", str, "the study's folder (default: output/importance-NAME)", word="FOLDER"),
    Field("device", str, "auto, cpu, cuda, cuda:1, …, mps", default="auto", word="NAME"),
    *MEMORY,
    THREADS,
)
SAVE = (
    _NAME,
    *FILES,
    Field("format", str, "official (single files) or diffusers (a folder; default, but for fp8)", word="NAME"),
    Field("dtype", str, "precision of the saved weights: bf16, fp16, fp32 or fp8", default="bf16", word="NAME"),
    Field("calibrate", str, "with --dtype fp8: draw these prompts and round by what is seen (GPTQ)", word="FILE"),
    Field("output", str, "new folder to write to (default: output/NAME-FORMAT-DTYPE)", word="FOLDER"),
)
DOWNLOAD = (
    Field(
        "source",
        str,
        "where from: hub (huggingface.co) or modelscope (modelscope.cn)",
        choices=("hub", "modelscope"),
        default="hub",
        word="NAME",
    ),
    Field(
        "endpoint",
        str,
        "address of the source or of a mirror (default: for the hub the environment's, else the source's own)",
        word="URL",
    ),
    Field("output_dir", str, "with --source modelscope: the folder (default: beside the hub's cache)", word="FOLDER"),
)


def take(given: dict[str, Any], rows: tuple[Field, ...]) -> dict[str, Any]:
    """The values of those rows, taken out of what was given."""
    return {row.name: given.pop(row.name) for row in rows if row.name in given}


FIELDS = {field.name: field for field in REQUEST}


def nearest(word: str, known: list[str]) -> str:
    """A clause " Did you mean …?" with the likeliest of the known words, or nothing."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""
