"""What Python makes of odd texts and odd pictures, for the browser's modules to be held against: `python -m tests.web.vectors FOLDER [BUNDLE …]`."""

from __future__ import annotations

import html
import html.entities
import json
import random
import sys
import unicodedata
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.odd_texts import odd_texts
from runtime.cleaning import _patterns
from runtime.preprocess import PreprocessConfig, load_image, normalise, resize_and_crop
from runtime.tokenizer import Tokenizer, build_clip_tokenizer

TEXTS = 2400
SIZES = (
    *((1, 1), (3, 500), (1, 9), (9, 1), (640, 1), (1, 300), (2, 3), (7, 5), (32, 32), (33, 64), (64, 33)),
    *((65, 63), (224, 224), (100, 37), (37, 100), (257, 131), (320, 240), (501, 333)),
)
SPECS = (
    {"image_size": 32, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "crop_pct": 1.0},
    {"image_size": 48, "mean": (0.481, 0.457, 0.408), "std": (0.268, 0.261, 0.275), "interpolation": "bicubic", "crop_pct": 0.875},
)
PLAIN = (
    *("", " ", "a photo of a cat", "A Photo of a CAT", "don't, can't, it's"),
    *("1234567890 3.14 20%", "fish &amp; chips &lt;3", "AT&T &notit; &#8364; &EACUTE; &amp;amp;", "ΟΔΟΣ ὈΔΥΣΣΕΎΣ ος ᾳ"),
)


def texts(seed: int, count: int = TEXTS) -> list[str]:
    """Odd texts, plain ones, and entities of all kinds."""
    rng = random.Random(seed)
    names = sorted(html.entities.html5)
    entities = [f"x &{name} y" for name in rng.sample(names, 200)] + [f"&{name.upper()}" for name in rng.sample(names, 50)] + [f"&#{n};&#x{n:x}" for n in range(0, 400)]
    return [*PLAIN, *odd_texts(count, seed=seed), *entities, "ab" * 20000, "猫" * 3000, "e\u0301" * 50]


def mended(seed: int, count: int = 400) -> list[str]:
    """Texts that ftfy mends character by character: controls, ligatures, widths, line breaks, escapes, tags before entities; some of them mojibake."""
    rng = random.Random(seed)
    parts = ["ﬁsh", "ＬＯＵＤ", "ｶﾞ", "a\u0007b", "\x1b[36;44mred\x1b[0m", "“x”", "ŉ", "ǅ", "\ufeffx", "\u206ay", "e\u0301", "&eacute;", "&EACUTE;", "<b>", "a\x85b", "x\u2028"]
    parts += ["schÃ¶n", "\n", "\r\n", "\r", "\ufffc", "３", "‘s", "\u3000", "İ", "ΑΣ", "\u0345", "tail", "&amp;lt;", "&#150;", "€5", "½"]
    return ["".join(rng.choice(parts) + rng.choice(["", " "]) for _ in range(rng.randrange(1, 7))) for _ in range(count)]


def every_character() -> list[str]:
    """Each assigned character between two letters, once, but for the large blocks of Han, Hangul and private use."""
    large = (range(0x3400, 0xA000), range(0xAC00, 0xD7A4), range(0x20000, 0x110000))
    points = [chr(n) for n in range(0x110000) if unicodedata.category(chr(n)) not in ("Cn", "Cs", "Co") and not any(n in block for block in large)]
    return [" ".join(f"a{c}b" for c in points[n : n + 6]) for n in range(0, len(points), 6)]


def write_texts(folder: Path, bundles: list[Path], count: int) -> None:
    """folder/texts-N.json: tokenizer file, settings, texts and their rows, for CLIP's vocabulary in two sizes, a WordPiece one, and those of the bundles."""
    merges = Path(str(files("open_clip"))) / "bpe_simple_vocab_16e6.txt.gz"
    cases: list[tuple[Path, dict[str, Any]]] = [
        (build_clip_tokenizer(merges, size, folder / f"clip-{size}.json"), {"context_length": length, "vocab_size": size, "pad_id": 0, "cleaning": "clip"})
        for size, length in ((49408, 77), (2048, 20))
    ]
    cases.append((write_word_pieces(folder / "word-pieces.json"), {"context_length": 24, "vocab_size": 0, "pad_id": 0, "cleaning": "none"}))
    for bundle in bundles:
        text = json.loads((bundle / "manifest.json").read_text())["text"]
        cases.append((bundle / "tokenizer.json", {name: text[name] for name in ("context_length", "vocab_size", "pad_id", "cleaning")}))
    for n, (path, spec) in enumerate(cases):
        tokenizer = Tokenizer.open(path, spec["context_length"], spec["cleaning"], spec["pad_id"])
        # JSON has no lone surrogates that every reader takes; they are repaired anyway.
        rows = [*texts(7 + n, count), *mended(7 + n), *(every_character() if n in (0, 2) else [])]
        given = [text for text in rows if not any("\ud800" <= c <= "\udfff" or newer(c) for c in html.unescape(html.unescape(text)))]
        document = {"tokenizer": str(path.resolve()), "spec": spec, "texts": given, "rows": tokenizer(given).tolist(), "trouble": [troubled(text) for text in given]}
        (folder / f"texts-{n}.json").write_text(json.dumps(document))


def troubled(text: str) -> bool | None:
    """Whether Python hands the text to ftfy for its characters; None: the answer depends on entities or on the composed form."""
    suspicious, trouble, _ = _patterns()
    if "&" in text or not unicodedata.is_normalized("NFC", text):
        return None
    return bool(suspicious.search(text) and trouble.search(text))


def newer(c: str) -> bool:
    """Whether Python knows no such character: it may be a letter to a younger browser."""
    return c > "\x7f" and unicodedata.category(c) == "Cn"


def write_word_pieces(path: Path) -> Path:
    """An uncased WordPiece vocabulary as BERT's, trained on the spot on odd texts."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    corpus = [text for text in odd_texts(800, seed=3) if not any("\ud800" <= c <= "\udfff" for c in text)]
    tokenizer.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=4000, special_tokens=specials, show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(path))
    return path


def pictures(seed: int) -> list[Image.Image]:
    """Noise and edges of odd sizes in grey, grey with alpha, RGB and RGBA."""
    rng = np.random.default_rng(seed)
    found = []
    for n, (width, height) in enumerate(SIZES):
        for mode, channels in (("RGB", 3), ("RGBA", 4), *((("L", 1), ("LA", 2)) if n % 2 == 0 else ())):
            noise = rng.integers(0, 256, (height, width, channels), np.uint8)
            if n % 2:  # hard edges: bicubic overshoots there
                noise = (noise > 127).astype(np.uint8) * 255
            found.append(Image.fromarray(noise[..., 0] if channels == 1 else noise, mode))
    return found


def write_pictures(folder: Path) -> None:
    """folder/pictures.json and folder/pictures.bin: raw pixels, and what becomes of them, uint8 and float32."""
    entries: list[dict[str, Any]] = []
    with (folder / "pictures.bin").open("wb") as out:
        for n, picture in enumerate(pictures(5)):
            spec = SPECS[n % 2]
            config = PreprocessConfig(**spec)
            data = np.asarray(picture)
            small = np.asarray(resize_and_crop(load_image(picture), config))
            entry = {"width": picture.width, "height": picture.height, "channels": 1 if data.ndim == 2 else data.shape[2], "spec": spec, "at": out.tell()}
            out.write(data.tobytes() + small.tobytes() + normalise(small[None], config).tobytes())
            entries.append(entry)
    (folder / "pictures.json").write_text(json.dumps(entries))


def write_files(folder: Path) -> None:
    """folder/files: encoded pictures for a browser to decode (all EXIF orientations, grey, palette, alpha), and their RGB pixels as Python decodes them."""
    (folder / "files").mkdir(exist_ok=True)
    rng = np.random.default_rng(9)
    base = Image.fromarray(np.kron(rng.integers(0, 256, (6, 9, 3), np.uint8), np.ones((8, 8, 1), np.uint8)))
    alpha = Image.fromarray(np.concatenate([np.asarray(base), np.asarray(base)[..., :1]], axis=2), "RGBA")
    made: dict[str, bytes] = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        made[f"exif-{orientation}.jpg"] = encoded(base, "JPEG", exif=exif, quality=95, subsampling=0)
        made[f"exif-{orientation}.png"] = encoded(base, "PNG", exif=exif)
    made |= {"grey.png": encoded(base.convert("L"), "PNG"), "palette.png": encoded(base.quantize(12), "PNG"), "alpha.png": encoded(alpha, "PNG")}
    made |= {"lossless.webp": encoded(base, "WEBP", lossless=True), "alpha.webp": encoded(alpha, "WEBP", lossless=True, exact=True)}
    palette = base.quantize(12)
    made |= {"palette-alpha.png": encoded(palette, "PNG", transparency=bytes(range(0, 240, 20))), "palette-index.png": encoded(palette, "PNG", transparency=3)}
    made |= {"colour-key.png": encoded(base, "PNG", transparency=base.getpixel((0, 0))), "two-colours.png": encoded(base.convert("1"), "PNG")}
    made |= {"grey-16.png": encoded(Image.fromarray(rng.integers(0, 65536, (40, 50), np.uint16)), "PNG"), "grey-alpha.png": encoded(alpha.convert("LA"), "PNG")}
    made |= {"row.png": encoded(base.crop((0, 0, 72, 1)), "PNG")}
    entries = []
    for name, data in made.items():
        (folder / "files" / name).write_bytes(data)
        picture = load_image(data)
        (folder / "files" / f"{name}.rgb").write_bytes(picture.tobytes())
        entries.append({"name": name, "width": picture.width, "height": picture.height})
    (folder / "files.json").write_text(json.dumps(entries))


def encoded(picture: Image.Image, kind: str, **settings: Any) -> bytes:
    """The picture as a file's bytes."""
    out = BytesIO()
    picture.save(out, kind, **settings)
    return out.getvalue()


def write_vectors(folder: Path, bundles: list[Path], count: int = TEXTS) -> None:
    """Everything a test of the browser's modules reads."""
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder, bundles, count)
    write_pictures(folder)
    write_files(folder)


if __name__ == "__main__":
    write_vectors(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
