"""The table of what can be asked: every flag of the command line and every field of a request, one row each.

The parser, its help, the request's bounds and the error texts all read this table, so they cannot disagree.
It holds plain data: a wrong flag is answered from here, before pydantic or torch are imported.
"""

from dataclasses import dataclass
from dataclasses import field as dataclass_field
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

PICTURES = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF", "AVIF")
"""kinds of picture files that are opened, AVIF where Pillow can"""
FITS = {"crop": "its edges are cut off", "pad": "it gets black edges", "stretch": "it is stretched"}
"""what happens to a given picture of another shape than the one to be drawn"""
NUDGE = 1.15
"""what a photograph's latent is multiplied by before its inversion (Stable Flow's released code)"""
PERCENTILE = 99.5
"""of dynamic thresholding, as in Imagen"""
CFG_SCHEDULES = ("constant", "linear", "cosine")
"""as it is, or down to 1 at the last step: in a line, or by a quarter of a cosine"""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One value that can be asked for, as a flag and as a field of a request."""

    name: str = dataclass_field(kw_only=False)
    kind: type = dataclass_field(kw_only=False)
    """int, float, str, or bool for a switch"""
    help: str = dataclass_field(kw_only=False)
    flags: tuple[str, ...] = ()
    """other spellings on the command line"""
    minimum: int | None = None
    maximum: int | None = None
    default: object = None
    """a value; None: found out when the request is built"""
    from_variant: bool = False
    """whether the default is the variant's attribute of the same name"""
    choices: tuple[str, ...] = ()
    multiple: bool = False
    """whether the flag takes several values"""
    metavar: str = ""
    """how help calls the value; empty: N, X or TEXT, by the kind"""
    path: bool = False
    """whether the value is, or may be, a file or folder: then a `~` at its beginning is the home folder"""
    const: str = ""
    """the value of a flag without a value; empty: a value has to follow"""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """What a value has to be, for error texts: "a whole number from 1 to 10000"."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        noun = {int: "a whole number", float: "a number", bool: "yes or no", str: "text"}[self.kind]
        return noun if self.minimum is None else f"{noun} from {self.minimum} to {self.maximum}"

    def parse(self, given: str | None, default: Any = None) -> Any:
        """The value of a flag's text, or `default` where it was not given. UsageError says what it has to be."""
        if given is None:
            return default
        try:
            value = self.kind(given)
            right = self.minimum is None or self.maximum is None or self.minimum <= value <= self.maximum
        except ValueError:
            right = False
        if not right or (self.choices and given not in self.choices):
            raise UsageError(f"{self.flag} must be {self.expected}, not {given!a}")
        return value

    @property
    def value_name(self) -> str:
        """The value's name in help."""
        return self.metavar or {int: "N", float: "X"}.get(self.kind, "TEXT")

    @property
    def default_text(self) -> str:
        """The default as help shows it; several where the variants differ."""
        if not self.from_variant:
            return "" if self.default in (None, False) else f" (default: {self.default})"
        values = {name: getattr(variant, self.name) for name, variant in VARIANTS.items()}
        first = next(iter(values.values()))
        others = [f"{name} {value}" for name, value in values.items() if value != first]
        return f" (default: {', '.join([str(first), *others])})"


NAME = Field("name", str, f"model: {', '.join(VARIANTS)}", default=DEFAULT, metavar="NAME")
THREADS = Field(
    "threads",
    int,
    "CPU threads; another number may change a picture's last bits (default: the cores this process may use)",
    minimum=1,
    maximum=1024,
)
FILES = (
    Field(
        "model",
        str,
        "your own weights: a safetensors file or a folder; or as --name",
        flags=("-m",),
        metavar="PATH",
        path=True,
    ),
    Field("ae", str, "your own autoencoder: a file or a folder", metavar="PATH", path=True),
    Field("clip_l", str, "your own CLIP text encoder: a file or a folder", metavar="PATH", path=True),
    Field("t5xxl", str, "your own T5 text encoder: a file or a folder", metavar="PATH", path=True),
)
"""the parts of a model; keys of `Variant.files`"""

REQUEST = (
    NAME,
    Field("prompt", str, "what to draw", flags=("-p",)),
    Field("negative_prompt", str, "what to steer away from; goes with --true-cfg-scale", flags=("-n",)),
    Field("width", int, "pixels", flags=("-W",), minimum=1, maximum=65536, from_variant=True),
    Field("height", int, "pixels", flags=("-H",), minimum=1, maximum=65536, from_variant=True),
    Field("num_steps", int, "denoising steps", flags=("--steps",), minimum=1, maximum=10_000, from_variant=True),
    Field("guidance", float, "how closely to follow the prompt", minimum=0, maximum=100, from_variant=True),
    Field(
        "true_cfg_scale",
        float,
        "steer from the negative (or empty) prompt towards the prompt; above 1 with two forwards a step (default: 1)",
        flags=("--cfg-scale",),
        minimum=1,
        maximum=100,
    ),
    Field(
        "cfg_zero",
        int,
        "CFG-Zero*: true CFG at its best scale, after N steps (1) that stand still",
        minimum=0,
        maximum=9999,
        const="1",
    ),
    Field(
        "mimic_scale",
        float,
        "dynamic thresholding: no more contrast than true CFG of this scale has",
        minimum=1,
        maximum=100,
    ),
    Field(
        "threshold_percentile",
        float,
        f"of the values that --mimic-scale bounds (default: {PERCENTILE})",
        minimum=50,
        maximum=100,
    ),
    Field(
        "cfg_schedule",
        str,
        f"how the scales of true CFG go over the steps: {', '.join(CFG_SCHEDULES)} (default: constant)",
        choices=CFG_SCHEDULES,
        metavar="NAME",
    ),
    Field("num_images", int, "draw the seeds s, s+1, …", minimum=1, maximum=MAX_SEEDS, default=1),
    Field(
        "seed",
        int,
        f"0 to {MAX_SEED}, one or several; -1: random (default)",
        flags=("-s",),
        minimum=0,
        maximum=MAX_SEED,
        multiple=True,
    ),
    Field("init_image", str, f"picture to start from ({', '.join(PICTURES)})", metavar="FILE", path=True),
    Field("strength", float, "how far to leave the init image; 1: all the way (default: 0.8)", minimum=0, maximum=1),
    Field(
        "fit",
        str,
        f"where the given picture has another shape: {', '.join(f'{name} ({what})' for name, what in FITS.items())} "
        "(default: crop)",
        choices=tuple(FITS),
        metavar="NAME",
    ),
    Field(
        "dtype",
        str,
        "precision: bfloat16, float32 or fp8 (default: bfloat16 on CUDA, else float32)",
        choices=("auto", *DTYPES),
        metavar="NAME",
    ),
    Field("force", bool, "allow sizes that the model was not made for", default=False),
    Field("allow_empty_prompt", bool, "allow a prompt without words", default=False),
)
MEMORY = (
    Field("offload", bool, "keep on the device only the part that is at work: less memory, slower", default=False),
    Field("vae_tiling", bool, "autoencoder strip by strip: large pictures in less memory, no seams", default=False),
)
"""also taken by themselves where memory runs out"""
DEVICE = Field("device", str, "auto, cpu, cuda, cuda:1, …, mps", default="auto", metavar="NAME")
OUTPUT_DIR = Field("output_dir", str, "folder for the pictures", default="output", metavar="FOLDER", path=True)
STEPWISE_DIR = Field(
    "stepwise_dir", str, "also write the picture after every step, and a sheet of them", metavar="FOLDER", path=True
)
MACHINE = (DEVICE, *MEMORY, THREADS)
"""where and how a model is loaded"""


def take(given: dict[str, Any], rows: tuple[Field, ...]) -> dict[str, Any]:
    """The values of those rows, taken out of what was given."""
    return {row.name: given.pop(row.name) for row in rows if row.name in given}


FIELDS = {field.name: field for field in REQUEST}
