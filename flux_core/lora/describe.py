"""What a LoRA is, as lines for people, and which models it fits."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..checkpoint.contents import listing
from ..checkpoint.source import Source, find_source
from ..errors import FileError
from ..variants import DEFAULT, VARIANTS, Variant, named_like, originals
from .dialects import TEXT, other_algebra, other_model
from .file import LoraFile, Misfit, check_shapes, check_tokens, find_lora, read_names, widened_input

MOST = 200
"""characters of a header's value that are printed"""


def best_fit(path: str | Path) -> tuple[LoraFile, list[Variant], str]:
    """The file, read for the models that it fits best; these models; where there are none, why. FileError.

    A model fits if all shapes do; of those that fit, the best have most of the file's modules.
    """
    fits: list[tuple[int, LoraFile, Variant]] = []
    others: list[tuple[int, LoraFile, str]] = []
    for variant in originals():
        lora = read_names(path, variant.params)
        count = len(lora.named_tokens) if lora.is_tokens else len(lora.of("transformer")) + len(lora.norms)
        try:
            check_shapes(lora, variant.params)
            if lora.is_tokens:
                check_tokens(lora, variant.params)
            fits.append((count, lora, variant))
        except Misfit as error:
            finding = str(error).partition(" Next:")[0].replace("the model has", f"{variant.name} has")
            others.append((count, lora, f"{finding} It has not the sizes of FLUX.1. Next: give a LoRA for FLUX.1."))
        except FileError as error:
            others.append((count, lora, str(error)))
    most = max((count for count, _, _ in fits), default=0)
    if most == 0 and others:
        _, lora, reason = max(others, key=lambda other: other[0])
        return lora, [], reason
    if most == 0:
        return fits[0][1], [], f"{path} trains nothing of the transformer. Next: give a LoRA for FLUX.1."
    best = [(lora, variant) for count, lora, variant in fits if count == most]
    return best[0][0], [variant for _, variant in best], ""


def describe(path: str | Path) -> list[str]:
    """Lines that say what a LoRA holds. FileError for a file that is none, or is damaged."""
    source = find_source(find_lora(path))
    metadata = source.headers[0].metadata
    if model := other_model(source.shapes, metadata):
        lines = [f"{path}: a LoRA for {model}, not for FLUX.1", _tensors(source)]
    elif other := other_algebra(source.shapes):
        lines = [f"{path}: {other[1]} (its tensor {other[0]}), which is not supported", _tensors(source)]
    else:
        lora, variants, reason = best_fit(path)
        names = ", ".join(variant.name for variant in variants)
        lines = [*_lines(path, lora), f"fits: {names}" if names else f"fits no model: {reason}"]
        if row := named_like(lora.path):
            lines.append(f"named like that of --name {row.name}: {row.settings}")
    return lines + [f"{key}: {value[:MOST]}" for key, value in sorted(metadata.items())]


def _lines(path: str | Path, lora: LoraFile) -> list[str]:
    from .handle import summary  # and with it torch

    if lora.is_tokens:
        return [f"{path}: vectors of trained tokens", summary(lora), _tensors(lora.source)]
    linears = {x.target.module for x in lora.of("transformer") if not x.target.module.endswith(".scale")}
    counts = [f"transformer {len(linears)} of {lora.total} Linears"]
    counts += [f"{len(lora.norms)} norms"] if lora.norms else []
    text = [(name, len(lora.of(network))) for network, name in zip(TEXT, ("CLIP", "T5"), strict=True)]
    counts += [f"{name} {count} modules" for name, count in text if count]
    lines = [
        f"{path}: a LoRA",
        summary(replace(lora, unmatched=(), tokens=())),
        f"dialect: {lora.dialect}",
        f"ranks: {_counted(module.rank for module in lora.modules if module.rank)}",
        f"alphas: {_counted(_alphas(lora))}",
        f"modules: {', '.join(counts)}",
        _tensors(lora.source),
    ]
    params = VARIANTS[DEFAULT].params
    if (width := widened_input(lora, params)) > params.in_channels:
        lines.append(f"for a control model: img_in takes {width} features")
    lines += [f"words: {lora.words[:MOST]}"] if lora.words else []
    lines += [listing("trained tokens, which are not used", lora.unused_tokens)] if lora.unused_tokens else []
    lines += [listing("modules that name nothing in the model", list(lora.unmatched))] if lora.unmatched else []
    return lines


def _alphas(lora: LoraFile) -> Iterable[str]:
    """Each module's alpha, of the file or the header; nothing for those without."""
    from .tensors import alphas_of

    for value in alphas_of(lora).values():
        yield f"{value:g}"
    for module in lora.modules:
        if module.scale is not None and "alpha" not in module.tensors:
            yield f"{module.scale * (module.rank or 1):g} by the header"


def _counted(values: Iterable[object]) -> str:
    """Values and how often each is there, the five most frequent first."""
    found = Counter(values).most_common()
    more = ", …" if len(found) > 5 else ""
    return ", ".join(f"{value} ({count})" for value, count in found[:5]) + more or "none"


def _tensors(source: Source) -> str:
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in Counter(source.dtypes.values()).most_common())
    return f"tensors: {len(source.shapes):,} ({dtypes}), {source.size:,} bytes"
