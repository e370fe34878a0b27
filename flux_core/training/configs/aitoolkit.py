"""ai-toolkit: the YAML, or JSON, of a job that trains a LoRA for FLUX.1.

Read at commit 27a03a91: toolkit/config.py, config_modules.py, dataloader_mixins.py. Paths are relative to the folder
that one calls from. `[name]` is the job's name wherever it stands, and `[trigger]` the trigger word.
"""

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ..captions import in_place
from .keys import (
    HELD_OUT,
    MOST_RANK,
    Fate,
    Folder,
    Key,
    LeftOut,
    Needless,
    Values,
    flatten,
    folders,
    here,
    left_out,
    model_of,
    needless,
    only,
    other,
    settle,
    when,
)

NAME = "ai-toolkit"
PROCESSES = ("sd_trainer", "diffusion_trainer", "ui_trainer")
NUMBER = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
"""as in 1e-4, which YAML 1.1 takes for a text and ai-toolkit for a number"""


# Rows' functions -----------------------------------------------------------------------------------------


def _out(value: Any, of: Values) -> str:
    return str(Path(value) / str(of["name"]))


def _network(value: Any, of: Values) -> Any:
    if value.lower() == "lokr":
        return {"lokr": of["network.lokr_factor"]}
    if value.lower() != "lora":
        raise LeftOut("there are lora, lokr")
    return {}


def _is_lokr(of: Values) -> bool:
    return str(of["network.type"]).lower() == "lokr"


def _rank(value: Any, of: Values) -> dict[str, Any]:
    if not _is_lokr(of):
        return {"rank": value, "alpha": value}
    return {"rank": MOST_RANK, "alpha": MOST_RANK} if of["network.lokr_full_rank"] else {"rank": value}


def _alpha(value: Any, of: Values) -> Any:
    if not _is_lokr(of):
        raise Needless("ai-toolkit ignores it for FLUX.1, where a LoRA's alpha is the rank")
    if of["network.lokr_full_rank"]:
        raise Needless("lokr_full_rank counts")
    return value


def _rate(value: Any, of: Values) -> Any:
    rate = value if of["train.unet_lr"] is None else of["train.unet_lr"]
    return 1.0 if of["train.optimizer"].lower() == "prodigy" and rate < 0.1 else rate


def _timesteps(value: Any, of: Values) -> str:
    if of["train.linear_timesteps"] or of["train.linear_timesteps2"]:
        raise Needless("linear_timesteps counts")
    if of["train.content_or_style"] in BIASES:
        raise Needless("content_or_style counts")
    return _named_in(TIMESTEPS, value, "timesteps")


def _bias(value: Any, of: Values) -> str:
    if value == "balanced":
        raise Needless("as here")
    if of["train.linear_timesteps"] or of["train.linear_timesteps2"]:
        raise LeftOut("linear_timesteps counts")
    return _named_in(BIASES, value, "timesteps")


def _contrast(value: Any, of: Values) -> Any:
    target = of["train.guidance_loss_target"]
    if value and not isinstance(target, int | float):
        raise LeftOut("guidance_loss_target is a range, and --contrast takes one number")
    return target if value else 0.0


def _targets(value: Any, of: Values) -> str:
    """All Linears of blocks, or those whose names contain a text."""
    parts = [str(one).removeprefix("transformer.") for one in of["network.network_kwargs.only_if_contains"] or []]
    return ",".join(f"*{part}*" for part in parts) or "blocks"


def _dropout(value: Any, of: Values) -> dict[str, Any]:
    """The trigger word stays when a caption is dropped."""
    return {"trigger_only" if of["trigger_word"] else "caption_dropout": value}


def _dtype(value: Any, of: Values) -> str:
    if of["model.quantize"]:
        raise Needless("model.quantize counts")
    return _named_in(DTYPES, value)


def _quantize(value: Any, of: Values) -> dict[str, Any]:
    return {"dtype": _named_in(QTYPES, of["model.qtype"])} if value else {}


def _named_in(names: Mapping[str, str], kind: str, setting: str = "dtype") -> str:
    if kind not in names:
        raise LeftOut(f"--{setting} has no {kind}; there are {', '.join(names)}")
    return names[kind]


def _t5(value: Any, of: Values) -> Any:
    if not of["model.quantize_te"]:
        raise Needless("model.quantize_te is off")
    return {"t5_dtype": _named_in(QTYPES, value)}


def _architecture(value: Any, of: Values) -> Any:
    if value != "flux":
        raise UsageError(f"it trains {value}, and this is FLUX.1. Next: give a config whose arch is flux")
    return {}


def _prompts(value: Any, of: Values) -> list[str]:
    texts = [one if isinstance(one, str) else one["prompt"] for one in value]
    return [in_place(text, of["trigger_word"] or "") for text in texts]


def _levels(value: Any, of: Values) -> Any:
    raise (Needless if value >= 999 else LeftOut)("all noise levels are drawn")


def _edges(value: Any, of: Values) -> dict[str, Any]:
    return {"resolution": ",".join(map(str, of["edges"])), "rule": "buckets"}


def _extension(value: Any, of: Values) -> Any:
    raise (Needless if value.lstrip(".") == "txt" else LeftOut)("captions are in NAME.txt")


# The tables ----------------------------------------------------------------------------------------------

QTYPES = {"qfloat8": "fp8", "float8": "fp8", "qint8": "int8", "int8": "int8", "convrot8": "int8"}
DTYPES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32", "float": "float32"}
TIMESTEPS = {"sigmoid": "sigmoid", "linear": "uniform"}
BIASES = {name: name for name in ("content", "style")}
DOP, BLANK = "train.diff_output_preservation", "train.blank_prompt_preservation"
PROCESS = (
    Key("type", why="the process that trains"),
    Key("training_folder", "output_dir", _out, default="output"),
    Key("device", "device"),
    Key("trigger_word", "trigger"),
    Key("network.type", turn=_network, default="lora"),
    Key("network.linear", turn=_rank, default=4, why="ai-toolkit's alpha is the rank for FLUX.1's LoRAs"),
    Key("network.linear_alpha", "alpha", _alpha, default=1.0),
    Key("network.transformer_only", "targets", _targets, default=True),
    Key("network.network_kwargs", default={}),
    Key("network.network_kwargs.only_if_contains", why="read with network.transformer_only"),
    Key("network.lokr_factor", default=-1, why="read with network.type"),
    Key("network.lokr_full_rank", default=False, why="read with network.linear"),
    Key("save.save_every", "save_every", default=1000),
    Key("save.max_step_saves_to_keep", "keep", default=5),
    Key("save.dtype", default="float16", lacks="the adapter is saved in fp32"),
    Key("save.save_format", default="safetensors", why="PEFT's keys, as its diffusers"),
    Key("train.batch_size", "batch", default=1),
    Key("train.steps", "steps", default=1000),
    Key("train.gradient_accumulation_steps", "accumulation", lambda x, of: max(x, of["train.gradient_accumulation"]),
        default=1, why="gradients are averaged, where ai-toolkit sums them"),
    Key("train.gradient_accumulation", default=1, why="read with train.gradient_accumulation_steps"),
    Key("train.gradient_checkpointing", "checkpointing", {"true": "blocks", "false": "none"}, default=True),
    Key("train.lr", "lr", _rate, default=1e-6),
    Key("train.unet_lr", why="read with train.lr"),
    Key("train.optimizer", "optimizer", {"adamw": "adamw", "adamw8": "adamw8bit", "adamw8bit": "adamw8bit",
        "prodigy": "prodigy"}, default="adamw", why="with an eps of 1e-8, where ai-toolkit has 1e-6"),
    Key("train.optimizer_params", default={}),
    Key("train.optimizer_params.weight_decay", "weight_decay"),
    Key("train.lr_scheduler", "schedule", {"constant": "constant", "cosine": "cosine"}, default="constant"),
    Key("train.lr_scheduler_params", default={}),
    Key("train.max_grad_norm", "max_grad_norm", default=1.0),
    Key("train.noise_scheduler", turn=only("flowmatch", "a rectified flow is trained"), default="ddpm"),
    Key("train.timestep_type", "timesteps", _timesteps, default="sigmoid"),
    Key("train.content_or_style", "timesteps", _bias, default="balanced",
        why="of evenly spread levels, where ai-toolkit's are spread by timestep_type"),
    Key("train.linear_timesteps", "timesteps", {"true": "linear_timesteps", "false": None}, default=False),
    Key("train.linear_timesteps2", "timesteps", {"true": "linear_timesteps2", "false": None}, default=False),
    Key("train.min_denoising_steps", turn=only(0, "all noise levels are drawn"), default=0),
    Key("train.max_denoising_steps", turn=_levels, default=999),
    Key("train.loss_type", "loss", {"mse": "l2", "mae": "l1"}, default="mse"),
    Key("train.cfg_scale", "guidance", default=1.0),
    Key("train.bypass_guidance_embedding", default=False, lacks="guidance is told to the model"),
    Key("train.dtype", "dtype", _dtype, default="fp32"),
    Key("train.train_unet", turn=only(True, "the transformer learns"), default=True),
    Key("train.train_text_encoder", "train_text", {"true": "clip,t5", "false": None}, default=False),
    Key("train.text_encoder_lr", turn=when("train.train_text_encoder", "text_lr")),
    Key(DOP, "preserve", {"true": "differential", "false": None}, default=False),
    Key(f"{DOP}_multiplier", turn=when(DOP, "preserve_weight"), default=1.0),
    Key(f"{DOP}_class", turn=when(DOP, "class_word")),
    Key(BLANK, "preserve", {"true": "blank", "false": None}, default=False),
    Key(f"{BLANK}_multiplier", turn=when(BLANK, "preserve_weight"), default=1.0),
    Key("train.do_guidance_loss", "contrast", _contrast, default=False),
    Key("train.guidance_loss_target", default=3.0, why="read with train.do_guidance_loss"),
    Key("train.inverted_mask_prior", turn=lambda x, of: when("masks", "mask_prior")(
        of["train.inverted_mask_prior_multiplier"] if x else 0.0, of), default=False,
        why="a picture's loss is not divided by the mean of its mask, as ai-toolkit's is"),
    Key("train.inverted_mask_prior_multiplier", default=0.5, why="read with train.inverted_mask_prior"),
    Key("train.reg_weight", turn=when("is_reg", "prior_weight"), default=1.0),
    Key("train.noise_offset", default=0.0, lacks="noise is plain"),
    Key("train.min_snr_gamma", lacks="it is not defined for a rectified flow"),
    Key("train.ema_config.use_ema", "ema", lambda x, of: of["train.ema_config.ema_decay"] if x else 0.0),
    Key("train.ema_config.ema_decay", default=0.999, why="read with train.ema_config.use_ema"),
    Key("model.name_or_path", turn=model_of),
    Key("model.is_flux", why="it is FLUX.1"),
    Key("model.arch", turn=_architecture),
    Key("model.quantize", turn=_quantize, default=False),
    Key("model.qtype", default="qfloat8", why="read with model.quantize"),
    Key("model.quantize_te", why="read with model.qtype_te"),
    Key("model.qtype_te", turn=_t5, default="qfloat8"),
    Key("sample.prompts", "sample_prompts", _prompts),
    Key("sample.samples", "sample_prompts", _prompts),
    Key("sample.sample_every", "sample_every"),
    Key("sample.sample_steps", "sample_steps"),
    *needless({
        "captions and latents are encoded once, always": "train.cache_text_embeddings train.unload_text_encoder",
        "it changes no numbers": "performance_log_every sqlite_db_path log_dir logging.log_every "
        "logging.use_ui_logger train.skip_first_sample train.disable_sampling train.force_first_sample "
        "train.attention_backend",
    }),
    *left_out({
        "nothing is sent anywhere": "save.push_to_hub save.hf_repo_id save.hf_private logging.use_wandb "
        "logging.project_name logging.run_name",
        "samples are of the training size, and of fixed seeds": "sample.sampler sample.width sample.height sample.neg "
        "sample.seed sample.walk_seed sample.guidance_scale sample.network_multiplier sample.num_frames sample.fps",
        "--memory SIZE lets blocks come when they compute": "model.low_vram model.layer_offloading",
        "every factor learns at every step": "network.dropout",
        "--targets names what learns": "network.network_kwargs.ignore_if_contains",
        "a LoRA has Linears alone": "network.conv network.conv_alpha",
        "a LoKr has LyCORIS' keys": "network.old_lokr_format",
        "one model is trained, and nothing is merged into it": "model.assistant_lora_path model.lora_path "
        "model.inference_lora_path model.unet_path model.model_kwargs",
        "the average is saved": "train.ema_config.use_feedback train.ema_config.param_multiplier",
        "the contrast has the empty prompt": "train.unconditional_prompt train.do_guidance_loss_cfg_zero",
        "for a squared error it is a factor of gradients, which AdamW does not see": "train.do_differential_guidance "
        "train.differential_guidance_scale",
        "there is no such loss": "train.loss_target train.snr_gamma train.do_cfg train.correct_pred_norm "
        "train.do_prior_divergence train.weight_jitter train.switch_boundary_every",
        "AdamW has diffusers' numbers": "train.optimizer_params.betas train.optimizer_params.eps "
        "train.optimizer_params.decouple train.optimizer_params.use_bias_correction",
    }),
)  # fmt: skip
DATASET = (
    Key("folder_path", turn=folders),
    Key("dataset_path", turn=folders),
    Key("resolution", turn=_edges, default=512,
        why="a picture is trained at the largest that it fills, where ai-toolkit trains it at each"),
    Key("caption_ext", turn=_extension, default=".txt"),
    Key("caption_dropout_rate", turn=_dropout, default=0.0),
    Key("num_repeats", default=1, why="read with folder_path"),
    Key("is_reg", default=False, why="read with folder_path"),
    Key("trigger_word", why="read with folder_path"),
    Key("mask_path", why="read with folder_path"),
    Key("mask_min_value", turn=when("masks", "mask_floor"), default=0.0),
    Key("alpha_mask", default=False, why="read with folder_path"),
    Key("shuffle_tokens", "shuffles", {"true": 8, "false": 0}, default=False, why="encoded once, as they are"),
    Key("keep_tokens", turn=only(0, "ai-toolkit does not keep them in front when it shuffles"), default=0),
    Key("flip_x", "flip", default=False),
    Key("random_crop", "crop", {"true": "random", "false": "centre"}, default=False),
    Key("buckets", turn=only(True, "buckets are used"), default=True),
    Key("bucket_tolerance", default=64, why="sides of buckets are multiples of 64; ai-toolkit's of 32 for FLUX.1"),
    Key("cache_latents", default=False, why="latents are encoded once, always"),
    Key("cache_latents_to_disk", default=False, why="latents are encoded once, always"),
    Key("default_caption", lacks="--trigger is the caption of pictures without one"),
    Key("token_dropout_rate", default=0.0, lacks="captions have all their tags"),
    Key("square_crop", default=False, lacks="--resolution 512x512 crops squares"),
    Key("random_scale", default=False, lacks="pictures are cut and mirrored, no more"),
    Key("scale", turn=only(1.0, "pictures are cut and mirrored, no more"), default=1.0),
    Key("flip_y", default=False, lacks="pictures are mirrored left to right"),
    Key("loss_multiplier", turn=only(1.0, "data's weight is how often pictures come"), default=1.0),
    Key("network_weight", turn=only(1.0, "a folder's adapter has the scale 1"), default=1.0),
    *left_out({
        "--takes reads maps and references that metadata.jsonl names": "control_path control_path_1 control_path_2 "
        "control_path_3 controls inpaint_path unconditional_path",
        "pictures are cut and mirrored, no more": "augments augmentations shrink_video_to_frames num_frames",
        "captions have one form": "random_triggers use_short_captions",
    }),
)  # fmt: skip
FOLDERS = {"folder_path", "dataset_path", "num_repeats", "is_reg", "trigger_word", "mask_path", "alpha_mask",
           "resolution"}  # fmt: skip
"""of which each data set's counts"""


def parse(text: str) -> Any:
    """A YAML document's value, with 1e-4 as a number. ValueError; UsageError where PyYAML is not installed."""
    try:
        yaml: Any = import_module("yaml")
    except ModuleNotFoundError:
        raise UsageError("a config in YAML needs PyYAML. Next: pip install pyyaml") from None
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+0123456789"))
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def recognises(document: Any) -> bool:
    """Whether it is a job of ai-toolkit's."""
    return isinstance(document, dict) and "job" in document and "config" in document


def read(document: Any, read_other: Any) -> Iterator[Fate]:
    """What becomes of each key. UsageError."""
    config = document["config"]
    process, *others = config["process"]
    if process["type"] not in PROCESSES:
        raise UsageError(f"its process is a {process['type']}, and {', '.join(PROCESSES)} train a LoRA. Next: give one")
    process = _named(process, str(config["name"]))
    datasets = process.pop("datasets", None) or [{}]  # of a folder that a flag may name
    yield Fate("config.name", config["name"], why="the folder in training_folder")
    where = "config.process[0]."
    given = flatten(process)
    known = {
        "name": config["name"],
        "trigger_word": process.get("trigger_word"),
        "masks": any(_folder(one).masks for one in datasets if one),
        "is_reg": any(one.get("is_reg") for one in datasets),
    }
    yield from settle((*PROCESS, HELD_OUT), given, NAME, {name: where + name for name in given}, known)
    yield from _data_fates(datasets, known, f"{where}datasets")
    for i in range(len(others)):
        yield Fate(f"config.process[{i + 1}]", others[i].get("type"), why="one process is run", lacks=True)
    rest = {name: value for name, value in document.items() if name != "config"}
    rest |= {f"config.{name}": value for name, value in config.items() if name not in ("name", "process")}
    yield from (Fate(key, value, why="a note of the file's own") for key, value in flatten(rest).items())


def _named(value: Any, name: str) -> Any:
    """With the job's name where `[name]` stands."""
    if isinstance(value, dict):
        return {key: _named(one, name) for key, one in value.items()}
    if isinstance(value, list):
        return [_named(one, name) for one in value]
    return value.replace("[name]", name) if isinstance(value, str) else value


def _data_fates(datasets: list[dict[str, Any]], above: Values, where: str) -> Iterator[Fate]:
    """What becomes of the keys of data sets: the first's that is learned from count for all, but for its folder's."""
    first = next((i for i, one in enumerate(datasets) if not one.get("is_reg")), None)
    if first is None:
        raise UsageError("it names no folder to learn from. Next: give datasets a folder_path")
    known = {
        "learned": [_folder(one) for one in datasets if one and not one.get("is_reg")],
        "regular": [_folder(one) for one in datasets if one.get("is_reg")],
        "edges": sorted({edge for one in datasets for edge in _list(one.get("resolution", 512))}),
    }
    given = datasets[first]
    places = {name: f"{where}[{first}].{name}" for name in given}
    yield from settle(DATASET, given, NAME, places, {**above, **known})
    for i, dataset in enumerate(datasets):
        for name, value in dataset.items() if i != first else []:
            again = name != "resolution" and _folder(dataset).path in [_folder(one).path for one in datasets[:i]]
            yield other(f"{where}[{i}].{name}", value, given.get(name), name in FOLDERS, again)


def _folder(dataset: Values) -> Folder:
    path = dataset.get("folder_path") or dataset["dataset_path"]
    masks = "alpha" if dataset.get("alpha_mask") else dataset.get("mask_path") or ""
    repeats = dataset.get("num_repeats", 1)
    return Folder(here(path), repeats, dataset.get("trigger_word") or "", masks, f"num_repeats = {repeats}")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def resolved(datasets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each data set as ai-toolkit reads it: with its defaults, once for each resolution."""
    defaults = {row.name: row.default for row in DATASET}
    return [{**defaults, **one, "resolution": edge} for one in datasets for edge in _list(one.get("resolution", 512))]
