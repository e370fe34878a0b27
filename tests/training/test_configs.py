"""Configs of other trainers: what their classes read (golden/train/configs.json), what it is here, and every key."""

import json
import math
import re
import shutil
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from flux_core.errors import FileError, UsageError
from flux_core.main import main
from flux_core.training.adapter import by_pattern, matching, patterns_of
from flux_core.training.configs import aitoolkit, kohya, read_config, read_document, simpletuner
from flux_core.training.configs.keys import flatten, settle
from flux_core.training.lokr import shapes
from flux_core.training.loop import levels
from flux_core.training.settings import BY_NAME, Settings, read_settings
from flux_core.variants import VARIANTS

GOLDEN = Path(__file__).parents[1] / "golden" / "train"
EXPECTED = json.loads((GOLDEN / "configs.json").read_text(encoding="utf-8"))
TIMESTEPS = json.loads((GOLDEN / "timesteps.json").read_text(encoding="utf-8"))["maps"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    shutil.copytree(GOLDEN / "configs", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(folder, count, caption=""):
    Path(folder).mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(Path(folder, f"{i}.png"))
        if caption:
            Path(folder, f"{i}.txt").write_text(caption, encoding="utf-8")


KNOWN = {"epoch": None, "steps": None, "is_reg": False}
TABLES = (kohya.TRAIN, (*kohya.DATASET, *kohya.SUBSET), aitoolkit.PROCESS, aitoolkit.DATASET,
          simpletuner.CONFIG, simpletuner.BACKEND, simpletuner.LYCORIS)  # fmt: skip


def fates_of(table, given):
    """Of a table's keys and of the tool's defaults, by their names."""
    return {fate.key: fate for fate in settle(table, given, "tool", known=KNOWN)}


def trained(given):
    """The settings of a training file of kohya's."""
    found = fates_of(kohya.TRAIN, kohya._expanded(given)).values()
    return {name: value for fate in found for name, value in fate.settings.items()}


def toolkit(datasets=({"folder_path": "a"},), **process):
    """The settings of a job of ai-toolkit's."""
    process = {"type": "sd_trainer", "datasets": list(datasets), **process}
    Path("c.json").write_text(json.dumps({"job": "extension", "config": {"name": "x", "process": [process]}}))
    return Settings(read_config("c.json").values)


def tuner(**config):
    """The settings of a config of SimpleTuner's."""
    Path("c.json").write_text(
        json.dumps({"model_family": "flux", "grad_clip_method": "norm", "mixflow_gamma": 0.0} | config)
    )
    return Settings({"data": "x"} | read_config("c.json").values)


def fates(path):
    """Of the keys, by their names: what they set, and whether they are left out."""
    return {fate.key: fate for fate in read_config(path).fates}


# What the tools read --------------------------------------------------------------------------------------


def test_kohya_reads_data_sets_so(work):
    """All but what is no option of a file: it is said here which."""
    train, data = tomllib.loads(Path("kohya_train_1.toml").read_text()), read_document("kohya_dataset_1.toml")
    expected = EXPECTED["kohya_dataset"]["resolved"]
    found = kohya.resolved(data, train)
    assert len(found) == len(expected) == 1
    internal = {"network_multiplier", "validation_seed", "prior_loss_weight"}
    for name, value in expected[0]["params"].items():
        assert name in internal or found[0][name] == value, name
    assert len(found[0]["subsets"]) == len(expected[0]["subsets"])
    for ours, theirs in zip(found[0]["subsets"], expected[0]["subsets"], strict=True):
        assert {name: {**found[0], **ours}[name] for name in theirs} == theirs


def test_kohya_drops_sections_and_the_last_of_equal_keys_counts(work):
    Path("c.toml").write_text('network_dim = 4\n[a]\nnetwork_dim = 8\n[b]\nnetwork_alpha = 2\noutput_dir = "x"\n')
    assert kohya._flat(tomllib.loads(Path("c.toml").read_text())) == {
        "network_dim": 8, "network_alpha": 2, "output_dir": "x"
    }  # fmt: skip
    assert kohya._flat(read_document("kohya_train_1.toml")) == EXPECTED["kohya_train"]["flattened"]


def test_ai_toolkit_reads_a_job_so(work):
    """Every key that its classes have is a row of ours, with its default."""
    job = read_document("aitoolkit_1.yaml")["config"]["process"][0]
    expected = EXPECTED["ai_toolkit"]["resolved"]
    datasets = aitoolkit.resolved(job.pop("datasets"))
    rows = {row.name: row for row in aitoolkit.PROCESS}
    values = {name: row.default for name, row in rows.items()} | flatten(job)
    values["train.unet_lr"] = values["train.unet_lr"] or values["train.lr"]
    for section in ("network", "save", "train"):
        for name, value in flatten(expected[section], section).items():
            name = name.replace("train.ema.", "train.ema_config.")
            assert values[name] == value, name
    theirs = [{**one, "caption_ext": one["caption_ext"].lstrip(".")} for one in expected["datasets"]]
    assert [{name: one[name] for name in theirs[0]} for one in datasets] == theirs


def test_numbers_that_yaml_takes_for_texts():
    """ai-toolkit's rule, which plain PyYAML has not."""
    assert aitoolkit.parse("lr: 1e-4")["lr"] == EXPECTED["ai_toolkit"]["yaml_trap"]["ai_toolkit_lr"]
    assert aitoolkit.parse("{a: 1E+3, b: -2e5, c: 12, d: 1e-4x, e: e5}") == {
        "a": 1000.0, "b": -2e5, "c": 12, "d": "1e-4x", "e": "e5"
    }  # fmt: skip


# What it is here ------------------------------------------------------------------------------------------


def test_kohyas_settings(work):
    pictures("data/p3r5on", 6, "a man")
    pictures("data/reg_man", 3, "a man")
    found = read_config("kohya_train_1.toml").values
    batches = 6 * 10 * 2 // 2  # regularization pictures come as often as the others
    assert (found["rank"], found["alpha"], found["steps"], found["save_every"]) == (16, 8, 8 * batches // 2, batches)
    assert found["timesteps"] == "shift" and found["timestep_shift"] == 3.1582 and found["guidance"] == 1.0
    assert found["targets"] == "transformer_blocks.*" and found["dtype"] == "fp8" and found["name"] == "flux-dev"
    assert found["resolution"] == "1024" and found["rule"] == "kohya_no_upscale" and found["batch"] == 2
    assert found["repeats"] == 10 and found["caption_dropout"] == 0.05 and found["held_out"] == 0
    assert found["data"] == "./data/p3r5on"  # no data set of the hub
    assert found["output_dir"] == "output/p3r5on_flux" and found["max_grad_norm"] == 1.0
    assert Settings({"data": "data/p3r5on", **found}).recipe.steps == 240


def test_ai_toolkits_settings(work):
    found = read_config("aitoolkit_1.yaml").values
    assert (found["rank"], found["alpha"], found["guidance"], found["timesteps"]) == (16, 16, 1.0, "sigmoid")
    assert found["trigger_only"] == 0.05 and "caption_dropout" not in found  # a dropped caption is the trigger
    assert found["ema"] == 0.99 and found["lr"] == 1e-4 and found["keep"] == 4 and found["dtype"] == "fp8"
    assert found["resolution"] == "512,768,1024" and found["output_dir"] == "output/p3r5on_flux_v1"
    assert found["sample_prompts"] == ["p3r5on holding a sign that says 'hello'"] and found["targets"] == "blocks"


def test_simpletuners_settings(work):
    found = read_config("simpletuner_config_1.json").values
    assert found["repeats"] == 10 and found["caption_dropout"] == 0.1 and found["guidance"] == 1.0
    assert (found["timesteps"], found["timestep_shift"], found["timestep_scale"]) == ("shift", 3.0, 1.0)
    assert found["dtype"] == "int8" and found["steps"] == 2000 and found["resolution"] == "512,1024"
    lost = {fate.key for fate in read_config("simpletuner_config_1.json").fates if fate.lacks}
    assert lost >= {"lr_scheduler", "max_grad_norm", "[1].crop", "[1].instance_prompt"}


def test_texts_and_dashes_are_read_as_the_rest(work):
    plain = json.loads(Path("simpletuner_config_1.json").read_text())
    dashed = {f"--{name}": json.dumps(x) if not isinstance(x, str) else x for name, x in plain.items()}
    Path("dashed.json").write_text(json.dumps(dashed))
    assert read_config("dashed.json").values == read_config("simpletuner_config_1.json").values


@pytest.mark.parametrize("name", ["kohya_train_1.toml", "aitoolkit_1.yaml", "simpletuner_config_1.json"])
def test_defaults_of_the_tools_are_set_and_said(work, name):
    """Files without what the tools have defaults for."""
    absent = {"kohya_train_1.toml": ["network_dim", "network_alpha", "learning_rate", "guidance_scale", "max_train_"],
              "aitoolkit_1.yaml": ["linear:", "linear_alpha", "lr:", "steps: 2000"],
              "simpletuner_config_1.json": ["flow_schedule_shift", "caption_dropout"]}[name]  # fmt: skip
    lines = Path(name).read_text().splitlines()
    Path(name).write_text("\n".join(line for line in lines if not any(part in line for part in absent)))
    expected = {"kohya_train_1.toml": {"rank": 4, "alpha": 1, "lr": 2e-6, "steps": 1600},
                "aitoolkit_1.yaml": {"rank": 4, "alpha": 4, "lr": 1e-6},
                "simpletuner_config_1.json": {"timestep_shift": 3.0, "caption_dropout": 0.1}}[name]  # fmt: skip
    config = read_config(name)
    assert {key: config.values[key] for key in expected} == expected
    said = {key for fate in config.fates if fate.is_default for key in fate.settings}
    assert said >= expected.keys() and all("(default)" in str(fate) for fate in config.fates if fate.is_default)


@pytest.mark.parametrize("given, expected", [
    ({"timestep_sampling": "flux_shift", "sigmoid_scale": 2.0}, {"timesteps": "flux_shift", "timestep_scale": 2.0}),
    ({"timestep_sampling": "uniform"}, {"timesteps": "uniform"}),
    ({"timestep_sampling": "qinglong_flux"}, {}),
])  # fmt: skip
def test_kohyas_noise_levels(given, expected):
    """What is not there is left out."""
    found = {name: value for name, value in trained(given).items() if name.startswith("timestep")}
    assert found == expected


@pytest.mark.parametrize("row", [row for row in TIMESTEPS if row["name"].startswith("sigma/")],
                         ids=lambda row: "-".join(map(str, [row["name"], *row["params"].values()])))  # fmt: skip
def test_kohyas_default_levels_are_drawn(row):
    """golden/train/timesteps.json: `sigma`, whose table is shifted: ours have its quantiles."""
    settings = Settings({"data": "x", **trained({**row["params"], "timestep_sampling": "sigma"})})
    ours = levels(settings.recipe, 0, 40_000).double().sort().values
    kind, draws = row["draw"]["kind"], torch.linspace(0, 1, 40_002, dtype=torch.float64)[1:-1]
    u = torch.special.ndtri(draws) if kind == "normal" else draws
    scheme = row["params"]["weighting_scheme"]
    if scheme == "logit_normal":
        u = torch.sigmoid(row["params"]["logit_mean"] + row["params"]["logit_std"] * u)
    elif scheme == "mode":
        u = 1 - u - row["params"]["mode_scale"] * (torch.cos(math.pi * u / 2).square() - 1 + u)
    shift, t = row["params"]["discrete_flow_shift"], (1000 - (1000 * u).floor().clamp(max=999)) / 1000
    theirs = (shift * t / (1 + (shift - 1) * t)).sort().values
    assert float((ours - theirs).abs().max()) < 0.02
    if scheme == "logit_normal" and shift != 1:  # the shift is in the mean, and to the other side it is not the same
        wrong = replace(settings.recipe, timestep_options={"mean": math.log(shift), "std": 1.0})
        assert float((levels(wrong, 0, 40_000).double().sort().values - theirs).abs().max()) > 0.2


def test_blocks_and_ranks_of_kohyas_network_args():
    given = kohya._expanded({"network_args": ["train_double_block_indices=0-1,5", "single_dim=8", "verbose=True"]})
    found = {fate.key: fate for fate in settle(kohya.TRAIN, given, "kohya", known=KNOWN)}
    targets = found["network_args.train_blocks"].settings["targets"]
    assert targets == (
        "transformer_blocks.0.*,transformer_blocks.1.*,transformer_blocks.5.*,single_transformer_blocks.*"
    )
    assert found["network_args.verbose"].lacks and "known here" in found["network_args.verbose"].why


def test_kohyas_names_by_regular_expressions():
    """Each is looked for in kohya's names; the first that is found counts, above a part's own rank."""
    args = ["single_dim=2", "network_reg_dims=double_blocks_(0|18)_.*qkv=32,img_attn=16",
            "network_reg_lrs=single_blocks_.*_linear2=2e-5", "loraplus_unet_lr_ratio=4"]  # fmt: skip
    found = trained({"network_args": args})
    settings, params = Settings({"data": "x", **found}), VARIANTS["flux-dev"].params
    assert settings.targets == "blocks" and settings.lora_plus == "4"
    names = matching(params, patterns_of(settings.targets, "flux-dev", params))
    ranks = by_pattern(settings.ranks, int, "flux-dev", params, names)
    rates = by_pattern(settings.rates, float, "flux-dev", params, names)
    assert {ranks[f"transformer_blocks.{i}.attn.{x}"] for i in (0, 18) for x in ("to_q", "add_v_proj")} == {32}
    assert ranks["transformer_blocks.1.attn.to_q"] == ranks["transformer_blocks.0.attn.to_out.0"] == 16
    assert ranks["single_transformer_blocks.3.attn.to_k"] == 2
    assert not {"transformer_blocks.1.attn.add_q_proj", "single_transformer_blocks.0.norm.linear"} & ranks.keys()
    assert rates == {f"single_transformer_blocks.{i}.proj_out": 2e-5 for i in range(38)}
    assert settings.rates == "single_transformer_blocks.*.proj_out=2e-5"  # not 38 of them
    lost = fates_of(kohya.TRAIN, kohya._expanded({"network_args": args, "optimizer_type": "prodigy"}))
    assert lost["network_args.network_reg_lrs"].lacks and lost["network_args.loraplus_unet_lr_ratio"].lacks


@pytest.mark.parametrize("given, expected", [
    ({"loss_type": "l1", "huber_c": 0.2}, {"loss": "l1"}),
    ({"loss_type": "smooth_l1", "huber_c": 0.2, "huber_schedule": "exponential"},
     {"loss": "smooth_l1", "huber_c": 0.2, "huber_schedule": "exponential"}),
    ({"loss_type": "huber"}, {"loss": "huber"}),  # with 0.1, as here
    ({"max_grad_norm": 0.0}, {"max_grad_norm": 0.0}),
    ({"prior_loss_weight": 0.5}, {}),  # without regularization pictures
    ({"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=8"]}, {"lokr": "8"}),
    ({"optimizer_type": "AdamWScheduleFree"}, {"optimizer": "adamw_schedulefree"}),
])  # fmt: skip
def test_kohyas_losses_and_optimizers(given, expected):
    names = ("loss", "huber_c", "huber_schedule", "max_grad_norm", "prior_weight", "lokr", "optimizer")
    found = trained(given)
    defaults = {"loss": "l2", "huber_c": 0.1, "max_grad_norm": 1.0, "optimizer": "adamw"}
    assert {x: found[x] for x in names if x in found and found[x] != defaults.get(x)} == expected
    assert fates_of(kohya.TRAIN, {"loss_type": "huber"})["huber_schedule"].lacks  # snr, by default


@pytest.mark.parametrize(("table", "key"), [(kohya.TRAIN, "optimizer_type"), (simpletuner.CONFIG, "optimizer")])
def test_a_schedule_free_optimizer_has_none(table, key):
    """As there: kohya gives it a schedule that does nothing, SimpleTuner overrides what is asked for."""
    given = {"lr_scheduler": "cosine", key: "adamw_schedulefree" if key == "optimizer" else "AdamWScheduleFree"}
    assert not fates_of(table, given)["lr_scheduler"].settings
    assert fates_of(table, {**given, key: "prodigy"})["lr_scheduler"].settings == {"schedule": "cosine"}


def test_kohyas_masks_and_sets(work):
    pictures("a", 2, "one ||| two, three")
    pictures("b", 2, "x")
    pictures("reg", 3, "y")
    Path("c.toml").write_text("""
network_dim = 4
masked_loss = true
prior_loss_weight = 0.5
dataset_config = "d.toml"
""")
    Path("d.toml").write_text("""
[general]
resolution = 64
enable_bucket = true
shuffle_caption = true
keep_tokens_separator = "|||"
enable_wildcard = true
[[datasets]]
[[datasets.subsets]]
image_dir = "a"
num_repeats = 300
conditioning_data_dir = "masks"
[[datasets.subsets]]
image_dir = "b"
num_repeats = 200
alpha_mask = true
[[datasets.subsets]]
image_dir = "reg"
num_repeats = 5
is_reg = true
""")
    found = read_config("c.toml").values
    assert found["data"] == ["./a,weight=3,masks=masks", "./b,weight=2,masks=alpha"] and found["repeats"] == 100
    assert found["regularization"] == "./reg" and found["prior_weight"] == 0.5 and "masks" not in found
    assert found["keep_separator"] == "|||" and found["shuffles"] == found["wildcards"] == 8
    assert [x.masks for x in Settings(found).folders] == ["masks", "alpha", ""]
    Path("c.toml").write_text(Path("c.toml").read_text().replace("masked_loss = true", ""))
    assert read_config("c.toml").values["data"] == ["./a,weight=3", "./b,weight=2,masks=alpha"]


def test_what_ai_toolkits_losses_are(work):
    found = toolkit(
        network={"type": "lokr", "linear": 8, "lokr_factor": 16}, trigger_word="zwx",
        train={"optimizer": "prodigy", "lr": 1e-4, "content_or_style": "content", "do_guidance_loss": True,
               "inverted_mask_prior": True, "reg_weight": 0.3, "diff_output_preservation": True, "loss_type": "mae",
               "diff_output_preservation_class": "dog", "diff_output_preservation_multiplier": 2.0},
        datasets=[{"folder_path": "a", "mask_path": "m", "mask_min_value": 0.1},
                  {"folder_path": "b", "alpha_mask": True}, {"folder_path": "r", "is_reg": True}],
    )  # fmt: skip
    expected = {
        "lokr": 16, "rank": 8, "alpha": 1.0, "optimizer": "prodigy", "lr": 1.0, "timesteps": "content", "contrast": 3.0,
        "mask_prior": 0.5, "mask_floor": 0.1, "prior_weight": 0.3, "preserve": "differential", "class_word": "dog",
        "preserve_weight": 2.0, "loss": "l1", "regularization": "./r", "data": ["./a,masks=m", "./b,masks=alpha"],
    }  # fmt: skip
    assert expected.items() <= {name: getattr(found, name) for name in expected}.items()
    whole = toolkit(network={"type": "lokr", "lokr_full_rank": True})
    assert "w2" in shapes(3072, 12288, whole.rank, whole.lokr) and whole.alpha == whole.rank
    linear = toolkit(train={"linear_timesteps2": True, "timestep_type": "weighted", "max_grad_norm": 0})
    assert linear.timesteps == "linear_timesteps2" and linear.max_grad_norm == 0
    blank = toolkit(train={"blank_prompt_preservation": True, "inverted_mask_prior": True, "reg_weight": 2.0})
    assert (blank.preserve, blank.mask_prior, blank.prior_weight) == ("blank", 0.0, 1.0)  # no masks, no set


def test_what_simpletuners_options_are(work):
    Path("lycoris.json").write_text(json.dumps({
        "algo": "tlora", "linear_dim": 32, "linear_alpha": 16, "tlora_min_rank": 4, "tlora_alpha": 2.0,
        "apply_preset": {"target_module": ["Attention", "FeedForward"]},
    }))  # fmt: skip
    own = {"lora_type": "lycoris", "lycoris_config": "lycoris.json"}
    found = tuner(**own, loss_type="huber", huber_c=0.3, huber_schedule="constant", mixflow_enabled=True)
    assert (found.rank, found.alpha, found.rank_min, found.rank_curve) == (32, 16.0, 4, 2.0)
    assert found.targets == "attn.*,ff.net.*,ff_context.net.*" and found.huber_c == 0.3 and found.loss == "huber"
    assert (found.timesteps, found.timestep_shift) == ("mixflow", 3.0)
    Path("lycoris.json").write_text('{"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 16, "odd": 1}')
    found = tuner(**own, flow_use_beta_schedule=True, flow_schedule_shift=1.5, optimizer="prodigy", max_grad_norm=0.0)
    assert (found.lokr, found.timesteps, found.timestep_shift) == (16, "beta", 1.5) and found.max_grad_norm == 0
    assert "w2" in shapes(3072, 12288, found.rank, found.lokr) and found.optimizer == "prodigy"
    lost = {fate.key for fate in read_config("c.json").fates if fate.lacks}
    assert "(lycoris_config).odd" in lost and "mixflow_gamma" not in lost


def test_simpletuners_backends(work):
    masks = {"id": "m", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "masks"}
    Path("b.json").write_text(json.dumps([
        {"id": "a", "type": "local", "instance_data_dir": "a", "conditioning_data": "m", "crop": False}, masks,
        {"id": "h", "type": "huggingface", "dataset_name": "user/set", "repeats": 1},
        {"id": "r", "type": "local", "instance_data_dir": "r", "is_regularization_data": True},
    ]))  # fmt: skip
    config = read_config("b.json")
    assert config.values["data"] == ["./a,masks=masks", "user/set,weight=2"]
    assert config.values["regularization"] == "./r"
    said = {fate.key: str(fate) for fate in config.fates}
    assert "keeps to what the base draws" in said["[3].is_regularisation_data"]


# Every key ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kohya_train_1.toml", "aitoolkit_1.yaml", "simpletuner_config_1.json"])
def test_no_key_is_ignored_in_silence(work, name):
    """Each key of each file has its line, with its value, and says something."""
    found = read_config(name)
    said = {fate.key: str(fate) for fate in found.fates}
    document = kohya._expanded(read_document(name)) if name.startswith("kohya") else flatten(read_document(name))
    more = {"kohya_train_1.toml": "kohya_dataset_1.toml",
            "simpletuner_config_1.json": "simpletuner_multidatabackend_1.json"}.get(name)  # fmt: skip
    document |= flatten(read_document(more)) if more else {}
    for key in document:
        assert (key if not key.startswith("[2]") else "[2]") in said, key  # a backend that is no folder has one line
    for line in said.values():
        assert not line.rstrip().endswith(":"), line


def test_a_table_has_each_key_once_and_each_row_says_something():
    for table in TABLES:
        names = [row.name for row in table]
        assert len(names) == len(set(names)), [name for name in names if names.count(name) > 1]
        assert all(row.setting or row.turn or row.why or row.lacks for row in table if row.default != {})


def test_keys_of_a_newer_version_are_named(work):
    with Path("kohya_train_1.toml").open("a") as file:
        file.write('network_dimm = 3\nhuggingface_token = "hf_abc"\n')
    found = fates("kohya_train_1.toml")
    assert str(found["network_dimm"]) == (
        "network_dimm = 3: left out: kohya has no such key that is known here. Did you mean network_dim?"
    )
    assert "hf_abc" not in str(found["huggingface_token"]) and found["huggingface_token"].lacks


def test_settings_that_rows_name_are_ours():
    """And their values are choices of those."""
    for row in (x for table in TABLES for x in table if x.setting and not x.lacks):
        field = BY_NAME[row.setting]
        values = row.turn.values() if isinstance(row.turn, Mapping) else ()
        assert all(x is None or not field.choices or x in field.choices for x in values), row.name


# The command ----------------------------------------------------------------------------------------------


def test_flags_win_and_a_dry_run_tells_all(work, capsys):
    code = main(["train", "--from-config=simpletuner_config_1.json", "--rank=3", "--name=flux-mini", "--dry-run"])
    said = capsys.readouterr()
    assert code == 2 and "data/p3r5on is no folder" in said.err
    lost = 'lr_scheduler = "polynomial": left out: there are constant, constant_with_warmup, cosine'
    for line in (lost, "rank = 3", 'name = "flux-mini"', "lora_rank = 16: rank = 16", "alpha = 16.0", "steps = 2000"):
        assert line in said.out.splitlines()


def test_settings_that_are_told_give_the_same_run(work, capsys):
    """What a dry run prints below its comment is a file of settings: the same ones, defaults included."""
    for name in ("kohya_train_1.toml", "aitoolkit_1.yaml", "simpletuner_config_1.json"):
        assert main(["train", f"--from-config={name}", "--dry-run", "--lr=3e-5"]) == 2  # there are no pictures
        _, told = capsys.readouterr().out.split("# settings, as a TOML file has them\n")
        Path("again.toml").write_text(told.partition("\n\n")[0])
        first = read_settings(None, None, {"lr": "3e-5"}, read_config(name).values)
        again = read_settings("again.toml", None, {})
        assert all(getattr(first, x) == getattr(again, x) for x in BY_NAME) and first.recipe == again.recipe
        assert {
            "name",
            "rank",
            "alpha",
            "steps",
            "lr",
            "resolution",
        } <= again.given.keys() and "crops" not in again.given


def test_a_run_tells_what_is_left_out(work, capsys):
    assert main(["train", "--from-config=aitoolkit_1.yaml", "--name=flux-mini", "--device=cpu"]) == 2
    said = capsys.readouterr()
    assert 'save.dtype = "float16": left out: the adapter is saved in fp32' in said.err and not said.out


@pytest.mark.parametrize("name, text, code, said", [
    ("a.toml", 'rank = 3\ndata = "x"', 2, "It is of our own kind. Next: give it as `train a.toml`"),
    ("a.toml", "x = 3", 2, "a.toml is none of kohya's TOML, ai-toolkit's YAML, SimpleTuner's JSON"),
    ("a.json", '{"LoRA_type": "Flux1"}', 2, "It is of kohya's GUI"),
    ("a.txt", "", 2, "a.txt ends with none of .toml, .yaml"),
    ("a.yaml", "a: [", 4, "a.yaml is no YAML"),
    ("a.yaml", "a: &x [*x]", 2, "a.yaml: it has more than 100,000 values"),
    ("a.toml", "a = ", 4, "a.toml is no TOML"),
    ("a.json", '{"a": 1,\n 2}', 4, "a.json is no JSON: Expecting property name enclosed in double quotes: line 2 "
     "column 2 (char 10). Next: mend it there"),
    ("a.json", "[" * 100_000, 4, "a.json is no JSON"),
    ("a.toml", 'network_dim = 4\ndataset_config = "none.toml"', 4, "none.toml cannot be read"),
    ("a.toml", 'network_dim = "x"\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 3\nnum_repeats = "y"', 2, "a.toml"),
    ("a.toml", 'network_dim = 4\nnetwork_args = ["network_reg_dims=lora_unet_.*_attn=8,(=2"]', 2,
     'a.toml: network_args.network_reg_dims = "lora_unet_.*_attn=8,(=2" is no value of'),
    ("a.toml", 'network_dim = 4\nnetwork_args = ["network_reg_lrs=lora=1e-4,[=2"]', 2,
     "a.toml: network_args.network_reg_lrs"),
    ("a.yaml", "job: extension\nconfig: {name: x, process: 3}", 2, "is not built as configs of ai-toolkit"),
    ("a.yaml", "job: extension\nconfig: {name: x, processes: []}", 2, "it may be of another version"),
    ("a.yaml", "job: extension\nconfig: {name: x, process: [{type: slider}]}", 2, "its process is a slider"),
    ("a.yaml", "job: extension\nconfig: {name: x, process: [{type: sd_trainer, datasets: [{folder_path: x}], "
     "model: {arch: wan21}}]}", 2, "it trains wan21, and this is FLUX.1"),
    ("a.json", '{"model_family": "sdxl"}', 2, "it trains sdxl, and this is FLUX.1"),
    ("a.json", '{"model_family": "flux", "lora_rank": 5000}', 2, "lora_rank must be a whole number from 1 to 1024"),
    ("a.json", '{"model_family": "flux", "lora_rank": {"a": 1}}', 2, "a.json: lora_rank must be"),
])  # fmt: skip
def test_a_wrong_file_is_said(work, capsys, name, text, code, said):
    Path(name).write_text(text)
    assert main(["train", f"--from-config={name}"]) == code
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


KOHYA = """
[[datasets]]
[[datasets.subsets]]
image_dir = "a"
num_repeats = {}
[[datasets.subsets]]
image_dir = "b"
num_repeats = {}
"""
TOOLKIT = """
job: extension
config: {{name: x, process: [{{type: sd_trainer, datasets: [{{folder_path: a, num_repeats: {}}}]}}]}}
"""


@pytest.mark.parametrize(("name", "text", "said"), [
    ("a.toml", KOHYA.format(-3, 1), "num_repeats = -3 of ./a is no number of times"),
    ("a.toml", KOHYA.format(3, 0), "num_repeats = 0 of ./b is no number of times"),
    ("a.toml", KOHYA.format(1, 150), "num_repeats = 150 of ./b makes the folders' ratio 1:150, and numbers in one go"),
    ("a.yaml", TOOLKIT.format(-1), "num_repeats = -1 of ./a is no number of times"),
    ("a.json", '[{"id": "x", "type": "local", "instance_data_dir": "a", "repeats": -5}]', "repeats = -5 of ./a is no"),
])  # fmt: skip
def test_repeats_that_cannot_be_are_said_in_the_files_own_words(work, name, text, said):
    Path(name).write_text(text)
    with pytest.raises(UsageError, match=f"^{re.escape(f'{name}: {said}')}"):
        read_config(name)


def test_yaml_without_pyyaml(work, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["train", "--from-config=aitoolkit_1.yaml"]) == 2
    assert "a config in YAML needs PyYAML. Next: pip install pyyaml" in capsys.readouterr().err


def test_one_way_to_begin(work, capsys):
    assert main(["train", "c.toml", "--from-config=aitoolkit_1.yaml"]) == 2
    assert "a file of settings and --from-config are two ways to begin" in capsys.readouterr().err


def test_aliases_that_blow_up_are_refused(work):
    """Before anything looks at their 4^21 values, in whatever tool's file."""
    text = "a0: &a0 [[1]]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 4)}]\n" for i in range(1, 22))
    for rest in (
        "job: extension\nconfig: {name: x, process: [{type: sd_trainer, big: *a21}]}",
        "network_dim: *a21\ndatasets: *a21",
        "model_family: flux",
        "- &b {id: *a21}\n- *b",
    ):
        is_list = rest.startswith("-")
        Path("c.yaml").write_text(f"- {{{', '.join(text.split(chr(10))[:-1])}}}\n{rest}" if is_list else text + rest)
        with pytest.raises(UsageError, match=r"c\.yaml: it has more than 100,000 values, which no config has"):
            read_config("c.yaml")


def test_a_missing_file():
    with pytest.raises(FileError, match=r"none\.toml cannot be read"):
        read_config("none.toml")


def test_a_data_set_alone(work):
    pictures("data/p3r5on", 2)  # without captions: the class tokens are what they show
    found = read_config("kohya_dataset_1.toml").values
    assert found["trigger"] == "p3r5on man" and "rank" not in found and found["repeats"] == 10
    assert read_config("simpletuner_multidatabackend_1.json").values["resolution"] == "512,1024"


@pytest.mark.parametrize(("name", "text"), [
    ("c.toml", 'network_dim = 4\nresolution = "512,256"\nmax_train_steps = 5\n[a]\ncaption_dropout_rate = 0.25\n'),
    ("c.yaml", "job: extension\nconfig: {name: x, process: [{type: sd_trainer, network: {linear: 4}, "
     "train: {steps: 5}}]}"),
    ("c.json", '{"model_family": "flux", "lora_rank": 4, "max_train_steps": 5, "grad_clip_method": "norm"}'),
])  # fmt: skip
def test_a_flag_names_the_folder_where_the_file_names_none(work, capsys, name, text):
    """With all else as the file has it."""
    pictures("mine", 4, "a pig")
    Path(name).write_text(text, encoding="utf-8")
    small = ["--resolution=32x32", "--rule=", "--name=flux-mini", "--device=cpu", "--dtype=float32"]
    assert main(["train", f"--from-config={name}", "--data=mine", "--dry-run", *small]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert '\ndata = "mine"\nr' in said and "\nrank = 4\n" in said and "\nsteps = 5\n" in said
    if name == "c.toml":
        assert "\ncaption_dropout = 0.25\n" in said and read_config(name).values["resolution"] == "512x256"
    assert main(["train", f"--from-config={name}", "--dry-run"]) == 2
    assert "there is no --data. Next: name a folder" in capsys.readouterr().err


def test_folders_that_are_named_by_repeats(work):
    pictures("train/10_zwx man", 3)
    Path("c.toml").write_text(
        'network_dim = 4\ntrain_data_dir = "train"\nmax_train_epochs = 2\nresolution = "512,512"\n'
    )
    found = read_config("c.toml").values
    assert found["data"] == "./train/10_zwx man" and found["repeats"] == 10 and found["trigger"] == "zwx man"
    assert found["steps"] == 60 and found["resolution"] == "512x512" and found["rule"] == "fixed"
