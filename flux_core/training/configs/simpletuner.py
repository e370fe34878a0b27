"""SimpleTuner: config.json for FLUX.1's LoRAs, and its multidatabackend.json, which may come alone.

Read at commit bc8e6ab77: its documentation and option fields. Paths are relative to the folder that one calls from.
Keys have `--` in front or not; values may be texts, as in "true".
"""

import math
from collections.abc import Iterator
from typing import Any

from ...errors import UsageError
from ...request.training import LOSSES
from .keys import (
    HELD_OUT,
    HUBER,
    MOST_RANK,
    Fate,
    Folder,
    Key,
    LeftOut,
    Needless,
    Values,
    count,
    epochs,
    folders,
    here,
    huber_schedule,
    left_out,
    model_of,
    needless,
    only,
    other,
    rate_schedule,
    settle,
    when,
)

NAME = "SimpleTuner"
OWN = {"model_family", "model_type", "data_backend_config", "lora_type", "flux_lora_target"}
"""keys that no other tool's config has"""
ALIASES = {"checkpointing_steps": "checkpoint_step_interval", "validation_steps": "validation_step_interval"}
"""older names"""
CONTEXT = ("add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
ALL = ("to_k", "to_q", "to_v", *CONTEXT[:3], "to_out.0", CONTEXT[3])
FEED = ("ff.net.0.proj", "ff.net.2")
FEED_CONTEXT = ("ff_context.net.0.proj", "ff_context.net.2")
ALL_FEED = (*ALL, *FEED, *FEED_CONTEXT, "proj_mlp", "proj_out")
TARGETS = {
    "all": ALL,
    "all+ffs": ALL_FEED,
    "all+ffs+embedder": (*ALL_FEED, "x_embedder"),
    "context": CONTEXT,
    "context+ffs": (*CONTEXT, *FEED_CONTEXT),
    "ai-toolkit": (*ALL_FEED, "norm.linear", "norm1.linear", "norm1_context.linear"),
    "tiny": ("single_transformer_blocks.7.proj_out", "single_transformer_blocks.20.proj_out"),
    "nano": ("single_transformer_blocks.7.proj_out",),
}
"""flux_lora_target -> diffusers' names"""


# Rows' functions -----------------------------------------------------------------------------------------


def _family(value: Any, of: Values) -> Any:
    if value != "flux":
        raise UsageError(f"it trains {value}, and this is FLUX.1. Next: give a config whose model_family is flux")
    return {}


def _kind(value: Any, of: Values) -> Any:
    if value != "lora":
        raise UsageError(f"its model_type is {value}, and LoRAs are trained here. Next: set model_type to lora")
    return {}


def _lycoris(value: Any, of: Values) -> Any:
    raise Needless("its keys follow" if of["lora_type"] == "lycoris" else "lora_type is standard")


def _algo(value: Any, of: Values) -> Any:
    known = "lora", "locon", "lokr", "tlora"
    raise (Needless if value in known else LeftOut)(f"there are {', '.join(known)}")


def _is_whole(of: Values) -> bool:
    """Whether it is a LoKr with a whole second factor, as any number above all ranks says, too."""
    return of["algo"] == "lokr" and (of["linear_dim"] > MOST_RANK or of["full_matrix"])


def _dim(value: Any, of: Values) -> dict[str, Any]:
    return {"rank": MOST_RANK, "alpha": MOST_RANK} if _is_whole(of) else {"rank": value}


def _alpha(value: Any, of: Values) -> Any:
    if _is_whole(of):
        raise Needless("LyCORIS uses it only for a second factor that is a product")
    return value


def _classes(value: Any, of: Values) -> str:
    """The Linears of diffusers' classes of modules."""
    if unknown := [one for one in value if one not in CLASSES]:
        raise LeftOut(f"--targets has no name for {', '.join(unknown)}; there are {', '.join(CLASSES)}")
    return ",".join(CLASSES[one] for one in value)


def _schedule(value: Any, of: Values) -> dict[str, Any]:
    """golden/train/timesteps.json: a sigmoid of a normal number, or another way, and then a shift."""
    shift = value or 0
    way = next((way for switch, way in SCHEDULES.items() if of[switch]), "")
    if way == "beta" and (of["flow_beta_schedule_alpha"], of["flow_beta_schedule_beta"]) != (2, 2):
        raise LeftOut("there is the beta distribution of 2 and 2")
    if way and shift <= 0 and of["flow_schedule_auto_shift"]:
        raise LeftOut(f"levels by {way} are shifted by one number, flow_schedule_shift")
    if way:
        return {"timesteps": way, **({"timestep_shift": shift} if shift > 0 else {})}
    scale = of["flow_sigmoid_scale"]
    if shift > 0:
        return {"timesteps": "shift", "timestep_shift": shift, "timestep_scale": scale}
    return {"timesteps": "flux_shift" if of["flow_schedule_auto_shift"] else "sigmoid", "timestep_scale": scale}


def _slowed(value: Any, of: Values) -> Any:
    if not of["mixflow_enabled"]:
        raise Needless("mixflow_enabled is off")
    raise (LeftOut if value else Needless)("pictures have the noise of their level, and no more")


def _targets(value: Any, of: Values) -> str:
    if of["lora_type"] == "lycoris":
        raise Needless("lycoris_config counts")
    if value not in TARGETS:
        raise LeftOut(f"there are {', '.join(TARGETS)}")
    return ",".join(TARGETS[value])


def _clip(value: Any, of: Values) -> Any:
    if value and of["grad_clip_method"] != "norm":
        raise LeftOut("values are clipped there one by one; here all by their norm, at --max-grad-norm")
    return value


def _steps(value: Any, of: Values) -> Any:
    if not value:
        raise Needless("num_train_epochs counts")
    return value


def _epochs(value: Any, of: Values) -> Any:
    if not value or of["max_train_steps"]:
        raise Needless("max_train_steps counts")
    return epochs("steps")(value, of)


def _precision(value: Any, of: Values) -> Any:
    if value == "no_change":
        return "float32" if of["mixed_precision"] == "no" else "bfloat16"
    kind = value.partition("-")[0]
    if kind not in ("int8", "fp8", "nf4"):
        raise LeftOut("there are int8, fp8, nf4")
    return kind


def _t5(value: Any, of: Values) -> Any:
    return {} if value == "no_change" else {"t5_dtype": _precision(value, of)}


def _again(value: Any, of: Values) -> Any:
    if not of["gradient_checkpointing"] or value in (None, 1):
        raise Needless("gradient_checkpointing counts")
    if value != 2:
        raise LeftOut("there is every block, or every second: --checkpointing second")
    return {}


def _checkpointing(value: Any, of: Values) -> str:
    return "none" if not value else "second" if of["gradient_checkpointing_interval"] == 2 else "blocks"


def _ema(value: Any, of: Values) -> float:
    if value and of["optimizer"] == "adamw_schedulefree":
        raise LeftOut("adamw_schedulefree keeps a mean of its own")
    return of["ema_decay"] if value else 0.0


def _type(value: Any, of: Values) -> Any:
    hub = value == "huggingface" and of["dataset_name"]
    raise (Needless if hub or value == "local" else LeftOut)("a folder is read, or a data set of the hub")


def _prompt(value: Any, of: Values) -> list[str]:
    return [value]


# The tables ----------------------------------------------------------------------------------------------

OPTIMIZERS = {"adamw_bf16": "adamw", "optimi-adamw": "adamw", "torch-adamw": "adamw", "bnb-adamw8bit": "adamw8bit",
              "bnb-adamw8bit-paged": "adamw8bit", "ao-adamw8bit": "adamw8bit", "prodigy": "prodigy",
              "adamw_schedulefree": "adamw_schedulefree"}  # fmt: skip
SCHEDULES = {"mixflow_enabled": "mixflow", "flow_use_uniform_schedule": "uniform", "flow_use_beta_schedule": "beta"}
LYCORIS = (
    Key("algo", turn=_algo, default="lora"),
    Key("linear_dim", "rank", _dim, default=4),
    Key("linear_alpha", "alpha", _alpha, default=1),
    Key("factor", turn=when("algo", "lokr", "lokr"), default=-1),
    Key("full_matrix", default=False, why="read with linear_dim"),
    Key("tlora_min_rank", turn=when("algo", "rank_min", "tlora"), default=1),
    Key("tlora_alpha", turn=when("algo", "rank_curve", "tlora"), default=1.0),
    Key("multiplier", turn=only(1, "an adapter is trained at the scale 1"), default=1.0),
    Key("apply_preset", default={}),
    Key("apply_preset.target_module", "targets", _classes),
    *left_out({
        "one factor and one rank are for all; --ranks has others": "apply_preset.module_algo_map "
        "apply_preset.name_algo_map",
        "--targets names what learns": "apply_preset.target_name apply_preset.exclude_name",
        "every factor learns at every step": "dropout rank_dropout module_dropout",
        "a LoKr has one form": "decompose_both use_tucker use_scalar weight_decompose dora_wd "
        "rs_lora unbalanced_factorization",
    }),
)  # fmt: skip
"""of the file that lycoris_config names"""
CLASSES = {"Attention": "attn.*", "FeedForward": "ff.net.*,ff_context.net.*"}
CONFIG = (
    Key("model_family", turn=_family),
    Key("model_type", turn=_kind),
    Key("model_flavour", why="pretrained_model_name_or_path names the model"),
    Key("pretrained_model_name_or_path", turn=model_of),
    Key("lora_type", default="standard", why="read with lora_rank"),
    Key("lora_rank", turn=when("lora_type", "rank", "standard"), default=16),
    Key("lora_alpha", turn=when("lora_type", "alpha", "standard")),
    Key("lora_dropout", lacks="every factor learns at every step"),
    Key("use_dora", "dora"),
    Key("lycoris_config", turn=_lycoris),
    Key("flux_lora_target", "targets", _targets, default="all"),
    Key("flux_guidance_mode", turn=only("constant", "guidance is one number"), default="constant"),
    Key("flux_guidance_value", "guidance", default=1.0),
    Key("flow_schedule_shift", turn=_schedule, default=3.0),
    Key("flow_schedule_auto_shift", default=False, why="read with flow_schedule_shift"),
    Key("flow_sigmoid_scale", default=1.0, why="read with flow_schedule_shift"),
    Key("flow_use_uniform_schedule", default=False, why="read with flow_schedule_shift"),
    Key("flow_use_beta_schedule", default=False, why="read with flow_schedule_shift"),
    Key("flow_beta_schedule_alpha", default=2.0, why="read with flow_schedule_shift"),
    Key("flow_beta_schedule_beta", default=2.0, why="read with flow_schedule_shift"),
    Key("mixflow_enabled", default=False, why="read with flow_schedule_shift"),
    Key("mixflow_gamma", turn=_slowed, default=0.8),
    Key("loss_type", "loss", {name: name for name in LOSSES}, default="l2"),
    Key("huber_c", turn=when("loss_type", "huber_c", *HUBER), default=0.1),
    Key("huber_schedule", turn=huber_schedule, default="snr"),
    Key("masked_loss_probability", turn=only(1, "masks count at every step"), default=1.0),
    Key("output_dir", "output_dir"),
    Key("caption_dropout_probability", "caption_dropout", default=0.1),
    Key("train_batch_size", "batch"),
    Key("gradient_accumulation_steps", "accumulation"),
    Key("gradient_checkpointing", "checkpointing", _checkpointing),
    Key("gradient_checkpointing_interval", turn=_again),
    Key("max_train_steps", "steps", _steps),
    Key("num_train_epochs", turn=_epochs),
    Key("optimizer", "optimizer", OPTIMIZERS, why="its numbers are in fp32"),
    Key("learning_rate", "lr"),
    Key("text_encoder_lr", turn=when("train_text_encoder", "text_lr")),
    Key("lr_scheduler", "schedule", rate_schedule("optimizer")),
    Key("lr_warmup_steps", "warmup"),
    Key("max_grad_norm", "max_grad_norm", _clip, default=2.0),
    Key("grad_clip_method", default="value", why="read with max_grad_norm"),
    Key("mixed_precision", why="read with base_model_precision"),
    Key("base_model_precision", "dtype", _precision, default="no_change"),
    Key("text_encoder_2_precision", turn=_t5),
    Key("seed", "seed"),
    Key("use_ema", "ema", _ema),
    Key("ema_decay", default=0.995, why="read with use_ema"),
    Key("checkpoint_step_interval", "save_every", default=500),
    Key("checkpoints_total_limit", "keep"),
    Key("validation_prompt", "sample_prompts", _prompt),
    Key("validation_step_interval", "sample_every"),
    Key("validation_num_inference_steps", "sample_steps"),
    Key("aspect_bucket_rounding", turn=only(2, "a bucket is the nearest in shape"), default=2),
    Key("aspect_bucket_alignment", turn=only(64, "sides of buckets are multiples of 64"), default=64),
    Key("train_text_encoder", "train_text", {"true": "clip", "false": None}),
    HELD_OUT,
    *needless({
        "read with the backends": "data_backend_config resolution resolution_type",
        "captions and latents are encoded once, always": "vae_batch_size write_batch_size cache_dir "
        "preserve_data_backend_cache text_embeds_path",
        "it changes no numbers": "attention_mechanism report_to dataloader_prefetch resume_from_checkpoint "
        "disable_benchmark allow_tf32 base_model_default_dtype skip_file_discovery minimum_image_size",
    }),
    *left_out({
        "nothing is sent anywhere": "push_to_hub hub_model_id push_checkpoints_to_hub tracker_project_name "
        "tracker_run_name webhook_config",
        "samples are of the training size, and of fixed seeds": "validation_resolution validation_seed "
        "validation_guidance validation_guidance_real validation_negative_prompt validation_guidance_rescale "
        "validation_disable_unconditional user_prompt_library validation_prompt_library num_eval_images",
        "CLIP computes as the model does": "text_encoder_1_precision",
        "noise is plain": "noise_offset offset_noise input_perturbation",
        "it is not defined for a rectified flow": "snr_gamma",
        "the schedules are constant and cosine": "lr_end lr_power lr_num_cycles lr_scale",
        "AdamW has diffusers' numbers": "optimizer_config optimizer_beta1 optimizer_beta2 adam_beta1 adam_beta2",
        "blocks are run whole": "tread_config crepa_enabled fuse_qkv_projections",
        "an adapter starts from nothing": "init_lora lora_init_type",
    }),
)  # fmt: skip


def _resolution(value: Any, of: Values) -> dict[str, Any]:
    """The edge of a square, for a crop of squares the square itself."""
    if None in of["edges"]:
        raise LeftOut("pixel is the shorter side; --resolution takes the edge of a square of that area")
    edges = sorted(of["edges"])
    if of["crop"] and of["crop_aspect"] == "square" and len(edges) == 1:
        return {"resolution": f"{edges[0]}x{edges[0]}", "rule": "fixed"}
    return {"resolution": ",".join(map(str, edges)), "rule": "buckets"}


def _crop(value: Any, of: Values) -> Any:
    if not of["crop"]:
        raise Needless("crop is off; what a bucket has less is cut at the centre")
    return {"crop": {"center": "centre", "centre": "centre", "random": "random"}[value]}


def _aspect(value: Any, of: Values) -> Any:
    if not of["crop"] or value == "preserve" or (value == "square" and len(of["edges"]) == 1):
        raise Needless("read with resolution")
    raise LeftOut("buckets keep a picture's shape")


def _captions(value: Any, of: Values) -> Any:
    if value == "textfile":
        raise Needless("NAME.txt; its lines are one caption, where SimpleTuner draws one of them")
    if value == "instanceprompt":
        raise Needless("instance_prompt is the trigger word, in front of what NAME.txt says")
    raise LeftOut("captions are in NAME.txt or metadata.jsonl")


BACKEND = (
    Key("id", why="a name"),
    Key("type", turn=_type, default="local"),
    Key("dataset_type", why="pictures to learn from"),
    Key("instance_data_dir", turn=folders),
    Key("repeats", default=0, why="read with instance_data_dir: one more pass than that"),
    Key("instance_prompt", why="read with instance_data_dir"),
    Key("prepend_instance_prompt", default=False, why="read with instance_data_dir"),
    Key("only_instance_prompt", default=False, why="read with instance_data_dir"),
    Key("conditioning_data", why="read with instance_data_dir, where it is of masks"),
    Key("is_regularisation_data", default=False, why="read with instance_data_dir"),
    Key("caption_strategy", turn=_captions),
    Key("resolution", turn=_resolution,
        why="a picture is trained at the largest that it fills, and left out where it fills none"),
    Key("resolution_type", why="read with resolution"),
    Key("crop", default=False, why="read with resolution"),
    Key("crop_aspect", turn=_aspect, default="square"),
    Key("crop_style", turn=_crop, default="random"),
    Key("caption_shuffle", "shuffles", {"true": 8, "false": 0}, why="encoded once, as they are"),
    Key("probability", turn=only(1, "data's weight is how often pictures come"), default=1),
    Key("disabled", default=False, why="it is used"),
    Key("dataset_name", turn=folders),
    *needless({
        "captions and latents are encoded once, always": "cache_dir_vae cache_dir vae_cache_clear_each_epoch "
        "metadata_backend skip_file_discovery preserve_data_backend_cache hash_filenames",
        "pictures that fill no bucket are left out": "minimum_image_size",
    }),
    *left_out({
        "captions have one form": "caption_filter_list disable_multiline_split",
        "a picture of any size is used": "maximum_image_size target_downsample_size crop_aspect_buckets "
        "minimum_aspect_ratio maximum_aspect_ratio",
        "levels are drawn alike for all": "timestep_sampling_offset",
    }),
)  # fmt: skip
FOLDERS = {"id", "instance_data_dir", "repeats", "instance_prompt", "prepend_instance_prompt", "only_instance_prompt",
           "conditioning_data", "is_regularisation_data", "resolution", "resolution_type", "dataset_name",
           "cache_dir_vae"}  # fmt: skip
"""of which each backend's counts"""
REGULAR = "is_regularisation_data"
LEARNED = "half of an epoch, and learned as they are, where SimpleTuner keeps to what the base draws"
ALWAYS = {"id", "resolution", "resolution_type", "cache_dir_vae"}
"""even of a folder that was named before"""


def recognises(document: Any) -> bool:
    """Whether it is SimpleTuner's: a config, or a list of backends."""
    if isinstance(document, list):
        return bool(document) and all(isinstance(one, dict) and "id" in one for one in document)
    return isinstance(document, dict) and bool(OWN & _plain(document).keys())


def read(document: Any, read_other: Any) -> Iterator[Fate]:
    """What becomes of each key. read_other: a document by its path. UsageError, FileError."""
    if isinstance(document, list):
        yield from _data_fates(_spelled(document), {})
        return
    config = _plain(document)
    backends = _spelled(read_other(config["data_backend_config"])) if "data_backend_config" in config else []
    yield from settle(CONFIG, config, NAME, known={"epoch": _steps_of_epoch(backends, config)})
    if config.get("lora_type") == "lycoris":
        lycoris = _opened(read_other(config["lycoris_config"]))
        yield from settle(LYCORIS, lycoris, NAME, {name: f"(lycoris_config).{name}" for name in lycoris})
    if backends:
        yield from _data_fates(backends, config)


def _plain(document: dict[str, Any]) -> dict[str, Any]:
    """Keys without dashes, by their newer names; texts that are truth values as those."""
    truths = {"true": True, "false": False, "none": None}
    found: dict[str, Any] = {}
    for key, value in document.items():
        name = key.lstrip("-").replace("-", "_")
        found[ALIASES.get(name, name)] = truths.get(value.lower(), _number(value)) if isinstance(value, str) else value
    return found


def _number(text: str) -> Any:
    """A number's text as that number."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _spelled(backends: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Backends, with an s in `is_regularisation_data`."""
    return [{name.replace("regularization", "regularisation"): x for name, x in one.items()} for one in backends]


def _opened(lycoris: dict[str, Any]) -> dict[str, Any]:
    """With a key for each of `apply_preset`."""
    preset = lycoris.get("apply_preset") or {}
    others = {name: value for name, value in lycoris.items() if name != "apply_preset"}
    return others | {f"apply_preset.{name}": value for name, value in preset.items()}


def _is_image(backend: Values) -> bool:
    return backend.get("dataset_type", "image") == "image" and not backend.get("disabled")


def _steps_of_epoch(backends: list[dict[str, Any]], config: Values) -> int | None:
    """An epoch's steps; None where pictures are not there."""
    used = [one for one in backends if _is_image(one)]
    counts = [count(str(one.get("instance_data_dir", ""))) for one in used]
    if None in counts or not counts:
        return None
    passes = sum((number or 0) * (one.get("repeats", 0) + 1) for number, one in zip(counts, used, strict=True))
    batch, accumulation = config.get("train_batch_size", 1), config.get("gradient_accumulation_steps", 1)
    return math.ceil(math.ceil(passes / batch) / accumulation) or None


def _data_fates(backends: list[dict[str, Any]], config: Values) -> Iterator[Fate]:
    """What becomes of backends: the options of the first that is learned from count for all, but for its folder's."""
    images = [one for one in backends if _is_image(one)]
    learned = [one for one in images if not one.get("is_regularisation_data")]
    if not learned:
        raise UsageError("no backend has pictures to learn from. Next: give one an instance_data_dir")
    masks = {one["id"]: one for one in backends if one.get("conditioning_type") == "mask"}
    above = {name: config[name] for name in ("resolution", "resolution_type") if name in config}
    known = {
        "learned": [_folder(one, masks) for one in learned],
        "regular": [_folder(one, masks) for one in images if one.get("is_regularisation_data")],
        "edges": {_edge({**above, **one}) for one in learned},
    }
    first = learned[0]
    for i, backend in enumerate(backends):
        if backend is first:
            places = {name: f"[{i}].{name}" for name in backend}
            yield from settle(BACKEND, {**above, **backend}, NAME, places, known)
        elif backend in images:
            before = [one.get("instance_data_dir") for one in backends[:i]]
            for name, value in backend.items():
                key, again = f"[{i}].{name}", name not in ALWAYS and backend.get("instance_data_dir") in before
                is_prior = name == REGULAR and value
                fate = other(key, value, first.get(name), name in FOLDERS, again)
                yield Fate(key, value, why=LEARNED) if is_prior else fate
        else:
            yield _unused(f"[{i}]", backend, masks)


def _unused(key: str, backend: Values, masks: Values) -> Fate:
    """Of a backend that is none of pictures to learn from."""
    kind, name = backend.get("dataset_type", "image"), backend["id"]
    if backend.get("disabled"):
        return Fate(key, name, why="disabled")
    if kind in ("text_embeds", "image_embeds"):
        return Fate(key, name, why="captions and latents are encoded once, always")
    if name in masks:
        return Fate(key, name, why="masks of the backend that names it")
    return Fate(key, name, why=f"pictures are learned from, not {kind}", lacks=True)


def _folder(backend: Values, masks: Values) -> Folder:
    """Passes are one more than repeats."""
    alone = backend.get("caption_strategy") == "instanceprompt" or backend.get("only_instance_prompt")
    word = backend.get("instance_prompt", "") if alone or backend.get("prepend_instance_prompt") else ""
    mask = masks.get(backend.get("conditioning_data", ""), {}).get("instance_data_dir", "")
    path = here(backend["instance_data_dir"]) if "instance_data_dir" in backend else backend["dataset_name"]
    repeats = backend.get("repeats", 0)
    return Folder(path, repeats + 1, word, mask, f"repeats = {repeats}")


def _edge(backend: Values) -> int | None:
    """The edge of a square of a backend's area, in multiples of 64; None for a shorter side."""
    kind, size = backend.get("resolution_type", "pixel_area"), backend.get("resolution", 1024)
    if kind == "pixel":
        return None
    edge = math.sqrt(size) * 1024 if kind == "area" else size
    return round(edge / 64) * 64
