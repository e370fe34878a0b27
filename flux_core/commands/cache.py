"""`cache search`: find the steps of a model's schedule that run when only so many may, for `--cache FILE`.

Scores are kept in a journal beside the file until it is written, so the same command goes on where it was stopped.
"""

import json
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..checkpoint import check_files, with_files
from ..device.threads import set_threads
from ..errors import UsageError
from ..files import prepare_folder, write_whole
from ..hooks import StepCache
from ..hooks.step_cache import Searched
from ..methods.importance import Prompt, default_prompts, read_prompts
from ..request.fields import DEVICE, FILES, LOADING, MEMORY, OUTPUT_DIR, THREADS, pop_fields
from ..request.generation import GenerationRequest
from ..session.sharing import alone
from ..terminal import no_bars, note, tell
from ..version import __version__
from .table import CACHE_SEARCH

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..methods.step_search import Journal, Picture
    from ..pipeline import Pipeline

_FIELDS = {field.name: field for field in CACHE_SEARCH}


def search(
    forwards: str | None = None,
    name: str | None = None,
    prompts: str | None = None,
    output: str | None = None,
    device: str = DEVICE.default,
    threads: str | None = None,
    **fields: Any,
) -> Path:
    """Search the steps, judge them on other pictures, and write the file. Returns its path.

    UsageError for wrong flags, FileError for files that cannot be read, DiskError.
    """
    limit, held_out, seeds, tries = (
        _FIELDS[key].parse(fields.pop(key, None), _FIELDS[key].default)
        for key in ("limit", "held_out", "seeds", "tries")
    )
    loading, memory = pop_fields(fields, LOADING), pop_fields(fields, MEMORY)
    variant = with_files(name, **pop_fields(fields, FILES))
    request = GenerationRequest(name=variant.name, prompt="", allow_empty_prompt=True, seed=0, **fields)
    if variant.takes:
        raise UsageError(
            f"{variant.name} takes a picture, and a search draws from prompts alone. Next: --cache fast, or faster"
        )
    count = _forwards(forwards, request.num_steps)
    pairs = _pairs(prompts or str(default_prompts(variant.name)), limit + held_out, seeds)
    stem = f"cache-{variant.name}-{count}of{request.num_steps}-{request.width}x{request.height}"
    path = Path(output) if output is not None else Path(OUTPUT_DIR.default, f"{stem}.json")
    _check_new(path)
    check_files(variant)
    prepare_folder(path.parent, "--output")
    for line in [] if variant.embedded else [variant.licence_line]:
        note(line)
    with alone(path.with_name(f".{path.name}.lock"), f"another process searches for {path}"):
        _check_new(path)  # since that process may have ended now

        import torch  # now, since it takes seconds

        from ..methods.step_search import Journal
        from ..pipeline import load_pipeline

        set_threads(THREADS.parse(threads))
        pipeline = load_pipeline(variant, device, request.dtype, t5_dtype=request.t5_dtype, **memory, **loading)
        about = request.model_dump(mode="json", include={"name", "width", "height", "num_steps", "guidance"})
        about |= {"dtype": pipeline.precision, "t5_dtype": pipeline.t5_precision, "attention": pipeline.attention}
        about |= {"weights": pipeline.weights, "searched": limit * seeds, "version": __version__}
        about["pairs"] = [[pair.prompt, pair.seed] for pair in pairs]
        journal = Journal(path.with_name(f"{path.name}.journal"), about)
        work = Work(pipeline, request, journal, pairs, limit * seeds)
        with torch.no_grad():
            try:
                best = work.search(count, tries)
                searched = work.judged(best, count)
            except KeyboardInterrupt:
                note(f"{len(journal.scores)} scores are in {journal.path}. Next: the same command goes on from them")
                raise
        entry = best.model_copy(update={"model": variant.name})
        whole = {
            **entry.model_dump(mode="json", exclude_none=True, exclude={"follow"}),
            "searched": searched.model_dump(mode="json"),
        }
        write_whole(path, json.dumps(whole, indent=1) + "\n")
        journal.path.unlink()
    return path


def _check_new(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"--output {path} is a folder. Next: a file in it, as in --output {path / 'cache.json'}")
    if path.exists():
        raise UsageError(f"{path} exists already: it holds what a search found. Next: another --output")


def print_found(**flags: Any) -> None:
    """Run `search` and print its file."""
    tell(str(search(**flags)))


def _forwards(text: str | None, num_steps: int) -> int:
    """The value of --forwards. UsageError where it leaves nothing to choose."""
    if text is None:
        raise UsageError("--forwards is missing: how many of the steps may run, as in --forwards 14")
    count = int(_FIELDS["forwards"].parse(text))
    if count >= num_steps:
        raise UsageError(f"--forwards {count} leaves out none of {num_steps} steps. Next: a smaller number")
    return count


def _pairs(file: str, count: int, seeds: int) -> list[Prompt]:
    """Each of the first prompts of a file with each of its seeds. UsageError where it has too few."""
    found = read_prompts(file)
    if len(found) < count:
        raise UsageError(f"{file} has {len(found)} prompts, {count} are needed. Next: lower --limit or --held-out")
    return [Prompt(prompt=one.prompt, seed=one.seed + i) for one in found[:count] for i in range(seeds)]


class Work:
    """A search with a loaded model. The first pairs of prompt and seed are searched on, the others judge."""

    def __init__(
        self, pipeline: "Pipeline", request: GenerationRequest, journal: "Journal", pairs: list[Prompt], searched: int
    ) -> None:
        self.pipeline, self.request, self.journal = pipeline, request, journal
        self.pairs, self.searched = pairs, searched
        self.size: dict[str, Any] = {"width": request.width, "height": request.height}
        self.pictures = [self._picture(pair) for pair in pairs]

    def _picture(self, pair: Prompt) -> "Picture":
        from ..methods.step_search import Picture

        sigmas = self.pipeline.schedule(self.request.num_steps, **self.size)
        velocity = self.pipeline.velocity(pair.prompt, self.request.guidance, **self.size)
        return Picture(velocity, self.pipeline.noise(pair.seed, **self.size), sigmas)

    def search(self, forwards: int, tries: int) -> StepCache:
        """The best that is found, with a line for each that is better than those before."""
        from ..methods.step_search import Search

        tell(f"{self.request.settings()}: {forwards} forwards, searched on {self.searched} pictures")
        best = None
        found = Search(self.pictures[: self.searched], forwards, self.journal).run(tries)
        for number, (cache, score) in enumerate(tqdm(found, total=tries, unit="try", disable=no_bars()), 1):
            if cache != best:
                steps = (str(step) for step in range(self.request.num_steps) if step not in (cache.steps or ()))
                tell(f"try {number}: {score:.2f} dB by latents, of the steps {' '.join(steps)}")
            best = cache
        assert best is not None
        return best

    def judged(self, best: StepCache, forwards: int) -> Searched:
        """What is to be said of the best, with a printed table of the pictures that it was not searched on."""
        from ..methods.step_search import by_hand

        mine, others = range(self.searched), range(self.searched, len(self.pairs))
        own, held_out = self._psnr(best, mine), self._psnr(best, others)
        hand = {name: self._psnr(cache, others) for name, cache in by_hand(forwards, self.request.num_steps).items()}
        tell(
            f"PSNR to uncached pictures, the mean over pictures: {own:.1f} dB of the {len(mine)} searched on, and of "
            f"{len(others)} others"
        )
        tell("\n".join(f"{psnr:5.1f} dB  {name}" for name, psnr in {"searched": held_out, **hand}.items()))
        return Searched(
            forwards=forwards,
            **self.size,
            guidance=self.request.guidance,
            weights=self.pipeline.weights,
            prompts=tuple(self.pairs[i].prompt for i in mine),
            seeds=tuple(self.pairs[i].seed for i in mine),
            psnr_db=round(own, 2),
            held_out_prompts=tuple(self.pairs[i].prompt for i in others),
            held_out_seeds=tuple(self.pairs[i].seed for i in others),
            held_out_psnr_db=round(held_out, 2),
            by_hand_psnr_db={name: round(psnr, 2) for name, psnr in hand.items()},
        )

    def _psnr(self, cache: StepCache, numbers: Sequence[int]) -> float:
        """Of pixels, the mean over these pictures."""
        found = list[float]()
        for i in tqdm(numbers, desc="pictures", disable=no_bars()):
            measure = partial(self.pictures[i].psnr, cache, self._levels)
            found.append(self.journal.of(["pixels", i, cache.slopes()], measure))
        return statistics.fmean(found)

    def _levels(self, x: "Tensor") -> "np.ndarray":
        import numpy as np

        return np.asarray(self.pipeline.decode(x, **self.size)[0], dtype=np.float64)
