"""Weight inheritance: the same weights for the same model, exact where the surplus is dead, honest about the rest."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch

from mobileclip.checkpoint import build_tokenizer
from mobileclip.config import ImageConfig, ModelConfig, TextConfig
from mobileclip.folding import reparameterize, structured_images
from mobileclip.inherit import effective_weight, inherit
from mobileclip.inherit_links import EMBED, image_wiring, pair_layers
from mobileclip.model import ImageTextModel
from mobileclip.presets import PRESETS
from mobileclip.students import student_config
from runtime.errors import CheckpointError

from .structured import calibrate

TEXT = TextConfig(context_length=12, vocab_size=600, width=32, heads=2, layers=2, mask="causal")
R3A = ["repmixer", "repmixer", "repmixer", "attention"]


def pocket(dims: list[int], depths: list[int], text: TextConfig = TEXT, embed_dim: int = 24, mlp_ratio: float = 2.0, name: str = "small") -> ModelConfig:
    args = {"dims": dims, "depths": depths, "mlp_ratio": mlp_ratio, "mixers": ["repmixer"] * (len(dims) - 1) + ["attention"]}
    return ModelConfig(name=name, embed_dim=embed_dim, licence="ours", image=ImageConfig(backbone="pocket", backbone_args=args, image_size=48), text=text)


def fastvit(first: int, layers: list[int], ratio: float = 2.0, name: str = "small") -> ModelConfig:
    args = {
        "layers": layers, "embed_dims": [first, 2 * first, 4 * first, 8 * first], "mlp_ratios": [ratio] * 4, "token_mixers": R3A,
        "se_downsamples": [False, False, True, True], "pos_embs": [None, None, None, 7], "layer_scale_init_value": 0.3,
    }  # fmt: skip
    return ModelConfig(name=name, embed_dim=24, licence="ours", image=ImageConfig(backbone="fastvit", backbone_args=args, image_size=64), text=TEXT)


def made(config: ModelConfig, seed: int = 0) -> ImageTextModel:
    """A model whose weights, biases and statistics are all of visible size."""
    torch.manual_seed(seed)
    model = ImageTextModel(config)
    calibrate(model, structured_images(6, config.image.image_size, seed=seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and "logit" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def tokens(config: TextConfig, count: int = 4) -> torch.Tensor:
    rows = torch.randint(0, config.vocab_size - 2, (count, config.context_length), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    rows[:, 0], rows[:, 6], rows[:, 7:] = config.vocab_size - 2, config.vocab_size - 1, 0
    return rows


def same_state(a: ImageTextModel, b: ImageTextModel) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


SAME = {
    "pocket": pocket([16, 32, 64], [1, 1, 1]),
    "narrow table": pocket([16, 32, 64], [0, 1, 1], dataclasses.replace(TEXT, embedding_dim=16, mask="pad")),
    "mct": pocket([16, 32, 64], [1, 0, 1], dataclasses.replace(TEXT, kind="mct", mask="none")),
    "fastvit": fastvit(8, [1, 1, 2, 1]),
    "any backbone": student_config(pocket([16, 32, 64], [1, 1, 1]), backbone="mobilenetv4_conv_small_035"),
}


@pytest.mark.parametrize("config", SAME.values(), ids=SAME)
def test_the_same_dimensions_give_the_same_weights(config):
    source, other = made(config), made(config, seed=1)
    before = copy.deepcopy(other)
    result, report = inherit(other, source)
    assert same_state(inherit(other, source, channels="first")[0], source)
    assert same_state(result, source)
    assert same_state(other, before)
    assert not same_state(result, other)
    for tower in (report.image, report.text):
        assert tower.parameters_inherited == tower.parameters > 0
        assert tower.tensors_inherited == tower.tensors
        assert tower.notes == ()


def scattered(small: ImageTextModel, large: ImageTextModel) -> dict[str, torch.Tensor]:
    """Put the small model's image tower somewhere inside the large one, whose other channels are dead.

    Places are drawn at random, once a space; the heads of an attention layer stay whole.
    """
    wiring = image_wiring(small, large, "first")
    generator, places = torch.Generator().manual_seed(5), {}
    ours, theirs = small.state_dict(), large.state_dict()

    def place(space: str, size: int, of: int) -> torch.Tensor:
        if space in wiring.ties:
            below, times = wiring.ties[space]
            return (place(below, size // times, of // times)[:, None] * times + torch.arange(times)).flatten()
        if space not in places:
            heads = wiring.heads.get(space.removesuffix(".out"))
            if heads:
                kept = torch.randperm(heads.source[0], generator=generator)[: heads.student[0]].sort().values
                inside = (kept[:, None] * heads.source[1] + torch.arange(heads.source[1])).flatten()
                whole = heads.source[0] * heads.source[1]
                base = space.removesuffix(".out")
                places[base], places[f"{base}.out"] = torch.cat([inside, whole + inside, 2 * whole + inside]), inside
            else:
                places[space] = torch.randperm(of, generator=generator)[:size].sort().values
        return places[space]

    for link in wiring.links:
        part, whole = ours[link.student], theirs[link.source]
        if part.ndim:
            whole.zero_()
            index = [
                torch.arange(part.shape[axis]) if space is None or space == EMBED else place(space, part.shape[axis], whole.shape[axis])
                for axis, space in enumerate(link.axes)
            ]
            whole[torch.meshgrid(*index, indexing="ij")] = part
        if link.source.endswith("running_var"):
            whole[whole == 0] = 1
    return theirs


@pytest.mark.parametrize(
    ("small", "large"),
    [
        (pocket([16, 32, 64], [1, 1, 2]), pocket([24, 48, 96], [1, 1, 2], mlp_ratio=3.0, name="large")),
        (pocket([16, 32, 64], [0, 1, 1]), pocket([16, 40, 128], [0, 1, 1], name="large")),
        (fastvit(8, [1, 1, 1, 1]), fastvit(12, [1, 1, 1, 1], ratio=3.0, name="large")),
    ],
    ids=["pocket", "pocket, other proportions", "fastvit"],
)
def test_image_towers_with_dead_surplus_are_found_exactly(small, large):
    """A large tower that computes a small one's function on channels strewn among dead ones: the small one must come out."""
    hidden, source = made(small), made(large, seed=1)
    source.load_state_dict(scattered(hidden, source))
    pixels = structured_images(5, small.image.image_size, seed=9)
    with torch.inference_mode():
        wanted = hidden.encode_image(pixels)
        assert (wanted @ wanted.T).std() > 1e-3
        torch.testing.assert_close(source.encode_image(pixels), wanted, atol=1e-5, rtol=1e-4)
        result, report = inherit(made(small, seed=2), source)
        torch.testing.assert_close(result.encode_image(pixels), wanted, atol=1e-5, rtol=1e-4)
    assert report.image.parameters_inherited == report.image.parameters
    with torch.inference_mode():
        first, _ = inherit(made(small, seed=2), source, channels="first")
        assert (first.encode_image(pixels) - wanted).abs().max() > 1e-2


def test_dead_units_words_and_positions_of_a_text_tower_are_left_out():
    small = made(pocket([16, 32, 64], [0, 1, 1]))
    wide = dataclasses.replace(TEXT, mlp_ratio=6.0, vocab_size=900, context_length=16)
    source = made(pocket([16, 32, 64], [0, 1, 1], wide, name="large"), seed=1)
    state = source.state_dict()
    for name, tensor in small.state_dict().items():
        whole = state[name]
        if ".mlp.fc" in name and whole.shape != tensor.shape:
            whole.zero_()
            live = torch.arange(tensor.shape[0 if "fc1" in name else 1]) * 3 // 2  # every third unit is dead
            whole[(live,) if "fc1" in name else (slice(None), live)] = tensor
        elif name == "text.token_embedding.weight":
            whole[:598], whole[-2:] = tensor[:598], tensor[-2:]
        elif name == "text.positional_embedding":
            whole[:12] = tensor
        elif name.startswith("text."):
            whole.copy_(tensor)
    result, report = inherit(made(small.config, seed=2), source)
    with torch.inference_mode():
        torch.testing.assert_close(result.encode_text(tokens(TEXT)), small.encode_text(tokens(TEXT)), atol=1e-6, rtol=1e-5)
    assert report.text.channels["text.tokens"] == "600 of 900"
    assert report.text.channels["text.positions"] == "0-11 of 16"
    assert report.text.channels["text.blocks.0.hidden"] == "128 of 192"


def test_token_rows_follow_the_words(tmp_path):
    vocabularies = {}
    for size in (2000, 3000):
        vocabularies[size] = json.loads(build_tokenizer(size, tmp_path / f"{size}.json").read_text())["model"]["vocab"]
    small, large = (made(pocket([16, 32, 64], [0, 1, 1], dataclasses.replace(TEXT, vocab_size=size)), seed=size) for size in (2000, 3000))
    result, _ = inherit(small, large)
    rows, source = result.text.token_embedding.weight, large.text.token_embedding.weight
    for word, row in vocabularies[2000].items():
        assert torch.equal(rows[row], source[vocabularies[3000][word]]), word
    back, report = inherit(large, small)  # the other way round: words that the source does not have keep their own rows
    known = [(row, vocabularies[2000].get(word)) for word, row in vocabularies[3000].items()]
    expected = torch.stack([small.text.token_embedding.weight[at] if at is not None else large.text.token_embedding.weight[row] for row, at in sorted(known)])
    assert torch.equal(back.text.token_embedding.weight, expected)
    assert report.text.parameters_inherited == report.text.parameters - 1000 * TEXT.width


def test_one_choice_of_width_for_the_whole_residual_stream():
    config = pocket([16, 32, 64], [0, 1, 1])
    source = made(pocket([16, 32, 64], [0, 1, 1], dataclasses.replace(TEXT, width=64, heads=4, layers=3), name="large"))
    kept = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32].sort().values
    quiet = torch.ones(64).index_fill(0, kept, 0).bool()
    with torch.no_grad():
        for name, parameter in source.text.named_parameters():
            axis = {"token_embedding.weight": 1, "positional_embedding": 1, "projection.weight": 1}.get(name, 1 if name.endswith(("qkv.weight", "fc1.weight")) else 0)
            if name.endswith(("embedding.weight", "embedding", "projection.weight", "qkv.weight", "fc1.weight", "out.weight", "fc2.weight")):
                parameter.index_copy_(axis, quiet.nonzero()[:, 0], parameter.index_select(axis, quiet.nonzero()[:, 0]) * 0.1)
    result, report = inherit(made(config, seed=1), source, layers=[0, 2])
    ours, theirs = result.text, source.text
    assert torch.equal(ours.token_embedding.weight[:512], theirs.token_embedding.weight[:512, kept])
    assert torch.equal(ours.positional_embedding, theirs.positional_embedding[:, kept])
    assert torch.equal(ours.ln_final.weight, theirs.ln_final.weight[kept])
    assert torch.equal(ours.projection.weight, theirs.projection.weight[:, kept])
    assert torch.equal(ours.blocks[1].ln_2.bias, theirs.blocks[2].ln_2.bias[kept])
    assert torch.equal(ours.blocks[1].mlp.fc2.bias, theirs.blocks[2].mlp.fc2.bias[kept])
    hidden = [int((row == theirs.blocks[2].mlp.fc1.bias).nonzero()[0, 0]) for row in ours.blocks[1].mlp.fc1.bias]
    assert hidden == sorted(hidden)
    assert torch.equal(ours.blocks[1].mlp.fc1.weight, theirs.blocks[2].mlp.fc1.weight[hidden][:, kept])
    assert torch.equal(ours.blocks[1].mlp.fc2.weight, theirs.blocks[2].mlp.fc2.weight[kept][:, hidden])
    assert report.text.blocks == {"text.blocks.0": "text.blocks.0", "text.blocks.1": "text.blocks.2"}


def test_narrower_heads_keep_the_scale_of_their_logits():
    """Where only 8 of a head's 16 dimensions live, the student's 8-wide head must give the same attention, divided by another root."""
    config = pocket([16, 32, 64], [0, 1, 1], dataclasses.replace(TEXT, heads=4))
    source = made(pocket([16, 32, 64], [0, 1, 1], TEXT, name="large"))
    result, report = inherit(made(config, seed=1), source)
    ours, theirs = result.text.blocks[0].attn, source.text.blocks[0].attn
    assert report.text.channels["text.blocks.0.heads"] == "0-1 of 2, for 4"
    q, k = (theirs.qkv.weight[n * 32 : n * 32 + 16] for n in (0, 1))
    best = ((q.double().square().sum(1) * k.double().square().sum(1)).sort(descending=True).indices[:8]).sort().values
    torch.testing.assert_close(ours.qkv.weight[:8], q[best] * 0.5**0.5)
    assert torch.equal(ours.qkv.weight[32:40], k[best])
    assert torch.equal(ours.qkv.weight[16:32], made(config, seed=1).text.blocks[0].attn.qkv.weight[16:32])  # heads that the source does not have


@pytest.mark.parametrize("narrow", [0, 24, 8])
def test_the_table_may_be_narrow_on_either_side(narrow):
    source = made(pocket([16, 32, 64], [0, 1, 1], dataclasses.replace(TEXT, embedding_dim=16), name="large"))
    student = made(pocket([16, 32, 64], [0, 1, 1], dataclasses.replace(TEXT, embedding_dim=narrow)), seed=1)
    result, report = inherit(student, source)
    seen = [tower.embedding_projection(tower.token_embedding.weight) for tower in (result.text, source.text)]
    with torch.inference_mode():
        if narrow == 8:
            error = (seen[0] - seen[1]).square().sum()
            values = torch.linalg.svdvals(seen[1])
            torch.testing.assert_close(error, values[8:].square().sum(), rtol=1e-3, atol=1e-4)  # the best of this rank
            assert "of its energy" in report.text.notes[0]
        else:
            torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(result.encode_text(tokens(TEXT)), source.encode_text(tokens(TEXT)), atol=1e-5, rtol=1e-4)


def test_a_smaller_shared_space_is_one_rotation_of_both_towers():
    small, large = pocket([16, 32, 64], [0, 1, 1]), pocket([16, 32, 64], [0, 1, 1], embed_dim=40, name="large")
    source = made(large)
    basis = torch.linalg.qr(torch.randn(40, 40, generator=torch.Generator().manual_seed(0))).Q[:, :24]
    with torch.no_grad():  # both towers live in 24 of the 40 dimensions, in no coordinate direction
        for parameter in (source.text.projection.weight, source.image.trunk.fc.weight, source.image.trunk.fc.bias):
            parameter.copy_(basis @ (basis.T @ parameter))
    result, report = inherit(made(small, seed=1), source)
    pixels = structured_images(4, 48, seed=9)
    with torch.inference_mode():
        wanted = source.encode_image(pixels) @ source.encode_text(tokens(TEXT)).T
        torch.testing.assert_close(result.encode_image(pixels) @ result.encode_text(tokens(TEXT)).T, wanted, atol=1e-5, rtol=1e-4)
    assert report.shared_space == "24 principal directions of both towers' projections, 100.0% of their weight"
    with torch.no_grad():  # where the first coordinates carry everything, they are kept as they are
        for parameter in (source.text.projection.weight, source.image.trunk.fc.weight, source.image.trunk.fc.bias):
            parameter[24:] = 0
    result, _ = inherit(made(small, seed=1), source)
    torch.testing.assert_close(result.text.projection.weight, source.text.projection.weight[:24], atol=1e-5, rtol=1e-4)
    larger, report = inherit(made(large, seed=1), result)
    assert torch.equal(larger.text.projection.weight[:24], result.text.projection.weight)
    assert report.shared_space == "the source's 24 dimensions come first, the student's other 16 are its own"


@pytest.mark.parametrize(
    ("students", "sources", "layers", "pairs"),
    [
        (3, 12, "even", [(0, 0), (1, 6), (2, 11)]),
        (1, 4, "even", [(0, 0)]),
        (2, 2, "even", [(0, 0), (1, 1)]),
        (2, 5, "first", [(0, 0), (1, 1)]),
        (5, 2, "even", [(0, 0), (4, 1)]),
        (0, 3, "even", []),
        (2, 5, [1, 4], [(0, 1), (1, 4)]),
    ],
)
def test_which_layers(students, sources, layers, pairs):
    assert pair_layers(students, sources, layers) == pairs


def test_stages_of_another_number_meet_at_both_ends():
    student, source = made(pocket([16, 32, 64], [1, 1, 1])), made(pocket([16, 32, 48, 96], [1, 1, 1, 2], name="large"), seed=1)
    result, report = inherit(student, source)
    assert report.image.blocks["image.trunk.stages.2.blocks.0"] == "image.trunk.stages.3.blocks.0"
    ours, theirs, own = (model.image.trunk for model in (result, source, student))
    assert torch.equal(ours.stages[1].downsample.conv_kxk[0].conv.weight, theirs.stages[1].downsample.conv_kxk[0].conv.weight)
    assert torch.equal(ours.stages[2].downsample.conv_kxk[0].conv.weight, own.stages[2].downsample.conv_kxk[0].conv.weight)
    assert report.image.parameters_inherited < report.image.parameters


def test_another_family_keeps_its_image_tower_and_the_report_says_so():
    student = made(dataclasses.replace(SAME["fastvit"], name="student"))
    source = made(dataclasses.replace(SAME["pocket"], licence="somebody's", sources=("a web page",)), seed=1)
    result, report = inherit(student, source)
    assert all(torch.equal(a, b) for a, b in zip(result.image.state_dict().values(), student.image.state_dict().values(), strict=True))
    assert report.image.parameters_inherited == 0
    assert report.image.notes == ("'pocket' and 'fastvit' are of different families: the image tower keeps its own weights",)
    assert report.text.parameters_inherited == report.text.parameters
    assert result.config.licence == report.licence == "somebody's"
    assert result.config.sources == ("a web page", "weights inherited from small (somebody's)")
    assert json.loads(json.dumps(report.as_dict()))["text"]["channels"]["text.width"] == "0-31 of 32"


def test_kernels_masks_and_pixels_that_differ_are_named():
    config = SAME["pocket"]
    other = dataclasses.replace(
        config, text=dataclasses.replace(config.text, mask="pad"),
        image=dataclasses.replace(config.image, mean=(0.5, 0.5, 0.5), backbone_args={**config.image.backbone_args, "mlp_kernel_size": 5}),
    )  # fmt: skip
    _, report = inherit(made(config), made(other))
    assert any("mlp.conv.conv.weight keeps its own weights" in note for note in report.image.notes)
    assert any("normalised by other means" in note for note in report.image.notes)
    assert report.text.notes == ("the source's mask is 'pad', the student's 'causal'",)


def test_attention_blocks_of_a_convolutional_text_tower_are_inherited():
    source = made(pocket([16, 32, 64], [0, 1, 1], dataclasses.replace(TEXT, kind="mct", mask="none", layers=3), name="large"))
    result, report = inherit(made(pocket([16, 32, 64], [0, 1, 1]), seed=1), source)
    assert report.text.blocks == {"text.blocks.0": "text.blocks.1", "text.blocks.1": "text.blocks.3"}
    assert torch.equal(result.text.blocks[1].attn.qkv.weight, source.text.blocks[3].attn.qkv.weight)


def test_joined_stages_choose_by_what_all_of_them_hold():
    """FastViT's stages are one choice: a channel of the stem stands for its two in the next stage, its four in the one after."""
    source = made(fastvit(12, [1, 1, 1, 1], name="large"))
    loud = torch.tensor([0, 2, 3, 5, 7, 8, 10, 11])
    with torch.no_grad():
        for stage in source.image.trunk.stages[1:]:
            mlp = stage.blocks[0].mlp
            channels = torch.arange(mlp.fc2.out_channels)
            odd = channels[torch.isin(channels // (len(channels) // 12), loud) & (channels % 2 == 1)]
            mlp.fc2.weight[odd] *= 30
            mlp.fc1.weight[:, odd] *= 30
    _, report = inherit(made(fastvit(8, [1, 1, 1, 1]), seed=1), source)
    assert report.image.channels["image.stem"] == "0, 2-3, 5, 7-8, 10-11 of 12"
    assert report.image.channels["image.stage1"] == "0-1, 4-7, 10-11, 14-17, 20-23 of 24"


def test_weights_are_weighed_as_the_norm_behind_them_lets_them_act():
    source = made(SAME["pocket"])
    name = "image.trunk.stem.0.conv_kxk.0.conv.weight"
    before = effective_weight(source.state_dict(), name).clone()
    with torch.no_grad():
        block = source.image.trunk.stem[0].conv_kxk[0]
        block.conv.weight *= 7
        block.bn.running_var.copy_((block.bn.running_var + 1e-5) * 49 - 1e-5)
    torch.testing.assert_close(effective_weight(source.state_dict(), name), before)


def test_refused_in_one_sentence():
    student, source = made(SAME["pocket"]), made(SAME["pocket"], seed=1)
    for arguments, message in (
        ({"channels": "largest"}, "channels is 'largest', expected 'norm' or 'first'"),
        ({"layers": "last"}, "layers is 'last'"),
        ({"layers": [0]}, "give 2 different numbers from 0 to 1"),
        ({"layers": [1, 0]}, "in rising order"),
        ({"layers": [1, 2]}, "give 2 different numbers from 0 to 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            inherit(student, source, **arguments)
    with pytest.raises(CheckpointError, match="the source 'small' is folded"):
        inherit(student, reparameterize(source)[0])
    with pytest.raises(CheckpointError, match="the student 'small' is folded"):
        inherit(reparameterize(student)[0], source)
    bert = ModelConfig(name="bert", embed_dim=24, image=ImageConfig(backbone="resnet18", image_size=32, projection="linear"), text=dataclasses.replace(TEXT, norm="post"))
    with pytest.raises(CheckpointError, match="nothing of 'bert' fits 'small': .*families.*; the source's blocks are post-norm.*take another source"):
        inherit(student, made(bert))


def test_words_of_another_tokenizer_are_not_taken():
    student = made(SAME["pocket"])
    source = made(dataclasses.replace(SAME["pocket"], text=dataclasses.replace(TEXT, tokenizer="wordpiece")), seed=1)
    result, report = inherit(student, source)
    assert torch.equal(result.text.token_embedding.weight, student.text.token_embedding.weight)
    assert "different tokenizers" in report.text.notes[0]


@pytest.mark.parametrize(("small", "large"), [("pocket_s", "pocket_m"), ("pocket_m", "pocket_l"), ("pocket_l", "pocket_xl"), ("pocket_xl", "pocket_xxl")])
def test_every_rung_starts_from_the_next(small, large):
    torch.manual_seed(0)
    _, report = inherit(ImageTextModel(PRESETS[small]), ImageTextModel(PRESETS[large]))
    assert report.text.parameters_inherited == report.text.parameters
    assert report.image.parameters_inherited > 0.6 * report.image.parameters
