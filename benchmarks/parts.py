"""Where the seconds of a picture go, from the start of its process: the command line, and one line more.

    python benchmarks/parts.py --prompt "a red apple" [other flags]

Takes the flags of cli.py. Its last line on stderr is JSON, in seconds: `imports` from the start of the process to the
last import, `loading` the model's files, `text` the prompt (with T5's file, where that is read only then), `steps` from
noise to latents, `decoding`, `file` the PNG with its metadata, and `else`, which is mostly checks of flags and headers.
What the process takes to end is not in it. On a card a part ends when its results are there. Linux.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def since_start() -> float:
    """Seconds since the process began, to a hundredth."""
    fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def timed(owner: Any, name: str, seconds: dict[str, float], part: str) -> None:
    """Let a function add to `seconds` what it takes."""
    import torch

    plain: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = plain(*args, **kwargs)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        seconds[part] += time.perf_counter() - begin
        return result

    setattr(owner, name, measured)


def draw(flags: Sequence[str]) -> int:
    """Run the command line, and print its parts."""
    from flux_core import pipeline
    from flux_core.images import output
    from flux_core.main import main
    from flux_core.pipeline.codec import Codec
    from flux_core.pipeline.denoiser import Denoiser

    seconds = {"imports": since_start(), "loading": 0.0, "text": 0.0, "steps": 0.0, "decoding": 0.0, "file": 0.0}
    timed(pipeline, "load_pipeline", seconds, "loading")
    timed(pipeline.Pipeline, "encode_ahead", seconds, "text")
    timed(Denoiser, "denoise", seconds, "steps")
    timed(Codec, "decode", seconds, "decoding")
    timed(output, "save_picture", seconds, "file")
    code = main(flags)
    seconds["else"] = since_start() - sum(seconds.values())
    print(json.dumps({part: round(taken, 3) for part, taken in seconds.items()}), file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(draw(sys.argv[1:]))
