"""Texts to token rows: `tokenizers` behind the cleaning that CLIP's tokenizer does in Python.

`tokenizer.json` is a plain Hugging Face file, so that other languages can read it; what such a file cannot express
(repair of mojibake, HTML entities, Python's idea of lower case and white space) happens here, in `clean_text`, first.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import CheckpointError

SOT = "<start_of_text>"
EOT = "<end_of_text>"
CLIP_VOCAB_SIZE = 49408
CLEANINGS = ("clip", "none")

# open_clip compiles its pattern with IGNORECASE, under which U+017F (long s) equals s: hence the two classes.
_PATTERN = r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# Printable ASCII, tab and line feed without '&': ftfy and html.unescape change nothing there (a test proves it), and
# not importing ftfy saves 0.1 s of a cold start.
_PLAIN = frozenset(map(chr, [9, 10, *range(32, 127)])) - {"&"}


def clean_text(text: str) -> str:
    """What CLIP does to a caption before splitting it: repair, unescape twice, one space, lower case.

    Equal to open_clip's `clean="lower"` for every string.
    """
    if not _PLAIN.issuperset(text):
        import html

        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def byte_alphabet() -> dict[int, str]:
    """The 256 byte values as printable characters, in the order in which CLIP's vocabulary lists them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {byte: chr(byte) for byte in printable}
    hidden = [byte for byte in range(256) if byte not in alphabet]
    alphabet.update({byte: chr(256 + n) for n, byte in enumerate(hidden)})
    return alphabet


def build_clip_tokenizer(merges_path: str | Path, vocab_size: int = CLIP_VOCAB_SIZE, out: str | Path = "tokenizer.json") -> Path:
    """Write CLIP's byte-pair tokenizer as a `tokenizer.json`.

    Args:
        merges_path: `bpe_simple_vocab_16e6.txt.gz` of the open_clip wheel (or the same text, not gzipped).
        vocab_size: 49408 is CLIP's own. A smaller one keeps 256 bytes, 256 word-final bytes, the first
            `vocab_size - 514` merges and the two specials; SOT is `vocab_size - 2` and EOT `vocab_size - 1`, the
            largest id, so that pooling at the arg-max finds it.
        out: the file to write (replaced atomically).

    Returns:
        `out` as a path.

    Raises:
        CheckpointError: the merges file is missing or not one, or `vocab_size` lies outside [514, 49408].
    """
    from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as RustTokenizer

    if not 514 <= vocab_size <= CLIP_VOCAB_SIZE:
        raise CheckpointError(f"vocab_size is {vocab_size}; a CLIP vocabulary has 514 (bytes only) to {CLIP_VOCAB_SIZE} entries")
    pairs = _read_merges(Path(merges_path))[: vocab_size - 514]
    tokens = list(byte_alphabet().values())
    tokens += [token + "</w>" for token in tokens]
    tokens += ["".join(pair) for pair in pairs]
    tokens += [SOT, EOT]
    vocab = {token: n for n, token in enumerate(tokens)}
    if len(vocab) != vocab_size:
        raise CheckpointError(f"{merges_path}: its first {len(pairs)} merges give {len(vocab)} distinct tokens, expected {vocab_size}; is it CLIP's file?")
    merges = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token=EOT))
    tokenizer.add_special_tokens([AddedToken(SOT, special=True, normalized=False), AddedToken(EOT, special=True, normalized=False)])
    # For readers in other languages; this module cleans in Python and switches the normaliser off.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{SOT} $A {EOT}", special_tokens=[(SOT, vocab[SOT]), (EOT, vocab[EOT])])
    out = Path(out)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.part")
    tokenizer.save(str(temporary), pretty=False)
    os.replace(temporary, out)
    return out


def _read_merges(path: Path) -> list[tuple[str, str]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot read the byte-pair merges ({error}); expected open_clip's bpe_simple_vocab_16e6.txt.gz") from error
    lines = text.split("\n")[1 : CLIP_VOCAB_SIZE - 514 + 1]
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) < CLIP_VOCAB_SIZE - 514 or any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(f"{path}: found {len(pairs)} lines that are not all pairs, expected {CLIP_VOCAB_SIZE - 514} merges, two parts each")
    return [(pair[0], pair[1]) for pair in pairs]


class Tokenizer:
    """Texts -> int32 (B, context_length); made by `Tokenizer.open`. Can be pickled (with its content, so the file may go)."""

    def __init__(self, tokenizer: Any, data: bytes, path: Path, context_length: int, cleaning: str, pad_id: int) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self.path = path
        self.context_length = context_length
        self.cleaning = cleaning
        self.pad_id = pad_id
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)
        empty = tokenizer.encode("").ids
        self._sot_id: int | None = tokenizer.token_to_id(SOT)
        self._eot_id: int | None = tokenizer.token_to_id(EOT)
        self._bare_length = len(empty)
        if context_length < max(len(empty), 1):
            raise CheckpointError(f"{path}: context_length is {context_length}, too short for the {len(empty)} special tokens of an empty text")
        tokenizer.enable_truncation(max_length=context_length)
        tokenizer.enable_padding(length=context_length, pad_id=pad_id, pad_token=tokenizer.id_to_token(pad_id) or "[PAD]")

    @classmethod
    def open(cls, path: str | Path, context_length: int = 77, cleaning: str = "clip", pad_id: int = 0) -> Tokenizer:
        """Read a `tokenizer.json`.

        Args:
            path: the file.
            context_length: tokens a row; longer texts lose their middle-to-end, never the final special token.
            cleaning: "clip" = `clean_text` first, the file's own normaliser off; "none" = the file's own normaliser
                (a WordPiece tokenizer such as MiniLM's), lone surrogates replaced.
            pad_id: fills a row's rest.

        Raises:
            CheckpointError: no such file, not a tokenizer, or settings that contradict it.
        """
        path = Path(path)
        if cleaning not in CLEANINGS:
            raise CheckpointError(f"unknown text cleaning {cleaning!r}; expected one of {', '.join(CLEANINGS)}")
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such tokenizer file; a checkpoint or bundle carries one as tokenizer.json")
        return cls.from_bytes(path.read_bytes(), path, context_length, cleaning, pad_id)

    @classmethod
    def from_bytes(cls, data: bytes, path: Path, context_length: int, cleaning: str, pad_id: int) -> Tokenizer:
        """As `open`, with the file's content at hand (already read to be hashed); `path` serves messages."""
        from tokenizers import Tokenizer as RustTokenizer

        try:
            tokenizer = RustTokenizer.from_buffer(data)
        except Exception as error:  # the Rust side raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer file ({error}); expected the JSON that `tokenizers` saves") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if cleaning == "clip":
            if tokenizer.token_to_id(SOT) is None or tokenizer.token_to_id(EOT) is None:
                raise CheckpointError(f"{path}: cleaning is 'clip' but the vocabulary has no {SOT} and {EOT}; use cleaning 'none' for other tokenizers")
            from tokenizers import normalizers

            tokenizer.normalizer = normalizers.Sequence([])
            # A literal special in a text is found by the split pattern, as open_clip does it, not by substring search.
            tokenizer.encode_special_tokens = True
        return cls(tokenizer, data, path, context_length, cleaning, pad_id)

    def __call__(self, texts: str | Sequence[str]) -> np.ndarray:
        """Tokens of texts, int32 (B, context_length). One string counts as a list of one.

        Raises:
            TypeError: something in the list is not a string.
        """
        if isinstance(texts, str):
            texts = [texts]
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"a text is a {type(text).__name__}, expected str")
        if not len(texts):
            return np.zeros((0, self.context_length), np.int32)
        clean = [self.clean(text) for text in texts]
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(clean)]
        if self.cleaning == "clip":
            for n, text in enumerate(clean):
                if SOT in text or EOT in text:
                    rows[n] = self._with_literal_specials(text)
        return np.array(rows, np.int32)

    def clean(self, text: str) -> str:
        """The text as it reaches the vocabulary."""
        if self.cleaning == "clip":
            return clean_text(text)
        return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _with_literal_specials(self, text: str) -> list[int]:
        """A row of a text that spells a special token: open_clip gives it the special's id, so do we."""
        assert self._sot_id is not None
        assert self._eot_id is not None
        special = {SOT: self._sot_id, EOT: self._eot_id}
        ids = [self._sot_id]
        for piece, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text):
            ids += [special[piece]] if piece in special else [token.id for token in self._tokenizer.model.tokenize(piece)]
        ids = [*ids[: self.context_length - 1], self._eot_id]
        return ids + [self.pad_id] * (self.context_length - len(ids))

    def decode(self, row: Sequence[int] | np.ndarray) -> str:
        """The text of one row, special tokens and padding left out (words are joined by single spaces)."""
        ids = [int(n) for n in row]
        if self.cleaning != "clip":
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        if self._eot_id in ids:
            ids = ids[: ids.index(self._eot_id)]
        ids = [n for n in ids if n != self._sot_id]
        byte_of = {character: byte for byte, character in byte_alphabet().items()}
        tokens = [str(self._tokenizer.id_to_token(n)) for n in ids]
        words = "".join(tokens).split("</w>")
        return " ".join(bytes(byte_of[c] for c in word).decode("utf-8", "replace") for word in words).strip()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tokenizer.from_bytes, (self._data, self.path, self.context_length, self.cleaning, self.pad_id))

    def __repr__(self) -> str:
        return f"Tokenizer({json.dumps(str(self.path))}, context_length={self.context_length}, cleaning={self.cleaning!r}, vocab_size={self.vocab_size})"
