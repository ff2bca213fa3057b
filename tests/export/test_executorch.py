"""ExecuTorch programs: what they compute, how much of them XNNPACK runs, and that two conversions are the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("executorch")
pytest.importorskip("torchao")

from export import to_executorch  # noqa: E402
from export.draft import Draft, Job  # noqa: E402
from export.to_executorch import Delegable, ExecutorchEncoder, Table, attention, drafts, require  # noqa: E402
from export.towers import encoder_of  # noqa: E402
from export.verify import measure  # noqa: E402
from mobileclip.folding import reparameterize  # noqa: E402
from runtime.errors import BundleError, MissingExtraError, ParityError  # noqa: E402
from tests.export.conftest import Odd  # noqa: E402


@pytest.fixture(scope="module")
def jobs(pocket, samples, tmp_path_factory) -> dict[str, Job]:
    folded, _ = reparameterize(pocket)
    folder = tmp_path_factory.mktemp("executorch")
    return {tower: Job(model=folded, tower=tower, calibration=samples.head(6), folder=folder) for tower in ("image", "text")}


@pytest.fixture(scope="module")
def made(jobs) -> dict[str, Draft]:
    return {draft.id: draft for job in jobs.values() for draft in drafts(job, ["fp32"])}


class Tiny(nn.Module):
    """What both towers have, small: a convolution or a table, a norm, an attention, a linear layer."""

    def __init__(self, tower: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(300, 16) if tower == "text" else None
        self.convolutions = nn.Sequential(*(nn.Conv2d(3 if n == 0 else 16, 16, 3, stride=2) for n in range(4 if tower == "image" else 0)))
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.convolutions(x).flatten(2).transpose(1, 2) if self.table is None else self.table(x)
        rows = self.norm(rows)
        return self.linear(F.scaled_dot_product_attention(rows, rows, rows)).mean(1)


def tiny_job(tower: str, samples, folder: Path, module: nn.Module | None = None) -> Job:
    class Model:
        image = text = module or Tiny(tower).eval()

    cut = samples.head(4)
    return Job(model=Model(), tower=tower, calibration=type(cut)(keys=cut.keys, captions=cut.captions, pixels=cut.pixels, tokens=cut.tokens % 300), folder=folder)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_files_compute_what_the_checkpoint_does(tower, made, jobs, samples, reference):
    draft = made[f"{tower}-executorch-fp32"]
    assert (jobs[tower].folder / draft.path).is_file()
    assert draft.batch == "1"
    embeddings = draft.run(samples.inputs(tower))
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-5)
    assert measure(tower, embeddings, reference).cosine_min >= 0.99999


@pytest.mark.slow
@pytest.mark.parametrize("tower", ["image", "text"])
def test_int8_of_a_whole_tower_is_small_and_near(tower, made, jobs, samples, reference):
    (draft,) = drafts(jobs[tower], ["int8"])
    small, large = ((jobs[tower].folder / path).stat().st_size for path in (draft.path, made[f"{tower}-executorch-fp32"].path))
    assert small < 0.35 * large
    assert 0.95 <= measure(tower, draft.run(samples.inputs(tower)), reference).cosine_mean < 0.99999


def test_norms_that_share_their_convolution_are_not_folded(jobs, samples):
    """torchao would: what a residual reads beside the norm would be scaled too."""
    module = Delegable(jobs["image"].encoder().tower)
    bare = to_executorch.without_norms(module, samples.pixels)
    assert any(isinstance(one, nn.BatchNorm2d) for one in module.modules())
    assert not any(isinstance(one, nn.BatchNorm2d) for one in bare.modules())
    assert len([one for one in bare.modules() if isinstance(one, nn.Conv2d)]) == 2 + len([one for one in module.modules() if isinstance(one, nn.Conv2d)])
    rows = torch.from_numpy(samples.pixels[:4])
    with torch.no_grad():
        assert torch.allclose(bare(rows), module(rows), atol=1e-5)


def test_attention_and_norm_stay_in_the_delegates(made):
    for draft in made.values():
        left = draft.facts["left_out_operations"]
        assert draft.facts["delegates"] >= 1
        assert draft.facts["left_out"] == sum(left.values())
        for operation in ("where", "any", "eq", "pow", "sum", "bmm", "softmax", "div", "linear", "convolution"):
            assert not [name for name in left if name.split(".")[1] in (operation, f"_{operation}")], left


def test_one_thread_is_held_and_said(made):
    for draft in made.values():
        assert draft.timed == (draft.facts["threads"] == 1)
        assert ("one thread" in draft.how) == draft.timed


def test_runtime_without_a_thread_setting_is_not_timed(made, jobs, monkeypatch):
    monkeypatch.setattr(to_executorch, "_one_thread", lambda runtime: None)
    monkeypatch.setattr(to_executorch, "convert", lambda job, precision: ((jobs["text"].folder / made["text-executorch-fp32"].path).read_bytes(), {}))
    (draft,) = drafts(jobs["text"], ["fp32"])
    assert not draft.timed
    assert "cannot be held to one" in draft.how


@pytest.mark.parametrize(("tower", "precision"), [pytest.param("image", "fp32", marks=pytest.mark.slow), ("text", "int8"), pytest.param("image", "int8", marks=pytest.mark.slow)])
def test_second_conversion_gives_the_same_bytes(tower, precision, samples, tmp_path):
    """On a tower of a few layers, as a conversion takes seconds."""
    files = []
    for folder in ("first", "second"):
        job = tiny_job(tower, samples, tmp_path / folder)
        (draft,) = drafts(job, [precision])
        files.append((job.folder / draft.path).read_bytes())
        expected = encoder_of(job.model, tower)(torch.from_numpy(job.rows)).detach().numpy()
        assert (draft.run(job.rows) * expected).sum(1).mean() >= (0.95 if precision == "int8" else 0.99999)
    assert files[0] == files[1]


def test_nothing_of_the_machine_is_inside(made, jobs, tmp_path_factory):
    words = [str(Path(__file__).parents[2]), "site-packages", str(Path.home()), str(tmp_path_factory.getbasetemp())]
    for draft in made.values():
        data = (jobs[draft.tower].folder / draft.path).read_bytes()
        assert not [word for word in words if word.encode() in data], draft.id


def test_no_output(samples, tmp_path, capfd):
    job = tiny_job("text", samples, tmp_path)
    (draft,) = drafts(job, ["fp32"])
    draft.run(job.rows)
    assert capfd.readouterr() == ("", "")


def test_own_attention_norm_and_table_equal_torchs():
    torch.manual_seed(0)
    query, key, value, mask = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 4), torch.randn(2, 1, 5, 7)
    torch.testing.assert_close(attention(query, key, value, attn_mask=mask), F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    torch.testing.assert_close(attention(query, key, value, scale=0.3), F.scaled_dot_product_attention(query, key, value, scale=0.3))
    with pytest.raises(ParityError, match="float mask"):
        attention(query, key, value, is_causal=True)
    torch.testing.assert_close(Delegable(nn.Identity())(query[0, 0]), F.normalize(query[0, 0], dim=-1))
    assert Delegable(nn.Identity())(torch.zeros(1, 8)).isfinite().all()
    weight, tokens = torch.randn(9, 6) * torch.logspace(-3, 3, 9)[:, None], torch.arange(9, dtype=torch.int32)[None]
    torch.testing.assert_close(Table(weight)(tokens)[0], weight, rtol=0, atol=weight.abs().amax().item() / 254)


def test_operation_without_a_translation_is_named_with_its_module(samples, tmp_path):
    tower = Odd(lambda x: torch.linalg.lstsq(x[:, 0, :8, :8], x[:, 0, :8, 8:9]).solution[..., 0])
    with pytest.raises(ParityError, match=r"linalg_lstsq.*comes from the module 'tower\.odd'"):
        list(drafts(tiny_job("image", samples, tmp_path, tower.eval()), ["fp32"]))
    assert not list(tmp_path.rglob("*.pte"))


def test_damaged_file_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "image.pte"
    path.write_bytes(b"no program" * 20)
    with pytest.raises(BundleError, match="export it again"):
        ExecutorchEncoder(path)


@pytest.mark.parametrize("package", ["executorch", "torchao"])
def test_missing_package_names_the_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}', which is not installed.*mobileclip-edge\[executorch\]"):
        require()
    with pytest.raises(MissingExtraError):
        next(iter(drafts(Job(model=None, tower="text", calibration=None, folder=Path()), ["fp32"])))
