"""The FLUX.1 models by name: sizes, files, licence and defaults of each variant, in one place.

Variants are plain data, so that the command line can check a request before torch is imported. Sizes and files of the
official models: black-forest-labs/flux `src/flux/util.py`; text lengths: its `cli.py`. Default steps for dev are 28,
as most users run it, instead of the official command's 50; every run prints its effective values.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, NamedTuple

from .errors import UsageError
from .params import AutoEncoderParams, FluxParams


class EncoderSize(NamedTuple):
    """Parameters of a text encoder."""

    all: int
    of_linears: int
    widest: int
    """of one Linear, at most"""
    blocks: int
    in_formats: int = 0
    """those that a format stores in few bits: T5's Linears but for `wo`"""


T5_XXL = EncoderSize(4_762_310_656, 4_630_511_616, 41_943_040, 24, 3_623_878_656)
"""of T5 1.1 XXL without its decoder"""
CLIP_L = EncoderSize(123_060_480, 84_934_656, 2_359_296, 12)
"""of the text half of ViT-L"""


Rgb = tuple[tuple[float, float, float], ...]
"""colours of a latent's pixels, for previews: a row for each channel, and a constant, to RGB from -1 to 1"""


FEATURES = {"kept": 64, "mask": 256, "control": 64}
"""of a token of the image beside its own: what `pipeline/family.py: CHANNELS` make"""


@dataclass(frozen=True)
class Takes:
    """What a model takes besides a prompt, in one of the ways that `pipeline/family.py` knows."""

    channels: tuple[str, ...] = ()
    """beside those of the image's tokens, in this order: of `family.CHANNELS`"""
    map: str = ""
    """what a photograph becomes for the channels of `control`: of `request.fields.MAPS`"""
    references: bool = False
    """pictures as tokens behind the image's, with position ids of their own"""
    sizes: tuple[tuple[int, int], ...] = ()
    """widths and heights, of which a reference gets the one that is nearest in shape; none: it is fitted"""
    words: str = ""
    """pictures as tokens behind the text's, which the model's adapter makes of what this vision model sees: a hub id,
    or the one that ships"""
    layers: tuple[int, ...] = ()
    """blocks of that model whose features, each normed, these are of; none: its last, by its own norm"""
    side: int = 0
    """words in a row and in a column of a picture, each of the patches in its part; 0: of every patch one"""

    def __bool__(self) -> bool:
        return self != Takes()

    @property
    def features(self) -> int:
        """Of a token of the image, beside its own."""
        return sum(FEATURES[name] for name in self.channels)

    @property
    def words_of_one(self) -> int:
        """Words of a picture."""
        return (self.side**2 or SIGLIP_PATCHES) if self.words else 0

    @property
    def mask(self) -> bool:
        return "mask" in self.channels

    @property
    def control(self) -> bool:
        return "control" in self.channels

    @property
    def pictures(self) -> bool:
        """Whether the request's references are for it."""
        return self.references or bool(self.words)


def nearest_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Of several sizes, the one that is nearest in shape; of equal ones the narrower."""
    ratio = size[0] / size[1]
    _, width, height = min((abs(ratio - width / height), width, height) for width, height in sizes)
    return width, height


def of_ratio(ratio: float, area: int) -> tuple[int, int]:
    """Width and height, multiples of 16, of a ratio of sides and about an area in pixels."""
    width, height = (round(side**0.5) // 16 * 16 for side in (area * ratio, area / ratio))
    return max(width, 16), max(height, 16)


KONTEXT_SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip
"""width and height of the pictures that Kontext was trained on"""


UNNAMED = "diffusion_pytorch_model"
"""what diffusers calls any network's file"""


@dataclass(frozen=True)
class Adapter:
    """A file that a variant adds to another one's transformer."""

    repo: str
    """hub repository; empty: it ships, in a folder of the variant's name, or is `made_by` a command"""
    file: str
    variables: tuple[str, ...]
    """environment variables for the file; the first that is set is used"""
    scale: float = 1.0
    made_by: str = ""

    def is_called(self, path: PurePath) -> bool:
        """Whether a file, or its folder where files have no names of their own, is called as this one is on the hub."""
        name = PurePath(self.file).stem
        if name == UNNAMED:
            name = self.repo.rpartition("/")[2]
        return name in path.name or (path.name == self.file and name in str(path.parent))


@dataclass(frozen=True)
class Variant:
    """A FLUX.1 model by name."""

    name: str
    params: FluxParams
    ae_params: AutoEncoderParams
    flow_file: str
    ae_file: str
    t5: str
    """hub id, or for an embedded model the name of a folder next to the weights"""
    clip: str
    max_text: int
    """number of T5 tokens to which a prompt is padded"""
    shift: bool
    """whether the schedule is shifted towards noise as the image grows"""
    num_steps: int
    guidance: float
    width: int
    height: int
    min_side: int
    """shortest side that gives a useful picture, in pixels"""
    max_side: int
    """longest such side; --force lifts both limits"""
    licence: str
    rgb: Rgb = field(hash=False, repr=False)
    repo: str | None = None
    """hub repository of the official files; None: the weights ship with the package, but for an adapter `made_by` a
    command"""
    takes: Takes = Takes()
    adapter: Adapter | None = None
    """a LoRA on the transformer, or the adapter of `takes.words`"""
    base: str = ""
    """a variant whose parts these are; without an `adapter` it ships, and the transformer has a LoRA in it, from the
    folder of this name"""
    variables: tuple[str, ...] = ("FLUX_MODEL",)
    """environment variables for the transformer's file; the first that is set is used"""
    t5_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """sizes of T5 and CLIP, as named in transformers, for files without a config.json"""
    clip_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    t5_size: EncoderSize = T5_XXL
    clip_size: EncoderSize = CLIP_L
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    """the user's own files, by the flag that named them: model, ae, clip_l, t5xxl"""

    @property
    def embedded(self) -> bool:
        """Whether all but an adapter `made_by` a command ships."""
        return self.repo is None

    @property
    def settings(self) -> str:
        """What its own LoRA is drawn with, in words."""
        scale = f"scale {self.adapter.scale:g}, " if self.adapter else ""
        return f"{scale}{self.num_steps} steps, guidance {self.guidance:g}"

    @property
    def licence_line(self) -> str:
        """The note shown when the model is first used."""
        return f"licence of {self.name}: {self.licence}"


def _flux1(guidance_embed: bool, in_channels: int = 64) -> FluxParams:
    return FluxParams(
        in_channels=in_channels,
        out_channels=64,
        vec_in_dim=768,
        context_in_dim=4096,
        hidden_size=3072,
        mlp_ratio=4.0,
        num_heads=24,
        depth=19,
        depth_single_blocks=38,
        axes_dim=(16, 56, 56),
        theta=10_000,
        qkv_bias=True,
        guidance_embed=guidance_embed,
    )


_FLUX1_AE = AutoEncoderParams(
    resolution=256,
    in_channels=3,
    ch=128,
    out_ch=3,
    ch_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    z_channels=16,
    scale_factor=0.3611,
    shift_factor=0.1159,
)
_FLUX1_RGB: Rgb = (
    (-0.0346, 0.0244, 0.0681), (0.0034, 0.0210, 0.0687), (0.0275, -0.0668, -0.0433),
    (-0.0174, 0.0160, 0.0617), (0.0859, 0.0721, 0.0329), (0.0004, 0.0383, 0.0115),
    (0.0405, 0.0861, 0.0915), (-0.0236, -0.0185, -0.0259), (-0.0245, 0.0250, 0.1180),
    (0.1008, 0.0755, -0.0421), (-0.0515, 0.0201, 0.0011), (0.0428, -0.0012, -0.0036),
    (0.0817, 0.0765, 0.0749), (-0.1264, -0.0522, -0.1103), (-0.0280, -0.0881, -0.0499),
    (-0.1262, -0.0982, -0.0778),
    (-0.0329, -0.0718, -0.0851),
)  # fmt: skip
"""ComfyUI `latent_formats.py`"""
_T5, _CLIP = "google/t5-v1_1-xxl", "openai/clip-vit-large-patch14"
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10_240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32_128,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}

_DEV = Variant(
    name="flux-dev",
    params=_flux1(guidance_embed=True),
    ae_params=_FLUX1_AE,
    repo="black-forest-labs/FLUX.1-dev",
    flow_file="flux1-dev.safetensors",
    ae_file="ae.safetensors",
    t5=_T5,
    clip=_CLIP,
    t5_config=_T5_XXL,
    clip_config=_CLIP_L,
    max_text=512,
    shift=True,
    num_steps=28,
    guidance=3.5,
    width=1360,
    height=768,
    min_side=256,
    max_side=4096,
    licence="FLUX.1 [dev] Non-Commercial License",
    rgb=_FLUX1_RGB,
    variables=("FLUX_MODEL", "FLUX_DEV"),
)

_MINI_RGB: Rgb = (
    (0.0469, 0.0028, 0.0171), (-0.0340, -0.1684, -0.1153), (-0.0029, -0.0132, 0.0069),
    (0.0179, 0.0446, 0.0314), (0.0288, -0.0073, 0.0898), (0.1052, 0.0625, 0.0663),
    (0.0229, 0.0710, 0.0188), (0.1826, 0.0286, 0.1201), (0.0028, 0.0627, 0.2007),
    (0.0107, 0.0006, 0.0200), (-0.0580, 0.0047, -0.0029), (0.0828, 0.0984, 0.0180),
    (-0.0115, 0.0555, 0.0108), (0.1766, 0.2859, 0.2394), (0.1416, 0.1816, -0.0218),
    (0.1973, 0.0328, 0.0299),
    (0.4117, 0.3548, 0.3134),
)  # fmt: skip
"""by `weights/recipe/fit_rgb.py`: 17.7 of 255 levels from the mean colour of 8x8 pixels"""
_MINI = Variant(
    name="flux-mini",
    params=FluxParams(
        in_channels=64,
        out_channels=64,
        vec_in_dim=128,
        context_in_dim=256,
        hidden_size=256,
        mlp_ratio=3.0,
        num_heads=4,
        depth=4,
        depth_single_blocks=8,
        axes_dim=(8, 28, 28),
        theta=10_000,
        qkv_bias=True,
        guidance_embed=True,
    ),
    ae_params=AutoEncoderParams(
        resolution=256,
        in_channels=3,
        ch=32,
        out_ch=3,
        ch_mult=(1, 2, 4, 4),
        num_res_blocks=1,
        z_channels=16,
        scale_factor=0.6467,
        shift_factor=0.1282,
    ),
    flow_file="flux-mini.safetensors",
    ae_file="ae.safetensors",
    t5="t5",
    clip="clip",
    t5_size=EncoderSize(2_197_376, 1_671_168, 98_304, 3, 1_376_256),
    clip_size=EncoderSize(537_216, 262_144, 32_768, 2),
    max_text=32,
    shift=True,
    num_steps=28,
    guidance=3.5,
    width=256,
    height=256,
    min_side=128,
    max_side=512,
    licence="Apache-2.0 (trained on Microsoft Fluent Emoji, MIT)",
    rgb=_MINI_RGB,
)

_SCHNELL = replace(
    _DEV,
    name="flux-schnell",
    params=_flux1(guidance_embed=False),
    repo="black-forest-labs/FLUX.1-schnell",
    flow_file="flux1-schnell.safetensors",
    max_text=256,
    shift=False,
    num_steps=4,
    licence="Apache-2.0",
    variables=("FLUX_MODEL", "FLUX_SCHNELL"),
)
REDUX = Adapter("black-forest-labs/FLUX.1-Redux-dev", "flux1-redux-dev.safetensors", ("FLUX_REDUX",))
SIGLIP = "google/siglip-so400m-patch14-384"
SIGLIP_PATCHES = (384 // 14) ** 2


def _taught(kind: str, takes: Takes) -> Variant:
    """flux-mini with an adapter that does not ship; a command of the recipe makes it."""
    name, variable = f"flux-mini-{kind}", f"FLUX_MINI_{kind.upper()}_LORA"
    command = f"python weights/recipe/train_family.py data work weights/flux-mini {kind} --rank 32 --lr 1e-3"
    return replace(
        _MINI, name=name, base="flux-mini", guidance=2.0, takes=takes,
        adapter=Adapter("", f"{name}.safetensors", ("FLUX_LORA", variable), made_by=command),
    )  # fmt: skip


def _control(kind: str, guidance: float) -> list[Variant]:
    """A model of edges or depth, and dev with the LoRA that makes it one."""
    title, variable = kind.title(), f"FLUX_DEV_{kind.upper()}"
    model = replace(
        _DEV,
        name=f"flux-dev-{kind}",
        params=_flux1(guidance_embed=True, in_channels=128),
        repo=f"black-forest-labs/FLUX.1-{title}-dev",
        flow_file=f"flux1-{kind}-dev.safetensors",
        num_steps=50,
        guidance=guidance,
        width=1024,
        height=1024,
        takes=Takes(channels=("control",), map=kind),
        variables=("FLUX_MODEL", variable),
    )
    file = Adapter(
        f"black-forest-labs/FLUX.1-{title}-dev-lora",
        f"flux1-{kind}-dev-lora.safetensors",
        ("FLUX_LORA", f"{variable}_LORA"),
        scale=0.85,
    )
    lora = replace(
        model, name=f"{model.name}-lora", params=_DEV.params, repo=_DEV.repo, flow_file=_DEV.flow_file,
        variables=_DEV.variables, adapter=file,
    )  # fmt: skip
    return [model, lora]


def _few_steps(name: str, repo: str, file: str, num_steps: int, scale: float, **changes: Any) -> Variant:
    """dev with a LoRA that makes it draw in few steps, at what the card of its repository says."""
    adapter = Adapter(repo, file, ("FLUX_LORA",), scale)
    return replace(_DEV, name=name, base=_DEV.name, num_steps=num_steps, adapter=adapter, **changes)


_FEW_STEPS = (
    # 8 steps, 0.125 and 3.5 as those write it who quote the card's example, 16 steps as loaders have it; LICENSE.md:
    # dev's for what is made of dev
    _few_steps("flux-dev-hyper-8", "ByteDance/Hyper-SD", "Hyper-FLUX.1-dev-8steps-lora.safetensors", 8, 0.125),
    _few_steps("flux-dev-hyper-16", "ByteDance/Hyper-SD", "Hyper-FLUX.1-dev-16steps-lora.safetensors", 16, 0.125),
    # the card recommends guidance_scale=3.5 and lora_scale=1, and has 8 steps; under dev's licence
    _few_steps("flux-dev-turbo", "alimama-creative/FLUX.1-Turbo-Alpha", f"{UNNAMED}.safetensors", 8, 1.0),
    # the card's example, which has all of these; the LoRA itself is under Apache-2.0
    _few_steps(
        "flux-dev-tdd", "RED-AIGC/TDD", "FLUX.1-dev_tdd_adv_lora_weights.safetensors", 8, 0.125, guidance=2.0,
        max_text=256,
    ),
)  # fmt: skip
"""cards: https://huggingface.co/REPO, the adapter's"""

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _MINI,
        replace(_MINI, name="flux-mini-fast", base="flux-mini", flow_file="flux-mini-fast.safetensors", num_steps=4),
        replace(
            _MINI,
            name="flux-mini-canny",
            base="flux-mini",
            guidance=2.0,
            takes=Takes(channels=("control",), map="canny"),
            adapter=Adapter("", "flux-mini-canny.safetensors", ("FLUX_LORA",)),
        ),
        replace(
            _MINI,
            name="flux-mini-kontext",
            base="flux-mini",
            guidance=1.0,
            takes=Takes(references=True),
            adapter=Adapter("", "flux-mini-kontext.safetensors", ("FLUX_LORA",)),
        ),
        replace(
            _MINI,
            name="flux-mini-redux",
            base="flux-mini",
            guidance=2.0,
            takes=Takes(words="dinov2-mini", layers=(2, 6), side=4),
            adapter=Adapter("", "flux-mini-redux.safetensors", ("FLUX_MINI_REDUX",)),
        ),
        _taught("fill", Takes(channels=("kept", "mask"))),
        _taught("depth", Takes(channels=("control",), map="depth")),
        _DEV,
        replace(
            _DEV,
            name="flux-dev-krea",
            repo="black-forest-labs/FLUX.1-Krea-dev",
            flow_file="flux1-krea-dev.safetensors",
            guidance=2.5,
            variables=("FLUX_MODEL",),
        ),
        *_FEW_STEPS,
        _SCHNELL,
        replace(
            _DEV,
            name="flux-dev-fill",
            params=_flux1(guidance_embed=True, in_channels=384),
            repo="black-forest-labs/FLUX.1-Fill-dev",
            flow_file="flux1-fill-dev.safetensors",
            max_text=128,
            num_steps=50,
            guidance=30.0,
            takes=Takes(channels=("kept", "mask")),
            variables=("FLUX_MODEL", "FLUX_DEV_FILL"),
        ),
        *_control("canny", guidance=30.0),
        *_control("depth", guidance=10.0),
        replace(
            _DEV,
            name="flux-dev-kontext",
            repo="black-forest-labs/FLUX.1-Kontext-dev",
            flow_file="flux1-kontext-dev.safetensors",
            num_steps=30,
            guidance=2.5,
            width=1024,
            height=1024,
            takes=Takes(references=True, sizes=KONTEXT_SIZES),
            variables=("FLUX_MODEL",),
        ),
        replace(_DEV, name="flux-dev-redux", guidance=2.5, takes=Takes(words=SIGLIP), adapter=REDUX),
        replace(
            _SCHNELL, name="flux-schnell-redux", licence=_DEV.licence, takes=Takes(words=SIGLIP), adapter=REDUX
        ),  # the adapter's, the stricter of the two
    )
}
DEFAULT = "flux-mini"
AE_VARIABLES = ("FLUX_AE", "AE")
"""environment variables for the autoencoder's file; `AE`, like `FLUX_DEV`, is an older official name"""


def originals() -> list[Variant]:
    """The variants that stand on no other: what fits one of them fits its twins."""
    return [variant for variant in VARIANTS.values() if not variant.base]


def plain() -> list[Variant]:
    """Of these, the variants that take nothing besides a prompt."""
    return [variant for variant in originals() if not variant.takes]


def named_like(path: PurePath) -> Variant | None:
    """The variant whose own LoRA has a file's name; None for any other file."""
    rows = (row for row in VARIANTS.values() if not row.takes.words)
    return next((row for row in rows if row.adapter and row.adapter.is_called(path)), None)


def get_variant(name: str) -> Variant:
    """The variant of that name. UsageError names the known variants and the nearest."""
    if name in VARIANTS:
        return VARIANTS[name]
    from difflib import get_close_matches

    near = get_close_matches(name, VARIANTS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    names = ", ".join(variant.name for variant in VARIANTS.values() if not variant.takes)
    raise UsageError(f"unknown model name {name!r}: there are {names}, and those of docs/family.md.{hint}")
