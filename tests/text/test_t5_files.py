"""T5 from GGUF files, by llama.cpp's names and by transformers', against transformers' own outputs."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from golden_files import FOLDER as GOLDEN
from golden_files import read
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5EncoderModel

from flux_core.checkpoint import check_files, with_files
from flux_core.checkpoint.gguf import write_gguf
from flux_core.checkpoint.names import LLAMA_T5, renamed
from flux_core.checkpoint.read import AS_STORED
from flux_core.checkpoint.shapes import autoencoder_shapes, flux_shapes, t5_shapes
from flux_core.commands.info import info
from flux_core.commands.save import save
from flux_core.errors import FileError, UsageError
from flux_core.linears.formats import format_of
from flux_core.linears.gguf import GgufLinear
from flux_core.linears.nf4 import Nf4Linear
from flux_core.lora import read_lora
from flux_core.pipeline import load_pipeline
from flux_core.pipeline.load import own_format
from flux_core.text.encoders import load_encoder
from flux_core.variants import VARIANTS

FILES = ("t5_q8_0", "t5_sdcpp_q4_0")
DEV = VARIANTS["flux-dev"]


def golden_variant(name):
    """flux-dev with T5 of a golden file and its sizes."""
    sizes = json.loads(read(f"gguf/{name}").metadata["params"])
    params = replace(DEV.params, context_in_dim=sizes["d_model"])
    return replace(DEV, t5_config=sizes, params=params, files={"t5xxl": str(GOLDEN / "gguf" / f"{name}.gguf")})


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("format", [AS_STORED, "gguf", None])
def test_a_gguf_file_encodes_as_transformers_does_with_its_numbers(name, format):
    golden, variant = read(f"gguf/{name}"), golden_variant(name)
    path = GOLDEN / "gguf" / f"{name}.gguf"
    assert own_format(variant, "t5") == "gguf"
    model = load_encoder("t5", path, variant, "cpu", torch.float32, format)
    layers = {name for name, one in model.named_modules() if isinstance(one, GgufLinear)}
    kept = 6 * variant.t5_config["num_layers"]  # q, k, v, o, wi_0, wi_1
    assert len(layers) == (0 if format is None else kept)
    assert not any(name.endswith(".wo") for name in layers)
    with torch.no_grad():
        found = model(golden.tensors["in.input_ids"])
    torch.testing.assert_close(found, golden.tensors["out.last_hidden_state"], rtol=0, atol=1e-5)


def test_a_t5_file_given_as_the_model_is_refused_by_its_name():
    for name in FILES:
        path = GOLDEN / "gguf" / f"{name}.gguf"
        with pytest.raises(FileError) as caught:
            check_files(with_files("flux-dev", model=path))
        text = str(caught.value)
        assert text.startswith(f"{path} is a T5 text encoder") and text.endswith("Next: give it with --t5xxl.")
        with pytest.raises(FileError, match=r"is a T5 text encoder.* Next: give it with --t5xxl\."):
            with_files(model=path)
        assert "a T5 text encoder" in info(str(path))


def llama_name(name):
    """A tensor of T5 as llama.cpp calls it."""
    theirs = {ours: theirs for theirs, ours in LLAMA_T5.items()}
    module, number = name.removesuffix(".weight"), re.search(r"block\.(\d+)\.", name)
    found = theirs[re.sub(r"block\.\d+\.", "block.N.", module)]
    return (found.replace("N", number[1]) if number else found) + ".weight"


def test_every_name_of_full_t5_is_known():
    """The 24 blocks of T5 XXL."""
    names = t5_shapes(DEV.t5_config)
    theirs = [llama_name(name) for name in names]
    assert len(theirs) == 219 and "enc.blk.23.ffn_down.weight" in theirs
    assert renamed(theirs, "t5") == dict(zip(names, theirs, strict=True))


@pytest.fixture
def llama_t5(small_root, tmp_path):
    """T5 of the small model in a GGUF file, in fp32."""
    state = load_file(small_root / "flux-mini" / "t5" / "model.safetensors")
    tensors = {llama_name(name): ("F32", tuple(x.shape), x.float()) for name, x in state.items()}
    write_gguf(tmp_path / "t5.gguf", tensors, {"general.architecture": "t5encoder"})
    return tmp_path / "t5.gguf"


def test_a_pipeline_draws_the_same_with_it_and_save_writes_transformers_names(small, llama_t5, small_root, tmp_path):
    plain = load_file(small_root / "flux-mini" / "t5" / "model.safetensors")
    fields = {"seed": 1, "num_steps": 1, "width": 32, "height": 32, "force": True}
    ours, other = (load_pipeline("flux-mini", "cpu", "fp32", t5xxl=x).generate("a", **fields) for x in (llama_t5, None))
    assert ours[0].tobytes() == other[0].tobytes()
    saved = save("flux-mini", "official", "fp32", tmp_path / "out", t5xxl=llama_t5)
    found = load_file(saved / "t5" / "model.safetensors")
    assert found.keys() == plain.keys() and all(torch.equal(found[name], x.float()) for name, x in plain.items())


def test_a_gguf_file_beside_its_tokenizer_is_not_copied_with_it(small, llama_t5, small_root, tmp_path):
    """The folder that `save` writes holds one set of weights, and is read again."""
    shipped, folder = small_root / "flux-mini" / "t5", tmp_path / "t5"
    shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    llama_t5.rename(folder / "t5.gguf")
    saved = save("flux-mini", "official", "fp32", tmp_path / "out", t5xxl=folder)
    assert sorted(x.name for x in (saved / "t5").iterdir()) == sorted(x.name for x in shipped.iterdir())
    check_files(with_files("flux-mini", model=saved))


def test_a_folder_by_bitsandbytes_needs_none_of_it_and_is_saved_without_a_trace(small, small_root, tmp_path):
    """As diffusers has `text_encoder_2` in NF4: the configuration asks transformers for bitsandbytes."""
    shipped, folder = small_root / "flux-mini" / "t5", tmp_path / "t5"
    shutil.copytree(shipped, folder)
    state = load_file(shipped / "model.safetensors")
    for name in [name for name in state if ".SelfAttention.q." in name or ".wi_0." in name]:
        linear = torch.nn.Linear(*reversed(state[name].shape), bias=False)
        linear.weight = torch.nn.Parameter(state.pop(name).float(), requires_grad=False)
        state |= {f"{name.removesuffix('weight')}{end}": x for end, x in Nf4Linear.of(linear).tensors().items()}
    save_file(state, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    asks = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": asks}))
    pipeline = load_pipeline("flux-mini", "cpu", "fp32", t5xxl=folder)
    assert format_of(pipeline.t5.model) == "nf4"
    saved = save("flux-mini", output=tmp_path / "out", t5xxl=folder)
    assert "quantization_config" not in json.loads((saved / "text_encoder_2" / "config.json").read_text())
    T5EncoderModel.from_pretrained(saved / "text_encoder_2")


def test_a_gguf_file_without_blocks_has_no_format_to_keep(small, llama_t5):
    with pytest.raises(UsageError, match=r"--t5-dtype gguf means .*t5.gguf has no weights in few bits. Next: "):
        load_pipeline("flux-mini", "cpu", "fp32", t5xxl=llama_t5, t5_dtype="gguf")


def test_a_quantized_model_given_as_a_lora_is_named():
    with pytest.raises(FileError, match=r"is a T5 text encoder by llama\.cpp's names, and no LoRA. Next: "):
        read_lora(GOLDEN / "gguf" / "t5_q8_0.gguf", DEV.params)


def test_no_weight_loses_a_dimension_in_gguf():
    """A GGUF file keeps no leading axes of length 1 (stable-diffusion.cpp drops them), and no tensor has any."""
    for variant in VARIANTS.values():
        shapes = flux_shapes(variant.params) | autoencoder_shapes(variant.ae_params) | t5_shapes(DEV.t5_config)
        assert not [name for name, shape in shapes.items() if len(shape) > 1 and shape[0] == 1]


def test_a_name_that_is_there_twice_is_none_of_ours(tmp_path):
    """A file by both kinds of names holds a tensor too many, which is said."""
    variant = golden_variant("t5_q8_0")
    shapes = t5_shapes(variant.t5_config)
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    rest = {"enc.output_norm.weight": torch.zeros(64), "token_embd.weight": torch.zeros(160, 64)}
    save_file(state | rest, tmp_path / "t5.safetensors")
    found = load_encoder("t5", tmp_path / "t5.safetensors", variant, "cpu", torch.float32)
    assert found.encoder.final_layer_norm.weight.shape == (64,)
    write_gguf(tmp_path / "t5.gguf", {"enc.blk.0.attn_q.weight": ("F32", (64, 64), torch.zeros(64, 64))}, {})
    with pytest.raises(FileError, match="20 missing"):
        load_encoder("t5", tmp_path / "t5.gguf", variant, "cpu", torch.float32)
