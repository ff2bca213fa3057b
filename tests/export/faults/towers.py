"""Faults of the network itself: the converter is given something else than the checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mobileclip.config import OPENAI_MEAN, OPENAI_STD
from mobileclip.model import ImageTextModel
from tests.export.faults import Fault, named

MISSED = r"cosine_min -?[01]\.\d+ is below 0\.99999, the least for fp32"


class Before(nn.Module):
    """A tower whose input is changed first."""

    def __init__(self, change, tower: nn.Module) -> None:
        super().__init__()
        self.change, self.tower = change, tower

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(self.change(x))


def channels_swapped(model: ImageTextModel) -> None:
    """Pictures reach the network as BGR instead of RGB."""
    model.image = Before(lambda x: x.flip(1), model.image)


def normalised_for_another_model(model: ImageTextModel) -> None:
    """OpenAI's mean and deviation are baked in, where the model was trained on pixels from 0 to 1."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (OPENAI_MEAN, OPENAI_STD))
    model.image = Before(lambda x: (x - mean) / std, model.image)


def scaled_twice(model: ImageTextModel) -> None:
    """The division by 255 is baked in, and the input is divided already."""
    model.image = Before(lambda x: x / 255, model.image)


def shrunk_without_antialiasing(model: ImageTextModel) -> None:
    """A resize without antialiasing stands before the network."""
    size = model.config.image.image_size
    model.image = Before(lambda x: nn.functional.interpolate(x[:, :, ::2, ::2], size=(size, size), mode="nearest"), model.image)


def branch_left_out(model: ImageTextModel) -> None:
    """Folding a training block forgets the branch that is only a norm (the skip past the convolution)."""
    branches = [module for name, module in model.image.named_modules() if name.endswith("mixer.mixer.identity")]
    assert branches
    for norm in branches:
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)


def first_branch_alone(model: ImageTextModel) -> None:
    """Weights of an unfolded checkpoint are put into the folded form by taking each block's convolution and dropping its other branches and norms."""
    for module in model.image.modules():
        for name in ("identity", "conv_scale"):
            branch = getattr(module, name, None)
            norm = branch if isinstance(branch, nn.BatchNorm2d) else getattr(branch, "bn", None)
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.zeros_(norm.weight)
                nn.init.zeros_(norm.bias)


def statistics_lost(model: ImageTextModel) -> None:
    """Running means and variances of the batch norms are not in the loaded state, so they are 0 and 1."""
    for module in model.image.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


def layer_scale_left_out(model: ImageTextModel) -> None:
    """The learned scale of the residual branches is not applied."""
    scales = [parameter for name, parameter in model.image.named_parameters() if name.endswith("gamma")]
    assert scales
    for scale in scales:
        scale.data.fill_(1)


def pooled_at_padding(model: ImageTextModel) -> None:
    """The text's embedding is taken at the last place of the row, which is padding, instead of at the end token."""
    model.text.pool = lambda x, tokens: x[:, -1]  # type: ignore[method-assign]


def pooled_at_the_first_token(model: ImageTextModel) -> None:
    """The end token is sought with an argmax over the wrong axis and found at the start."""
    model.text.pool = lambda x, tokens: x[:, 0]  # type: ignore[method-assign]


def mask_left_out(model: ImageTextModel) -> None:
    """The causal mask is not exported: every token sees those after it, padding too."""
    model.text.causal_bias.zero_()


def mask_upside_down(model: ImageTextModel) -> None:
    """The causal mask hides the past instead of the future."""
    model.text.causal_bias.copy_(model.text.causal_bias.T.clone())


def projection_transposed(model: ImageTextModel) -> None:
    """The projection's matrix is read in the other order of its axes."""
    weight = model.text.projection.weight
    weight.data = weight.data.T.reshape(weight.shape).contiguous()


def vocabulary_cut(model: ImageTextModel) -> None:
    """The token table is cut to its first half; ids beyond it read its last row."""
    table = model.text.token_embedding.weight.data
    table[len(table) // 2 :] = table[len(table) // 2 - 1]


def positions_shifted(model: ImageTextModel) -> None:
    """Positions count from one."""
    model.text.positional_embedding.data = model.text.positional_embedding.data.roll(-1, 0)


def attention_not_scaled(model: ImageTextModel) -> None:
    """Attention scores are not divided by the root of the head's width."""
    attention = model.text.blocks[0].attn
    width = attention.out.in_features
    attention.qkv.weight.data[:width] *= (width // attention.heads) ** 0.5


def another_gelu(model: ImageTextModel) -> None:
    """GELU is exported as x times the sigmoid of 1.702 x, which early CLIPs used."""

    class QuickGELU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(1.702 * x)

    for block in model.text.blocks:
        block.mlp.act = QuickGELU()


def block_left_out(model: ImageTextModel) -> None:
    """The last transformer block is missing."""
    model.text.blocks = model.text.blocks[:-1]


def norm_apart(model: ImageTextModel) -> None:
    """Layer norms are taken apart into means, squares and roots, as exports to old opsets do."""

    class Apart(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return apart(x, self.weight, self.bias, self.eps)

    for name, module in list(model.text.named_modules()):
        if isinstance(module, nn.LayerNorm):
            put(model.text, name, like(Apart, module))


def norm_apart_in_half(model: ImageTextModel) -> None:
    """The same by a module of one's own, which no count of layer norms sees; in half precision the squares of large activations overflow."""

    class OwnNorm(nn.Module):
        def __init__(self, norm: nn.LayerNorm) -> None:
            super().__init__()
            self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

        def forward(self, x: Tensor) -> Tensor:
            return apart(x, self.weight, self.bias, self.eps)

    for name, module in list(model.text.named_modules()):
        if isinstance(module, nn.LayerNorm):
            put(model.text, name, OwnNorm(module))


def mask_of_infinity(model: ImageTextModel) -> None:
    """The mask holds minus infinity, which becomes NaN where a row is masked wholly or a compiler multiplies it by zero."""
    model.text.causal_bias.masked_fill_(model.text.causal_bias < 0, float("-inf"))


def mask_of_the_least_float(model: ImageTextModel) -> None:
    """The mask holds float32's least number, which float16 cannot."""
    model.text.causal_bias.masked_fill_(model.text.causal_bias < 0, torch.finfo(torch.float32).min)


def apart(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + eps) * weight + bias


def like(kind: type[nn.LayerNorm], norm: nn.LayerNorm) -> nn.LayerNorm:
    made = kind(norm.normalized_shape, eps=norm.eps)
    made.load_state_dict(norm.state_dict())
    return made


def put(parent: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(parent.get_submodule(owner), leaf, module)


BEYOND = r"beyond float16's 65504"

FAULTS = named(
    [
        *(
            Fault(plant=plant, says=MISSED, tower="image", slow=plant not in (channels_swapped, branch_left_out))
            for plant in (
                channels_swapped, normalised_for_another_model, scaled_twice, shrunk_without_antialiasing, branch_left_out, first_branch_alone,
                statistics_lost, layer_scale_left_out,
            )
        ),
        *(
            Fault(
                plant=plant, says=MISSED, tower="text",
                slow=plant not in (pooled_at_padding, mask_left_out, another_gelu),
            )
            for plant in (
                pooled_at_padding, pooled_at_the_first_token, mask_left_out, mask_upside_down, projection_transposed, vocabulary_cut, positions_shifted,
                attention_not_scaled, another_gelu, block_left_out,
            )
        ),
        Fault(plant=norm_apart, says="expected them whole", tower="text"),
        Fault(plant=norm_apart_in_half, says="squares float16 values, which overflow", tower="text", precision="fp16", model="outlier"),
        Fault(plant=mask_of_infinity, says=BEYOND, tower="text"),
        Fault(plant=mask_of_the_least_float, says=BEYOND, tower="text", slow=True),
    ]
)  # fmt: skip
