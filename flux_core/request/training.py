"""The table of a training run's settings: keys of its TOML file, flags of `train`, and what `--example` prints.

Plain data, as `fields.py`. Defaults are those of diffusers' script, but where the help says otherwise.
"""

from dataclasses import replace

from .fields import DEVICE, FIELDS, FILES, MAPS, MAX_SEED, MEMORY, NAME, OUTPUT_DIR, T5_DEVICE, THREADS, Field

OFTEN = 10_000_000
"""the most steps"""
TIMESTEPS = (
    "logit_normal", "uniform", "sigmoid", "shift", "flux_shift", "mode", "content", "style", "beta", "mixflow",
    "linear_timesteps", "linear_timesteps2",
)  # fmt: skip
LOSSES = ("l2", "l1", "huber", "smooth_l1")
WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")
CHECKPOINTING = ("none", "mlp", "second", "linears", "blocks")
PRESERVE = ("differential", "blank", "regularization")
OPTIMIZERS = ("adamw", "adamw8bit", "prodigy", "adamw_schedulefree")
RULES = ("buckets", "kohya", "kohya_no_upscale", "diffusers", "fixed")

MODEL = (
    NAME,
    *FILES,
    replace(
        FIELDS["dtype"],
        help="of the frozen base: bfloat16, float32, fp8, int8, nf4, gguf (default: what its file has, else bfloat16 "
        "on CUDA and float32 elsewhere)",
    ),
    FIELDS["t5_dtype"],
    T5_DEVICE,
    Field("memory", str, "bytes of the card to stay below, as in 8GB: blocks that find no room come when they compute",
          metavar="SIZE"),
    Field("shard", bool, "spread the frozen base over torchrun's processes: each card has a part of every block",
          default=False),
    DEVICE,
    next(field for field in MEMORY if field.name == "vae_tiling"),
    THREADS,
)  # fmt: skip
DATA = (
    Field("data", str, "a folder of pictures with captions (NAME.txt, or a table: metadata.jsonl or .parquet), or a "
          "hub data set's id; what is its own behind it, as in FOLDER,weight=2,trigger=WORD,masks=FOLDER; may be "
          "repeated", metavar="FOLDER", path=True, repeated=True),
    Field("trigger", str, "a word for what is learned; put in front of captions that lack it, or where they say "
          "[trigger]", metavar="WORD"),
    Field("repeats", int, "how often a picture comes in an epoch", minimum=1, maximum=10_000, default=1),
    Field("resolution", str, "512x768: all pictures at that size; 512, or 512,768: buckets of that area "
          "(default: the model's size)", metavar="SIZE"),
    Field("rule", str, f"how a picture gets its size: {', '.join(RULES)} (default: fixed for a width and height, else "
          "buckets)", choices=RULES, metavar="NAME"),
    Field("crop", str, "where a picture is cut: centre, or random", choices=("centre", "random"), default="centre",
          metavar="NAME"),
    Field("crops", int, "random crops of each picture", minimum=1, maximum=100, default=4),
    Field("flip", bool, "mirror images, too", default=False),
    Field("shuffles", int, "orders of a caption's tags beside its own", minimum=0, maximum=100, default=0),
    Field("keep_tags", int, "tags in front that stay there", minimum=0, maximum=100, default=0),
    Field("caption_dropout", float, "chance of an empty caption", minimum=0, maximum=1, default=0.0),
    Field("trigger_only", float, "chance of the trigger word alone", minimum=0, maximum=1, default=0.0),
    Field("held_out", int, "pictures that are not trained on, but judged (default: a tenth, at most 8)", minimum=0,
          maximum=1000),
    Field("strict", bool, "end where a picture cannot be used, instead of leaving it out", default=False),
)  # fmt: skip
MORE_DATA = (
    Field("regularization", str, "a folder of pictures of the class, as --data: as many of an epoch as others; may be "
          "repeated", metavar="FOLDER", path=True, repeated=True),
    Field("prior_weight", float, "of the loss of regularization pictures", minimum=0, maximum=1000, default=1.0),
    Field("masks", str, "what of a picture is learned from: alpha (its own channel), metadata (files that "
          "the table names by mask), or a folder of files by the pictures' names", metavar="FOLDER", path=True),
    Field("mask_floor", float, "how much is learned from where a mask is black", minimum=0, maximum=1, default=0.0),
    Field("mask_prior", float, "weight of the loss that keeps what the base draws where a mask is black", minimum=0,
          maximum=1000, default=0.0),
    Field("wildcards", int, "captions that are made of one with {a|b}; 0: braces are plain text", minimum=0,
          maximum=100, default=0),
    Field("keep_separator", str, "a text in captions, as |||: what is before it, or behind a second one, is not "
          "shuffled", metavar="TEXT"),
)  # fmt: skip
"""which a run's card names where they are given"""
ADAPTER = (
    Field("rank", int, "of the factors", minimum=1, maximum=1024, default=16),
    Field("alpha", float, "their scale is alpha / rank (default: the rank)", minimum=0, maximum=10_000),
    Field("rslora", bool, "a scale of alpha / sqrt(rank)", default=False),
    Field("dora", bool, "a magnitude for each row, too", default=False),
    Field("rank_min", int, "T-LoRA: ranks that count at pure noise, more where there is less of it; 0: all everywhere",
          minimum=0, maximum=1024, default=0),
    Field("rank_curve", float, "of --rank-min: the exponent of (1 - noise level)", minimum=0, maximum=100, default=1.0),
    Field("lokr", int, "LoKr instead of LoRA: a Linear is cut by this factor, or by the largest (-1); 0: LoRA",
          minimum=-1, maximum=1024, default=0),
    Field("ranks", str, "of modules that have another, as to_q=4,vital=32; patterns as in --targets",
          metavar="NAME=RANK"),
    Field("takes", str, f"what the model learns to see besides the prompt: {', '.join(MAPS)} (a map of each picture), "
          "control (maps that the table names), reference (pictures there that captions change)",
          choices=(*MAPS, "control", "reference"), default="", metavar="NAME"),
    Field("targets", str, "what learns, with commas: attention (the notebook's four), blocks (all Linears of blocks), "
          "vital or vital:FILE (those of a study's vital blocks), names as to_q, or none, with --token",
          default="attention", metavar="NAMES"),
    Field("train_text", str, "text encoders that learn, too: clip, t5, or clip,t5; texts are then encoded at each step",
          default="", metavar="NAMES"),
    Field("text_rank", int, "of their factors (default: as --rank)", minimum=1, maximum=1024),
    Field("text_lr", float, "their learning rate (default: as --lr)", minimum=0, maximum=10),
    Field("token", str, "a new word that learns vectors in front of CLIP and T5 (textual inversion); the trigger, if "
          "there is none", metavar="WORD"),
    Field("token_init", str, "words that its vectors begin as (default: its own letters)", metavar="TEXT"),
    Field("token_vectors", int, "how many it has for each (default: 1)", minimum=1, maximum=64),
    Field("token_lr", float, "their learning rate (default: as --lr)", minimum=0, maximum=10),
)  # fmt: skip
TRAINING = (
    Field("steps", int, "optimizer steps", minimum=1, maximum=OFTEN, default=1000),
    Field("lr", float, "learning rate (of prodigy: a factor, 1 if not given)", minimum=0, maximum=10, default=1e-4),
    Field("lora_plus", float, "LoRA+: times the rate is that of factors that begin at zero", minimum=0, maximum=1000,
          default=1.0),
    Field("rates", str, "of modules that have another, as norm.linear=1e-5; patterns as in --targets",
          metavar="NAME=RATE"),
    Field("batch", int, "pictures at once", minimum=1, maximum=1024, default=1),
    Field("accumulation", int, "batches of a step, whose mean is taken", minimum=1, maximum=1024, default=1),
    Field("warmup", int, "steps in which the rate grows", minimum=0, maximum=OFTEN, default=0),
    Field("schedule", str, "of the rate behind that: constant, cosine", choices=("constant", "cosine"),
          default="constant", metavar="NAME"),
    Field("optimizer", str, "adamw; adamw8bit (with bitsandbytes), prodigy (prodigyopt), adamw_schedulefree "
          "(schedulefree)", choices=OPTIMIZERS, default="adamw", metavar="NAME"),
    Field("weight_decay", float, "of AdamW", minimum=0, maximum=10, default=1e-2),
    Field("max_grad_norm", float, "gradients are clipped to it; 0: not at all", minimum=0, maximum=1_000_000,
          default=1.0),
    Field("ema", float, "decay of an average of the factors, which is then saved; 0: none", minimum=0, maximum=1,
          default=0.0),
    Field("precision", str, "auto: as the model computes; fp16: half precision with a scale of the loss",
          choices=("auto", "fp16"), default="auto", metavar="NAME"),
    Field("checkpointing", str, "what is computed again to save memory: none, mlp, second (every second block), "
          "linears (all but attention), blocks",
          choices=CHECKPOINTING, default="none", metavar="NAME"),
    Field("timesteps", str, f"how noise levels are drawn: {', '.join(TIMESTEPS)}", choices=TIMESTEPS,
          default="logit_normal", metavar="NAME"),
    Field("timestep_mean", float, "of logit_normal (default: 0)", minimum=-10, maximum=10),
    Field("timestep_std", float, "of logit_normal (default: 1)", minimum=0, maximum=10),
    Field("timestep_scale", float, "of sigmoid, shift and flux_shift (default: 1), and of mode (default: 1.29)",
          minimum=-10, maximum=10),
    Field("timestep_shift", float, "of shift, uniform, mode, beta and mixflow: towards noise above 1", minimum=0,
          maximum=100),
    Field("weighting", str, f"of the loss by noise level: {', '.join(WEIGHTINGS)}", choices=WEIGHTINGS, default="none",
          metavar="NAME"),
    Field("loss", str, f"of the velocity's errors: {', '.join(LOSSES)}", choices=LOSSES, default="l2", metavar="NAME"),
    Field("huber_c", float, "size of errors from which huber and smooth_l1 are linear", minimum=0, maximum=1000,
          default=0.1),
    Field("huber_schedule", str, "of huber_c: constant, or exponential (from 1 without noise to it)",
          choices=("constant", "exponential"), default="constant", metavar="NAME"),
    Field("preserve", str, "what stays as it was: differential (captions with --class-word in place of the trigger), "
          "blank (the empty caption), by a second forward; regularization (its pictures' target is the base's own)",
          choices=PRESERVE, default="", metavar="NAME"),
    Field("preserve_weight", float, "of that in the loss", minimum=0, maximum=1000, default=1.0),
    Field("class_word", str, "what the trigger word stands for, as in dog", metavar="WORD"),
    Field("contrast", float, "guidance that the target has, so that what guidance was distilled into a model stays "
          "there: as --guidance; 0: none", minimum=0, maximum=100, default=0.0),
    Field("guidance", float, "that the model is told while it learns", minimum=0, maximum=100, default=3.5),
    Field("seed", int, "of everything that is drawn", minimum=0, maximum=MAX_SEED, default=0),
    Field("compile", bool, "torch.compile for the blocks", default=False),
)  # fmt: skip
SHOWN = (
    replace(OUTPUT_DIR, help="the run's folder: the adapter, and folders of caches, checkpoints and samples",
            default="output/lora"),
    Field("save_every", int, "steps between checkpoints", minimum=1, maximum=OFTEN, default=100),
    Field("keep", int, "newest checkpoints that stay", minimum=1, maximum=1000, default=2),
    Field("sample_prompts", str, "drawn while it trains, and for the A/B sheet; may be repeated", multiple=True,
          repeated=True),
    Field("sample_every", int, "steps between samples (default: a tenth of the steps)", minimum=1, maximum=OFTEN),
    Field("sample_steps", int, "denoising steps of a sample (default: the model's)", minimum=1, maximum=10_000),
    Field("validate_every", int, "steps between validations (default: as --save-every)", minimum=1, maximum=OFTEN),
)  # fmt: skip
SECTIONS = {
    "The frozen model": MODEL, "Pictures and captions": DATA + MORE_DATA, "What learns": ADAPTER,
    "How it learns": TRAINING, "What is kept and shown": SHOWN,
}  # fmt: skip
"""of the file that `--example` prints"""
SETTINGS = tuple(field for fields in SECTIONS.values() for field in fields)
EXAMPLES = ("style", "noto", "zib")
"""configurations that ship"""
