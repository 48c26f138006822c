"""The ``ser-ray`` command: a table of the verbs, each imported only when it is called.

``--help`` loads neither torch nor Ray.
"""

from __future__ import annotations

import importlib
import os
import sys

from ser_ray import __version__, disk
from ser_ray.schema import UserError

VERBS = {
    "prepare": "SPACE.yaml [key=value ...]      corpora -> checked 16 kHz shards",
    "audit": "SPACE.yaml [key=value ...]      what crosses the splits: speakers, recordings, versions of one take",
    "train": "SPACE.yaml [key=value ...] [--dry-run]   one trial; resources.workers=0: in this process, for a debugger",
    "tune": "[SPACE.yaml] [key=value ...] [--dry-run]   search, evaluate, report; without a file: the embedded demo",
    "evaluate": "RESULTS_DIR                     score the finalists on dev, choose, open the test set",
    "report": "RESULTS_DIR...                  tables, figures, report.html from what is there; several: side by side",
    "rerun": "RESULTS_DIR [key=value ...]     the same search again, and by how much its figures differ",
    "cache": "SPACE.yaml [key=value ...]      what frozen layers compute, once for all trials (tune does it as needed)",
    "premium": "SPACE.yaml [key=value ...]      what shared speakers add: random against disjoint splits",
    "fetch": "SPACE.yaml [--to DIR]           backbones into a cache that compute nodes without internet read",
    "predict": "CHECKPOINT AUDIO... [--format table|jsonl|csv] [--output FILE]   files or folders -> emotions",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 failed, 2 bad configuration or input, said in one line."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    wants_help = any(argument in ("-h", "--help") for argument in arguments)
    if wants_help or not arguments:
        print(_usage(arguments[0] if arguments and arguments[0] in VERBS else None))
        return 0 if wants_help else 2
    if "--verbose" in arguments:
        arguments = [argument for argument in arguments if argument != "--verbose"]
        os.environ["SER_RAY_VERBOSE"] = "1"
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"ser-ray: unknown command {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        code: int = importlib.import_module(f"ser_ray.{verb}").main(rest)
        return code
    except UserError as error:
        print(f"ser-ray {verb}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if (line := disk.explain(error)) is None:
            raise
        print(f"ser-ray {verb}: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nser-ray {verb}: interrupted; the same command continues", file=sys.stderr)
        return 130


def _usage(verb: str | None) -> str:
    shown = {verb: VERBS[verb]} if verb else VERBS
    lines = [f"  ser-ray {name:9} {text}" for name, text in shown.items()]
    return "\n".join(
        [
            "usage (python -m ser_ray.<command> is the same):",
            *lines,
            "",
            "A space is one YAML file; any of its keys is overridden by key=value, such as experiment.epochs=3.",
            "--dry-run prints the plan (trials at once, GPUs in use and idle, steps, caches) and trains nothing.",
            "--verbose shows Ray's own logs as well.",
            "Exit codes: 0 done, 1 failed, 2 bad configuration or input, 130 interrupted.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
