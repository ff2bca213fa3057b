"""Captioners by name, each with the library's own code on a tiny model with random weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.caption_cleaning import cleaned, first_sentence
from distill.captioners import Captioner, CaptionerFacts, CaptionerOptions, Draft, Request, check_drafts, open_captioner
from distill.captions import Caption
from distill.nucleus import Sampling, uniforms
from runtime.errors import CheckpointError, ClipError, PairsError, RecipeError
from tests.distill import tiny_captioners

SHORT = Sampling(max_tokens=6, min_tokens=2)
MODULE = "tests.distill.tiny_captioners"


def options(sampling: Sampling = SHORT, **more: Any) -> CaptionerOptions:
    return CaptionerOptions(sampling=sampling, **more)


def requests(captioner: Captioner, keys: Sequence[str] = ("a", "b", "c"), count: int = 3, seed: int = 0) -> list[Request]:
    out = []
    for n, key in enumerate(keys):
        picture = Image.fromarray(np.random.default_rng(ord(key[0])).integers(0, 256, (40, 36, 3), dtype=np.uint8))
        randoms = np.stack([uniforms(seed, key, i, captioner.most_uniforms) for i in range(count)])
        reads = captioner.facts.reads
        text = f"the {tiny_captioners.WORDS[n]} disc"
        out.append(Request(key=key, picture=picture if reads != "text" else None, text=text if reads != "picture" else None, count=count, uniforms=randoms))
    return out


def make_coca(folder: Path) -> str:
    return "coca:" + tiny_captioners.register_coca(folder)


def transformers_with(save: Callable[[Path], Path], kind: str = "transformers") -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        pytest.importorskip("transformers")
        return f"{kind}:{save(folder)}"

    return make


KINDS: dict[str, Callable[[Path], str]] = {
    "coca": make_coca,
    "blip": transformers_with(tiny_captioners.save_blip),
    "encoder-decoder": transformers_with(tiny_captioners.save_encoder_decoder),
    "llava": transformers_with(tiny_captioners.save_llava),
    "gpt2": transformers_with(tiny_captioners.save_language_model, "rewrite"),
    "t5": transformers_with(lambda folder: tiny_captioners.save_language_model(folder, encoder_decoder=True), "rewrite"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Captioner]]:
    made = {}
    for name, make in KINDS.items():
        spec = make(tmp_path_factory.mktemp(name))
        made[name] = (spec, open_captioner(spec, options()))
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_a_function_of_picture_seed_key_and_number(models: dict[str, tuple[str, Captioner]], kind: str) -> None:
    spec, captioner = models[kind]
    torch.manual_seed(1)
    together = captioner.caption(requests(captioner))
    assert check_drafts(captioner, requests(captioner), together) is together
    assert [len(made) for made in together] == [3, 3, 3]
    state = torch.random.get_rng_state()
    again = open_captioner(spec, options()).caption(requests(captioner))
    assert again == together
    assert torch.equal(torch.random.get_rng_state(), state)
    assert captioner.caption(list(reversed(requests(captioner)))) == together[::-1]
    alone = captioner.caption(requests(captioner, ("b",), count=2)[:1])
    if captioner.facts.reads == "picture" and kind != "coca":  # the text of request "b" differs when it comes first; untrained, 49,408 tokens are all but equally likely
        assert alone[0] == together[1][:2]
    other = captioner.caption(requests(captioner, seed=1))
    assert other != together
    assert len({draft.text for made in together for draft in made}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_length_is_controlled(models: dict[str, tuple[str, Captioner]], kind: str) -> None:
    spec, _ = models[kind]
    one = open_captioner(spec, options(Sampling(max_tokens=2, min_tokens=1)))
    long = open_captioner(spec, options(Sampling(max_tokens=7, min_tokens=6)))

    def words(captioner: Captioner) -> list[int]:
        return [len(captioner_tokens(captioner, draft.text)) for made in captioner.caption(requests(captioner)) for draft in made]

    assert max(words(one)) <= (4 if kind == "coca" else 2)  # random byte pairs, decoded, are spelled with more of them
    assert min(words(long)) >= 1  # special tokens other than the end may be drawn, and are not shown
    assert sum(words(long)) > 2 * sum(words(one))


def captioner_tokens(captioner: Any, text: str) -> list[Any]:
    return captioner._tokenizer.encode(text) if hasattr(captioner, "_tokenizer") else text.split()


def test_facts_name_weights_and_licence(models: dict[str, tuple[str, Captioner]]) -> None:
    for kind, (spec, captioner) in models.items():
        assert captioner.facts.name == spec
        assert len(captioner.facts.sha256) == 64
        rewrites = kind in ("gpt2", "t5")
        assert (captioner.facts.type, captioner.facts.reads) == (("rewritten", "text") if rewrites else ("synthetic", "picture"))
    assert models["coca"][1].facts.licence == "none (random weights)"
    assert models["llava"][1].facts.settings["prompt"] == "<image>\nDescribe the picture in one sentence."


def test_greedy_captions_are_what_the_library_writes(models: dict[str, tuple[str, Captioner]]) -> None:
    """Differential: at temperature 0 our draw must walk the library's own greedy path, without and with its caches."""
    for kind in ("blip", "encoder-decoder", "llava"):
        spec, _ = models[kind]
        captioner: Any = open_captioner(spec, options(Sampling(max_tokens=6, min_tokens=0, temperature=0.0)))
        asked = requests(captioner, count=1)
        inputs = captioner._processor(images=[r.picture for r in asked], return_tensors="pt", **({"text": [captioner._prompt] * 3, "padding": True} if captioner._prompt else {}))
        with torch.inference_mode():
            greedy = captioner._write.model.generate(**inputs, max_new_tokens=6, do_sample=False)
        greedy = greedy[:, inputs["input_ids"].shape[1] :] if captioner._prompt else greedy
        expected = captioner._write.tokenizer.batch_decode(greedy, skip_special_tokens=True)
        assert [made[0].text for made in captioner.caption(asked)] == expected


def test_greedy_coca_is_the_whole_models_own_choice(models: dict[str, tuple[str, Captioner]]) -> None:
    """Differential: picture encoded once and rows dropped, against open_clip's whole forward on one picture at a time."""
    from runtime.preprocess import preprocess

    captioner: Any = open_captioner(models["coca"][0], options(Sampling(max_tokens=6, min_tokens=6 - 1, temperature=0.0)))
    asked = requests(captioner, count=2)
    expected = []
    for request in asked:
        tokens = torch.tensor([[captioner._tokenizer.sot_token_id]])
        for position in range(6):
            with torch.inference_mode():
                logits = captioner._model(torch.from_numpy(preprocess([request.picture], captioner._config)), tokens, output_labels=False)["logits"][0, -1]
            logits = logits.clone()
            logits[captioner._tokenizer.sot_token_id] = -torch.inf
            if position < 5:
                logits[captioner._tokenizer.eot_token_id] = -torch.inf
            tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
        expected.append(captioner._tokenizer.decode([token for token in tokens[0, 1:].tolist() if token != captioner._tokenizer.eot_token_id]))
    assert [made[0].text for made in captioner.caption(asked)] == expected
    assert all(made[0] == made[1] for made in captioner.caption(asked))


def test_callables() -> None:
    captioner = open_captioner(f"{MODULE}:colours", options())
    assert captioner.caption(requests(captioner))[0][0].text.split()[0].isdigit()
    plain = open_captioner(f"{MODULE}:sizes", options())
    assert plain.caption(requests(plain)) == [[Draft(text="36 by 40")]] * 3
    broken = open_captioner(f"{MODULE}:deaf", options())
    with pytest.raises(PairsError, match="captioner 'colours' returned 3 lists for 3 pairs; expected one list of drafts"):
        check_drafts(broken, requests(broken), broken.caption(requests(broken)))


@pytest.mark.parametrize(
    ("spec", "more", "message"),
    [
        ("poet", {}, r"captioner 'poet' is no coca:NAME\[/PRETRAINED\], transformers:NAME"),
        ("coca:", {}, "captioner 'coca:' is no coca:NAME"),
        ("no.such.module:f", {}, "cannot be imported"),
        (f"{MODULE}:nothing", {}, "cannot be imported"),
        (f"{MODULE}:not_a_captioner", {}, "returned str, which lacks facts"),
        (f"{MODULE}:WORDS", {}, "is no function"),
        ("coca:ViT-B-32", {}, "has no text decoder and cannot caption"),
        ("coca:nothing", {}, "has no model 'nothing'; its captioners are coca_base"),
        ("transformers:/nowhere", {}, "cannot open '/nowhere'"),
        ("rewrite:/nowhere", {}, "cannot open '/nowhere'"),
        ("rewrite:/nowhere", {"prompt": "say it again"}, "has no place for the caption; write {caption}"),
        ("coca:coca_ViT-B-32", {"best_of": 2}, "best-of selection needs a captioner with a teacher"),
        ("coca:coca_ViT-B-32", {"prompt": "x"}, "reads no prompt"),
        ("prefix:/nowhere", {}, "captioner '/nowhere' does not exist; expected a folder that mclip train-captioner wrote"),
    ],
)
def test_what_cannot_be_opened_is_named(spec: str, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ClipError, match=message) as caught:
        open_captioner(spec, options(**more))
    assert "\n" not in str(caught.value)


def test_coca_takes_no_more_tokens_than_it_reads(models: dict[str, tuple[str, Captioner]]) -> None:
    with pytest.raises(CheckpointError, match="--max-tokens is 40, but 'coca_tiny' reads 15 tokens"):
        open_captioner(models["coca"][0], options(Sampling(max_tokens=40)))


@pytest.mark.parametrize("bad", [{"top_p": 0.0}, {"top_p": 1.1}, {"temperature": -1.0}, {"temperature": float("nan")}, {"min_tokens": 30}, {"max_tokens": 5000}])
def test_impossible_sampling_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="expected 0 <"):
        Sampling(**bad)


def test_the_first_sentence() -> None:
    cases = {
        "A dog. It runs.": "A dog.", "no end": "no end", "": "", "Mr. Smith sits. Alone.": "Mr. Smith sits.", "3.5 metres! wide": "3.5 metres!", "U. S. flag. More": "U. S. flag.",
        "eine Katze? ja": "eine Katze?", "一只狗。一只猫。": "一只狗。", "...": "...",
    }  # fmt: skip
    assert {text: first_sentence(text) for text in cases} == cases


def test_cleaning_drops_and_counts() -> None:
    facts = CaptionerFacts(name="m", type="rewritten", reads="text")
    drafts = [Draft(text=text) for text in (" A  dog.\nIt runs", "a DOG.", "", "\x00\t", "x" * 9000, "own Text", "a\ud800 cat\x07", "two\u2028lines")]
    made, dropped = cleaned(drafts, facts, first_sentence=True, language="en", own="Own text")
    assert made[0] == Caption(text="A dog.", type="rewritten", source="m", parent=0, sentence=0)
    assert [caption.text for caption in made] == ["A dog.", "a cat", "two lines"]
    assert dropped == {"duplicate": 2, "empty": 2, "too long": 1}
