"""taef1's decoder: diffusers' class with the same weights, both layouts of its file, and files that hold none."""

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file

from flux_core.checkpoint.tiny import load_tiny_decoder
from flux_core.errors import FileError


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return AutoencoderTiny(latent_channels=16).eval()


@pytest.mark.parametrize("layout", ["taesd", "diffusers"])
def test_it_decodes_as_diffusers_does(theirs, layout, tmp_path):
    state = theirs.state_dict()
    if layout == "taesd":
        parts = {name.removeprefix("decoder.layers."): x for name, x in state.items() if name.startswith("decoder.")}
        state = {f"{int(name.split('.')[0]) + 1}.{name.split('.', 1)[1]}": x for name, x in parts.items()}
    save_file(state, tmp_path / "x.safetensors")
    found = load_tiny_decoder(tmp_path / "x.safetensors")
    z = 4 * torch.randn(1, 16, 4, 6)
    with torch.no_grad():
        assert torch.allclose(2 * found(z) - 1, theirs.decode(z).sample, atol=1e-5)


def test_another_file_is_refused(theirs, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"1.weight": torch.zeros(64, 4, 3, 3)}, path)  # of Stable Diffusion's latents
    with pytest.raises(FileError, match=r"no decoder of taef1: 1.bias is missing, and should be \(64,\)"):
        load_tiny_decoder(path)
    torch.save({"1.weight": torch.zeros(1)}, tmp_path / "taef1_decoder.pth")
    with pytest.raises(FileError):
        load_tiny_decoder(tmp_path / "taef1_decoder.pth")
