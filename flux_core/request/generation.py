"""`GenerationRequest`: the description of a picture, the same for the command line, Python and files.

It is validated once, when it is built. Missing fields are filled from the variant there, and a missing seed is drawn,
so that a request always says what will happen. Every failure is a UsageError of one line.
"""

import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Annotated, Any, Self

import pydantic
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ModelWrapValidatorHandler,
    model_validator,
)

from ..errors import UsageError, nearest
from ..hooks import Intervention, Lora, Plan, StepCache, check_plan, parse_plan
from ..jsonfile import first_finding, quoted
from ..strength import highest_strength, skipped_steps
from ..terminal import one_line
from ..variants import VARIANTS, Variant, get_variant
from ..version import __version__
from .batch import Batch
from .fields import (
    DTYPES,
    FIELDS,
    FIT,
    MAPS,
    MAX_SEED,
    STRENGTH,
    CfgSchedule,
    Dtype,
    Fit,
)
from .pictures import Control, ControlNetUse, InitImage, Reference, read_pad

PATCH = 16
"""pixels that one image token covers along each side"""
MAX_PROMPT = 64 * 1024
"""bytes of a prompt that metadata keeps"""
_LORA_WORD = re.compile(r"<lora:[^<>]{1,200}>")
"""how prompts of other tools ask for a LoRA"""


def _random_seed(data: dict[str, Any]) -> int:
    return secrets.randbelow(MAX_SEED + 2 - data["num_images"])


def _prompt(data: dict[str, Any]) -> str:
    if get_variant(data["name"]).takes.words:
        return ""
    raise UsageError('--prompt is missing, as in --prompt "a red apple"')


def _guidance(data: dict[str, Any]) -> float | None:
    variant = get_variant(data["name"])
    return variant.guidance if variant.params.guidance_embed else None


def _strength(data: dict[str, Any]) -> float | None:
    if not data["init_image"]:
        return None
    return STRENGTH if data["mask"] is None and data["pad"] is None else 1.0


def _fit(data: dict[str, Any]) -> str | None:
    return FIT if data["init_image"] else None


def _of(name: str, factory: Any = None) -> Any:
    """The pydantic field for a field of the table. factory: computes the default from the fields before it."""
    field = FIELDS[name]
    options: dict[str, Any] = {"description": field.help}
    if field.minimum is not None:
        options |= {"ge": field.minimum, "le": field.maximum}
    if field.kind is float:
        options["allow_inf_nan"] = False
    if factory or field.from_variant:
        return pydantic.Field(default_factory=factory or _variant_default(name), **options)
    return pydantic.Field(default=field.default, **options)


def _variant_default(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda data: getattr(get_variant(data["name"]), name)


def _plan(plan: Plan, info: pydantic.ValidationInfo) -> Plan:
    """The plan's entries as this request records them, whose model and number of steps are known by now."""
    if not {"name", "num_steps"} <= info.data.keys():  # they are wrong, which is reported
        return plan
    return tuple(entry.for_request(info.data["name"], info.data["num_steps"]) for entry in plan)


DRAWN_BY = frozenset({"version", "weights", "compiled", "functions", "environment"})
"""fields that record how a picture was drawn, not what was requested; `batch` does, too, and is needed to repeat it"""


def _dtype(value: object) -> object:
    return None if value == "auto" else DTYPES.get(str(value), value)


class GenerationRequest(BaseModel):
    """A picture, or `num_images` pictures with consecutive seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(lambda name: get_variant(name).name)] = _of("name")
    prompt: str = pydantic.Field(default_factory=_prompt, description=FIELDS["prompt"].help)
    """may be empty, or missing, where the model takes pictures as words"""
    negative_prompt: str | None = _of("negative_prompt")
    """None: the empty prompt, with true CFG"""
    width: int = _of("width")
    height: int = _of("height")
    num_steps: int = _of("num_steps")
    guidance: float | None = _of("guidance", _guidance)
    """None: the model takes none"""
    true_cfg_scale: float | None = _of("true_cfg_scale")
    """None or 1: no true CFG; the negative prompt and the four fields below must be None (`sampling/guidance.py`)"""
    cfg_zero: int | None = _of("cfg_zero")
    mimic_scale: float | None = _of("mimic_scale")
    threshold_percentile: float | None = _of("threshold_percentile")
    cfg_schedule: CfgSchedule | None = _of("cfg_schedule")
    num_images: int = _of("num_images")
    seed: int = _of("seed", _random_seed)
    init_image: InitImage | None = None
    mask: InitImage | None = None
    """what of the init image is painted anew; None: all of it, or what `pad` adds"""
    mask_padding: int | None = _of("mask_padding")
    pad: Annotated[tuple[int, int, int, int] | None, BeforeValidator(read_pad)] = None
    """pixels by which the init image is extended: left, top, right, bottom"""
    control: Control | None = None
    controlnet: tuple[ControlNetUse, ...] | None = None
    """None: none. Residuals of several are added up"""
    reference: tuple[Reference, ...] | None = None
    strength: float | None = _of("strength", _strength)
    """None: no init image"""
    fit: Fit | None = _of("fit", _fit)
    """how the init image gets this picture's shape; None: no init image. Version 0.1 recorded none and stretched
    (`images/metadata.py`)"""
    dtype: Annotated[Dtype | None, BeforeValidator(_dtype)] = _of("dtype")
    """None: the pipeline's, which fills it when it draws"""
    t5_dtype: Annotated[Dtype | None, BeforeValidator(_dtype)] = _of("t5_dtype")
    """None: likewise; T5's"""
    plan: Annotated[Plan, BeforeValidator(parse_plan), AfterValidator(_plan)] = ()
    """interventions, in the order in which they are applied"""
    functions: tuple[str, ...] = ()
    """names of other interventions: Python functions and tensors from files, which metadata cannot hold"""
    compiled: bool = False
    """whether the pipeline's blocks are compiled, which changes last bits; filled when it draws"""
    environment: dict[str, str] | None = None
    """what else changes last bits, filled when the pipeline draws: torch, device, attention, kernels, replay"""
    batch: Batch | None = None
    """None: drawn alone. Filled when rows are drawn; a request that has one is drawn among copies of itself"""
    version: str = __version__
    weights: dict[str, str] = pydantic.Field(default_factory=dict)
    """short hash of every weight file, filled when the pipeline draws"""
    # Permissions of the user, no properties of the picture: not recorded, and no file may grant them.
    force: bool = pydantic.Field(default=False, exclude=True)
    allow_empty_prompt: bool = pydantic.Field(default=False, exclude=True)

    @model_validator(mode="wrap")
    @classmethod
    def _build(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if not _means_default(key, value)}
        try:
            request = handler(data)
        except pydantic.ValidationError as error:
            raise UsageError(_error_text(error)) from None
        check_plan(request.plan, request.variant.params, request.num_forward_steps, request.branches)
        request._check_prompt()
        request._check_true_cfg()
        request._check_pictures()
        request._check_size()
        request._check_seeds()
        return request

    def _check_prompt(self) -> None:
        if not (self.prompt.strip() or self.allow_empty_prompt or self.variant.takes.words):
            raise UsageError("--prompt has no words: say what to draw, or add --allow-empty-prompt")
        for name in ("prompt", "negative_prompt"):
            try:
                (getattr(self, name) or "").encode()
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"{FIELDS[name].flag} is no valid text: half a surrogate pair at character {error.start}. "
                    "Is the terminal's encoding another than UTF-8?"
                ) from None

    def _check_true_cfg(self) -> None:
        """UsageError for fields that would have no effect."""
        dependent = ("negative_prompt", "cfg_zero", "mimic_scale", "threshold_percentile", "cfg_schedule")
        idle = [FIELDS[name].flag for name in dependent if getattr(self, name) is not None]
        if idle and not self.uses_true_cfg:
            scale = "without --true-cfg-scale" if self.true_cfg_scale is None else "at --true-cfg-scale 1"
            raise UsageError(f"{idle[0]} does nothing {scale}. Next: add a scale above 1, as in --true-cfg-scale 2")
        if self.threshold_percentile is not None and self.mimic_scale is None:
            raise UsageError("--threshold-percentile does nothing without --mimic-scale. Next: add --mimic-scale 1")
        if (self.cfg_zero or 0) >= self.num_forward_steps > 0:
            raise UsageError(
                f"--cfg-zero {self.cfg_zero} leaves none of {self.num_forward_steps} step(s). Next: a smaller number"
            )

    def _check_pictures(self) -> None:
        """UsageError for pictures that the model does not take, or that another one is for."""
        takes, name = self.variant.takes, self.name
        if (self.mask or self.pad) and self.init_image is None:
            given = "--mask" if self.mask else "--pad"
            if used := "reference" if self.reference else "control" if self.control else "":
                raise UsageError(f"{given} needs a picture to paint in, and {name} takes --image as its {used}. "
                                 "Next: give that by --init-image")  # fmt: skip
            raise UsageError(f"{given} does nothing without --init-image: give the picture to paint in")
        if self.mask_padding is not None and self.mask is None:
            raise UsageError("--mask-padding does nothing without --mask: it draws the masked part alone")
        for field, takers in (("control", "control"), ("reference", "pictures")):
            if getattr(self, field) and not getattr(takes, takers):
                names = ", ".join(x.name for x in VARIANTS.values() if getattr(x.takes, takers))
                raise UsageError(f"{name} takes no --{field}. Next: leave it out, or --name with one of {names}")
        if self.control and self.control.map not in ("", *MAPS):
            raise UsageError(f"there is no map {self.control.map[:40]!a}: there are {', '.join(MAPS)}")
        if not takes.words and any(one.weight != 1 for one in self.reference or ()):
            raise UsageError(f"{name} changes a picture as a whole: a weight does nothing. Next: leave it out")

    def check_whole(self) -> None:
        """UsageError where a picture is missing without which the model does not draw."""
        takes, name = self.variant.takes, self.name
        if takes.mask and not self.paints:
            raise UsageError(f"{name} paints into a picture. Next: --image FILE with --mask FILE, or with --pad")
        if takes.control and self.control is None:
            made = f"--control {takes.map}:FILE, or " if takes.map else ""
            raise UsageError(f"{name} follows a map. Next: {made}--control MAP.png")
        if takes.pictures and not self.reference:
            raise UsageError(f"{name} takes a picture. Next: --reference FILE")

    def _check_size(self) -> None:
        variant = self.variant
        for flag, side in (("--width", self.width), ("--height", self.height)):
            if not variant.min_side <= side <= variant.max_side and not self.force:
                tokens = self.padded_size[0] * self.padded_size[1] // PATCH**2
                raise UsageError(
                    f"{flag} {side} is not among the {variant.min_side} to {variant.max_side} pixels {variant.name} "
                    f"is made for: choose another (where none was typed, it is that of a picture, --pad or "
                    f"--aspect-ratio), or add --force ({tokens:,} image tokens)"
                )

    def _check_seeds(self) -> None:
        if self.seed + self.num_images - 1 > MAX_SEED:
            raise UsageError(f"{self.num_images} images from --seed {self.seed} on go past the last seed, {MAX_SEED}")

    @property
    def variant(self) -> Variant:
        return get_variant(self.name)

    @property
    def uses_true_cfg(self) -> bool:
        """Whether a step takes two forwards, for the prompt and the negative prompt."""
        return (self.true_cfg_scale or 1) > 1

    @property
    def paints(self) -> bool:
        """Whether only a part of the init image is painted anew."""
        return self.mask is not None or self.pad is not None

    @property
    def loras(self) -> tuple[Lora, ...]:
        """The LoRAs of the plan."""
        return tuple(entry for entry in self.plan if isinstance(entry, Lora))

    @property
    def hooks(self) -> tuple[Intervention, ...]:
        """The plan without LoRAs: what hooks into a forward."""
        return tuple(entry for entry in self.plan if not isinstance(entry, Lora))

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts to encode: the prompt, and with true CFG the negative prompt."""
        return (self.prompt, self.negative_prompt or "") if self.uses_true_cfg else (self.prompt,)

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of these texts' forwards in a plan."""
        return ("positive", "negative") if self.uses_true_cfg else ("image",)

    @property
    def padded_size(self) -> tuple[int, int]:
        """Width and height that the model draws: the next multiples of 16. The picture is cropped from it."""
        return -(-self.width // PATCH) * PATCH, -(-self.height // PATCH) * PATCH

    @property
    def num_forward_steps(self) -> int:
        """The steps that are computed: `num_steps` without those that image-to-image skips."""
        strength = 1.0 if self.init_image is None or self.strength is None else self.strength
        return self.num_steps - skipped_steps(self.num_steps, strength)

    def recorded(self, functions: Sequence[Intervention] = ()) -> Self:
        """The request for a picture's metadata: interventions that are functions or name a file only as labels.

        functions: interventions beside those of the plan.
        """
        entries = (*self.plan, *functions)
        labels = tuple(entry.label for entry in entries if entry.changes_pixels and not entry.portable)
        kept = tuple(entry for entry in entries if entry.portable and entry.changes_pixels)
        return self.model_copy(update={"plan": kept, "functions": (*self.functions, *labels)})

    def images(self) -> list["GenerationRequest"]:
        """A request for each picture: seeds s, s+1, …"""
        seeds = range(self.seed, self.seed + self.num_images)
        return [self.model_copy(update={"seed": seed, "num_images": 1}) for seed in seeds]

    def settings(self) -> str:
        """The main settings, in a line for the user."""
        parts = [f"{self.name}: {self.width}x{self.height}", f"{self.num_steps} steps"]
        parts += [] if self.guidance is None else [f"guidance {self.guidance:g}"]
        parts += [f"true CFG {self.true_cfg_scale:g}"] if self.uses_true_cfg else []
        parts += [] if self.cfg_zero is None else ["CFG-Zero*"]
        parts += [] if self.mimic_scale is None else [f"thresholded as at {self.mimic_scale:g}"]
        if self.hooks:
            parts.append("plan: " + ", ".join(getattr(entry, "called", entry.kind) for entry in self.hooks))
        parts += [f"LoRA {entry.settings()}" for entry in self.loras]
        if self.init_image is not None:
            strength = "" if self.paints and self.strength == 1 else f" at strength {self.strength:g}"
            parts.append(f"{'in' if self.paints else 'from'} {one_line(self.init_image.file)}{strength}")
        parts += [f"painted where {one_line(self.mask.file)} is white"] if self.mask else []
        parts += ["extended by {},{},{},{} pixels".format(*self.pad)] if self.pad else []
        if self.control is not None:
            parts.append(f"along {self.control.map or 'the map'} of {one_line(self.control.file)}")
        parts += [one.settings() for one in self.controlnet or ()]
        for one in self.reference or ():
            parts.append(f"with {one_line(one.file)}" + (f" at {one.weight:g}" if one.weight != 1 else ""))
        return ", ".join(parts)

    def notes(self) -> list[str]:
        """What the user should know before drawing, a line each."""
        about = self._model_notes(), self._true_cfg_notes(), self._init_image_notes(), self._map_notes()
        caches = (x.notes(self.width, self.height, self.guidance) for x in self.plan if isinstance(x, StepCache))
        return [*chain(*about, *caches, self._prompt_notes())]

    def _model_notes(self) -> Iterator[str]:
        variant = self.variant
        if self.padded_size != (self.width, self.height):
            padded = "{}x{}".format(*self.padded_size)
            yield f"{self.width}x{self.height} is drawn at {padded}, multiples of {PATCH}, and cropped"
        if not variant.shift and self.num_steps > 8:
            yield f"{variant.name} is made for {variant.num_steps} steps; more than 8 rarely help"
        if not variant.params.guidance_embed and "guidance" in self.model_fields_set:
            yield f"{variant.name} takes no guidance: --guidance is ignored"
        elif self.guidance is not None and self.guidance > max(10, variant.guidance):
            yield f"guidance {self.guidance:g} is high: above 10 pictures look burnt"

    def _true_cfg_notes(self) -> Iterator[str]:
        if self.uses_true_cfg:
            yield "true CFG takes two forwards a step, about twice the time"
            if not self.negative_prompt:
                yield "true CFG steers away from the empty prompt: --negative-prompt names another"
        if (self.mimic_scale or 1) > (self.true_cfg_scale or 1):
            yield f"--mimic-scale {self.mimic_scale:g} is above --true-cfg-scale: it bounds next to nothing"

    def _init_image_notes(self) -> Iterator[str]:
        if self.init_image is None:
            for name in ("strength", "fit"):
                if name in self.model_fields_set:
                    yield f"--{name} does nothing without --init-image"
        elif self.num_forward_steps == self.num_steps and not self.paints and not self.variant.takes.mask:
            yield (
                f"strength {self.strength:g} draws all of {self.num_steps} step(s), from noise alone: the init image "
                f"has no effect. Next: --strength {highest_strength(self.num_steps):g} or lower, or more --num-steps"
            )

    def _map_notes(self) -> Iterator[str]:
        made, known = self.control.map if self.control else "", self.variant.takes.map
        if made and known and made != known:
            yield f"{self.name} follows maps of {known}, and this is one of {made}"

    def _prompt_notes(self) -> Iterator[str]:
        if found := next(filter(None, (_LORA_WORD.search(text) for text in self.texts)), None):
            yield f"{found[0][:60]} in a prompt does nothing here. Next: --lora FILE SCALE"
        if any(len(text.encode()) > MAX_PROMPT for text in self.texts):
            yield f"the picture's metadata keeps the first {MAX_PROMPT // 1024} KB of the prompt"


def check_untrusted(fields: dict[str, Any]) -> None:
    """UsageError for fields from a file whose plan would read or write other files; none of these is opened."""
    if unsafe := [entry.kind for entry in parse_plan(fields.get("plan") or ()) if not entry.portable]:
        raise UsageError(f"a file cannot make us read or write other files ({', '.join(unsafe)})")


def _means_default(key: str, value: object) -> bool:
    """Whether a value means the field's default: None, seed -1 (as in many tools), a negative prompt without words."""
    if key == "negative_prompt" and isinstance(value, str) and not value.strip():
        return True
    return value is None or (key == "seed" and str(value).strip() == "-1")


def _error_text(error: pydantic.ValidationError) -> str:
    """A line with the flag's name, the finding, and what the value must be."""
    first = first_finding(error)
    name = str(first["loc"][0]) if first["loc"] else "request"
    field = FIELDS.get(name)
    if first["type"] == "extra_forbidden" and name not in GenerationRequest.model_fields:
        return f"a request has no field {name[:60]!r}.{nearest(name, list(GenerationRequest.model_fields))}"
    if field is None or len(first["loc"]) > 1:
        return f"{field.flag if field else name}: {first['msg']}"
    if first["type"] == "value_error":
        return f"{field.flag}: {first['msg'].removeprefix('Value error, ')}, not {quoted(first['input'])}"
    return f"{field.flag} must be {field.expected}, not {quoted(first['input'])}"
