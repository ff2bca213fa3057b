"""Train a student from pairs and a store: no teacher is run, augmentations are replayed.

    mclip train --pairs PAIRS --store STORE --out CKPT --recipe reinforced

The state of a run is one file, written under a temporary name and renamed: weights, average, optimiser and the number of
samples seen. The order of samples is a function of that number, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.dataset import Batch, ReinforcedPairs
from distill.losses import affinity_loss, clip_loss, ensemble_basis, ensemble_target, feature_loss
from distill.progress import progress
from distill.recipes import Recipe, load_recipe
from distill.store import Store, open_store
from mobileclip.checkpoint import build_tokenizer, load_checkpoint, open_tokenizer, preprocess_config, read_config, save_checkpoint
from mobileclip.config import ModelConfig, config_to_dict
from mobileclip.inherit import inherit
from mobileclip.model import ImageTextModel
from mobileclip.models import create_model
from mobileclip.students import student_config
from runtime.errors import CheckpointError, RecipeError, TrainingError
from runtime.files import file_sha256
from runtime.pairs import open_pairs
from runtime.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STATE = "state.safetensors"
MAX_LOGIT_SCALE = 100.0
BASIS_ROWS = 4096
VARIATIONS = ("backbone", "image_size", "mask", "vocab_size", "embedding_dim")
YOUNGER = (("kind", "transformer"), ("conv_kernel", 11), ("embedding_dim", 0))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of one run."""

    pairs: str
    """Folder of tar shards."""
    store: str
    """Their reinforcement, as `mclip reinforce` wrote it."""
    out: str
    """Checkpoint folder to write; it also holds metrics.jsonl and, while the run lasts, its state."""
    recipe: str = "reinforced"
    """A name in distill/recipes.py or a JSON file."""
    model: str = "pocket_s"
    """A preset. Not used with `init`."""
    backbone: str | None = None
    """Image backbone instead of the preset's: a name of timm.list_models()."""
    image_size: int | None = None
    """Side of the pictures in pixels, instead of the preset's."""
    mask: Literal["causal", "pad"] | None = None
    """What a token of the text tower sees, instead of the preset's: those before it, or all but padding."""
    vocab_size: int | None = None
    """Ids of the token table (the first merges of CLIP's vocabulary), instead of the preset's: 514 to 49408."""
    embedding_dim: int | None = None
    """Width of the token table, instead of the preset's; a narrow one is followed by a linear map. 0: the tower's own width."""
    init: str | None = None
    """A checkpoint folder to start from, instead of random weights. It says what the model is."""
    inherit: str | None = None
    """A checkpoint folder of a larger model whose layers and channels the student starts from, chosen by size (mobileclip/inherit.py)."""
    samples: int = 250_000
    """Pairs seen, the same one again counted again; captions read alone count as well."""
    seed: int = 0
    threads: int = 1
    """Torch threads. Small models gain more from a second process than from a second thread."""
    save_seconds: float = 30.0
    """At most this much work is lost to a kill."""
    validation: str | None = None
    """Pairs folder: retrieval on it is written to the metrics along the way. Nothing is chosen by it here."""
    validations: int = 5
    """How often, evenly over the run."""
    batch_size: int | None = None
    """Overrides the recipe."""
    learning_rate: float | None = None
    """Overrides the recipe."""

    def resolved_model(self) -> ModelConfig:
        """What is trained: the checkpoint's model, or the preset with its variations."""
        changes = {name: getattr(self, name) for name in VARIATIONS if getattr(self, name) is not None}
        if self.init is None:
            return student_config(self.model, **changes)
        if changes or self.inherit is not None:
            wrong = [f"--{name.replace('_', '-')}" for name in (*changes, *(["inherit"] if self.inherit is not None else []))]
            raise RecipeError(f"--init goes on from a finished model and does not go with {', '.join(wrong)}; for another student with its weights, use --inherit alone")
        return read_config(self.init)

    def resolved_recipe(self) -> Recipe:
        recipe = load_recipe(self.recipe)
        changes = {name: getattr(self, name) for name in ("batch_size", "learning_rate") if getattr(self, name) is not None}
        return dataclasses.replace(recipe, **changes)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Steps of a run: `text_steps` on captions alone, then steps on pairs up to `steps`."""

    text_steps: int
    steps: int
    batch_size: int

    @classmethod
    def of(cls, samples: int, recipe: Recipe) -> Plan:
        """A caption read alone counts as a sample: two recipes given the same number of samples have read as much."""
        text_steps = round(min(recipe.text_samples, samples // 10) / (2 * recipe.batch_size))
        pair_steps = math.ceil((samples - 2 * text_steps * recipe.batch_size) / recipe.batch_size)
        if samples < recipe.batch_size:
            raise RecipeError(f"samples is {samples}, less than one batch of {recipe.batch_size}; ask for more samples or a smaller batch")
        return cls(text_steps=text_steps, steps=text_steps + pair_steps, batch_size=recipe.batch_size)

    def pairs(self, step: int) -> int:
        """Pairs seen after `step` steps."""
        return max(0, step - self.text_steps) * self.batch_size

    def samples(self, step: int) -> int:
        """Pairs and captions alone seen after `step` steps."""
        return self.pairs(step) + min(step, self.text_steps) * 2 * self.batch_size


def train(config: TrainConfig) -> Path:
    """Run to the end, from where an earlier run of the same settings stopped. Returns the checkpoint folder.

    Raises:
        RecipeError, PairsError, StoreError, CheckpointError: the inputs do not fit (before anything is written).
        TrainingError: the folder holds a run with other settings, or the loss is no longer finite.
    """
    torch.set_num_threads(config.threads)
    recipe = config.resolved_recipe()
    plan = Plan.of(config.samples, recipe)
    pairs, store = open_pairs(config.pairs), open_store(config.store)
    out = Path(config.out)
    fingerprint = _fingerprint(config, recipe, store)
    if finished(out, fingerprint):
        logger.info("%s is complete", out)
        return out
    torch.manual_seed(config.seed)
    model, tokenizer_path, inherited = _make_model(config, out)
    data = ReinforcedPairs(pairs, store, preprocess_config(model.config), _tokenizer(model.config, tokenizer_path), seed=config.seed, caption_types=recipe.caption_types or None)
    average = _copy(model)
    run = Run(model=model, average=average, optimizer=_optimizer(model, recipe), averaging=Average(average, model))
    _restore(run, out, fingerprint)
    _loop(run, plan, recipe, config, data, store, out, fingerprint)
    figures = {"samples": plan.samples(plan.steps), "steps": plan.steps, "seconds": round(run.seconds, 1), "unreadable": data.unreadable, **_time_figures(out)}
    run.average.logit_scale.data.copy_(run.model.logit_scale.data)
    save_checkpoint(
        run.average.eval(), out, tokenizer=tokenizer_path,
        extra={"stage": "train", "config": dataclasses.asdict(config), "recipe": dataclasses.asdict(recipe), "fingerprint": fingerprint, "figures": figures,
               **inherited, "store_licences": sorted({teacher.licence for teacher in store.teachers}) if recipe.reinforced else []},
    )  # fmt: skip
    (out / STATE).unlink(missing_ok=True)
    return out


def _loop(
    run: Run, plan: Plan, recipe: Recipe, config: TrainConfig, data: ReinforcedPairs, store: Store, out: Path, fingerprint: str
) -> None:
    """Steps until the plan is done; the state is saved every `save_seconds`, and on an interruption."""
    basis = _basis(store, run.model.config.embed_dim) if recipe.feature or recipe.text_samples else None
    validate = _Validation(config, plan)
    clock = {"data": 0.0, "model": 0.0, "optimizer": 0.0}
    log_every = max(1, plan.steps // 200)
    saved = started = time.monotonic()
    before = run.seconds
    marks: dict[str, float] = {}
    with open(out / "metrics.jsonl", "a", encoding="utf-8") as metrics, progress(f"train {out.name}", plan.steps, run.step) as advance:
        try:
            while run.step < plan.steps:
                terms = _step(run, plan, recipe, data, store, basis, clock)
                run.step += 1
                run.seconds = before + time.monotonic() - started
                if run.step % log_every == 0 or run.step == plan.steps:
                    line = _metrics_line(run, plan, recipe, terms, clock, marks)
                    line.update(validate.maybe(run))
                    metrics.write(json.dumps(line) + "\n")
                    metrics.flush()
                    advance(run.step, f"loss {line['loss']:.3f}  {line['samples_per_second']:.0f} samples/s")
                if time.monotonic() - saved > config.save_seconds:
                    _save(run, out, fingerprint)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            _save(run, out, fingerprint)
            raise


def _step(
    run: Run, plan: Plan, recipe: Recipe, data: ReinforcedPairs, store: Store, basis: Tensor | None, clock: dict[str, float]
) -> dict[str, Tensor]:
    """One optimiser step; returns the loss terms, detached."""
    began = time.perf_counter()
    text_only = run.step < plan.text_steps
    batch = _text_batch(data, run.step, 2 * plan.batch_size) if text_only else data.batch(plan.pairs(run.step), plan.batch_size)
    known = _teacher_embeddings(store, batch, images=not text_only) if recipe.reinforced else ([], [])
    loaded = time.perf_counter()
    run.model.train()
    terms = text_loss(run.model, batch, known[1], basis) if text_only else pair_losses(run.model, batch, known, recipe, store, basis)
    loss = torch.stack([getattr(recipe, name) * value for name, value in terms.items()]).sum()
    if not torch.isfinite(loss):
        keys = [store.keys[row] for row in batch.rows]
        raise TrainingError(
            f"the loss is {loss.item()} at step {run.step + 1}; the last saved state is intact. The batch holds {', '.join(keys[:4])} and "
            f"{max(0, len(keys) - 4)} more. Lower learning_rate (now {recipe.learning_rate})"
        )
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    modelled = time.perf_counter()
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, plan.steps, recipe)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), recipe.clip_norm)
    run.optimizer.step()
    with torch.no_grad():
        run.model.logit_scale.clamp_(0, math.log(MAX_LOGIT_SCALE))
    run.averaging.update(min(recipe.ema_decay, (1 + run.step) / (10 + run.step)))
    ended = time.perf_counter()
    for name, seconds in (("data", loaded - began), ("model", modelled - loaded), ("optimizer", ended - modelled)):
        clock[name] += seconds
    return {name: value.detach() for name, value in terms.items()}


def pair_losses(
    model: ImageTextModel, batch: Batch, known: tuple[list[Tensor], list[Tensor]], recipe: Recipe, store: Store, basis: Tensor | None
) -> dict[str, Tensor]:
    """The recipe's loss terms on B pairs, unweighted. `known`: per teacher its stored image and text embeddings, each (B, E_k)."""
    image, text, scale = model.encode_image(torch.from_numpy(batch.pixels)), encode_texts(model, batch.tokens), model.logit_scale.exp()
    terms: dict[str, Tensor] = {}
    if recipe.contrastive:
        terms["contrastive"] = clip_loss(image, text, scale, torch.from_numpy(batch.same))
    if recipe.affinity:
        terms["affinity"] = affinity_loss(image, text, scale, known[0], known[1], [teacher.logit_scale for teacher in store.teachers])
    if recipe.feature:
        assert basis is not None
        # Each tower follows its own teacher embedding: a picture whose caption is wrong still teaches the image tower what it shows.
        terms["feature"] = (feature_loss(image, ensemble_target(known[0], basis)) + feature_loss(text, ensemble_target(known[1], basis))) / 2
    return terms


def text_loss(model: ImageTextModel, batch: Batch, known: list[Tensor], basis: Tensor | None) -> dict[str, Tensor]:
    """The text tower alone: its embeddings follow the ensemble's text embeddings."""
    assert basis is not None
    return {"feature": feature_loss(encode_texts(model, batch.tokens), ensemble_target(known, basis))}


def encode_texts(model: ImageTextModel, tokens: np.ndarray, groups: int = 4) -> Tensor:
    """tokens (B, T) int32 -> (B, D), unit norm, in groups of like length: most captions are a third as long as a batch's longest.

    Exact for the causal and pad-masked towers that are trained here, whose embedding does not depend on the padding.
    """
    lengths = tokens.argmax(axis=1) + 1
    order = np.argsort(lengths, kind="stable")
    parts = [model.encode_text(torch.from_numpy(np.ascontiguousarray(tokens[rows, : lengths[rows].max()]))) for rows in np.array_split(order, groups) if len(rows)]
    return torch.cat(parts)[torch.from_numpy(np.argsort(order))]


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    warmup = max(1, round(recipe.warmup * steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


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


def _text_batch(data: ReinforcedPairs, step: int, size: int) -> Batch:
    """Captions of the endless order, without decoding any picture."""
    rows, _, captions = (np.concatenate(column) for column in zip(*_orders(data, step * size, size), strict=True))
    texts = np.array([data._text_of[row][caption] for row, caption in zip(rows, captions, strict=True)])
    return Batch(rows=rows, augs=np.zeros_like(rows), captions=captions, pixels=np.zeros((0, 3, 1, 1), np.float32), tokens=data.tokens(texts), same=texts)


def _orders(data: ReinforcedPairs, first: int, size: int) -> Iterator[list[np.ndarray]]:
    while size > 0:
        epoch, offset = divmod(first, len(data))
        columns = [column[offset : offset + size] for column in data.order(epoch)]
        yield columns
        first, size = first + len(columns[0]), size - len(columns[0])


def _teacher_embeddings(store: Store, batch: Batch, images: bool) -> tuple[list[Tensor], list[Tensor]]:
    teachers = range(len(store.teachers))
    return (
        [torch.from_numpy(store.image_embeddings(k, batch.rows, batch.augs)) for k in teachers] if images else [],
        [torch.from_numpy(store.text_embeddings(k, batch.rows, batch.captions)) for k in teachers],
    )


def _basis(store: Store, dim: int) -> Tensor:
    rows = np.linspace(0, len(store) - 1, min(len(store), BASIS_ROWS)).astype(np.int64)
    zeros = np.zeros_like(rows)
    both = [
        torch.cat([torch.from_numpy(store.image_embeddings(k, rows, zeros)), torch.from_numpy(store.text_embeddings(k, rows, zeros))])
        for k in range(len(store.teachers))
    ]
    return ensemble_basis(both, dim)


def _make_model(config: TrainConfig, out: Path) -> tuple[ImageTextModel, Path, dict[str, Any]]:
    """The student, the path of its tokenizer.json, and what the receipt says about where its weights come from."""
    if config.init is not None:
        out.mkdir(parents=True, exist_ok=True)
        return load_checkpoint(config.init), Path(config.init) / "tokenizer.json", {}
    model, facts = create_model(config.resolved_model()), {}
    if config.inherit is not None:
        model, report = inherit(model, load_checkpoint(config.inherit))
        facts = {"inherited": report.as_dict()}
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tokenizer.json"  # written again each time: one that is there may be of another vocabulary
    os.replace(build_tokenizer(model.config.text.vocab_size, out / f".tokenizer.{os.getpid()}.json"), path)
    return model, path, facts


def _tokenizer(config: ModelConfig, path: Path) -> Tokenizer:
    if config.text.mask == "none":
        raise RecipeError(
            f"model '{config.name}' lets padding take part in attention (mask 'none'); training cuts texts to the longest of a batch and needs "
            "mask 'causal' or 'pad'"
        )
    return open_tokenizer(path.parent, config)


def _copy(model: ImageTextModel) -> ImageTextModel:
    import copy

    return copy.deepcopy(model).requires_grad_(False)


def _optimizer(model: ImageTextModel, recipe: Recipe) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def _fingerprint(config: TrainConfig, recipe: Recipe, store: Store) -> str:
    """Of everything that decides the weights; a folder continues only its own run."""
    model = config_to_dict(config.resolved_model())
    # Settings that are younger than the first runs are facts where they say something: those runs stay the ones that they were.
    model["text"] = {name: value for name, value in model["text"].items() if (name, value) not in YOUNGER}
    facts = {
        "recipe": dataclasses.asdict(recipe), "model": model, "samples": config.samples, "seed": config.seed,
        "store": {"parts": store.index.get("parts"), "seed": store.index.get("seed")}, "init": _weights_hash(config.init),
    }  # fmt: skip
    if config.inherit is not None:
        facts["inherit"] = _weights_hash(config.inherit)
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _weights_hash(folder: str | None) -> str | None:
    if folder is None:
        return None
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"'{folder}' is not a checkpoint: it has no model.safetensors; give a folder that mclip train or mclip convert has written")
    return file_sha256(path)


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


def _save(run: Run, out: Path, fingerprint: str) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in run.model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in run.average.state_dict().items()}
    for index, state in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in state.items()}
    temporary = out / f".{STATE}.{os.getpid()}"
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, temporary, metadata={"step": str(run.step), "seconds": str(run.seconds), "fingerprint": fingerprint})
    os.replace(temporary, out / STATE)


def _restore(run: Run, out: Path, fingerprint: str) -> None:
    """Continue from the saved state, if there is one; metrics written after it are dropped."""
    for stale in out.glob(f".{STATE}.*"):
        stale.unlink(missing_ok=True)
    path = out / STATE
    if not path.exists():
        (out / "metrics.jsonl").unlink(missing_ok=True)
        return
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"'{path}' cannot be read ({error}); remove it to start this run again") from None
    if facts.get("fingerprint") != fingerprint:
        raise TrainingError(f"'{out}' holds an unfinished run with other settings or data; choose another --out, or remove the folder to start again")
    run.model.load_state_dict(_sub(tensors, "model."))
    run.average.load_state_dict(_sub(tensors, "average."))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _sub(tensors, "optimizer.").items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = tensor
    run.optimizer.load_state_dict({"state": state, "param_groups": run.optimizer.state_dict()["param_groups"]})
    run.step, run.seconds = int(facts["step"]), float(facts["seconds"])
    metrics = out / "metrics.jsonl"
    if metrics.exists():
        kept = [line for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}") and json.loads(line)["step"] <= run.step]
        metrics.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _sub(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _metrics_line(run: Run, plan: Plan, recipe: Recipe, terms: dict[str, Tensor], clock: dict[str, float], marks: dict[str, float]) -> dict[str, Any]:
    """One line of metrics.jsonl. `samples_per_second` counts pairs (captions in the text-only steps) since the line before."""
    values = {name: float(value) for name, value in terms.items()}
    text_only = run.step <= plan.text_steps
    items = (run.step - marks.get("step", 0)) * plan.batch_size * (2 if text_only else 1)
    elapsed = sum(clock.values()) - marks.get("clock", 0.0)
    marks.update(step=run.step, clock=sum(clock.values()))
    return {
        "step": run.step,
        "phase": "text" if text_only else "pairs",
        "samples": plan.samples(run.step),
        "loss": sum(getattr(recipe, name) * value for name, value in values.items()),
        "loss_terms": values,
        "lr": learning_rate(run.step - 1, plan.steps, recipe),
        "logit_scale": float(run.model.logit_scale.detach().exp()),
        "samples_per_second": round(items / max(elapsed, 1e-9), 1),
        "seconds": round(run.seconds, 2),
        "time_share": {name: round(seconds / max(sum(clock.values()), 1e-9), 3) for name, seconds in clock.items()},
    }


def _time_figures(out: Path) -> dict[str, Any]:
    """Where the time went, from the last line of the metrics, and the median rate on pairs."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["samples_per_second"] for line in lines if line["phase"] == "pairs"]
    return {"samples_per_second": float(np.median(rates)), "time_share": lines[-1]["time_share"]}


class _Validation:
    """Retrieval of the averaged weights on the validation pairs, a few times over the run. Its time counts for no step."""

    def __init__(self, config: TrainConfig, plan: Plan) -> None:
        self.config, self.plan, self.done = config, plan, 0
        self.encoder: Any = None

    def maybe(self, run: Run) -> dict[str, Any]:
        wanted = int(self.config.validations * run.step / self.plan.steps)
        if self.config.validation is None or wanted <= self.done:
            return {}
        self.done = wanted
        from distill.evaluate import quick_recall

        return {"validation": quick_recall(run.average, self.config.validation, Path(self.config.out))}


def main(argv: list[str]) -> int:
    """`mclip train`."""
    import tyro

    config = tyro.cli(TrainConfig, args=argv, prog="mclip train", description=__doc__)
    out = train(config)
    figures = json.loads((out / "receipt.json").read_text(encoding="utf-8"))["figures"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in figures["time_share"].items())
    sys.stdout.write(
        f"{out}: {figures['samples']:,} samples in {figures['seconds']:.0f} s, median {figures['samples_per_second']:.0f} samples/s on {config.threads} thread(s); "
        f"time went to {shares}\n"
    )
    return 0
