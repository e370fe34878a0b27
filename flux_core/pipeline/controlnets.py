"""The ControlNets of a pipeline's requests: each is loaded once, and freed when a request without it comes.

They stay on the device while the other parts take turns; blocks that come when they compute have the room that is left.
"""

from ..checkpoint.controlnet import load_controlnet
from ..device.choice import empty_device_cache
from ..images.given import Followed, Given
from ..kernels import install
from ..lora.known import Known
from ..model import ControlNet
from ..params import FluxParams
from ..request.generation import GenerationRequest
from ..request.pictures import ControlNetUse
from .codec import Codec
from .controlnet import ControlNetCondition
from .family import Maps


class ControlNets:
    """Makes conditions of what requests follow."""

    def __init__(self, params: FluxParams, codec: Codec, maps: Maps) -> None:
        """params: of the transformer that they steer; codec: with the device and dtype that they get, too."""
        self.params, self.codec, self.maps = params, codec, maps
        self.loaded: dict[str, ControlNet] = {}
        """by the SHA-256 of their files, since those of one maker have the same header"""

    def conditions(self, request: GenerationRequest, given: Given) -> list[ControlNetCondition]:
        """What a request follows, a condition for each of its ControlNets. Errors as in `load_controlnet`."""
        self._keep({one.net.sha256 for one in given.controlnets})
        uses = zip(request.controlnet or (), given.controlnets, strict=True)
        return [self._condition(use, one, request.padded_size) for use, one in uses]

    def _keep(self, wanted: set[str]) -> None:
        """Free all others."""
        others = self.loaded.keys() - wanted
        for key in others:
            del self.loaded[key]
        if others:
            empty_device_cache(self.codec.placement.device)

    def _condition(self, use: ControlNetUse, one: Followed, size: tuple[int, int]) -> ControlNetCondition:
        net, pixels = self._net(one.net), self.maps.made(use.map, one.image, size)
        cond = pixels if net.params.takes_pixels else self.codec.encode_pixels(pixels)
        return ControlNetCondition(net, cond, use.scale, use.start, use.end, use.mode)

    def _net(self, known: Known) -> ControlNet:
        if known.sha256 not in self.loaded:
            placement = self.codec.placement
            placement.release()  # the other parts, where they take turns
            net = load_controlnet(known.path, placement.device, self.codec.dtype, self.params)
            install(net, placement.device)
            self.loaded[known.sha256] = net
        return self.loaded[known.sha256]
