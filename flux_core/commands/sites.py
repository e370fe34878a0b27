"""`sites`: list the named values of a model's forward, which plans use."""

from ..hooks.sites import ATTEND, GLOBAL, KINDS, OF_BLOCK, SITES, head_names, site_names
from ..terminal import tell
from ..variants import DEFAULT, get_variant

_GIVEN = {"double_blocks": "x is (img, txt)", "single_blocks": "x is the joined sequence, text first"}


def sites(name: str = DEFAULT) -> str:
    """A table of site names, shapes and meanings, with the model's sizes. UsageError for an unknown model."""
    variant = get_variant(name)
    params = variant.params
    numbers = {"double_blocks": params.depth, "single_blocks": params.depth_single_blocks}
    ranges = {kind: f"{kind}.0-{count - 1}" for kind, count in numbers.items()}
    of_forward = {site.name: site for site in SITES if not site.kinds}
    parts = [_table("once in a forward", [(name, of_forward[name].shape, of_forward[name].meaning) for name in GLOBAL])]
    for kind in KINDS:
        of_kind = [site for site in SITES if kind in site.kinds]
        assert len(of_kind) == len(OF_BLOCK[kind])
        parts.append(
            _table(
                f"in each of {ranges[kind]} ({kind}.0.NAME)",
                [(site.name, site.shape, site.meaning) for site in of_kind],
            )
        )
    places = [
        *((f"{kind}.N", "fn(call, x, at)", f"the block: {given}") for kind, given in _GIVEN.items()),
        (f"BLOCK.{ATTEND}", "fn(attend, q, k, v, at)", "the attention of any block, over the joined sequence"),
    ]
    parts.append(_table("where functions are placed besides (docs/hooks.md)", places))
    flat = numbers["double_blocks"] + numbers["single_blocks"]
    sizes = f"D {params.hidden_size}, H {params.num_heads}, P {params.head_dim}, C {params.out_channels}"
    parts.append(
        f"{len(site_names(params)):,} sites of {variant.name}, and {len(head_names(params)):,} heads: {sizes}; "
        f"B batch rows, L image tokens, T text tokens ({variant.max_text}), V features of CLIP's vector.\n"
        f"layer.0-{flat - 1} numbers double, then single blocks; globs work (double_blocks.*.img.k)."
    )
    return "\n\n".join(parts)


def _table(title: str, rows: list[tuple[str, str, str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"  {name:<{widths[0]}}  {shape:<{widths[1]}}  {meaning}" for name, shape, meaning in rows]
    return "\n".join([title, *lines])


def print_sites(**flags: str) -> None:
    """Print the result of `sites`."""
    tell(sites(**flags))
