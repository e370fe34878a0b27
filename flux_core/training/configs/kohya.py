"""kohya's sd-scripts: the TOML of `--config_file` for FLUX.1, and that of `--dataset_config`, which may come alone.

Read at commit 48d368fa: library/config_util.py, library/train_util.py, networks/lora_flux.py. Paths are relative to the
folder that one calls from. The sections of the first file only group its keys. A subset's option is its own, else its
dataset's, else that of `[general]`, else the first file's, else the default.
"""

import fnmatch
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...files import user_path
from ...lora.dialects import Table, flat
from ...request.training import LOSSES
from ...variants import VARIANTS
from ..adapter import matching
from .keys import (
    HUBER,
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

NAME = "kohya"
OWN = {"pretrained_model_name_or_path", "network_module", "network_dim", "dataset_config", "train_data_dir"}
"""keys that no other tool's TOML has"""
ORDERS = 8
"""orders of tags, and variants of wildcards, that are encoded where kohya draws new ones every time"""


# Rows' functions -----------------------------------------------------------------------------------------


def _timesteps(value: Any, of: Values) -> dict[str, Any]:
    """golden/train/timesteps.json: `sigma` is diffusers' table, shifted; the others are continuous."""
    shift, scale = of["discrete_flow_shift"], of["sigmoid_scale"]
    if value in ("sigmoid", "flux_shift"):
        return {"timesteps": value, "timestep_scale": scale}
    if value == "shift":
        return {"timesteps": value, "timestep_shift": shift, "timestep_scale": scale}
    if value == "uniform":
        return {"timesteps": value}
    if value != "sigma":
        raise LeftOut("there are sigma, uniform, sigmoid, shift, flux_shift")
    if of["weighting_scheme"] == "logit_normal":  # a shift of levels is one of their logit
        mean = of["logit_mean"] - math.log(shift)
        return {"timesteps": "logit_normal", "timestep_mean": mean, "timestep_std": of["logit_std"]}
    moved = {} if shift == 1 else {"timestep_shift": shift}
    if of["weighting_scheme"] == "mode":
        return {"timesteps": "mode", "timestep_scale": of["mode_scale"], **moved}
    return {"timesteps": "uniform", **moved}


def _prediction(value: Any, of: Values) -> dict[str, Any]:
    """`sigma_scaled` weighs the velocity's squared error by sigma^2, times its weighting."""
    if value == "raw" or (value == "sigma_scaled" and of["weighting_scheme"] == "sigma_sqrt"):
        return {"weighting": "none"}
    raise LeftOut("the velocity's error is weighed by --weighting alone")


def _rate(value: Any, of: Values) -> Any:
    if of["unet_lr"] is not None:
        raise Needless("unet_lr counts")
    return value


def _warmup(value: Any, of: Values) -> Any:
    if not 0 < value < 1:
        return int(value)
    if of["steps"] is None:
        raise LeftOut("the pictures are not there, so the steps of which it is a share are not known")
    return int(value * of["steps"])


def _steps(value: Any, of: Values) -> Any:
    if of["max_train_epochs"] is not None:
        raise Needless("max_train_epochs counts")
    return value


PRECISIONS = {"no": {"dtype": "float32"}, "bf16": {"dtype": "bfloat16"}, "fp16": {"precision": "fp16"}}


def _precision(value: Any, of: Values) -> dict[str, Any]:
    if (of["fp8_base"] or of["fp8_base_unet"]) and value != "fp16":
        raise Needless("fp8_base counts")
    if value not in PRECISIONS:
        raise LeftOut(f"there are {', '.join(PRECISIONS)}")
    return PRECISIONS[value]


def _module(value: Any, of: Values) -> Any:
    if value == "lycoris.kohya" and of["network_args.algo"] == "lokr":
        return {"lokr": of["network_args.factor"]}
    if value not in ("networks.lora_flux", "lycoris.kohya") or of["network_args.algo"] not in ("lora", None):
        raise LeftOut("a LoRA of the transformer is trained")
    return {}


def _text(value: Any, of: Values) -> Any:
    """CLIP learns unless one says that the transformer alone does; T5 if one asks for it."""
    if value:
        return {}
    return {"train_text": "clip,t5" if str(of["network_args.train_t5xxl"]).lower() == "true" else "clip"}


def _text_lr(value: Any, of: Values) -> Any:
    if of["network_train_unet_only"]:
        raise Needless("network_train_unet_only is on")
    return value[0] if isinstance(value, list) else value


def _plus(value: Any, of: Values) -> Any:
    if _is_prodigy(of):
        raise LeftOut("prodigy finds one rate for all")
    return value


def _is_prodigy(of: Values) -> bool:
    return OPTIMIZERS.get(of["optimizer_type"].lower()) == "prodigy"


BLOCKS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
"""diffusers' names"""


def _targets(value: Any, of: Values) -> str:
    """All Linears of these blocks."""
    found = []
    for kind, name in BLOCKS.items():
        which = of[f"network_args.train_{kind}_block_indices"]
        if value in ("all", kind) and which != "none":
            found += [f"{name}.*"] if which == "all" else [f"{name}.{i}.*" for i in _numbers(which)]
    return "blocks" if found == [f"{name}.*" for name in BLOCKS.values()] else ",".join(found)


def _numbers(text: str) -> Iterator[int]:
    """`0-2,5` -> 0, 1, 2, 5"""
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


PARTS = {
    "img_attn_dim": ("double", ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")),
    "txt_attn_dim": ("double", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")),
    "img_mlp_dim": ("double", ("ff.net.0.proj", "ff.net.2")),
    "txt_mlp_dim": ("double", ("ff_context.net.0.proj", "ff_context.net.2")),
    "img_mod_dim": ("double", ("norm1.linear",)),
    "txt_mod_dim": ("double", ("norm1_context.linear",)),
    "single_dim": ("single", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")),
    "single_mod_dim": ("single", ("norm.linear",)),
}
"""network_args with a rank of their own: the kind of block, and diffusers' names of the Linears"""
NO_RANK = "a rank of 0 is no rank. Next: name what learns with --targets"
OF_RANKS = "alpha / rank is that of all, where kohya's alpha is"


def _ranks(value: Mapping[str, Any], of: Values) -> str:
    if "0" in map(str, value.values()):
        raise LeftOut(NO_RANK)
    return ",".join(
        f"{BLOCKS[kind]}.*.{name}={rank}"
        for (kind, names), rank in ((PARTS[part], rank) for part, rank in value.items())
        for name in names
    )


def _reg_ranks(value: str, of: Values) -> str:
    """Above those of parts."""
    if re.search(r"=0*(,|$)", value):
        raise LeftOut(NO_RANK)
    parts = of["network_args.dims"]
    return ",".join([*([_ranks(parts, of)] if parts else []), *_by_regex(value, of)])


def _reg_rates(value: str, of: Values) -> str:
    return _plus(",".join(_by_regex(value, of)), of)


def _by_regex(text: str, of: Values) -> list[str]:
    """`REGEX=VALUE,…` of kohya's names, the first that is found in one counts, by diffusers' names of what learns."""
    parts = (one.partition("=") for one in text.split(","))
    regexes = [(re.compile(regex.strip()), value.strip()) for regex, _, value in parts]
    params, which = VARIANTS["flux-dev"].params, of["network_args.train_blocks"]
    linears, found = Table(params).linears, dict[str, str]()
    names = matching(params, [f"{name}.*" for kind, name in BLOCKS.items() if which in ("all", kind)])
    for name in names:
        own = f"lora_unet_{flat(linears[flat(name)].module)}"
        found |= next(({name: value} for regex, value in regexes if regex.search(own)), {})
    if not found:
        raise LeftOut("nothing that learns has such a name")
    return _in_patterns(found, names)


def _in_patterns(values: Mapping[str, str], names: Collection[str]) -> list[str]:
    """`NAME=VALUE` of each name, with `*` for the number of a block where all blocks have the value."""
    return list(dict.fromkeys(
        f"{pattern if all(values.get(one) == value for one in fnmatch.filter(names, pattern)) else name}={value}"
        for name, value in values.items() for pattern in [re.sub(r"(blocks)\.\d+\.", r"\1.*.", name)]
    ))  # fmt: skip


def _out(value: Any, of: Values) -> str:
    """The run's folder: `output_name` in `output_dir`."""
    return str(Path(value) / of["output_name"])


def _prompts(value: Any, of: Values) -> list[str]:
    """The prompts of a .txt, without what follows ` --` in their lines."""
    path = user_path(value)
    if path.suffix != ".txt" or not path.is_file():
        raise LeftOut("a .txt with a prompt in each line would be read")
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [line.partition(" --")[0].strip() for line in lines if not line.startswith("#")]
    return [line for line in found if line]


def _length(value: Any, of: Values) -> Any:
    raise (Needless if value in (256, 512) else LeftOut)("T5 takes 512 tokens for dev, 256 for schnell")


# The training file ---------------------------------------------------------------------------------------

OPTIMIZERS = {"": "adamw", "adamw": "adamw", "adamw8bit": "adamw8bit", "bitsandbytes.optim.adamw8bit": "adamw8bit",
              "pagedadamw8bit": "adamw8bit", "prodigy": "prodigy", "prodigyopt.prodigy": "prodigy",
              "adamwschedulefree": "adamw_schedulefree",
              "schedulefree.adamwschedulefree": "adamw_schedulefree"}  # fmt: skip
TRAIN = (
    Key("pretrained_model_name_or_path", turn=model_of),
    Key("clip_l", "clip_l"),
    Key("t5xxl", "t5xxl"),
    Key("ae", "ae"),
    Key("network_module", turn=_module),
    Key("network_dim", "rank", default=4, why="q, k and v have factors of their own, as with split_qkv"),
    Key("network_alpha", "alpha", default=1),
    Key("network_train_unet_only", turn=_text, default=False),
    Key("network_args.train_blocks", "targets", _targets, default="all"),
    Key("network_args.train_double_block_indices", default="all", why="read with train_blocks"),
    Key("network_args.train_single_block_indices", default="all", why="read with train_blocks"),
    Key("network_args.dims", "ranks", _ranks, why=OF_RANKS),
    Key("network_args.network_reg_dims", "ranks", _reg_ranks, why=OF_RANKS),
    Key("network_args.network_reg_lrs", "rates", _reg_rates),
    Key("network_args.loraplus_lr_ratio", "lora_plus", _plus),
    Key("network_args.loraplus_unet_lr_ratio", "lora_plus", _plus),
    Key("network_args.algo", why="read with network_module"),
    Key("network_args.factor", default=-1, why="read with network_module"),
    Key("network_args.train_t5xxl", why="read with network_train_unet_only"),
    Key("learning_rate", "lr", _rate, default=2e-6),
    Key("unet_lr", "lr"),
    Key("text_encoder_lr", "text_lr", _text_lr),
    Key("optimizer_type", "optimizer", OPTIMIZERS, default=""),
    Key("use_8bit_adam", "optimizer", {"true": "adamw8bit", "false": "adamw"}),
    Key("optimizer_args.weight_decay", "weight_decay"),
    Key("lr_scheduler", "schedule", rate_schedule("optimizer_type"), default="constant"),
    Key("lr_warmup_steps", "warmup", _warmup, default=0),
    Key("max_train_steps", "steps", _steps, default=1600),
    Key("max_train_epochs", turn=epochs("steps"), why="batches are counted without the remainders of buckets"),
    Key("gradient_accumulation_steps", "accumulation", default=1),
    Key("max_grad_norm", "max_grad_norm", default=1.0),
    Key("gradient_checkpointing", "checkpointing", {"true": "blocks", "false": "none"}, default=False),
    Key("mixed_precision", turn=_precision, default="no"),
    Key("fp8_base", "dtype", {"true": "fp8", "false": None}),
    Key("fp8_base_unet", "dtype", {"true": "fp8", "false": None}),
    Key("seed", "seed"),
    Key("guidance_scale", "guidance", default=3.5),
    Key("timestep_sampling", turn=_timesteps, default="sigma"),
    Key("discrete_flow_shift", default=3.0, why="read with timestep_sampling"),
    Key("sigmoid_scale", default=1.0, why="read with timestep_sampling"),
    Key("logit_mean", default=0.0, why="read with timestep_sampling"),
    Key("logit_std", default=1.0, why="read with timestep_sampling"),
    Key("mode_scale", default=1.29, why="read with timestep_sampling"),
    Key("weighting_scheme", default="uniform", why="read with timestep_sampling and model_prediction_type"),
    Key("model_prediction_type", turn=_prediction, default="sigma_scaled"),
    Key("loss_type", "loss", {name: name for name in LOSSES}, default="l2"),
    Key("huber_c", turn=when("loss_type", "huber_c", *HUBER), default=0.1),
    Key("huber_schedule", turn=huber_schedule, default="snr"),
    Key("huber_scale", turn=only(1, "huber_c is the size itself"), default=1.0),
    Key("prior_loss_weight", turn=when("is_reg", "prior_weight"), default=1.0),
    Key("masked_loss", why="read with image_dir"),
    Key("output_dir", "output_dir", _out),
    Key("output_name", default="last", why="the folder in output_dir"),
    Key("save_every_n_steps", "save_every"),
    Key("save_every_n_epochs", turn=epochs("save_every")),
    Key("save_model_as", turn=only("safetensors", "the adapter is a safetensors file, in PEFT's keys")),
    Key("sample_prompts", "sample_prompts", _prompts),
    Key("sample_every_n_steps", "sample_every"),
    Key("sample_every_n_epochs", turn=epochs("sample_every")),
    Key("t5xxl_max_token_length", turn=_length),
    *needless({
        "latents and captions are encoded once, always": "cache_latents cache_latents_to_disk "
        "cache_text_encoder_outputs cache_text_encoder_outputs_to_disk skip_cache_check vae_batch_size "
        "text_encoder_batch_size",
        "it changes no numbers, or is chosen by the device": "sdpa xformers mem_eff_attn lowvram highvram "
        "max_data_loader_n_workers persistent_data_loader_workers no_half_vae cpu_offload_checkpointing",
        "read with the data set": "dataset_config train_batch_size train_data_dir reg_data_dir",
        "kohya does not use it for FLUX.1": "min_snr_gamma v2 v_parameterization clip_skip max_token_length",
    }),
    *left_out({
        "--memory SIZE lets blocks come when they compute": "blocks_to_swap double_blocks_to_swap "
        "single_blocks_to_swap",
        "factors are in fp32, and saved so": "save_precision full_bf16 full_fp16",
        "the run's folder tells its losses": "logging_dir log_with log_prefix log_tracker_name wandb_api_key "
        "wandb_run_name log_config",
        "checkpoints are kept by --keep, and the run goes on from the last": "resume save_state save_last_n_steps "
        "save_last_n_epochs save_state_on_train_end save_last_n_steps_state save_last_n_epochs_state",
        "an adapter starts from nothing": "network_weights dim_from_weights base_weights base_weights_multiplier",
        "every factor learns at every step": "network_dropout network_args.rank_dropout network_args.module_dropout "
        "network_args.network_dropout scale_weight_norms",
        "--ranks has no inputs": "network_args.in_dims",
        "noise is plain": "noise_offset ip_noise_gamma multires_noise_iterations adaptive_noise_scale",
        "T5's padding is seen, as in FLUX.1": "apply_t5_attn_mask",
        "nothing is sent anywhere": "huggingface_repo_id huggingface_token huggingface_path_in_repo "
        "huggingface_repo_visibility huggingface_repo_type async_upload",
        "the card of the run says what is known": "training_comment metadata_title metadata_author "
        "metadata_description metadata_license metadata_tags",
        "captions are of T5's and CLIP's own": "network_train_text_encoder_only weighted_captions",
        "AdamW has diffusers' numbers": "optimizer_args.betas optimizer_args.eps optimizer_args.d_coef",
        "the schedules are constant and cosine": "lr_scheduler_num_cycles lr_scheduler_power lr_scheduler_args "
        "lr_scheduler_type lr_scheduler_min_lr_ratio lr_scheduler_timescale lr_decay_steps",
        "there is no such loss": "debiased_estimation_loss scale_v_pred_loss_like_noise_pred zero_terminal_snr",
        "metadata.jsonl is read in Hugging Face's form": "in_json",
    }),
)  # fmt: skip


# The data set's file -------------------------------------------------------------------------------------


def _resolution(value: Any, of: Values) -> dict[str, Any]:
    """Buckets are of an area; without them there is one size."""
    width, height = value
    if not of["enable_bucket"]:
        return {"resolution": f"{width}x{height}", "rule": "fixed"}
    rule = "kohya_no_upscale" if of["bucket_no_upscale"] else "kohya"
    return {"resolution": ",".join(map(str, of["edges"])), "rule": rule}


def _side(ours: int) -> Any:
    def turn(value: Any, of: Values) -> Any:
        if not of["enable_bucket"] or of["bucket_no_upscale"]:
            raise Needless("kohya uses it only for buckets that enlarge")
        raise (Needless if value == ours else LeftOut)(f"{ours} is the bound of --rule kohya")

    return turn


def _held(value: Any, of: Values) -> Any:
    if value and of["count"] is None:
        raise LeftOut("the pictures are not there to be counted; --held-out takes a number of them")
    return round(value * (of["count"] or 0))


def _words(value: Any, of: Values) -> Any:
    if not of["learned"] or of["learned"][0].trigger != value:
        raise LeftOut("a caption for pictures that have none, which are left out here")
    return {}


def _keep(value: Any, of: Values) -> Any:
    if value and not of["shuffle_caption"]:
        raise Needless("kohya uses it only with shuffle_caption")
    return {"keep_tags": value} if value else {}


def _separator(value: Any, of: Values) -> Any:
    if not value or not of["shuffle_caption"]:
        raise Needless("kohya uses it only with shuffle_caption")
    return value


def _masks(value: Any, of: Values) -> Any:
    raise Needless("masks, read with image_dir" if of["masked"] else "without masked_loss")


DATASET = (
    Key("resolution", turn=_resolution,
        why="a picture is trained at the largest that it fills, and left out where it fills none"),
    Key("batch_size", "batch", default=1),
    Key("enable_bucket", default=False, why="read with resolution"),
    Key("bucket_no_upscale", default=False, why="read with resolution; nothing is enlarged here"),
    Key("min_bucket_reso", turn=_side(256), default=256),
    Key("max_bucket_reso", turn=_side(2048), default=1024),
    Key("bucket_reso_steps", turn=only(64, "sides of buckets are multiples of 64"), default=64),
    Key("validation_split", "held_out", _held, default=0.0),
    Key("resize_interpolation", lacks="pictures are resized by Lanczos"),
)  # fmt: skip
"""of [general] and [[datasets]]"""
CLASS_TOKENS = "a folder's trigger word where no picture of it has a caption; else not used"
SUBSET = (
    Key("image_dir", turn=folders),
    Key("num_repeats", default=1, why="read with image_dir"),
    Key("is_reg", default=False, why="read with image_dir"),
    Key("class_tokens", turn=_words, why=CLASS_TOKENS),
    Key("conditioning_data_dir", turn=_masks),
    Key("alpha_mask", default=False, why="read with image_dir"),
    Key("caption_extension", turn=only(".txt", "captions are in NAME.txt"), default=".caption"),
    Key("shuffle_caption", "shuffles", {"true": ORDERS, "false": 0}, default=False, why="encoded once, as they are"),
    Key("keep_tokens", turn=_keep, default=0),
    Key("caption_separator", turn=only(",", "tags are divided by commas"), default=","),
    Key("enable_wildcard", "wildcards", {"true": ORDERS, "false": None}, default=False),
    Key("caption_prefix", "trigger", why="in front of captions that lack it"),
    Key("caption_dropout_rate", "caption_dropout", default=0.0),
    Key("flip_aug", "flip", default=False),
    Key("random_crop", "crop", {"true": "random", "false": "centre"}, default=False),
    Key("keep_tokens_separator", "keep_separator", _separator, default=""),
    Key("token_warmup_min", turn=only(1, "captions are whole from the first step"), default=1),
    Key("caption_dropout_every_n_epochs", default=0, lacks="--caption-dropout is a chance"),
    Key("caption_tag_dropout_rate", default=0.0, lacks="captions have all their tags"),
    Key("color_aug", default=False, lacks="pictures keep their colours"),
    Key("cache_info", default=False, why="pictures are looked at every time"),
    Key("token_warmup_step", default=0, lacks="captions are whole from the first step"),
    *left_out({
        "captions have one form": "secondary_separator caption_suffix",
        "pictures are cut and mirrored, no more": "face_crop_aug_range",
        "metadata.jsonl is read in Hugging Face's form": "metadata_file",
        "nothing here reads it": "custom_attributes",
    }),
)  # fmt: skip
"""of subsets, and of all above them"""
INSIDE = {row.name for row in (*DATASET, *SUBSET)}
OF_DATASET = {row.name for row in DATASET}
FOLDERS = {"image_dir", "num_repeats", "is_reg", "class_tokens", "conditioning_data_dir", "alpha_mask", "resolution"}
"""of which each folder's counts"""


def recognises(document: Any) -> bool:
    """Whether it is a file of kohya's."""
    if not isinstance(document, dict) or "LoRA_type" in document:  # the GUI's JSON has other keys
        return False
    lists = document.get("datasets")
    return isinstance(lists, list) or bool(OWN & _flat(document).keys())


def read(document: Any, read_other: Any) -> Iterator[Fate]:
    """What becomes of each key. read_other: a document by its path. UsageError, FileError."""
    if "datasets" in document:
        yield from _data_fates(document, {})
        return
    train = _expanded(_flat(document))
    path = train.get("dataset_config")
    data = read_other(path) if path else _of_folders(train)
    if not isinstance(data.get("datasets"), list):
        raise UsageError(f"{path} has no [[datasets]], as kohya's data sets have. Next: name the right file")
    own = {name: value for name, value in train.items() if name not in INSIDE}
    steps = _steps_of_epoch(resolved(data, train), own.get("gradient_accumulation_steps", 1))
    total = own.get("max_train_steps", 1600) if "max_train_epochs" not in own else None
    if total is None and steps is not None:
        total = steps * own["max_train_epochs"]
    is_reg = any(one["is_reg"] for dataset in resolved(data, train) for one in dataset["subsets"])
    yield from settle(TRAIN, own, NAME, known={"epoch": steps, "steps": total, "is_reg": is_reg})
    yield from _data_fates(data, train)


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a training file without its sections; the last of equal ones counts."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        found |= value if isinstance(value, dict) else {key: value}
    return found


def _expanded(train: Mapping[str, Any]) -> dict[str, Any]:
    """With a key for each `k=v` of network_args and optimizer_args, and one for all ranks of parts."""
    found: dict[str, Any] = {}
    for name, value in train.items():
        if name not in ("network_args", "optimizer_args"):
            found[name] = value
            continue
        for one in value if isinstance(value, list) else [value]:
            key, _, text = str(one).partition("=")
            if name == "network_args" and key in PARTS:
                found.setdefault("network_args.dims", {})[key] = text
            else:
                found[f"{name}.{key.strip()}"] = text.strip()
    return found


def _of_folders(train: Mapping[str, Any]) -> dict[str, Any]:
    """The data set of `train_data_dir` and `reg_data_dir`, whose folders are named as in `10_zwx man`."""
    subsets = []
    for key, is_reg in (("train_data_dir", False), ("reg_data_dir", True)):
        if key not in train:
            continue
        folder = user_path(train[key])
        found = [re.fullmatch(r"(\d+)_(.*)", path.name) for path in sorted(folder.glob("*_*")) if path.is_dir()]
        subsets += [
            {"image_dir": f"{train[key]}/{one[0]}", "num_repeats": int(one[1]), "class_tokens": one[2],
             "is_reg": is_reg} for one in found if one
        ] or [{"image_dir": train[key], "is_reg": is_reg}]  # fmt: skip
    return {"datasets": [{"subsets": subsets or [{}]}]}  # of a folder that a flag may name


def _outer(train: Mapping[str, Any]) -> dict[str, Any]:
    """What a training file says of data sets."""
    found = {name: value for name, value in train.items() if name in INSIDE}
    if isinstance(found.get("resolution"), str):
        found["resolution"] = [int(side) for side in found["resolution"].split(",")]
    return found | ({"batch_size": train["train_batch_size"]} if "train_batch_size" in train else {})


def _levels(data: Mapping[str, Any], train: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What is written of data sets, from the outside in: where, and the keys there."""
    found = [("", _outer(train)), ("general.", data.get("general", {}))]
    for i, dataset in enumerate(data["datasets"]):
        found.append((f"datasets[{i}].", {name: value for name, value in dataset.items() if name != "subsets"}))
        found += [(f"datasets[{i}].subsets[{j}].", one) for j, one in enumerate(dataset.get("subsets", []))]
    return found


def resolved(data: Mapping[str, Any], train: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each data set as kohya reads it: its options, and `subsets` with theirs. train: a training file's keys."""
    defaults = {row.name: row.default for row in (*DATASET, *SUBSET)}
    above = {**defaults, **_outer(train), **data.get("general", {})}
    found = []
    for dataset in data["datasets"]:
        options = {**above, **{name: value for name, value in dataset.items() if name != "subsets"}}
        side = options["resolution"]
        options["resolution"] = [side, side] if isinstance(side, int) else side
        subsets = [{**options, **subset} for subset in dataset.get("subsets", [])]
        inner = [{name: value for name, value in one.items() if name not in OF_DATASET} for one in subsets]
        found.append({name: options[name] for name in OF_DATASET} | {"subsets": inner})
    return found


def _steps_of_epoch(datasets: list[dict[str, Any]], accumulation: int) -> int | None:
    """An epoch's steps: regularization pictures come as often as all others. None where pictures are not there."""
    batches = 0
    for dataset in datasets:
        counts = [(one["num_repeats"], count(str(one["image_dir"])), one["is_reg"]) for one in dataset["subsets"]]
        if any(number is None for _, number, _ in counts):
            return None
        learned = sum(repeats * (number or 0) for repeats, number, is_reg in counts if not is_reg)
        every = learned * (2 if any(is_reg for _, _, is_reg in counts) else 1)
        batches += math.ceil(every / dataset["batch_size"])
    return math.ceil(batches / accumulation) or None


def _data_fates(data: Mapping[str, Any], train: Mapping[str, Any]) -> Iterator[Fate]:
    """What becomes of the keys of data sets: the options of the first folder to learn from count for all."""
    datasets = resolved(data, train)
    subsets = {(i, j): one for i, dataset in enumerate(datasets) for j, one in enumerate(dataset["subsets"])}
    first = next((place for place, one in subsets.items() if not one["is_reg"]), None)
    if first is None:
        raise UsageError("no folder of pictures is named. Next: give kohya's data set an image_dir")
    levels = _levels(data, train)
    counting = {"", "general.", f"datasets[{first[0]}].", f"datasets[{first[0]}].subsets[{first[1]}]."}
    where = {name: prefix for prefix, level in levels for name in level if prefix in counting}
    options = {**datasets[first[0]], **subsets[first]}
    given = {name: options[name] for name in where if name in INSIDE}
    unknown = {name: dict(levels)[prefix][name] for name, prefix in where.items() if name not in INSIDE}
    masked = bool(train.get("masked_loss", not train))  # a data set alone has no other use for them
    learned = [_folder(one, masked) for one in subsets.values() if one["image_dir"] and not one["is_reg"]]
    counts = [count(one.path) for one in learned]
    known = {
        "learned": learned,
        "regular": [_folder(one, masked) for one in subsets.values() if one["is_reg"]],
        "masked": masked,
        "edges": sorted({math.isqrt(math.prod(one["resolution"])) for one in datasets if one["resolution"]}),
        "count": None if None in counts or not counts else sum(x or 0 for x in counts),
    }
    places = {name: prefix + name for name, prefix in where.items()}
    yield from settle((*DATASET, *SUBSET), given | unknown, NAME, places, known)
    paths: list[Any] = []
    for prefix, level in levels:
        again = level.get("image_dir") in paths
        paths += [level["image_dir"]] if "image_dir" in level else []
        for name, value in level.items():
            if where.get(name) == prefix:
                continue
            if name not in FOLDERS and prefix in ("", "general."):
                yield Fate(prefix + name, value, why="an inner one counts")
            elif name == "class_tokens" and value:
                yield Fate(prefix + name, value, why=CLASS_TOKENS)
            else:
                yield other(prefix + name, value, options.get(name), name in FOLDERS, again)


def _folder(subset: Values, masked: bool) -> Folder:
    """Its class tokens are a picture's caption where it has none: a trigger word, where no picture has one.

    masked: whether masks that are files count, before alpha channels.
    """
    name, words = str(subset["image_dir"]), subset["class_tokens"] or ""
    captions = any(user_path(name).rglob("*.txt"))
    trigger = words if count(name) and not captions and "," not in words else ""
    masks = (masked and subset.get("conditioning_data_dir")) or ("alpha" if subset["alpha_mask"] else "")
    repeats = subset["num_repeats"]
    return Folder(here(name), repeats, trigger, masks, f"num_repeats = {repeats}")
