"""`mclip`: one verb a stage. Nothing heavy is imported until a verb is chosen."""

from __future__ import annotations

import importlib
import logging
import os
import sys

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("benchmarks.suites.demo:main", "everything below on the sample data, from pictures to a report"),
    "sample": ("distill.sample:main", "fetch and draw a sample data set (emoji, stamps)"),
    "train-captioner": ("distill.prefix_training:main", "a small captioner for a pairs folder, from its captions and a teacher"),
    "caption": ("distill.captioning:main", "write captions of a pairs folder with a captioner"),
    "reinforce": ("distill.reinforce:main", "store what teachers know about a pairs folder"),
    "import-datacompdr": ("distill.datacompdr:main", "turn DataCompDR's published shards into a store for one's own pictures"),
    "curate": ("distill.curate:main", "choose pairs by rules: duplicates, captions, stored similarity"),
    "pilot": ("distill.pilot:main", "choose teachers and settings on a small share of the pairs, by the student's recall"),
    "train": ("distill.train:main", "train a student from pairs and a store"),
    "average": ("distill.weight_average:main", "a model between a checkpoint and what was fine-tuned from it"),
    "train-languages": ("distill.languages:main", "teach a text tower more languages, with texts alone"),
    "eval": ("distill.evaluate:main", "retrieval and zero-shot figures of a checkpoint or bundle"),
    "compress": ("export.compress:main", "prune a checkpoint and recover it from the store"),
    "export": ("export.bundle:main", "convert a checkpoint to a proven bundle"),
    "verify": ("runtime.shell:verify", "run a bundle's parity gate on this machine"),
    "inspect": ("mobileclip.inspection:main", "say what a folder or file is, and check its hashes"),
    "convert": ("mobileclip.conversion:main", "rewrite weights in Apple's, open_clip's, timm's or our layout"),
    "models": ("mobileclip.catalogue:main", "list the model presets"),
    "embed": ("runtime.shell:embed", "embeddings of pictures and texts"),
    "classify": ("runtime.shell:classify", "probabilities of labels for a picture"),
    "classes": ("runtime.shell_classes:classes", "put a table of classes into a bundle, on wish without the text tower"),
    "index": ("runtime.shell_index:index", "bring a photo index up to date with folders of pictures"),
    "search": ("runtime.shell:search", "find pictures by text"),
    "adapt": ("runtime.shell_index:adapt", "let a new model's queries search what an old model embedded"),
    "bench": ("benchmarks.latency:main", "measure a bundle on this device"),
    "compare": ("benchmarks.comparison:main", "two finished results files, unpaired"),
    "import-results": ("benchmarks.importers:main", "results of trtexec, LiteRT, onnxruntime_perf_test or Qualcomm AI Hub as results of ours"),
    "report": ("benchmarks.report:main", "turn results into one HTML page"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns 0 done, 1 refused or failed check, 2 wrong use, 130 interrupted and resumable."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        sys.stdout.write(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from mobileclip import __version__

        sys.stdout.write(f"mclip {__version__}\n")
        return 0
    if argv[0] not in VERBS:
        sys.stderr.write(f"error: unknown verb '{argv[0]}'; known verbs are {', '.join(VERBS)}\n")
        return 2
    # Two OpenMP runtimes that spin on two cores slow each other down by an order of magnitude; must be set before torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=os.environ.get("MCLIP_LOG", "WARNING").upper(), format="%(levelname)s %(name)s: %(message)s")
    return run_verb(argv[0], argv[1:])


def run_verb(verb: str, argv: list[str]) -> int:
    from runtime.errors import ClipError, MissingExtraError

    module, function = VERBS[verb][0].split(":")
    try:
        return int(getattr(importlib.import_module(module), function)(argv))
    except ClipError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("distill", "export", "mobileclip", "runtime", "benchmarks"):
            raise
        missing = MissingExtraError(str(error.name), EXTRAS.get(verb, "all"), f"mclip {verb}")
        sys.stderr.write(f"error: {missing}\n")
        return 1
    except Exception as error:
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        sentence = of_the_machine(error)
        if sentence is None:
            raise
        logging.getLogger(__name__).debug("where it happened", exc_info=True)
        sys.stderr.write(f"error: {sentence}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue\n")
        return 130


def of_the_machine(error: BaseException) -> str | None:
    """A sentence for what a disk or the memory does to any command; None for every other error, which is one of ours."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if isinstance(error.filename, str) and error.filename.isprintable() else ""
        what = f"{where}{error.strerror or error}"
        return f"{what}; what was finished is kept: see to the disk, its room and permissions, and run the same command again (MCLIP_LOG=debug tells where)"
    if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):  # compiled code has errors of its own for the same
        return f"{error}; what was finished is kept: see to the disk, its room and permissions, and run the same command again (MCLIP_LOG=debug tells where)"
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error):
        return "the memory does not suffice; what was finished is kept: take less at a time (a smaller batch, fewer threads or workers), or run it where there is more"
    return None


EXTRAS = {
    "sample": "sample", "convert": "train", "average": "train", "train-languages": "train", "train-captioner": "train", "caption": "train",
    "reinforce": "train", "curate": "train", "pilot": "train", "train": "train", "eval": "train", "compress": "export", "export": "export",
    "bench": "bench", "compare": "bench", "import-results": "bench", "report": "bench", "demo": "all",
}  # fmt: skip


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb.ljust(width)}  {text}" for verb, (_, text) in VERBS.items()]
    return "usage: mclip VERB ...\n\n" + "\n".join(lines) + "\n\nmclip VERB --help tells more.\n"


if __name__ == "__main__":
    sys.exit(main())
