"""What changes while training, and its file: weights, average, optimiser and the number of steps, written whole and renamed."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.recipes import Recipe
from mobileclip.model import ImageTextModel
from runtime.errors import TrainingError

logger = logging.getLogger(__name__)

STATE = "state.safetensors"


class DamagedStateError(TrainingError):
    """A saved state that cannot be read."""


@dataclass(slots=True)
class Run:
    """What changes while training."""

    model: ImageTextModel
    average: ImageTextModel
    optimizer: torch.optim.AdamW
    averaging: Average
    step: int = 0
    """Steps done, the text-only ones first."""
    seconds: float = 0.0


def start(model: ImageTextModel, recipe: Recipe) -> Run:
    """A run before its first step."""
    average = copy.deepcopy(model).requires_grad_(False)
    return Run(model=model, average=average, optimizer=_optimizer(model, recipe), averaging=Average(average, model))


def _optimizer(model: ImageTextModel, recipe: Recipe) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


class Average:
    """average = decay * average + (1 - decay) * model, BatchNorm statistics included; counters are copied.

    The tensors of both are looked up once: for a small model, walking its modules takes longer than the arithmetic.
    """

    def __init__(self, average: torch.nn.Module, model: torch.nn.Module) -> None:
        ours, theirs = average.state_dict(), model.state_dict()
        floating = [name for name in ours if ours[name].is_floating_point()]
        self.ours, self.theirs = [ours[name] for name in floating], [theirs[name] for name in floating]
        self.counters = [(ours[name], theirs[name]) for name in ours.keys() - set(floating)]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        torch._foreach_lerp_(self.ours, self.theirs, 1 - decay)
        for ours, theirs in self.counters:
            ours.copy_(theirs)


def finished(out: Path, fingerprint: str | None = None) -> bool:
    """True when `out` holds a finished run (with these settings).

    Raises:
        TrainingError: it holds a finished run with other settings.
    """
    receipt = out / "receipt.json"
    if not receipt.is_file():
        return False
    found = json.loads(receipt.read_text(encoding="utf-8")).get("fingerprint")
    if fingerprint is not None and found != fingerprint:
        raise TrainingError(
            f"'{out}' holds a checkpoint that was trained with other settings or data; choose another --out, or remove the folder to train again"
        )
    return True


def save(run: Run, out: Path, fingerprint: str, keep: int = 1) -> None:
    """Write the state; of those before it the last `keep` - 1 stay, under names that hold their step.

    Raises:
        TrainingError: it cannot be written; what was there is as it was.
    """
    if keep > 1 and (out / STATE).is_file():
        before = _facts(out / STATE).get("step")
        if before is not None and before != str(run.step):
            kept = out / _older(int(before))
            kept.unlink(missing_ok=True)
            os.link(out / STATE, kept)
    write_state(out, {"model": run.model, "average": run.average}, run.optimizer, fingerprint, run.step, run.seconds)
    for stale in older_states(out)[: None if keep <= 1 else -(keep - 1)]:
        stale.unlink(missing_ok=True)


def restore(run: Run, out: Path, fingerprint: str, metrics: bool = True) -> None:
    """Continue from the saved state, if there is one, or where it is damaged from the one before; metrics written after it are dropped (unless that is
    another process's work)."""
    lines = out / "metrics.jsonl"
    modules = {"model": run.model, "average": run.average}
    try:
        found = read_state(out, modules, run.optimizer, fingerprint)
    except DamagedStateError as error:
        found = _restore_older(out, modules, run.optimizer, fingerprint, error)
    if found is not None:
        run.step, run.seconds = found
    if metrics and found is None:
        lines.unlink(missing_ok=True)
    elif metrics and lines.exists():
        kept = [line for line in lines.read_text(encoding="utf-8").splitlines() if line.endswith("}") and json.loads(line)["step"] <= run.step]
        lines.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _restore_older(
    out: Path, modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer, fingerprint: str, error: DamagedStateError
) -> tuple[int, float]:
    for path in reversed(older_states(out)):
        try:
            found = read_state(out, modules, optimizer, fingerprint, path.name)
        except DamagedStateError:
            continue
        if found is not None:
            logger.warning("%s; going on from the state of step %d instead", error, found[0])
            return found
    raise error


def _older(step: int) -> str:
    return f"state-{step:010}.safetensors"


def older_states(out: Path) -> list[Path]:
    """The states before the last one, the oldest first."""
    return sorted(out.glob("state-*.safetensors"))


def remove_states(out: Path) -> None:
    """A finished run needs none."""
    for path in (out / STATE, *older_states(out)):
        path.unlink(missing_ok=True)


def _facts(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError):
        return {}


def write_state(out: Path, modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer, fingerprint: str, step: int, seconds: float) -> None:
    """All that an unfinished run needs, in one file that is renamed into its place. modules: name to module; names hold no dot."""
    tensors = {f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(tensor) for key, tensor in state.items()}
    temporary = out / f".{STATE}.{os.getpid()}"
    facts = {"step": str(step), "seconds": str(seconds), "fingerprint": fingerprint}
    try:
        save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary, metadata=facts)
        os.replace(temporary, out / STATE)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise TrainingError(
            f"the state of step {step} cannot be written to '{out}' ({error}); the one saved before it is intact: free some space and run the same command again"
        ) from None


def read_state(
    out: Path, modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer, fingerprint: str, name: str = STATE
) -> tuple[int, float] | None:
    """Load what `write_state` wrote. Returns steps done and seconds taken by former runs; None where there is no state.

    Raises:
        DamagedStateError: the file is damaged. TrainingError: it is of a run with other settings.
    """
    for stale in out.glob(f".{STATE}.*"):
        stale.unlink(missing_ok=True)
    path = out / name
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise DamagedStateError(f"'{path}' cannot be read ({error}); remove it to start this run again") from None
    if facts.get("fingerprint") != fingerprint:
        raise TrainingError(f"'{out}' holds an unfinished run with other settings or data; choose another folder, or remove it to start again")
    for prefix, module in modules.items():
        module.load_state_dict(_sub(tensors, f"{prefix}."))
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in _sub(tensors, "optimizer.").items():
        index, field = key.split(".", 1)
        state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(facts["step"]), float(facts["seconds"])


def _sub(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
