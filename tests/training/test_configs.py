"""Configs of other trainers: what their classes read (golden/train/configs.json), what it is here, and every key."""

import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from flux_core.errors import FileError, UsageError
from flux_core.main import main
from flux_core.training.configs import aitoolkit, kohya, read_config, read_document, simpletuner
from flux_core.training.configs.keys import Key, flatten, settle
from flux_core.training.settings import BY_NAME, Settings

GOLDEN = Path(__file__).parents[1] / "golden" / "train"
EXPECTED = json.loads((GOLDEN / "configs.json").read_text(encoding="utf-8"))


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
    with pytest.raises(UsageError, match="no folder of pictures is named"):
        read_config("c.toml")
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
    ({"weighting_scheme": "logit_normal", "logit_std": 1.5},
     {"timesteps": "shift", "timestep_shift": 3.0, "timestep_scale": 1.5}),
    ({"weighting_scheme": "logit_normal", "logit_mean": 1.0, "discrete_flow_shift": 1.0},
     {"timesteps": "logit_normal", "timestep_mean": 1.0, "timestep_std": 1.0}),
    ({"weighting_scheme": "logit_normal", "logit_mean": 1.0}, None),
    ({"discrete_flow_shift": 1.0}, {"timesteps": "uniform"}),
    ({}, None),
    ({"timestep_sampling": "qinglong_flux"}, None),
])  # fmt: skip
def test_kohyas_noise_levels(given, expected):
    """golden/train/timesteps.json; what is not there is left out."""
    known = {"epoch": None, "steps": None}
    found = {name: value for fate in settle(kohya.TRAIN, given, "kohya", known=known)
             for name, value in fate.settings.items() if name.startswith("timestep")}  # fmt: skip
    if expected is None:
        assert not found
    else:  # defaults of both are not set
        assert {"timestep_scale": 1.0, "timesteps": "logit_normal"} | found == (
            {"timestep_scale": 1.0, "timesteps": "logit_normal"} | expected
        )


def test_blocks_and_ranks_of_kohyas_network_args():
    given = kohya._expanded({"network_args": ["train_double_block_indices=0-1,5", "single_dim=8", "verbose=True"]})
    found = {fate.key: fate for fate in settle(kohya.TRAIN, given, "kohya", known={"epoch": None, "steps": None})}
    targets = found["network_args.train_blocks"].settings["targets"]
    assert targets == (
        "transformer_blocks.0.*,transformer_blocks.1.*,transformer_blocks.5.*,single_transformer_blocks.*"
    )
    assert found["network_args.verbose"].lacks and "known here" in found["network_args.verbose"].why


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


@pytest.mark.parametrize("tool, tables", [
    ("kohya", [kohya.TRAIN, [*kohya.DATASET, *kohya.SUBSET]]),
    ("ai-toolkit", [aitoolkit.PROCESS, aitoolkit.DATASET]),
    ("SimpleTuner", [simpletuner.CONFIG, simpletuner.BACKEND]),
])  # fmt: skip
def test_a_table_has_each_key_once_and_each_row_says_something(tool, tables):
    for table in tables:
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


def test_what_has_no_setting_is_left_out():
    """A row's setting that `SETTINGS` has not, and one of its values that is no choice."""
    rows = [Key("a", "no_such_setting"), Key("b", "optimizer"), Key("c", "rank")]
    a, b, c = settle(rows, {"a": 3, "b": "no_such_one", "c": 4}, "tool")
    assert a.lacks and b.lacks and "no_such_setting = 3" in a.why and c.settings == {"rank": 4}


def test_settings_that_rows_name_are_ours(work):
    for name in ("kohya_train_1.toml", "aitoolkit_1.yaml", "simpletuner_config_1.json"):
        assert read_config(name).values.keys() <= BY_NAME.keys()


# The command ----------------------------------------------------------------------------------------------


def test_flags_win_and_a_dry_run_tells_all(work, capsys):
    code = main(["train", "--from-config=simpletuner_config_1.json", "--rank=3", "--name=flux-mini", "--dry-run"])
    said = capsys.readouterr()
    assert code == 2 and "data/p3r5on is no folder" in said.err
    lost = 'lr_scheduler = "polynomial": left out: there are constant, constant_with_warmup, cosine'
    for line in (lost, "rank = 3", 'name = "flux-mini"', "lora_rank = 16: rank = 16", "alpha = 16.0", "steps = 2000"):
        assert line in said.out.splitlines()


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
    ("a.yaml", "a: &x [*x]", 2, "a.yaml is none of"),
    ("a.toml", "a = ", 4, "a.toml is no TOML"),
    ("a.json", "{", 2, "a.json is no JSON"),
    ("a.toml", 'network_dim = 4\ndataset_config = "none.toml"', 4, "none.toml cannot be read"),
    ("a.toml", 'network_dim = "x"\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = 3\nnum_repeats = "y"', 2, "a.toml"),
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


def test_yaml_without_pyyaml(work, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert main(["train", "--from-config=aitoolkit_1.yaml"]) == 2
    assert "a config in YAML needs PyYAML. Next: pip install pyyaml" in capsys.readouterr().err


def test_one_way_to_begin(work, capsys):
    assert main(["train", "c.toml", "--from-config=aitoolkit_1.yaml"]) == 2
    assert "a file of settings and --from-config are two ways to begin" in capsys.readouterr().err


def test_aliases_that_blow_up_are_refused():
    text = "a0: &a0 [[1]]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8))
    with pytest.raises(UsageError, match="which no config has"):
        flatten(aitoolkit.parse(text))


def test_a_missing_file():
    with pytest.raises(FileError, match=r"none\.toml cannot be read"):
        read_config("none.toml")


def test_a_data_set_alone(work):
    pictures("data/p3r5on", 2)  # without captions: the class tokens are what they show
    found = read_config("kohya_dataset_1.toml").values
    assert found["trigger"] == "p3r5on man" and "rank" not in found and found["repeats"] == 10
    assert read_config("simpletuner_multidatabackend_1.json").values["resolution"] == "512,1024"


def test_folders_that_are_named_by_repeats(work):
    pictures("train/10_zwx man", 3)
    Path("c.toml").write_text(
        'network_dim = 4\ntrain_data_dir = "train"\nmax_train_epochs = 2\nresolution = "512,512"\n'
    )
    found = read_config("c.toml").values
    assert found["data"] == "./train/10_zwx man" and found["repeats"] == 10 and found["trigger"] == "zwx man"
    assert found["steps"] == 60 and found["resolution"] == "512x512" and found["rule"] == "fixed"
