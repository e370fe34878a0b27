"""`lora info`, `lora convert`, `lora merge`, `lora extract`: LoRA files without a picture."""

from ..images.metadata import printable
from ..lora.describe import describe
from ..terminal import tell


def print_info(file: str) -> None:
    """Print what a LoRA holds: dialect, ranks, alphas, modules, the models that it fits, metadata."""
    tell(printable("\n".join(describe(file))))
