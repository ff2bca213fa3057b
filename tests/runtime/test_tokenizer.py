"""The tokenizer against open_clip's own, and its behaviour at the edges."""

from __future__ import annotations

import importlib.util
import json
import pickle
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from runtime.cleaning import clean_words
from runtime.errors import CheckpointError
from runtime.tokenizer import Tokenizer, build_clip_tokenizer

SPEC = importlib.util.find_spec("open_clip")
MERGES = Path(SPEC.origin).parent / "bpe_simple_vocab_16e6.txt.gz" if SPEC and SPEC.origin else Path("missing")

HAND_MADE = [
    "",
    " ",
    "a photo of a cat",
    "A  PHOTO\tof\na cat ",
    "it's they're I'd we'll I've 'S don'T o'ſclock",
    "&amp;amp;lt; &lt;b&gt; &#x41; &copy; &notin",
    "schÃ¶n âœ” voilÃ  le travail",
    "ＬＯＵＤ　ＮＯＩＳＥＳ ﬂubberiﬁc “quoted” … it&#x2019;s",
    "👩‍👩‍👧‍👦 🇩🇪 ❤️ ☎︎ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "שלום مرحبا 你好 こんにちは 안녕 ไทย हिन्दी",
    "İstanbul ΣΑΣ ẞ ſ K Å ǅ",
    "<start_of_text>",
    "a <end_of_text> b",
    "!<end_of_text> x<start_of_text>y <END_OF_TEXT> <ſtart_of_text>",
    "\x00\x01\x1b[31mred\x1b[0m\x7f\x85\xa0\u2028\u200b\ufeff x\x1cy\x1fz",
    "½ ² ① Ⅳ 3.14 1,000 ٣",
    "a" * 500,
    "word " * 200,
    "\ud800 lone &#xD800; surrogate",
    "e\u0301 é cafe\u0301",
    "ᾳ α\u0345 k\u0345û !\u0345! \u0345 it\u0345's",
    "_under_score_ -- ... !? @#$%^&*()",
    "&",
    "a<b & c>d",
    "tab\there\r\nnew\rline\x0bv\x0cf",
]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = build_clip_tokenizer(MERGES, out=tmp_path_factory.mktemp("full") / "tokenizer.json")
    return Tokenizer.open(path, 77)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = build_clip_tokenizer(MERGES, 2048, out=tmp_path_factory.mktemp("small") / "tokenizer.json")
    return Tokenizer.open(path, 20)


@pytest.fixture(scope="module")
def theirs() -> object:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.mark.parametrize("context_length", [77, 16, 3])
def test_hand_made_texts_equal_open_clip(full: Tokenizer, theirs: object, context_length: int) -> None:
    ours = Tokenizer.open(full.path, context_length)(HAND_MADE)
    assert ours.dtype == np.int32
    assert ours.shape == (len(HAND_MADE), context_length)
    np.testing.assert_array_equal(ours, theirs(HAND_MADE, context_length).numpy())  # type: ignore[operator]


ODD = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=string.printable, max_size=60),
    st.text(alphabet=[chr(n) for n in range(1, 0x250)], max_size=40),
    st.lists(
        st.sampled_from(
            [
                "&amp;",
                "&lt",
                "&#39;",
                "Ã©",
                "â€™",
                "'S",
                "'ſ",
                "<end_of_text>",
                "<start_of_text>",
                "👍🏽",
                "\u200d",
                "ﬁ",
                " ",
                "\n",
            ]
            + ["the", "Cat", "9", "İ", "ß", "مر", "漢", "!!", "\u0301", "\x85", "\xa0", "\r", "\x1b[0m", "<b>"]
        ),
        max_size=20,
    ).map("".join),
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(text=ODD)
def test_odd_texts_equal_open_clip(full: Tokenizer, theirs: object, text: str) -> None:
    np.testing.assert_array_equal(full([text]), theirs([text]).numpy())  # type: ignore[operator]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(text=st.text(max_size=80))
def test_rows_of_a_small_vocabulary(small: Tokenizer, text: str) -> None:
    # A text that spells a special token holds it, as in open_clip: everything else has one start and one end.
    assume(not any("_of_text>" in word for word in clean_words(text)))
    row = small([text])[0]
    assert small.vocab_size == 2048
    assert row[0] == 2046
    assert (row == 2047).sum() == 1
    assert (row == 2046).sum() == 1
    end = int(row.argmax())
    assert row[end] == 2047
    assert not row[end + 1 :].any()
    assert row.min() >= 0


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(words=st.lists(st.text(alphabet=string.ascii_lowercase, min_size=1, max_size=4), max_size=4))
def test_decode_gives_plain_text_back(small: Tokenizer, words: list[str]) -> None:
    assert small.decode(small([" ".join(words)])[0]) == " ".join(words)


@pytest.mark.parametrize("vocab_size", [514, 600, 8192])
def test_small_vocabularies_spell_everything(tmp_path: Path, vocab_size: int) -> None:
    tokenizer = Tokenizer.open(build_clip_tokenizer(MERGES, vocab_size, tmp_path / "tokenizer.json"), 77)
    row = tokenizer(["grüße 漢"])[0]
    assert row.max() == vocab_size - 1
    assert tokenizer.decode(row) == "grüße 漢"


def test_small_vocabulary_agrees_with_clip_where_words_are_frequent(small: Tokenizer, full: Tokenizer) -> None:
    ours, clips = small(["the in"])[0], full(["the in"])[0]
    np.testing.assert_array_equal(ours[1:3], clips[1:3])


def test_no_texts_and_one_text(small: Tokenizer) -> None:
    assert small([]).shape == (0, 20)
    assert small([]).dtype == np.int32
    np.testing.assert_array_equal(small("a cat"), small(["a cat"]))


def test_truncation_keeps_the_end(small: Tokenizer) -> None:
    row = small(["one two three four five six seven eight nine ten " * 5])[0]
    assert row[0] == 2046
    assert row[-1] == 2047


def test_a_batch_equals_its_rows(small: Tokenizer) -> None:
    np.testing.assert_array_equal(small(HAND_MADE), np.concatenate([small([text]) for text in HAND_MADE]))


def test_pickle(small: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(small))
    np.testing.assert_array_equal(again(HAND_MADE), small(HAND_MADE))


def test_same_bytes_every_time(tmp_path: Path) -> None:
    first = build_clip_tokenizer(MERGES, 1000, tmp_path / "a.json").read_bytes()
    assert first == build_clip_tokenizer(MERGES, 1000, tmp_path / "b.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


@pytest.fixture
def wordpiece(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "heart", "##s"]
    tokenizer = Rust(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.add_special_tokens(words[:4])
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_wordpiece_tokenizer_keeps_its_own_normaliser(wordpiece: Path) -> None:
    tokenizer = Tokenizer.open(wordpiece, 6, cleaning="none", pad_id=0)
    rows = tokenizer(["A RED Hearts", "red " * 20, "", "\ud800"])
    assert rows.tolist() == [[2, 4, 5, 6, 7, 3], [2, 5, 5, 5, 5, 3], [2, 3, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0]]
    assert tokenizer.decode(rows[0]) == "a red hearts"


def test_bad_files_and_settings(tmp_path: Path, wordpiece: Path, small: Tokenizer) -> None:
    with pytest.raises(CheckpointError, match="no such tokenizer file"):
        Tokenizer.open(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text(json.dumps({"version": "1.0"})[:-3])
    with pytest.raises(CheckpointError, match="not a tokenizer file"):
        Tokenizer.open(tmp_path / "broken.json")
    with pytest.raises(CheckpointError, match="use cleaning 'none'"):
        Tokenizer.open(wordpiece, cleaning="clip")
    with pytest.raises(CheckpointError, match="unknown text cleaning"):
        Tokenizer.open(wordpiece, cleaning="lower")
    with pytest.raises(CheckpointError, match="too short"):
        Tokenizer.open(small.path, 1)
    with pytest.raises(TypeError, match="expected str"):
        small([b"bytes"])  # type: ignore[list-item]


def test_bad_merges(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vocab_size is 513"):
        build_clip_tokenizer(MERGES, 513, tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="cannot read"):
        build_clip_tokenizer(tmp_path / "missing.gz", 600, tmp_path / "tokenizer.json")
    (tmp_path / "cut.gz").write_bytes(MERGES.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot read"):
        build_clip_tokenizer(tmp_path / "cut.gz", 600, tmp_path / "tokenizer.json")
    (tmp_path / "other.txt").write_text("#version\na b\n")
    with pytest.raises(CheckpointError, match="expected 48894 merges"):
        build_clip_tokenizer(tmp_path / "other.txt", 600, tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()
