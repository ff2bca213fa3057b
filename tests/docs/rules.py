"""How each command of the documents is run: as written in a folder where its placeholders are real, smaller, or not at all, with the reason.

A command that no rule names is run as written. Rules are looked for in order; a pattern is searched in the command's text.
"""

from __future__ import annotations

HARDWARE = "asks for a device that is not here"
HUB = "asks for weights or data of a hub, which CI does not fetch"
CLUSTER = "asks for several machines"
LONG = "takes long; its parts are run by the pages of each stage"

NOT_RUN: tuple[tuple[str, str], ...] = (
    (r"^make (demo|efficiency|grid|bench-|faults|fuzz|load|coverage)", LONG),
    (r"^make (test|lint|attacks|docs|test-docs|install|test-all|test-wheel)\b", "is run by CI itself, or would run this very check"),
    (r"^make (web|test-web|audit|licences)", "asks for npm, Chromium or a database of vulnerabilities; run by hand before a release"),
    (r"^(pip|git|npm) ", "installs; CI has installed what it needs by the same command"),
    (r"^(torchrun|ray) ", CLUSTER),
    (r"runtime\.web_server", "serves until it is interrupted; tests/web serves and asks"),
    (r"hf-hub:|coca:|transformers:NAME|rewrite:NAME|open_clip:|wds_mscoco", HUB),
    (r"my_module:my_function", "stands for a function of one's own"),
    (r"--device (ssh|adb|browser|mac|ios)", HARDWARE),
    (r"^mclip import-datacompdr SHARDS", "the same command stands in the guide, and is run there"),
    (r"inspect mobileclip_s2\.pt|convert mobileclip_s2\.pt", "asks for Apple's weights; the same is done with random ones in tests/mobileclip"),
    (r"^mclip (caption|train-captioner) .*CAPTIONER|self_retrieval|--captions CAPTIONS|--add-captions", "asks for a trained captioner; run in tests/distill"),
    (r"^mclip pilot", "trains many students; run in tests/distill/test_pilot.py"),
    (r"^mclip train-languages|--labels captions/de\.jsonl", "asks for texts of another language; run in tests/distill/test_languages.py"),
    (r"--four-bit-steps|--prune-latency|--max-recall-loss|--latency 0\.5", "searches for minutes; run in tests/export"),
    (r"report --front", "shows what such a search found; run in tests/benchmarks"),
    (r"^mclip train .*(…|--backbone|--inherit|--vocab-size)", "an outline of settings; run in tests/distill and tests/mobileclip"),
    (r"^mclip train --pairs.* --nproc [0-9]+", "several processes; run in tests/distill/test_train_processes.py"),
    (r"pilot/recipe\.json|OUT/recipe\.json", "goes on from a pilot"),
    (r"--store STORE --within clean\.keep|--keep good\.keep", "asks for facts that teachers of the demo store; run in tests/distill/test_curate.py"),
    (r"^mclip adapt|--adapter", "asks for two models of one family; run in tests/runtime"),
    (r"^mclip demo", LONG),
    (r"--gallery TEACHER1", "asks for a student that follows its teachers' features; run in tests/distill/test_evaluate.py"),
    (r"demo/teachers/", "asks for the demo's teachers, which it trains"),
)
"""Pattern -> reason."""

SMALLER: tuple[tuple[str, tuple[tuple[str, str], ...], dict[str, str]], ...] = (  # fmt: skip
    (
        r"^mclip export .*", ((r"--target \S+", "--target onnx"), (r"--precision \S+", "--precision fp32")),
        {"--samples": "12", "--golden": "2", "--calibration": "4", "--force": ""},
    ),
    (
        r"^mclip train --dry-run",
        ((r" --model \S+", " --model pocket_s"), (r" --nproc \S+", ""), (r" --precision \S+", ""), (r"--recipe \S+", "--recipe reinforced")),
        {"--pairs": "PAIRS", "--store": "STORE", "--out": "DRY"},
    ),
    (r"^mclip train ", ((r"--out (CKPT|TUNED)", r"--out \1-NEW"),), {"--samples": "64", "--prefetch-threads": "0"}),
    (r"^mclip bench .*plan:", (), {"--seconds": "0.05"}),
    (r"^mclip bench (A B|BUNDLE BUNDLE)", (), {"--seconds": "0.05", "--phases": "text_tower"}),
    (r"^mclip import-results trtexec", ((r"image-tensorrt-fp16", "image-onnx-fp32"),), {}),
    (
        r"^mclip bench ", ((r"--sustained \S+", "--sustained 1"), (r"--period \S+", "--period 0.05"), (r" --priority -5", "")),
        {"--seconds": "0.05", "--starts": "1", "--queries": "12", "--rest": "0.1", "--phases": "decode,text_tower"},
    ),
    (r"^mclip compress ", (), {"--calibration": "16", "--recover-samples": "64", "--importance": "norm"}),
    (r"^mclip (index|search) ", ((r"--open\b", ""),), {}),
)
"""Pattern, replacements in the text, options added where they are not given: the first that fits."""
