"""Texts to token rows, with the cleaning that CLIP's tokenizer does in Python.

`tokenizer.json` is a plain Hugging Face file, so that other languages can read it; what such a file cannot express
(repair of mojibake, HTML entities, Python's idea of lower case and white space) happens first, in `runtime/cleaning.py`.
CLIP's own vocabulary is spelled here (`runtime/byte_pairs.py`), each word once (`runtime/word_cache.py`); any other file goes to the package `tokenizers`.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.byte_pairs import EOT, SOT, SPLIT, BytePairs, byte_alphabet, read_byte_pairs
from runtime.cleaning import clean_words
from runtime.errors import CheckpointError, MissingExtraError
from runtime.word_cache import WordCache

CLIP_VOCAB_SIZE = 49408
CLEANINGS = ("clip", "none")


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
    from tokenizers import AddedToken, Regex, models, normalizers, processors
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
    tokenizer.pre_tokenizer = _clip_split()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{SOT} $A {EOT}", special_tokens=[(SOT, vocab[SOT]), (EOT, vocab[EOT])])
    out = Path(out)
    temporary = out.with_name(f"{out.name}.{os.getpid()}.part")
    tokenizer.save(str(temporary), pretty=False)
    os.replace(temporary, out)
    return out


def _clip_split() -> Any:
    """CLIP's way to cut a cleaned text into pieces, their bytes written as `byte_alphabet`."""
    from tokenizers import Regex, pre_tokenizers

    pieces = pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


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


@contextlib.contextmanager
def _no_panic(path: Path, what: str = "a tokenizer file that contradicts itself") -> Iterator[None]:
    """What the compiled package raises over a file that contradicts itself (a bare Exception, or a panic that is none), as the error that it is."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, CheckpointError) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise CheckpointError(f"{path}: {what} ({' '.join(str(error).split())[:120]}); expected the JSON that `tokenizers` saves") from None


class Tokenizer:
    """Texts -> int32 (B, context_length); made by `Tokenizer.open`. Can be pickled (with its content, so the file may go)."""

    def __init__(self, spelled: Any, data: bytes, path: Path, context_length: int, cleaning: str, pad_id: int) -> None:
        self._data = data
        self.path = path
        self.context_length = context_length
        self.cleaning = cleaning
        self.pad_id = pad_id
        self._words: WordCache | None = None
        self._specials: dict[str, int] = {}
        if isinstance(spelled, BytePairs):
            self._pairs: BytePairs | None = spelled
            self._specials = {SOT: spelled.start, EOT: spelled.end}
            self._words = WordCache(spelled.spell, self._specials, byte_alphabet())
            self.vocab_size = len(spelled.vocab)
            needed = len(self._specials)
        else:
            self._pairs, self._tokenizer = None, spelled
            with _no_panic(path):
                # a file may leave ids out, and name others beyond their number
                self.vocab_size = max(spelled.get_vocab(with_added_tokens=True).values(), default=-1) + 1
                if cleaning == "clip":
                    self._specials = {SOT: spelled.token_to_id(SOT), EOT: spelled.token_to_id(EOT)}
                needed = max(len(spelled.encode("").ids), 1)
        if context_length < needed:
            raise CheckpointError(f"{path}: context_length is {context_length}, too short for the {needed} special tokens of an empty text")
        if self._pairs is None:
            self._tokenizer.enable_truncation(max_length=context_length)
            self._tokenizer.enable_padding(length=context_length, pad_id=pad_id, pad_token=self._tokenizer.id_to_token(pad_id) or "[PAD]")

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
        pairs = read_byte_pairs(data) if cleaning == "clip" else None
        if pairs is not None:
            return cls(pairs, data, path, context_length, cleaning, pad_id)
        return cls.by_package(data, path, context_length, cleaning, pad_id)

    @classmethod
    def by_package(cls, data: bytes, path: Path, context_length: int, cleaning: str, pad_id: int) -> Tokenizer:
        """As `from_bytes`, by the package `tokenizers` in any case. Raises MissingExtraError without it."""
        try:
            from tokenizers import Tokenizer as RustTokenizer
        except ModuleNotFoundError as error:
            if error.name != "tokenizers":
                raise
            raise MissingExtraError("tokenizers", "tokenizers", f"a tokenizer other than CLIP's ({path.name})") from None
        with _no_panic(path, "not a tokenizer file"):
            tokenizer = RustTokenizer.from_buffer(data)
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
        if self._words is not None:
            return self._rows_of_words(texts, self._words)
        clean = [self.clean(text) for text in texts]
        with _no_panic(self.path):
            rows = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(clean)]
            for n, text in enumerate(clean):
                if any(special in text for special in self._specials):
                    rows[n] = self._with_literal_specials(text)
        return np.array(rows, np.int32)

    def _rows_of_words(self, texts: Sequence[str], words: WordCache) -> np.ndarray:
        room = self.context_length - 2
        start, end = np.array([*self._specials.values()], np.int32).reshape(2, 1)
        first, last, padding = start.tobytes(), end.tobytes(), np.full(room, self.pad_id, np.int32).tobytes()
        rows = bytearray()
        for text in texts:
            # A word has at least one token, so that no more than `room` words count.
            ids = b"".join(map(words.__getitem__, clean_words(text)[:room]))[: 4 * room]
            rows += first + ids + last + padding[len(ids) :]
        return np.frombuffer(rows, np.int32).reshape(len(texts), self.context_length)

    def clean(self, text: str) -> str:
        """The text as it reaches the vocabulary."""
        if self.cleaning == "clip":
            return " ".join(clean_words(text))
        return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def _with_literal_specials(self, text: str) -> list[int]:
        """A row of a text that spells a special token: open_clip gives it the special's id, so do we."""
        start, end = self._specials.values()
        ids = [start]
        for piece, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text):
            ids += [self._specials[piece]] if piece in self._specials else [token.id for token in self._tokenizer.model.tokenize(piece)]
        ids = [*ids[: self.context_length - 1], end]
        return ids + [self.pad_id] * (self.context_length - len(ids))

    def decode(self, row: Sequence[int] | np.ndarray) -> str:
        """The text of one row, special tokens and padding left out (words are joined by single spaces)."""
        ids = [int(n) for n in row]
        if self.cleaning != "clip":
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))
        start, end = self._specials.values()
        if end in ids:
            ids = ids[: ids.index(end)]
        ids = [n for n in ids if n != start]
        byte_of = {character: byte for byte, character in byte_alphabet().items()}
        if self._pairs is not None:
            token_of = {id: token for token, id in self._pairs.vocab.items()}
            tokens = [token_of[n] for n in ids]
        else:
            tokens = [str(self._tokenizer.id_to_token(n)) for n in ids]
        words = "".join(tokens).split("</w>")
        return " ".join(bytes(byte_of[c] for c in word).decode("utf-8", "replace") for word in words).strip()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Tokenizer.from_bytes, (self._data, self.path, self.context_length, self.cleaning, self.pad_id))

    def __repr__(self) -> str:
        return f"Tokenizer({json.dumps(str(self.path))}, context_length={self.context_length}, cleaning={self.cleaning!r}, vocab_size={self.vocab_size})"
