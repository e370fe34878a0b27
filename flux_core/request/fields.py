"""The table of a request's fields and of the flags that several commands take.

The parser, its help, the request's bounds and the error texts all read this table, so they cannot disagree. It holds
plain data: errors in flags are found with it before pydantic or torch are imported.
"""

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, Literal, get_args

from ..errors import UsageError
from ..variants import DEFAULT, VARIANTS, plain

MAX_SEED = 2**32 - 1
"""torch's CPU generator reads the low 32 bits of a seed; larger seeds would silently repeat smaller seeds"""
MAX_ROWS = 64
"""of `--batch`, and of a batch of which a picture is drawn again as a row"""
MAX_SEEDS = 1000
"""the largest number of pictures or seeds in a flag"""

FORMATS: dict[str, str] = {
    "fp8": "bfloat16 with most of the transformer's Linears in e4m3",
    "int8": "the same Linears in int8, rotated: nearer to bfloat16",
    "nf4": "the blocks in four bits",
    "gguf": "as a GGUF file has it",
}
"""values of --dtype that are formats of `linears.formats`, and what they are"""
DTYPES = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "fp32": "float32"} | {x: x for x in FORMATS}
"""accepted spellings of a dtype -> the recorded name; no float16, in which FLUX and T5 overflow"""
Dtype = Literal["bfloat16", "float32", "fp8", "int8", "nf4", "gguf"]
"""the recorded names"""

PICTURES = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF", "AVIF")
"""formats of picture files that are opened, AVIF where Pillow can"""
STRENGTH = 0.8
"""default strength of image-to-image"""
Fit = Literal["crop", "pad", "stretch"]
FIT: Fit = "crop"
FITS: dict[str, str] = {"crop": "its edges are cut off", "pad": "it gets black edges", "stretch": "it is stretched"}
"""what happens to an init image of another shape than the picture's; `FIT` is the default"""
MAPS: dict[str, str] = {
    "canny": "white edges on black, by OpenCV",
    "depth": "the nearer the brighter, by Depth Anything",
}
"""maps that models of edges and depth follow, and what they are"""
MODES = ("canny", "tile", "depth", "blur", "pose", "gray", "low_quality")
"""what a union of ControlNets calls its kinds of conditions, by their numbers: InstantX's, which Shakker's has, too"""
MOST_CONTROL = 100
"""the largest scale of a ControlNet, of either sign"""
MOST_WEIGHT = 100
"""of a reference, to either side of 0"""
NUDGE = 1.15
"""factor for a photograph's latent before its inversion (Stable Flow's released code)"""
PERCENTILE = 99.5
"""default percentile of dynamic thresholding, as in Imagen"""
CfgSchedule = Literal["constant", "linear", "cosine"]
CFG_SCHEDULES: tuple[CfgSchedule, ...] = get_args(CfgSchedule)
"""how the scale of true CFG changes over the steps: not (the default), or down to 1 at the last step, linearly or by a
quarter of a cosine"""


@dataclass(frozen=True, kw_only=True)
class Field:
    """A value that the user can set: a flag, and a field of a request."""

    name: str = dataclass_field(kw_only=False)
    kind: type = dataclass_field(kw_only=False)
    """int, float, str, or bool for a switch"""
    help: str = dataclass_field(kw_only=False)
    flags: tuple[str, ...] = ()
    """other spellings on the command line"""
    minimum: int | None = None
    maximum: int | None = None
    default: Any = None
    """a value; None: chosen when the request is built"""
    from_variant: bool = False
    """whether the default is the variant's attribute of the same name"""
    choices: tuple[str, ...] = ()
    multiple: bool = False
    """whether the flag takes several values"""
    repeated: bool = False
    """whether the flag may be given several times, each with its own values"""
    metavar: str = ""
    """the value's name in help; empty: N, X or TEXT, by the kind"""
    path: bool = False
    """whether the value is, or may be, a file or folder, in which a leading `~` is the home folder"""
    const: str = ""
    """the value of the flag when none follows; empty: a value has to follow"""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        """What a value must be, for error texts: "a whole number from 1 to 10000"."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        noun = {int: "a whole number", float: "a number", bool: "yes or no", str: "text"}[self.kind]
        return noun if self.minimum is None else f"{noun} from {self.minimum} to {self.maximum}"

    def parse(self, text: str | None, default: Any = None) -> Any:
        """The value of a flag's text, or `default` if that is None. UsageError says what the value must be."""
        if text is None:
            return default
        try:
            value = self.kind(text) or self.kind()  # -0 is 0
            valid = self.kind is str or text.isascii()  # Python reads any script's digits
            valid = valid and (self.minimum is None or self.maximum is None or self.minimum <= value <= self.maximum)
        except ValueError:
            valid = False
        if not valid or (self.choices and text not in self.choices):
            raise UsageError(f"{self.flag} must be {self.expected}, not {text!a}")
        return value

    @property
    def value_name(self) -> str:
        """The value's name in help."""
        return self.metavar or {int: "N", float: "X"}.get(self.kind, "TEXT")

    @property
    def default_text(self) -> str:
        """The default as help shows it, with those of the variants that differ.

        `NAME` says what a twin changes, docs/family.md what the models do that take a picture."""
        if not self.from_variant:
            return "" if self.default in (None, False) else f" (default: {self.default})"
        values = {variant.name: getattr(variant, self.name) for variant in plain()}
        first = next(iter(values.values()))
        others = [f"{name} {value}" for name, value in values.items() if value != first]
        return f" (default: {', '.join([str(first), *others])})"


_NAMES = (f"{name} ({row.num_steps} steps)" if row.base and not row.takes else name for name, row in VARIANTS.items())
NAME = Field("name", str, f"model: {', '.join(_NAMES)}", default=DEFAULT, metavar="NAME")
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
"""the user's own files for the parts of a model; keys of `Variant.files`"""

GIVEN = (
    Field("init_image", str, f"picture to start from ({', '.join(PICTURES)})", metavar="FILE", path=True),
    Field(
        "strength",
        float,
        f"how far to leave the init image; 1 ignores it (default: {STRENGTH}, with a mask 1)",
        minimum=0,
        maximum=1,
    ),
    Field(
        "fit",
        str,
        f"where the init image has another shape: {', '.join(f'{name} ({what})' for name, what in FITS.items())} "
        f"(default: {FIT})",
        choices=tuple(FITS),
        metavar="NAME",
    ),
    Field(
        "mask",
        str,
        "what of the init image is painted anew: a grey picture of its size (white: from noise, black: kept, grey: "
        "in part), or one that is transparent there",
        flags=("--img-mask-path",),
        metavar="FILE",
        path=True,
    ),
    Field(
        "mask_padding",
        int,
        "draw the masked part alone, with so many pixels around it, and put it back: for small faces",
        minimum=0,
        maximum=4096,
    ),
    Field(
        "pad",
        str,
        "extend the init image: pixels on its left, top, right and bottom, as in 128,0,128,0",
        metavar="L,T,R,B",
    ),
    Field(
        "control",
        str,
        "map of edges or depth that the picture follows: canny:photo.png or depth:photo.png makes one, map.png is one",
        metavar="MAP",
        path=True,
    ),
    Field(
        "controlnet",
        str,
        "a ControlNet (a file, a folder or a hub id), what the picture follows as for --control, and how closely, as "
        "in union.safetensors canny:photo.png 0.7, or 0.7@0-0.8 for a part of the steps; a union's mode may "
        f"follow ({', '.join(MODES[:5])}, …); may be repeated",
        multiple=True,
        repeated=True,
        metavar="FILE MAP",
        path=True,
    ),
    Field(
        "reference",
        str,
        "picture to change (Kontext) or to take things from (Redux), and its weight, as in cup.png 0.7; may be "
        "repeated",
        multiple=True,
        repeated=True,
        metavar="FILE",
        path=True,
    ),
)
"""what pictures a request starts from, paints in, follows or takes things from, and how"""
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
        "CFG-Zero*: the best scale for each step, after N first steps (1) without a change",
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
        f"how the scale changes over the steps: {', '.join(CFG_SCHEDULES)} (default: {CFG_SCHEDULES[0]})",
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
    *GIVEN,
    Field(
        "dtype",
        str,
        f"precision: bfloat16, float32, {', '.join(FORMATS)} (default: what an int8, NF4 or GGUF file has, else "
        "bfloat16 on CUDA and float32 elsewhere)",
        choices=("auto", *DTYPES),
        metavar="NAME",
    ),
    Field(
        "t5_dtype",
        str,
        f"precision of T5: bfloat16, float32, {', '.join(FORMATS)} (default: what an int8, NF4 or GGUF file has, else "
        "as the model computes)",
        choices=("auto", *DTYPES),
        metavar="NAME",
    ),
    Field("force", bool, "allow sizes that the model was not made for", default=False),
    Field("allow_empty_prompt", bool, "allow a prompt without words", default=False),
)
LORAS = (
    Field(
        "lora",
        str,
        "a LoRA: a file, a folder or a hub id, and its scale, as in style.safetensors 0.8, or 0.8@0-13 for some steps; "
        "may be repeated",
        multiple=True,
        repeated=True,
        metavar="FILE",
        path=True,
    ),
    Field(
        "lora_scale",
        float,
        "scale of each --lora without one of its own (default: 1); without --lora that of the model's own LoRA",
        minimum=-1000,
        maximum=1000,
    ),
    Field("lora_allow_partial", bool, "apply what matches of a LoRA whose other modules do not", default=False),
    Field("lora_merge", bool, "write LoRAs into the weights (bf16 or fp32 only): no cost a step", default=False),
)
"""become entries of the plan (`hooks/lora.py`)"""
_OFTEN: dict[str, Any] = {"multiple": True, "repeated": True}
PLAN = (
    Field(
        "plan",
        str,
        "interventions to draw with: a JSON file, or those that a function of your own returns, as in my.py or "
        "my.py:name (docs/hooks.md)",
        metavar="FILE",
        path=True,
    ),
    Field("skip", str, "leave blocks out, as in layer.9 or layer.3-5@0-14 (steps)", multiple=True, metavar="BLOCKS"),
    Field(
        "hook", str, "a function of your own at --at, as in my.py:brighter", metavar="FILE.py:NAME", path=True, **_OFTEN
    ),
    Field("at", str, "where, as in layer.*.img.q, or vec@0-9 (steps)", metavar="SITES", **_OFTEN),
    Field("hook_steps", str, "the steps of --hook, as in 0-9; beside --hook, --steps says the same", metavar="STEPS"),
    Field("wrap", str, "a function of your own around the velocity", metavar="FILE.py:NAME", path=True, **_OFTEN),
    Field("sampler", str, "a sampler of your own in place of Euler's method", metavar="FILE.py:NAME", path=True),
    Field(
        "cache",
        str,
        "leave steps out: fast (half of them run), faster (a third), or a file of cache search (docs/caching.md)",
        metavar="NAME",
        path=True,
    ),
)
CODE = ("hook", "wrap", "sampler")
"""those that always run Python"""
MEMORY = (
    Field("offload", bool, "parts take turns on the device: less memory, slower", default=False),
    Field("vae_tiling", bool, "autoencoder strip by strip: large pictures in less memory, no seams", default=False),
)
"""switched on automatically where memory runs out"""
T5_DEVICE = Field(
    "t5_device",
    str,
    "cpu: T5 encodes on the CPU and takes no memory of the device",
    choices=("auto", "cpu"),
    default="auto",
    metavar="NAME",
)
BUDGET = Field(
    "memory",
    str,
    "how much memory to use, as in 8GB or 7.5GiB, or auto: what is free (on a card the default); blocks that find no "
    "room on a card come when they compute, a CPU's stay in their files",
    metavar="SIZE",
)
ATTENTION = Field(
    "attention",
    str,
    "exact, or in eight bits, on cards that can: int8 (values in e4m3), fp8 (all in e4m3, by NVIDIA's cuDNN); auto: "
    "the quickest whose error was measured and is small beside the model's own",
    choices=("auto", "exact", "int8", "fp8"),
    default="auto",
    metavar="NAME",
)


def kind_of_attention(recorded: str) -> str:
    """The value of `--attention` that decides pixels more than their last bits: `exact` is any of PyTorch's kernels.

    recorded: `attention` of a picture's environment.
    """
    return recorded if recorded in ATTENTION.choices else "exact"


LOADING = (
    BUDGET,
    Field(
        "reserve",
        str,
        "with --memory auto: what stays free for others (default: 0.5GB)",
        metavar="SIZE",
    ),
    T5_DEVICE,
    Field(
        "keep_embeddings",
        str,
        "keep encoded prompts in this folder, and use those that are there (default folder: beside the hub's cache)",
        metavar="FOLDER",
        const="auto",
        path=True,
    ),
    ATTENTION,
)
"""how much memory a model takes, where prompts are encoded, whether they are kept, how it attends; arguments of
`load_pipeline`"""
DEVICE = Field("device", str, "auto, cpu, cuda, cuda:1, …, mps", default="auto", metavar="NAME")
OUTPUT_DIR = Field("output_dir", str, "folder for the pictures", default="output", metavar="FOLDER", path=True)
STEPWISE_DIR = Field(
    "stepwise_dir", str, "also write the picture after every step, and a sheet of them", metavar="FOLDER", path=True
)
MACHINE = (DEVICE, *MEMORY, *LOADING, THREADS)
"""where and how a model is loaded"""


def key_of(flag: str) -> str:
    """A flag as a key of JSON or the name of a column: `--num-steps` -> `num_steps`."""
    return flag.lstrip("-").replace("-", "_")


def pop_fields(flags: dict[str, Any], fields: tuple[Field, ...]) -> dict[str, Any]:
    """Remove the values of these fields from `flags` and return them. UsageError for a text that a field has not."""
    found = {field: flags.pop(field.name) for field in fields if field.name in flags}
    return {field.name: field.parse(x) if isinstance(x, str) else x for field, x in found.items()}


PICTURE_FILES = tuple(field.name for field in GIVEN if field.path)
"""of these, the ones that are picture files"""
FIELDS = {field.name: field for field in (*REQUEST, *LORAS)}
