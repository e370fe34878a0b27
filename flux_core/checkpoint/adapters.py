"""The endings of the keys in LoRA files, and which factor of a difference each is. No torch.

They tell a LoRA from other weights: its keys need not have the word in them (LoKr, LoHa, whole differences).
"""

import re
from collections.abc import Container

ENDINGS: dict[str, str] = {
    ".lora_A.weight": "down",
    ".lora_down.weight": "down",
    ".lora.down.weight": "down",
    ".down.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.weight": "up",
    ".lora.up.weight": "up",
    ".up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "up_bias",
    ".alpha": "alpha",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".magnitude": "magnitude",
    ".dora_scale": "magnitude",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".set_weight": "set_weight",
    ".reshape_weight": "reshape_weight",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    **{f".lokr_{x}": f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f".hada_{x}": f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".{x}.weight": f"glora_{x}" for x in ("a1", "a2", "b1", "b2")},
}
"""what a key ends with -> the factor it is, in every spelling"""
_DEFAULT = re.compile(r"\.default(?=\.weight$|\.bias$|$)")
"""the name of PEFT's only adapter, which files saved by hand have in their keys"""
_ENDINGS = sorted(ENDINGS, key=len, reverse=True)

OTHER_ALGEBRAS: tuple[tuple[str, str], ...] = (
    (r"\.(oft_\w+|boft_\w+)(\.weight)?$", "OFT"),
    (r"\.(hra_\w+|vera_\w+|ia3_l|on_input|lora_embedding_[AB]|randlora_\w+)(\.weight)?$", "another kind of adapter"),
)
"""endings of adapters that are no difference to a weight: (pattern, name)"""

_WEAK = ("alpha", "magnitude", "set_weight", "reshape_weight")
"""roles of endings that go with others, or that other networks have, too"""
_CERTAIN = tuple(end for end, role in ENDINGS.items() if role not in _WEAK)


def split_ending(name: str) -> tuple[str, str]:
    """A key's stem, and the factor that its ending is; the whole key and "" where it has no such ending."""
    bare = _DEFAULT.sub("", name) if ".default" in name else name
    ending = next((end for end in _ENDINGS if bare.endswith(end)), "")
    return bare[: len(bare) - len(ending)], ENDINGS.get(ending, "")


def is_adapter(name: str) -> bool:
    """Whether only a LoRA, or another kind of adapter, has such a key."""
    bare = _DEFAULT.sub("", name) if ".default" in name else name
    return bare.endswith(_CERTAIN) or any(re.search(pattern, name) for pattern, _ in OTHER_ALGEBRAS)


def is_idle_alpha(name: str, names: Container[str]) -> bool:
    """Whether a key is the alpha of a LoKr whose factors are both whole: it means nothing, and is infinite in some."""
    stem, role = split_ending(name)
    return role == "alpha" and all(f"{stem}.{factor}" in names for factor in ("lokr_w1", "lokr_w2"))
