"""Two small tokenizers, trained on the captions, in the forms that FLUX's own come in.

T5's is SentencePiece Unigram: 2,048 pieces, <pad> 0, </s> 1, <unk> 2, digits apart. The library's T5 class
fixes everything about a tokenizer except its pieces and SentencePiece's normalisation table, so case is
folded there: the table below maps accented and upper-case letters, full-width forms and typographic marks to
plain ASCII. Every ASCII letter, digit and mark is a piece, hence a new word falls to pieces, not to <unk>
(other scripts do).

CLIP's is byte-level BPE: 256 bytes, the same at a word's end, merges, <|startoftext|>, <|endoftext|>, 77
tokens. Nothing is unknown to it.

    python weights/recipe/vocab.py ROOT OUT      # OUT/t5_tokenizer, OUT/clip_tokenizer
"""

import io
import json
import sys
import tempfile
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece
from scenes import sample_scenes
from sprites import load_sprites
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

T5_SIZE, CLIP_SIZE, T5_LENGTH, CLIP_LENGTH = 2048, 2048, 64, 77
ASCII = "".join(chr(c) for c in range(33, 127) if not chr(c).isupper())
MARKS = {
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "–": "-",
    "—": "-",
    "…": "...",
    "ß": "ss",
    "æ": "ae",
    "œ": "oe",
    "ø": "o",
    "ł": "l",
    "đ": "d",
    "×": "x",
}
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def captions_for(root: str, n: int = 200_000) -> list[str]:
    _, captions = sample_scenes(n // 4, 7, load_sprites(root, pixels=False), k=4)
    return [c for cs in captions for c in cs]


def folding_table() -> str:
    """SentencePiece's format: source code points, tab, target code points, in hexadecimal."""
    blocks = [
        range(0x41, 0x5B),
        range(0xA0, 0x250),
        range(0x1E00, 0x1F00),
        range(0x2000, 0x2070),
        range(0xFF01, 0xFF5F),
    ]
    rows = {chr(c): _fold(chr(c)) for block in blocks for c in block}
    rows |= {chr(c): "" for c in (*range(0x300, 0x370), *range(0x200B, 0x2010), 0xFE0E, 0xFE0F, 0xFEFF)}
    rows |= dict.fromkeys("\t\n\r\u3000\u2028\u2029", " ")
    return "".join(f"{ord(a):X}\t{' '.join(f'{ord(c):X}' for c in b)}\n" for a, b in sorted(rows.items()) if a != b)


def _fold(char: str) -> str:
    char = MARKS.get(char.lower(), char.lower())
    plain = unicodedata.normalize("NFKD", char)
    plain = "".join(c for c in plain if not unicodedata.combining(c)).lower()
    return MARKS.get(plain, plain)


def train_t5(captions: Iterable[str], folder: Path, size: int = T5_SIZE) -> T5TokenizerFast:
    model = io.BytesIO()
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as table:
        table.write(folding_table())
        table.flush()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(captions),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            character_coverage=1.0,
            required_chars=ASCII,
            split_digits=True,
            normalization_rule_tsv=table.name,
            minloglevel=1,
            num_threads=4,
            hard_vocab_limit=False,
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    tokenizer = T5TokenizerFast.from_pretrained(folder, extra_ids=0, model_max_length=T5_LENGTH)
    tokenizer.save_pretrained(folder)
    return T5TokenizerFast.from_pretrained(folder)


def train_clip(captions: Iterable[str], folder: Path, size: int = CLIP_SIZE) -> CLIPTokenizer:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.train_from_iterator(
        captions, trainers.BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", show_progress=False)
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = letters + [c + "</w>" for c in letters]
    merges = json.loads(bpe.to_str())["model"]["merges"][: size - len(pieces) - 2]
    pieces += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({p: i for i, p in enumerate(pieces)}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=CLIP_LENGTH)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def main(root: str, out: str) -> None:
    captions = captions_for(root)
    unique = sorted(set(captions))
    for name, train in (("t5_tokenizer", train_t5), ("clip_tokenizer", train_clip)):
        tokenizer = train(unique, Path(out) / name)
        lengths = np.array([len(ids) for ids in tokenizer(captions[::4]).input_ids])
        t = tokenizer
        print(f"{name}: {len(t)} entries, pad {t.pad_token_id}, bos {t.bos_token_id}, eos {t.eos_token_id}")
        print("length: " + ", ".join(f"{p}% {np.percentile(lengths, p):.0f}" for p in (50, 99, 99.9, 100)))


if __name__ == "__main__":
    main(*sys.argv[1:3])
