"""Two projections over frozen features, trained with a contrastive loss that expects wrong captions.

Shapes: N = pairs, U = different captions, B = batch, D = embed_dim. What makes it robust, each chosen on the validation style:

* identical captions are positives of one another, so a generic tag is never a negative of its twin;
* the text projection is a damped PCA of the caption features and stays so: words that were never seen keep their place;
* after the first epochs only the pairs of smallest loss are trusted (small-loss selection, as in co-teaching), judged anew every
  `reselect` epochs against all captions; half of the others take part, at less weight, with the caption that fits them best among
  those of trusted pairs;
* features carry noise and dropout, so that another drawing style is not far away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobileclip.projection import MlpProjection


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How projectors are trained."""

    embed_dim: int = 256
    hidden: int = 512
    text_hidden: int = 8
    """The text projection is linear; an MLP of zero weights stands beside it only because its bias holds the offset."""
    epochs: int = 20
    batch_size: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    dropout: float = 0.3
    noise: float = 0.3
    """Standard deviation of the noise on standardised features."""
    logit_scale: float = 10.0
    text_power: float = 0.5
    """How far PCA directions of the captions are whitened: 0 not at all, 1 fully."""
    keep: float = 1.0
    select_from: int = 6
    reselect: int = 3
    guessed: float = 0.5
    """Weight of a pair that was given another caption; 0 leaves all untrusted pairs out."""
    seed: int = 0


@dataclass(kw_only=True, slots=True)
class Features:
    """Frozen features of a pairs folder."""

    images: Tensor
    """(N, W_image) float32."""
    texts: Tensor
    """(U, W_text) float32."""
    caption_of: Tensor
    """(N,) int64 into `texts`."""
    queries: Tensor
    """(N,) bool: pairs whose caption is asked when these features validate."""
    skipped: int = 0


@dataclass(kw_only=True, slots=True)
class Projectors:
    """Trained projections of standardised features: z = projection((x - mean) / std)."""

    image: MlpProjection
    text: MlpProjection
    image_mean: Tensor
    image_std: Tensor
    text_mean: Tensor
    text_std: Tensor
    logit_scale: float
    trusted: Tensor
    """(N,) bool: the pairs that the last epochs learned from."""

    def encode_image(self, features: Tensor) -> Tensor:
        """(B, W_image) -> (B, D), unit norm."""
        return F.normalize(self.image((features - self.image_mean) / self.image_std), dim=1)

    def encode_text(self, features: Tensor) -> Tensor:
        """(B, W_text) -> (B, D), unit norm."""
        return F.normalize(self.text((features - self.text_mean) / self.text_std), dim=1)


def train_projectors(features: Features, settings: Settings) -> Projectors:
    """Train on frozen features. Deterministic for one seed and one thread."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return _train(features, settings)


def _train(features: Features, s: Settings) -> Projectors:
    made = _start(features, s)
    images = (features.images - made.image_mean) / made.image_std
    texts = (features.texts - made.text_mean) / made.text_std
    total, size = len(images), min(s.batch_size, len(images))
    steps = s.epochs * (total // size)
    made.text.requires_grad_(False)
    captions, weights = features.caption_of, torch.ones(total)
    optimizer = torch.optim.AdamW(made.image.parameters(), lr=s.learning_rate, weight_decay=s.weight_decay, betas=(0.9, 0.98))
    step = 0
    for epoch in range(s.epochs):
        if s.keep < 1 and epoch >= s.select_from and (epoch - s.select_from) % s.reselect == 0:
            captions, weights = _select(made, images, texts, features.caption_of, s)
        rows = torch.randperm(total)
        for start in range(0, total - size + 1, size):
            chosen = rows[start : start + size]
            for group in optimizer.param_groups:
                group["lr"] = s.learning_rate * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = _loss(made, images[chosen], texts, captions[chosen], weights[chosen], s)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    made.image.requires_grad_(False)
    return made


def _start(features: Features, s: Settings) -> Projectors:
    image = MlpProjection(features.images.shape[1], s.hidden, s.embed_dim)
    text = MlpProjection(features.texts.shape[1], s.text_hidden, s.embed_dim)
    for projection in (image, text):
        nn.init.zeros_(projection.fc2.weight)
        nn.init.zeros_(projection.fc2.bias)
    text_mean, text_std = features.texts.mean(0), features.texts.std(0) + 1e-6
    centred = features.texts - text_mean
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    rank = min(s.embed_dim, len(values))
    axes = directions[:rank].T / (values[:rank].clamp(min=1e-3 * float(values[0])) / math.sqrt(len(centred))) ** s.text_power
    axes = axes / (centred @ axes).norm(dim=1).mean()
    with torch.no_grad():
        text.linear.weight.zero_()
        text.linear.weight[:rank] = axes.T * text_std
    return Projectors(
        image=image, text=text, image_mean=features.images.mean(0), image_std=features.images.std(0) + 1e-6, text_mean=text_mean, text_std=text_std,
        logit_scale=s.logit_scale, trusted=torch.ones(len(features.images), dtype=torch.bool),
    )  # fmt: skip


def _loss(made: Projectors, images: Tensor, texts: Tensor, captions: Tensor, weights: Tensor, s: Settings) -> Tensor:
    """Symmetric cross-entropy where every twin of a caption is a positive; a pair of weight 0 stays as a negative only."""
    noisy = F.dropout(images + s.noise * torch.randn_like(images), s.dropout)
    hidden = F.dropout(made.image.act(made.image.fc1(noisy)), s.dropout)
    image = F.normalize(made.image.linear(noisy) + made.image.fc2(hidden), dim=1)
    chosen = texts[captions]
    text = F.normalize(made.text(chosen + s.noise * torch.randn_like(chosen)), dim=1)
    logits = s.logit_scale * image @ text.T  # (B, B)
    same = (captions[:, None] == captions[None]).float()
    targets = same / same.sum(1, keepdim=True)
    each = -(targets * (F.log_softmax(logits, 1) + F.log_softmax(logits.T, 1))).sum(1) / 2
    return (each * weights).sum() / weights.sum().clamp(min=1)


@torch.no_grad()
def _select(made: Projectors, images: Tensor, texts: Tensor, captions: Tensor, s: Settings) -> tuple[Tensor, Tensor]:
    """Captions and weights (N,) to learn from next; sets `made.trusted`.

    Trusted is the share `keep` whose own caption is likeliest among all captions, given the picture. Of the others, the half
    whose best caption (of a trusted pair) is surest gets that one, with the weight `guessed`; the rest gets weight 0.
    """
    scores = s.logit_scale * F.normalize(made.image(images), dim=1) @ F.normalize(made.text(texts), dim=1).T  # (N, U)
    likely = F.log_softmax(scores, 1)
    own = likely.gather(1, captions[:, None])[:, 0]
    made.trusted = own >= own.quantile(1 - s.keep)
    known = torch.zeros(len(texts), dtype=torch.bool)
    known[captions[made.trusted]] = True
    sure, best = likely.masked_fill(~known, -torch.inf).max(1)
    guess = ~made.trusted & (sure >= sure[~made.trusted].median()) if s.guessed and not made.trusted.all() else torch.zeros_like(made.trusted)
    return torch.where(guess, best, captions), made.trusted.float() + s.guessed * guess.float()


@torch.no_grad()
def calibrate(made: Projectors, features: Features) -> float:
    """The logit scale under which the asked captions find their pictures with the greatest likelihood, of a grid from 5 to 60."""
    scores = made.encode_text(features.texts)[features.caption_of[features.queries]] @ made.encode_image(features.images).T
    own = torch.nonzero(features.queries)[:, 0]
    grid = torch.linspace(5, 60, 56)
    return float(min(grid, key=lambda scale: float(F.cross_entropy(scale * scores, own))))


@torch.no_grad()
def recall_at(made: Projectors, features: Features, k: int) -> float:
    """Text to image recall@k: captions of `features.queries` among all pictures."""
    images, texts = made.encode_image(features.images), made.encode_text(features.texts)
    scores = texts[features.caption_of[features.queries]] @ images.T
    own = scores.gather(1, torch.nonzero(features.queries))
    return float(((scores > own).sum(1) < k).float().mean()) if len(scores) else 0.0
