"""`mclip eval` as its user runs it."""

from __future__ import annotations

import json

import pytest
import torch

from distill.evaluate import main
from mobileclip import create_model, save_checkpoint
from runtime.errors import CheckpointError, PairsError

from .world import make_pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    make_pairs(root / "pairs", copies=1)
    torch.manual_seed(0)
    save_checkpoint(create_model("pocket_s"), root / "ckpt")
    return root


@pytest.fixture(autouse=True)
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_retrieval_and_zero_shot_of_a_checkpoint(made, capsys):
    assert main([str(made / "ckpt"), "--data", str(made / "pairs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gallery"]["count"] == 12
    assert 0 <= found["text_to_image"]["all"]["recall@5"]["value"] <= 1
    assert main([str(made / "ckpt"), "--data", str(made / "pairs")]) == 0
    assert "gallery: 12 pictures" in capsys.readouterr().out
    assert main([str(made / "ckpt"), "--data", str(made / "pairs"), "--task", "zero-shot", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 12


def test_what_cannot_be_evaluated_is_one_sentence(made, tmp_path):
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        main([str(tmp_path), "--data", str(made / "pairs")])
    with pytest.raises(PairsError):
        main([str(made / "ckpt"), "--data", str(tmp_path)])
