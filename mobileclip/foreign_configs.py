"""The config files that open_clip and timm want beside their weights, written from a config of ours.

Without them a model is loaded with the settings of whoever loads it: open_clip normalises by OpenAI's mean and masks causally
unless it is told otherwise.
"""

from __future__ import annotations

from typing import Any

from mobileclip.config import ModelConfig


def open_clip_config(config: ModelConfig) -> dict[str, Any]:
    """`open_clip_config.json` (open_clip 3.3): how to build the model, and how to prepare a picture for it."""
    image, text = config.image, config.text
    text_cfg: dict[str, Any] = {
        "context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width, "heads": text.heads, "layers": text.layers,
        "no_causal_mask": text.mask == "none",
    }  # fmt: skip
    if text.mlp_ratio != 4.0:
        text_cfg["mlp_ratio"] = text.mlp_ratio
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "vision_cfg": {
                "timm_model_name": image.backbone,
                "timm_model_pretrained": False,
                "timm_pool": image.backbone_args.get("global_pool", "avg"),
                "timm_proj": None,
                "timm_drop": 0.0,
                "timm_drop_path": 0.0,
                "image_size": image.image_size,
            },
            "text_cfg": text_cfg,
            "custom_text": True,
        },
        "preprocess_cfg": {
            "size": image.image_size,
            "mean": list(image.mean),
            "std": list(image.std),
            "interpolation": image.interpolation,
            "resize_mode": "shortest",
        },
    }


def timm_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` (timm 1.0) of the image tower alone, its projection being the classifier."""
    import timm

    image = config.image
    base = timm.get_pretrained_cfg(image.backbone)
    assert base is not None
    licence = "apple-amlr" if config.licence.startswith("Apple ML Research") else config.licence
    return {
        "architecture": image.backbone,
        "num_classes": config.embed_dim,
        "model_args": dict(image.backbone_args),
        "pretrained_cfg": {
            "tag": config.name,
            "custom_load": False,
            "input_size": [3, image.image_size, image.image_size],
            "fixed_input_size": base.fixed_input_size,
            "interpolation": image.interpolation,
            "crop_pct": image.crop_pct,
            "crop_mode": "center",
            "mean": list(image.mean),
            "std": list(image.std),
            "num_classes": config.embed_dim,
            "pool_size": base.pool_size,
            "first_conv": base.first_conv,
            "classifier": base.classifier,
            "license": licence,
        },
    }
