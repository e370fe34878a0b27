"""Save the decoded latents after every step, and a sheet of them: from noise to the finished picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..images.given import NOTHING, Given
from ..images.output import save_picture
from ..images.pictures import grid
from ..request.generation import GenerationRequest

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..sampling import Step


class Stepwise:
    """A step callback for the single image of `request`, made from the pictures given. File names as in mflux."""

    def __init__(self, pipeline: "Pipeline", request: GenerationRequest, folder: Path, given: Given = NOTHING) -> None:
        self.pipeline, self.request, self.folder, self.given = pipeline, request, folder, given
        self.pictures: list[Image.Image] = []

    def __call__(self, step: "Step") -> None:
        if step.index < len(self.pictures):
            return  # drawn again after out of memory
        picture = self.pipeline.picture(step.x, self.request, self.given)
        self.pictures.append(picture)
        self._save(picture, f"step{step.index + 1}of{self.request.num_forward_steps}")

    def save_sheet(self) -> None:
        """Save all pictures so far on one sheet, if there are any."""
        if self.pictures:
            self._save(grid(self.pictures), "composite")

    def _save(self, picture: Image.Image, name: str) -> None:
        save_picture(picture, self.folder, f"seed_{self.request.seed}_{name}")
