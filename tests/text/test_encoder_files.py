"""Text encoders are held against their configuration and the model by their headers, before anything is loaded."""

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_core.checkpoint import check_files
from flux_core.checkpoint.files import text_files
from flux_core.checkpoint.shapes import autoencoder_shapes, clip_shapes, flux_shapes, t5_shapes
from flux_core.commands.info import info
from flux_core.errors import FileError
from flux_core.text import load_text_encoders
from flux_core.variants import VARIANTS

DEV = VARIANTS["flux-dev"]
ROOT = Path(__file__).parents[2]


def sparse(path, shapes):
    """A file of full-size bf16 tensors, all zeros, that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def t5(**changes):
    return t5_shapes({**DEV.t5_config, **changes})


def clip(prefix="text_model.", **changes):
    return {prefix + name: shape for name, shape in clip_shapes({**DEV.clip_config, **changes}).items()}


def but(shapes, *names):
    return {name: shape for name, shape in shapes.items() if name not in names}


TIED = "encoder.embed_tokens.weight"
BESIDE_CLIP = {"text_projection.weight": (768, 768), "logit_scale": (), "text_model.embeddings.position_ids": (1, 77)}


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """FLUX.1-dev's transformer and autoencoder at full size."""
    folder = tmp_path_factory.mktemp("dev")
    files = {
        "model": sparse(folder / "model.safetensors", flux_shapes(DEV.params)),
        "ae": sparse(folder / "ae.safetensors", autoencoder_shapes(DEV.ae_params)),
    }
    return replace(DEV, files={flag: str(path) for flag, path in files.items()})


@pytest.mark.parametrize(
    ("flag", "shapes"),
    [
        ("t5xxl", t5()),
        ("t5xxl", t5() | {TIED: (32_128, 4096)}),  # as bare t5xxl files have it
        ("t5xxl", but(t5(), "shared.weight") | {TIED: (32_128, 4096)}),
        ("t5xxl", t5() | {"decoder.block.0.layer.0.layer_norm.weight": (4096,), "lm_head.weight": (32_128, 4096)}),
        ("clip_l", clip()),
        ("clip_l", clip("")),
        ("clip_l", clip() | BESIDE_CLIP | {"vision_model.post_layernorm.weight": (1024,)}),
    ],
)
def test_the_right_ones_pass(dev, tmp_path, flag, shapes):
    path = sparse(tmp_path / "encoder.safetensors", shapes)
    check_files(replace(dev, files=dev.files | {flag: str(path)}))
    assert "fits: flux-dev, flux-dev-krea, flux-schnell\n" in info(str(path)) + "\n"


LARGE = {"d_model": 1024, "d_ff": 2816, "num_heads": 16}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}


@pytest.mark.parametrize(
    ("flag", "shapes", "words"),
    [
        ("clip_l", clip(max_position_embeddings=248), "position embeddings for 248 places instead of 77: a LongCLIP"),
        ("clip_l", clip("", max_position_embeddings=248), "position embeddings for 248 places instead of 77"),
        ("clip_l", clip(max_position_embeddings=64), r"position_embedding.weight [64, 768] instead of [77, 768]"),
        ("clip_l", clip(vocab_size=49_000), "token_embedding.weight [49000, 768] instead of [49408, 768]"),
        ("clip_l", clip(**BIG_G), "a CLIP text encoder of 1280 features for each token, and flux-dev takes 768"),
        ("clip_l", clip(num_hidden_layers=13), "16 unexpected (encoder.layers.12."),
        ("clip_l", clip(num_hidden_layers=11), "16 missing (encoder.layers.11."),
        ("t5xxl", t5(**LARGE), "a T5 text encoder of 1024 features for each token, and flux-dev takes 4096"),
        ("t5xxl", t5(vocab_size=32_100), "shared.weight [32100, 4096] instead of [32128, 4096]"),
        ("t5xxl", but(t5(), "shared.weight"), "1 missing (shared.weight)"),
        ("t5xxl", t5(feed_forward_proj="relu"), "48 missing (encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        ("t5xxl", t5() | {"shared.weight": ()}, "shared.weight [] instead of"),
    ],
)
def test_what_does_not_fit_is_told_by_the_header(dev, tmp_path, flag, shapes, words):
    path = sparse(tmp_path / "encoder.safetensors", shapes)
    with pytest.raises(FileError) as caught:
        check_files(replace(dev, files=dev.files | {flag: str(path)}))
    text, repository = str(caught.value), {"t5xxl": DEV.t5, "clip_l": DEV.clip}[flag]
    assert text.startswith(f"{path} ") and words in text and "\n" not in text
    assert text.endswith(f"Next: give that of {repository} with --{flag.replace('_', '-')}.")
    assert f"fits no model: {path} " in info(str(path))


def test_a_configuration_beside_the_weights_counts_and_the_width_is_the_models(dev, tmp_path):
    """T5 large as transformers keeps it: weights and configuration agree, and FLUX.1 still cannot take it."""
    sparse(tmp_path / "model.safetensors", t5(**LARGE))
    config = tmp_path / "config.json"
    for sizes, words in (
        (LARGE, "1024 features"),
        ({"num_layers": "x"}, "could not be read: num_layers is 'x'. Next:"),
    ):
        config.write_text(json.dumps({"model_type": "t5", **DEV.t5_config, **sizes}))
        with pytest.raises(FileError, match=words):
            check_files(replace(dev, files=dev.files | {"t5xxl": str(tmp_path)}))


def test_a_long_clip_with_its_own_configuration_reads_77_tokens(small, small_root, tmp_path):
    """Attention is causal: what 77 tokens give does not depend on the places behind them."""
    folder = tmp_path / "clip"
    shutil.copytree(small_root / "flux-mini" / "clip", folder)
    lengthen(folder / "model.safetensors", folder / "model.safetensors")
    long = replace(small, files={"clip_l": str(folder)})
    with pytest.raises(FileError, match=r"for 248 places instead of 77: a LongCLIP\. Next: leave --clip-l out"):
        check_files(long)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 248}))
    check_files(long)
    (_, ours), (_, plain) = (load_text_encoders(variant, "cpu", torch.float32) for variant in (long, small))
    assert ours.max_length == 77
    assert torch.equal(ours(["a red apple"]), plain(["a red apple"]))


def lengthen(source, target):
    """The CLIP in a file with 248 position embeddings, the first 77 as they were."""
    state = load_file(source)
    (name,) = (name for name in state if "position_embedding" in name)
    more = torch.randn(248 - 77, state[name].shape[1], generator=torch.Generator().manual_seed(0))
    save_file(state | {name: torch.cat((state[name], more.to(state[name].dtype)))}, target)


def test_a_long_clip_is_told_by_the_loader_too_and_before_torch_by_the_command(small, small_root, tmp_path):
    lengthen(small_root / "flux-mini" / "clip" / "model.safetensors", tmp_path / "long.safetensors")
    with pytest.raises(FileError, match="LongCLIP"):
        load_text_encoders(replace(small, files={"clip_l": str(tmp_path / "long.safetensors")}))
    lengthen(ROOT / "weights" / "flux-mini" / "clip" / "model.safetensors", tmp_path / "long.safetensors")
    code = (
        "import sys; from flux_core.checkpoint import check_files, with_files\n"
        "try: check_files(with_files(clip_l=sys.argv[1]))\n"
        "except Exception as error: print(type(error).__name__, 'LongCLIP' in str(error), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "long.safetensors")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "FileError True False\n"


@pytest.mark.parametrize("both", [False, True])
def test_t5s_table_under_its_other_name(small, small_root, tmp_path, both):
    """One tensor by two names: `shared` and, in files of other tools, `encoder.embed_tokens`."""
    path = text_files(small).t5 / "model.safetensors"
    state = load_file(path)
    table = state["shared.weight"]
    state = state if both else {name: x for name, x in state.items() if name != "shared.weight"}
    folder = tmp_path / "t5"
    shutil.copytree(path.parent, folder)
    save_file(state | {TIED: table.clone()}, folder / "model.safetensors")
    (ours, _), (plain, _) = (
        load_text_encoders(variant, "cpu", torch.float32)
        for variant in (replace(small, files={"t5xxl": str(folder)}), small)
    )
    assert torch.equal(ours(["a red apple"]), plain(["a red apple"]))
