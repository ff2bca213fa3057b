"""The names of tensors in four layouts: one table of rules a layout, read in both directions. Needs no torch.

A rule pairs a name of theirs with ours. Placeholders: {i} {k} a number, {end} the first or last of the six blocks of the
"mct" tower, {wb} weight or bias, {bn} the five tensors of a BatchNorm, {conv} a convolution and its BatchNorm, {rest}
anything. The first rule that fits counts; a name that none fits has no counterpart: nothing is guessed. Ours are timm's
names under `image.trunk.` and our own under `text.`.

Sources: the module names of Apple's package, of timm's fastvit.py and vision_transformer_hybrid.py, and of open_clip's
TextTransformer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

_PATTERNS = {
    "i": r"\d+",
    "k": r"\d+",
    "end": r"0|5",
    "wb": r"weight|bias",
    "bn": r"weight|bias|running_mean|running_var|num_batches_tracked",
    "conv": r"conv\.weight|bn\.(?:weight|bias|running_mean|running_var|num_batches_tracked)",
    "rest": r".+",
}


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor, or one family of tensors, in two layouts."""

    theirs: str
    """Empty: they have no such tensor, it is zeros (the bias of Apple's projections)."""
    ours: str
    turned: bool = False
    """Theirs is the transpose of ours."""
    ones: int = 0
    """Leading dimensions of size one that theirs has and ours has not."""
    kind: str = ""
    """The kind of text tower that has it, where our name alone does not say; empty: any."""

    def shape_of_theirs(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor of ours has on their side."""
        return (1,) * self.ones + (shape[::-1] if self.turned else shape)

    def shape_of_ours(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a tensor of theirs has on our side."""
        shape = shape[self.ones :]
        return shape[::-1] if self.turned else shape


def _same(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, name) for name in names)


def _mobileone(theirs: str, ours: str) -> tuple[Rule, ...]:
    """A MobileOne block of Apple's: its branches, or the one convolution that they were folded into."""
    return (
        Rule(theirs + ".rbr_conv.{k}.{conv}", ours + ".conv_kxk.{k}.{conv}"),
        Rule(theirs + ".rbr_scale.{conv}", ours + ".conv_scale.{conv}"),
        Rule(theirs + ".rbr_skip.{bn}", ours + ".identity.{bn}"),
        Rule(theirs + ".reparam_conv.{wb}", ours + ".reparam_conv.{wb}"),
    )


def _blocks(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The blocks of a FastViT stage, with RepMixer or with attention."""
    theirs, ours = theirs + ".{i}", ours + ".{i}"
    return (
        *_mobileone(theirs + ".token_mixer.mixer", ours + ".token_mixer.mixer"),
        Rule(theirs + ".token_mixer.norm.rbr_skip.{bn}", ours + ".token_mixer.norm.identity.{bn}"),
        Rule(theirs + ".token_mixer.layer_scale", ours + ".token_mixer.layer_scale.gamma"),
        Rule(theirs + ".token_mixer.reparam_conv.{wb}", ours + ".token_mixer.reparam_conv.{wb}"),
        Rule(theirs + ".norm.{bn}", ours + ".norm.{bn}"),
        Rule(theirs + ".token_mixer.qkv.{wb}", ours + ".token_mixer.qkv.{wb}"),
        Rule(theirs + ".token_mixer.proj.{wb}", ours + ".token_mixer.proj.{wb}"),
        Rule(theirs + ".convffn.conv.{conv}", ours + ".mlp.conv.{conv}"),
        Rule(theirs + ".convffn.fc{k}.{wb}", ours + ".mlp.fc{k}.{wb}"),
        Rule(theirs + ".layer_scale", ours + ".layer_scale.gamma"),
        Rule(theirs + ".layer_scale_{k}", ours + ".layer_scale_{k}.gamma"),
    )


def _downsample(theirs: str, ours: str) -> tuple[Rule, ...]:
    """The step between two stages. Its squeeze-and-excitation is timm's in both, so those names agree."""
    theirs, ours = theirs + ".proj", ours + ".proj"
    return (
        Rule(theirs + ".0.lkb_origin.{conv}", ours + ".0.large_conv.{conv}"),
        Rule(theirs + ".0.small_conv.{conv}", ours + ".0.small_conv.{conv}"),
        Rule(theirs + ".0.lkb_reparam.{wb}", ours + ".0.reparam_conv.{wb}"),
        Rule(theirs + ".0.se.fc{k}.{wb}", ours + ".0.se.fc{k}.{wb}"),
        *_mobileone(theirs + ".1", ours + ".1"),
    )


_A, _O = "image_encoder.model.", "image.trunk."
# Apple's stages are a flat list, the same in MCi0, MCi1 and MCi2; in timm a stage begins with its downsampling.
_APPLE_MCI = (
    *_mobileone(_A + "patch_embed.{i}", _O + "stem.{i}"),
    *_blocks(_A + "network.0", _O + "stages.0.blocks"),
    *_downsample(_A + "network.1", _O + "stages.1.downsample"),
    *_blocks(_A + "network.2", _O + "stages.1.blocks"),
    *_downsample(_A + "network.3", _O + "stages.2.downsample"),
    *_blocks(_A + "network.4", _O + "stages.2.blocks"),
    *_downsample(_A + "network.5", _O + "stages.3.downsample"),
    Rule(_A + "network.6.pe.{wb}", _O + "stages.3.pos_emb.pos_enc.{wb}"),
    Rule(_A + "network.6.reparam_conv.{wb}", _O + "stages.3.pos_emb.reparam_conv.{wb}"),
    *_blocks(_A + "network.7", _O + "stages.3.blocks"),
    *_mobileone(_A + "conv_exp", _O + "final_conv"),
    Rule(_A + "conv_exp.se.reduce.{wb}", _O + "final_conv.se.fc1.{wb}"),
    Rule(_A + "conv_exp.se.expand.{wb}", _O + "final_conv.se.fc2.{wb}"),
    Rule(_A + "head.proj", _O + "head.fc.weight", turned=True),
    Rule("", _O + "head.fc.bias"),
)


def _attention(theirs: str, ours: str, norm: str, qkv: str, out: str) -> tuple[Rule, ...]:
    """Apple's pre-norm transformer block, which its ViT and its text towers share."""
    theirs, ours = theirs + ".{i}", ours + ".{i}"
    return (
        Rule(theirs + ".pre_norm_mha.0.{wb}", f"{ours}.{norm}1.{{wb}}"),
        Rule(theirs + ".pre_norm_mha.1.qkv_proj.{wb}", f"{ours}.attn.{qkv}.{{wb}}"),
        Rule(theirs + ".pre_norm_mha.1.out_proj.{wb}", f"{ours}.attn.{out}.{{wb}}"),
        Rule(theirs + ".pre_norm_ffn.0.{wb}", f"{ours}.{norm}2.{{wb}}"),
        Rule(theirs + ".pre_norm_ffn.1.{wb}", ours + ".mlp.fc1.{wb}"),
        Rule(theirs + ".pre_norm_ffn.4.{wb}", ours + ".mlp.fc2.{wb}"),
    )


_APPLE_VIT = (
    Rule(_A + "patch_emb.{i}.block.conv.{wb}", _O + "patch_embed.backbone.{i}.conv.{wb}"),
    Rule(_A + "patch_emb.{i}.block.norm.{bn}", _O + "patch_embed.backbone.{i}.bn.{bn}"),
    Rule(_A + "cls_token", _O + "cls_token"),
    Rule(_A + "pos_embed.pos_embed.pos_embed", _O + "pos_embed", ones=1),
    *_attention(_A + "transformer", _O + "blocks", "norm", "qkv", "proj"),
    Rule(_A + "post_transformer_norm.{wb}", _O + "norm.{wb}"),
    Rule(_A + "classifier.proj", _O + "head.weight", turned=True),
    Rule("", _O + "head.bias"),
)
_M = "text.blocks.{i}"
_T_END, _M_END = "text_encoder.transformer.{end}", "text.blocks.{end}"
_APPLE_TEXT = (
    Rule("text_encoder.embedding_layer.weight", "text.token_embedding.weight"),
    Rule("text_encoder.positional_embedding.pos_embed.pos_embed", "text.positional_embedding", ones=2),
    # The convolutional blocks at both ends of the "mct" tower.
    Rule(_T_END + ".token_mixer.mixer.rbr_skip.{bn}", _M_END + ".token_mixer.skip.{bn}"),
    Rule(_T_END + ".token_mixer.mixer.rbr_conv.0.conv.weight", _M_END + ".token_mixer.conv.weight"),
    Rule(_T_END + ".token_mixer.mixer.rbr_conv.0.bn.{bn}", _M_END + ".token_mixer.norm.{bn}"),
    Rule(_T_END + ".token_mixer.norm.rbr_skip.{bn}", _M_END + ".token_mixer.base.{bn}"),
    Rule(_T_END + ".token_mixer.layer_scale", _M_END + ".token_mixer.gamma"),
    Rule(_T_END + ".token_mixer.reparam_conv.{wb}", _M_END + ".token_mixer.reparam_conv.{wb}"),
    Rule(_T_END + ".convffn.conv.conv.weight", _M_END + ".mlp.conv.weight"),
    Rule(_T_END + ".convffn.conv.bn.{bn}", _M_END + ".mlp.norm.{bn}"),
    Rule(_T_END + ".convffn.fc{k}.{wb}", _M_END + ".mlp.fc{k}.{wb}", kind="mct"),
    Rule(_T_END + ".layer_scale", _M_END + ".gamma"),
    *_attention("text_encoder.transformer", "text.blocks", "ln_", "qkv", "out"),
    Rule("text_encoder.final_layer_norm.{wb}", "text.ln_final.{wb}"),
    Rule("text_encoder.projection_layer", "text.projection.weight", turned=True),
)
_R = "text.transformer.resblocks.{i}"
_OPEN_CLIP = (
    Rule("visual.trunk.{rest}", "image.trunk.{rest}"),
    *_same("text.token_embedding.weight", "text.positional_embedding"),
    Rule(_R + ".ln_{k}.{wb}", _M + ".ln_{k}.{wb}"),
    Rule(_R + ".attn.in_proj_{wb}", _M + ".attn.qkv.{wb}"),
    Rule(_R + ".attn.out_proj.{wb}", _M + ".attn.out.{wb}"),
    Rule(_R + ".mlp.c_fc.{wb}", _M + ".mlp.fc1.{wb}"),
    Rule(_R + ".mlp.c_proj.{wb}", _M + ".mlp.fc2.{wb}"),
    *_same("text.ln_final.{wb}"),
    Rule("text.text_projection", "text.projection.weight", turned=True),
    *_same("logit_scale"),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "ours": _same("image.{rest}", "text.{rest}", "logit_scale"),
    "apple": (*_APPLE_MCI, *_APPLE_VIT, *_APPLE_TEXT, *_same("logit_scale")),
    "open_clip": _OPEN_CLIP,
    "timm": (Rule("{rest}", "image.trunk.{rest}"),),
}


@cache
def _compiled(layout: str) -> tuple[tuple[re.Pattern[str], re.Pattern[str], Rule], ...]:
    return tuple((_pattern(rule.theirs), _pattern(rule.ours), rule) for rule in RULES[layout])


def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(f"(?P<{piece}>{_PATTERNS[piece]})" if odd % 2 else re.escape(piece) for odd, piece in enumerate(pieces)))


def our_name(name: str, layout: str) -> tuple[str, Rule] | None:
    """Their name -> ours and the rule, or None where no rule knows it.

    >>> our_name("text.transformer.resblocks.3.mlp.c_fc.bias", "open_clip")[0]
    'text.blocks.3.mlp.fc1.bias'
    """
    for theirs, _, rule in _compiled(layout):
        if rule.theirs and (match := theirs.fullmatch(name)):
            return rule.ours.format(**match.groupdict()), rule
    return None


def their_name(name: str, layout: str, kind: str = "transformer") -> tuple[str, Rule] | None:
    """Our name -> theirs and the rule; "" where they have no such tensor because it is zeros; None where no rule knows it.

    Args:
        kind: the kind of text tower (`TextConfig.kind`).

    >>> their_name("image.trunk.stages.1.downsample.proj.0.large_conv.conv.weight", "apple")[0]
    'image_encoder.model.network.1.proj.0.lkb_origin.conv.weight'
    """
    for _, ours, rule in _compiled(layout):
        if rule.kind in ("", kind) and (match := ours.fullmatch(name)):
            return rule.theirs.format(**match.groupdict()), rule
    return None
