"""Search the steps of a schedule that run when only so many may: those whose pictures are nearest to uncached ones.

After BudCache (arXiv 2606.13496): which steps run is searched for a number of forwards, on final pictures, in three
stages:

1. The uncached pictures are drawn, and their velocities kept. To first order, a velocity u in place of v_i at step i
   moves the final latents by g_i dt_i (u - v_i), where dt_i is the step in sigma, and the gain g_i is what later steps
   make of it, measured by leaving out single steps. u is a sum of two other velocities (`hooks/step_cache.py`), so the
   error of any choice is a quadratic form of the velocities' inner products, and the slopes that make it least are the
   solution of a small linear system (`Estimate`): a fraction of a millisecond, no forward.
2. Simulated annealing on that estimate.
3. Hill climbing on pictures from the best few, by moves of one forward, the most promising by the estimate first.

A score is the PSNR of final latents to the uncached ones in dB, up to a constant, the mean over pictures: as the mean
of pixels' PSNR, by which results are judged. All choices follow from the scores and a seed, and a `Journal` keeps
scores, so that a search that was stopped goes on and ends as one that was not.
"""

import json
import math
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..errors import FileError, UsageError
from ..files import append_synced, disk_errors
from ..hooks import StepCache
from ..hooks.step_cache import MOST_SLOPE

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..sampling import Velocity

Forwards = tuple[int, ...]
"""the steps that run, in order, of which the first is 0"""
PROBED = 3
"""pictures by which gains are measured"""
PROBES = (1, 2, 3, 5, 9, 15, 22)
"""of 28 steps, those that are left out for it: more of the first, where gains fall"""
STARTS = 3
"""walks of annealing, whose results are drawn"""
MOVES = 3000
"""of an annealing"""
HOPELESS = 6.0
"""dB, summed over pictures, by which a candidate is behind the best when no more of its pictures are drawn"""
NO_ERROR = 1e-12
"""the least mean squared error that is told from none"""
HOLD = 1.0
"""how firmly slopes are held to those of single steps; on flux-mini 0.1 is worse, and at 0 pictures fall apart"""


def cache_of(forwards: Sequence[int], num_steps: int, slope: float | Sequence[float] = 1.0) -> StepCache:
    """The intervention that runs these steps of a schedule alone, at least one fewer than it has."""
    left_out = tuple(sorted(set(range(num_steps)) - set(forwards)))
    return StepCache(steps=left_out, slope=slope if isinstance(slope, float) else tuple(slope), num_steps=num_steps)


def spread(forwards: int, num_steps: int) -> Forwards:
    """So many of the steps, evenly."""
    return tuple(i * num_steps // forwards for i in range(forwards))


def by_hand(forwards: int, num_steps: int) -> dict[str, StepCache]:
    """Schedules of so many forwards that people write, by name, each with the last velocity reused and with slope 1.

    The evenly spread ones; and wherever the number allows, the first steps and then one of 2, of 3 or of 4.
    """
    found = {"even": spread(forwards, num_steps)}
    for every, first in product((2, 3, 4), range(1, num_steps)):
        steps = (*range(first), *range(first + every - 1, num_steps, every))
        if len(steps) == forwards and steps not in found.values():
            found[f"1 of {every} from step {first}"] = steps
    slopes = {"reuse": 0.0, "linear": 1.0}
    return {
        f"{name}, {how}": cache_of(steps, num_steps, slope)
        for (name, steps), (how, slope) in product(found.items(), slopes.items())
    }


class Picture:
    """The uncached picture of a prompt and seed, and the way to others with steps left out."""

    def __init__(self, velocity: "Velocity", noise: "Tensor", sigmas: Sequence[float]) -> None:
        """velocity: without a gradient. noise: [1, L, C]. Nothing is drawn before it is asked for."""
        self.velocity, self.noise, self.sigmas = velocity, noise, tuple(sigmas)
        self._known: OrderedDict[Any, Tensor] = OrderedDict()
        self._final: Tensor | None = None
        self._products: np.ndarray | None = None
        self._pixels: np.ndarray | None = None

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def products(self) -> "np.ndarray":
        """Inner products of the uncached velocities, float64 [N, N], divided by their number of values."""
        import torch

        if self._products is None:
            ran: list[Tensor] = []

            def kept(x: "Tensor", sigma: float) -> "Tensor":
                ran.append(self.velocity(x, sigma))
                return ran[-1]

            self._final = self._sampled(kept)
            flat = torch.cat(ran).flatten(1).cpu().double()
            self._products = (flat @ flat.T / flat.shape[1]).numpy()
            self._known |= {(None,) * i: v for i, v in enumerate(ran)}
        return self._products

    def final(self) -> "Tensor":
        """The uncached final latents [1, L, C]."""
        self.products()
        assert self._final is not None
        return self._final

    def error(self, cache: StepCache) -> float:
        """The mean squared error of final latents to the uncached ones."""
        return float((self.drawn(cache) - self.final()).float().square().mean())

    def psnr(self, cache: StepCache, decode: "Callable[[Tensor], np.ndarray]") -> float:
        """PSNR of pixels to the uncached ones, in dB. decode: latents to levels from 0 to 255."""
        if self._pixels is None:
            self._pixels = decode(self.final())
        return 20 * math.log10(255) + decibels(((decode(self.drawn(cache)) - self._pixels) ** 2).mean())

    def drawn(self, cache: StepCache) -> "Tensor":
        """Final latents [1, L, C] with steps left out."""
        slopes, numbers = cache.slopes(), {sigma: i for i, sigma in enumerate(self.sigmas)}

        def shared(x: "Tensor", sigma: float) -> "Tensor":
            """The velocity, which candidates have in common that are the same up to here."""
            key = tuple(slopes.get(step) for step in range(numbers[sigma]))
            if key not in self._known:
                self._known[key] = self.velocity(x, sigma)
            self._known.move_to_end(key)
            return self._known[key]

        found = self._sampled(cache.following(shared, self.sigmas))
        while len(self._known) > 3 * self.num_steps:
            self._known.popitem(last=False)
        return found

    def _sampled(self, velocity: "Velocity") -> "Tensor":
        from ..sampling import euler

        return euler(velocity, self.noise, self.sigmas)


class Estimate:
    """The error of steps left out, to first order, and the slopes that make it least; without a forward."""

    def __init__(self, products: "np.ndarray", sigmas: Sequence[float], gains: Sequence[float]) -> None:
        """products: of pictures, [P, N, N]. gains: of the N steps."""
        import numpy as np

        self.products, self.mean, self.sigmas = products, products.mean(0), np.asarray(sigmas)
        self.weights = np.diff(self.sigmas) * gains

    def errors(self, forwards: Forwards, slopes: "np.ndarray | None" = None) -> "np.ndarray":
        """The mean squared error of each picture's final latents, [P]. slopes: the best, if none are given."""
        reused, along = self._moves(forwards)
        moved = reused.sum(0) + (self._best(reused, along) if slopes is None else slopes) @ along
        return self.products @ moved @ moved

    def score(self, forwards: Forwards) -> float:
        return sum(map(decibels, self.errors(forwards))) / len(self.products)

    def slopes(self, forwards: Forwards) -> "np.ndarray":
        """The slopes of the steps left out that make the error of the mean picture least, held to those that would do
        so for each step's own error alone: unheld, they rely on errors that cancel, and pictures fall apart."""
        return self._best(*self._moves(forwards))

    def _best(self, reused: "np.ndarray", along: "np.ndarray") -> "np.ndarray":
        import numpy as np

        seen = along @ self.mean
        whole, alone = seen @ along.T, (seen * along).sum(1)
        hold = HOLD * np.where(alone > 0, alone, 1)  # behind a single step that ran there is no slope
        own = -(seen * reused).sum(1) / np.where(alone > 0, alone, 1)
        found = np.linalg.solve(whole + np.diag(hold), hold * own - seen @ reused.sum(0))
        return found.clip(-MOST_SLOPE, MOST_SLOPE)

    def _moves(self, forwards: Forwards) -> "tuple[np.ndarray, np.ndarray]":
        """What each of the M steps left out adds to the final latents, as sums of velocities, [M, N] each: with the
        last velocity reused, and by a slope of 1."""
        import numpy as np

        size = len(self.weights)
        left_out = np.array(sorted(set(range(size)) - set(forwards)))
        rows, ran = np.arange(len(left_out)), np.array(forwards)
        behind = np.searchsorted(ran, left_out) - 1
        last, before = ran[behind], ran[np.maximum(behind - 1, 0)]
        reused, along, weights = np.zeros((len(rows), size)), np.zeros((len(rows), size)), self.weights[left_out]
        reused[rows, last] += weights
        reused[rows, left_out] -= weights
        two = behind > 0
        run = np.where(two, self.sigmas[last] - self.sigmas[before], 1)
        along[rows, last] += two * weights * (self.sigmas[left_out] - self.sigmas[last]) / run
        along[rows, before] -= two * weights * (self.sigmas[left_out] - self.sigmas[last]) / run
        return reused, along


def decibels(error: float) -> float:
    return -10 * math.log10(max(error, NO_ERROR))


class Journal:
    """Scores that are known, in a file that a search goes on from: what it is about, then a line for each score."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        """about: what the scores depend on. FileError for a damaged file, UsageError for one about something else."""
        self.path, self.scores = path, dict[str, float]()
        lines = self._whole_lines()
        if not lines:
            self._append({"about": about})
        elif lines[0] != {"about": json.loads(json.dumps(about))}:
            raise UsageError(f"{path} is the journal of another search. Next: another --output, or delete it")
        try:
            self.scores = {line["of"]: line["score"] for line in lines[1:]}
        except (KeyError, TypeError):
            raise self._damaged() from None

    def of(self, key: Sequence[Any], measure: Callable[[], float]) -> float:
        """The score of a key; measured and written down where it is not known. DiskError."""
        text = json.dumps(key)
        if text not in self.scores:
            self.scores[text] = measure()
            self._append({"of": text, "score": self.scores[text]})
        return self.scores[text]

    def _whole_lines(self) -> list[Any]:
        """The lines that were written whole; the rest, which a stopped search may leave, is cut off."""
        if not self.path.exists():
            return []
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise FileError(f"{self.path} could not be read: {error.strerror}. Next: another --output") from None
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with disk_errors(self.path, "--output"):
                os.truncate(self.path, len(whole))
        try:
            return [json.loads(line) for line in whole.splitlines()]
        except ValueError:
            raise self._damaged() from None

    def _damaged(self) -> FileError:
        return FileError(f"{self.path} is damaged. Next: delete it, and search anew")

    def _append(self, line: dict[str, Any]) -> None:
        with disk_errors(self.path, "--output"):
            append_synced(self.path, json.dumps(line).encode() + b"\n")


class Search:
    """The search for one number of forwards."""

    def __init__(self, pictures: Sequence[Picture], forwards: int, journal: Journal, seed: int = 0) -> None:
        """pictures: of one schedule. forwards: at least 2, and fewer than its steps."""
        self.pictures, self.forwards, self.journal, self.random = pictures, forwards, journal, random.Random(seed)
        self.num_steps = pictures[0].num_steps
        self.estimate = self._estimate()

    def run(self, tries: int) -> Iterator[tuple[StepCache, float]]:
        """The best so far and its score, after each of at most so many candidates that are drawn."""
        queue = starts = self._starts()
        best, score, tried = starts[0], -math.inf, set[Forwards]()
        while queue and len(tried) < tries:
            forwards, *queue = queue
            tried.add(forwards)
            found = self._score(forwards, best)
            if found > score:
                best, score = forwards, found
            if not queue or (forwards == best and len(tried) > len(starts)):
                near = sorted(moved(best, self.num_steps), key=self.estimate.score, reverse=True)
                queue = [one for one in near if one not in tried]
            yield self.cache(best), score

    def cache(self, forwards: Forwards) -> StepCache:
        """The intervention of a candidate, with its slopes."""
        return cache_of(forwards, self.num_steps, [round(float(x), 3) for x in self.estimate.slopes(forwards)])

    def _estimate(self) -> Estimate:
        """The estimate, with the gains of single steps, geometric means over pictures, and between them on a line."""
        import numpy as np

        products, sigmas = np.stack([picture.products() for picture in self.pictures]), self.pictures[0].sigmas
        probes = sorted({max(1, round(step * self.num_steps / 28)) for step in PROBES})
        plain, gains = Estimate(products, sigmas, [1.0] * self.num_steps), list[float]()
        for probe in probes:
            forwards = tuple(i for i in range(self.num_steps) if i != probe)
            alone, cache = plain.errors(forwards, np.zeros(1))[:PROBED], cache_of(forwards, self.num_steps, 0.0)
            gains.append(fmean(decibels(error) - self._of(i, cache) for i, error in enumerate(alone)) / 20)
        return Estimate(products, sigmas, list(10 ** np.interp(range(self.num_steps), probes, gains)))

    def _starts(self) -> list[Forwards]:
        """What annealing finds, the best by the estimate first."""
        return sorted({self._annealed() for _ in range(STARTS)}, key=self.estimate.score, reverse=True)

    def _annealed(self) -> Forwards:
        """The best candidate by the estimate on a walk of random moves, which go down by less and less."""
        current = best = spread(self.forwards, self.num_steps)
        score = top = self.estimate.score(current)
        for i in range(MOVES):
            chosen = set(current)
            chosen.remove(self.random.choice(current[1:]))
            chosen.add(self.random.choice([x for x in range(self.num_steps) if x not in current]))
            other = tuple(sorted(chosen))
            found = self.estimate.score(other)
            if found - score > math.log(1 - self.random.random()) * (1 - i / MOVES) ** 2:
                current, score = other, found
            if score > top:
                best, top = current, score
        return best

    def _score(self, forwards: Forwards, best: Forwards) -> float:
        """The mean score; minus infinity once it is hopelessly behind that of the best."""
        cache, other, scores, behind = self.cache(forwards), self.cache(best), list[float](), 0.0
        for number in range(len(self.pictures)):
            scores.append(self._of(number, cache))
            behind += self._of(number, other) - scores[-1]
            if behind > HOPELESS:
                return -math.inf
        return sum(scores) / len(scores)

    def _of(self, number: int, cache: StepCache) -> float:
        """The score of a picture."""
        return self.journal.of([number, cache.slopes()], lambda: decibels(self.pictures[number].error(cache)))


def moved(forwards: Forwards, num_steps: int) -> Iterator[Forwards]:
    """All candidates with one forward at another step."""
    for forward, place in product(forwards[1:], sorted(set(range(num_steps)) - set(forwards))):
        yield tuple(sorted({*forwards, place} - {forward}))
