"""The ``ser-ray`` command: every verb with its arguments, and nothing of what it does.

A verb's module is imported when the verb is called: ``--help`` loads neither torch nor Ray. Built with Typer, which
transformers brings along anyway: help, checked arguments and shell completion come from the signatures below.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ser_ray import __version__, disk
from ser_ray.schema import UserError
from ser_ray.terminal import one_line

RENAMED = {"premium": "leakage"}
"""Old names of verbs, which still work."""
COMPLETE = "_SER_RAY_COMPLETE"
"""Set by the completion that ``ser-ray --install-completion`` installs."""
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 bad configuration or input (one line says which), 130 interrupted."

app = typer.Typer(
    name="ser-ray",
    help="Experiments in speech emotion recognition: search, fine-tune, evaluate, report. "
    "A search space is one YAML file; any of its keys is overridden by key=value, such as experiment.epochs=3. "
    "python -m ser_ray.VERB is the same as ser-ray VERB (but for config and new).",
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


Space = Annotated[Path, typer.Argument(metavar="SPACE.yaml", help="The search space.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="key=value", help="Keys of it to set, such as experiment.epochs=3.")
]
Results = Annotated[Path, typer.Argument(metavar="RESULTS_DIR", help="The folder of a search: results/NAME.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A directory such as results/demo/best.")]
Backbone = Annotated[
    str | None, typer.Option(metavar="DIR", help="Where the checkpoint's backbone is now, if that has moved.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan (trials at once, GPUs, steps, caches) and stop.")
]


def _epilog(*examples: str) -> str:
    lines = "\n\n".join(f"`{example}`" for example in examples)
    return f"Examples:\n\n{lines}\n\n{EXIT_CODES}"


def _call(verb: str, *arguments: object, **options: object) -> int:
    was_enabled = gc.isenabled()
    gc.disable()  # imports make no garbage to speak of, and looking for it takes a second
    try:
        module = importlib.import_module(f"ser_ray.{verb}")
    finally:
        if was_enabled:
            gc.enable()
    return int(module.main(*arguments, **options))


@app.callback()
def _ser_ray(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show Ray's logs, start its dashboard; anywhere in the line.")
    ] = False,
) -> None:
    if verbose:
        os.environ["SER_RAY_VERBOSE"] = "1"


@app.command(epilog=_epilog("ser-ray new demo > mine.yaml", "ser-ray new ravdess_whisper"))
def new(name: Annotated[str, typer.Argument(metavar="NAME", help="One of `ser-ray spaces`.")]) -> int:
    """Print a built-in search space with its comments, as a start for your own."""
    return _call("spaces", name)


@app.command(epilog=_epilog("ser-ray spaces", "ser-ray new demo > mine.yaml"))
def spaces() -> int:
    """List the built-in search spaces: what each is for, what it needs and takes."""
    return _call("spaces")


@app.command(epilog=_epilog("ser-ray config adapter.rank", "ser-ray config optimizer mine.yaml experiment.epochs=3"))
def config(
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="A key or a section; all keys without it.")] = None,
    space: Annotated[Path | None, typer.Argument(metavar="SPACE.yaml", help="Show its values as well.")] = None,
    overrides: Overrides = None,
) -> int:
    """Explain keys of the configuration: meaning, type, default and reason; with a file, its values."""
    return _call("explain", key, space, overrides or [])


@app.command(
    epilog=_epilog("ser-ray table recordings > mine.csv", "ser-ray table calls --pattern '{speaker}_{emotion}_{}.wav'")
)
def table(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of recordings.")],
    pattern: Annotated[
        str | None,
        typer.Option(help="How they are named: '{speaker}_{emotion}_{text}.wav', with folders: '{emotion}/*.wav'."),
    ] = None,
) -> int:
    """Make a table of a folder: emotion and speaker from folders and names, to check before training."""
    return _call("table", directory, pattern)


@app.command(epilog=_epilog("ser-ray prepare mine.yaml", "ser-ray prepare mine.yaml experiment.audio.trim_db=null"))
def prepare(
    space: Annotated[
        Path | None, typer.Argument(metavar="SPACE.yaml", help="The search space, default the demo.")
    ] = None,
    overrides: Overrides = None,
) -> int:
    """Decode and check the corpora: 16 kHz shards, made once, and made again only where something changed."""
    return _call("prepare", space, overrides or [])


@app.command(epilog=_epilog("ser-ray audit mine.yaml", "ser-ray audit mine.yaml experiment.protocol.scheme=random"))
def audit(space: Space, overrides: Overrides = None) -> int:
    """Look for what crosses the splits: speakers, recordings, versions of one recording, absent emotions."""
    return _call("audit", space, overrides or [])


@app.command(epilog=_epilog("ser-ray cache mine.yaml", "ser-ray cache mine.yaml storage.prefix_gb=200"))
def cache(space: Space, overrides: Overrides = None) -> int:
    """Compute the features of frozen layers, once for all trials (tune does it as needed)."""
    return _call("cache", space, overrides or [])


@app.command(
    epilog=_epilog("ser-ray train mine.yaml", "ser-ray train mine.yaml resources.workers=0 experiment.epochs=1")
)
def train(space: Space, overrides: Overrides = None, dry_run: DryRun = False) -> int:
    """Train the one experiment of a space; resources.workers=0 trains in this process, for a debugger."""
    return _call("train", space, overrides or [], dry_run=dry_run)


@app.command(epilog=_epilog("ser-ray tune", "ser-ray tune mine.yaml tune.trials=24 --dry-run"))
def tune(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="SPACE.yaml key=value", help="The search space, default the embedded demo; keys."),
    ] = None,
    dry_run: DryRun = False,
) -> int:
    """Search, evaluate and report. The same command continues a search that was interrupted."""
    given = arguments or []
    has_space = bool(given) and "=" not in given[0]
    return _call("tune", Path(given[0]) if has_space else None, given[has_space:], dry_run=dry_run)


@app.command(epilog=_epilog("ser-ray evaluate results/demo", "ser-ray report results/demo"))
def evaluate(results: Results) -> int:
    """Score the finalists on dev, choose one, open the test set for it."""
    return _call("evaluate", results)


@app.command(
    epilog=_epilog("ser-ray report results/demo", "ser-ray report results/one results/other --output both.html")
)
def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS_DIR", help="One folder, or several to compare.")],
    no_audio: Annotated[
        bool, typer.Option("--no-audio", help="Leave recordings out: a smaller page, which may be published.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Of several: the page. Default: comparison.html above them all.")
    ] = None,
) -> int:
    """Write report.html from what is there, or compare several searches; print the summary."""
    return _call("report", results, audio=not no_audio, output=output)


@app.command(epilog=_epilog("ser-ray rerun results/demo", "ser-ray rerun results/demo storage.results=/tmp/again"))
def rerun(results: Results, overrides: Overrides = None) -> int:
    """Run the same search again, and say by how much its metrics differ."""
    return _call("rerun", results, overrides or [])


@app.command(
    epilog=_epilog(
        "ser-ray distil results/mine --student embedded/tiny-whisper",
        "ser-ray distil results/mine --student embedded/tiny-whisper --speech calls/ experiment.epochs=60",
    )
)
def distil(
    results: Results,
    student: Annotated[
        str, typer.Option(metavar="BACKBONE", help="Of the student: at most 2 million parameters with its head.")
    ],
    overrides: Overrides = None,
    speech: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of recordings without labels to train on as well.")
    ] = None,
) -> int:
    """Train a small student on the probabilities of a search's winner, evaluate it, and compare the two."""
    return _call("distil", results, student, overrides or [], speech=speech)


@app.command(epilog=_epilog("ser-ray leakage mine.yaml", "ser-ray leakage mine.yaml experiment.protocol.folds=4"))
def leakage(space: Space, overrides: Overrides = None) -> int:
    """Measure what shared speakers add: the same experiment under random and speaker-disjoint splits."""
    return _call("leakage", space, overrides or [])


@app.command(epilog=_epilog("ser-ray fetch mine.yaml", "ser-ray fetch mine.yaml --to /shared/hub"))
def fetch(
    space: Space,
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option(help="The cache directory. Default: Hugging Face's own.")] = None,
) -> int:
    """Download the backbones of a space, for compute nodes without internet."""
    return _call("fetch", space, overrides or [], to=to)


@app.command(
    epilog=_epilog(
        "ser-ray predict results/demo/best call.wav", "ser-ray predict results/demo/best calls/ --format csv"
    )
)
def predict(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A directory such as results/demo/best, or a model.onnx of it.")
    ],
    audio: Annotated[
        list[Path], typer.Argument(metavar="AUDIO", help="Files, folders that are searched for audio, - for a pipe.")
    ],
    format: Annotated[Literal["table", "jsonl", "csv"], typer.Option(help="How predictions are written.")] = "table",
    output: Annotated[Path | None, typer.Option(help="A file to write to. Default: the terminal.")] = None,
    backbone: Backbone = None,
    voice: Annotated[
        Path | None, typer.Option(help="What is known of the one speaker of all AUDIO: a file of `ser-ray enrol`.")
    ] = None,
    enrol: Annotated[
        Literal["self"] | None,
        typer.Option(
            help="self: AUDIO is a table (path, speaker), whose speakers are known by their other recordings."
        ),
    ] = None,
    sets: Annotated[
        bool, typer.Option("--sets", help="With each answer a set that holds the true emotion in 90 % of the cases.")
    ] = False,
) -> int:
    """Predict the emotion of recordings, with the probability of each."""
    options = {"output": output, "backbone": backbone, "voice": voice, "enrol": enrol is not None, "sets": sets}
    return _call("predict", checkpoint, audio, format=format, **options)


@app.command(
    epilog=_epilog(
        "ser-ray enrol results/mine/best anna/ --output anna.json",
        "ser-ray predict results/mine/best call.wav --voice anna.json",
    )
)
def enrol(
    checkpoint: Checkpoint,
    audio: Annotated[
        list[Path], typer.Argument(metavar="AUDIO", help="Recordings of one speaker: files, and folders of them.")
    ],
    output: Annotated[Path, typer.Option(help="The file to write: numbers, no audio.")],
    name: Annotated[str, typer.Option(help="Who it is; written to the file.")] = "",
    backbone: Backbone = None,
) -> int:
    """Make a speaker known by recordings without labels, for predict --voice."""
    return _call("enrol", checkpoint, audio, output, name=name, backbone=backbone)


@app.command(
    epilog=_epilog(
        "ser-ray serve results/demo/best", "ser-ray serve results/demo/best --host 0.0.0.0 --key-file keys.txt"
    )
)
def serve(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT", help="Directories such as results/demo/best.")
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen on; one that other machines reach needs --key-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    replicas: Annotated[str, typer.Option(help="Processes with the model; auto: by load.")] = "auto",
    key_file: Annotated[
        Path | None, typer.Option(help="Who may ask: a line for each client, with a name, a space and a key.")
    ] = None,
    config: Annotated[bool, typer.Option("--config", help="Print a file for `serve deploy`, and stop.")] = False,
    limit: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="A limit of a request or a client: seconds=60.")
    ] = None,
) -> int:
    """Answer over HTTP with one or more checkpoints: recordings, and speech as it is spoken."""
    options = {"host": host, "port": port, "replicas": replicas, "key_file": key_file, "config": config}
    return _call("serve", checkpoints, **options, limits=limit or [])


@app.command(
    epilog=_epilog(
        "ser-ray export results/demo/best --to hf",
        "ser-ray export results/demo/best --to onnx --dtype int8",
    )
)
def export(
    checkpoint: Checkpoint,
    to: Annotated[
        Literal["hf", "onnx", "audonnx", "page", "peft"],
        typer.Option(
            help="hf: a directory for transformers' pipeline. onnx: one file for any ONNX runtime. audonnx: the same "
            "for audEERING's audonnx. page: a web page that answers by itself. peft: the adapter alone, with a card."
        ),
    ],
    dtype: Annotated[
        Literal["fp32", "fp16", "int8"], typer.Option(help="How its weights are held; not every format has all.")
    ] = "fp32",
    output: Annotated[
        Path | None, typer.Option(help="The new folder. Default: beside the checkpoint, such as best-hf.")
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Upload it to the hub of Hugging Face as well.")
    ] = None,
    backbone: Backbone = None,
    ort: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For page: the folder of onnxruntime-web, from npm.")
    ] = None,
) -> int:
    """Write a checkpoint for other programs, and prove that it answers as predict does."""
    options = {"output": output, "push": push, "backbone": backbone, "ort": ort}
    return _call("export", checkpoint, to, dtype=dtype, **options)


def _run(arguments: list[str]) -> int:
    """Parse and call. Not by calling ``app``: that takes an interrupt, and some errors of a verb, for its own."""
    try:
        command = typer.main.get_command(app)
        with command.make_context("ser-ray", arguments) as context:
            code: int | None = command.invoke(context)
    except typer.Exit as end:  # help was shown
        return end.exit_code
    return code or 0


VERBS = tuple(command.callback.__name__ for command in app.registered_commands if command.callback)


def _as_path(argument: str) -> str:
    """An argument as it is; a file of this directory whose name begins with a dash is no option."""
    return f"./{argument}" if argument[:1] == "-" and os.path.isfile(argument) else argument  # noqa: PTH113


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0 done, 1 failed, 2 bad configuration or input, said in one line."""
    atexit.register(gc.freeze)  # the system frees memory at once; to take all modules apart takes another second
    arguments = [_as_path(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    if arguments[:1] == ["--version"]:
        print(__version__)
        return 0
    if "--verbose" in arguments:
        arguments = ["--verbose", *(argument for argument in arguments if argument != "--verbose")]
    name = next((argument for argument in arguments if not argument.startswith("-")), "")
    if name in RENAMED:
        print(f"ser-ray {name} is called ser-ray {RENAMED[name]} now", file=sys.stderr)
        arguments = [RENAMED[name] if argument == name else argument for argument in arguments]
        name = RENAMED[name]
    said = f"ser-ray {name}".strip()
    if COMPLETE in os.environ:  # asked by the shell, for what may follow
        app(prog_name="ser-ray")
    try:
        if name not in ("predict", "enrol") and (
            bad := [one for one in arguments if one != os.fsencode(one).decode(errors="replace")]
        ):
            raise UserError(f"{disk.readable(bad[0])}: this name is not UTF-8, as records and Ray need it; rename it")
        return _run(arguments) if arguments else (_run(["--help"]) or 2)
    except UserError as error:
        first, *others = error.args
        print("\n".join(one_line(str(line)) for line in (f"{said}: {first}", *others)), file=sys.stderr)
        return 2
    except typer.TyperException as error:
        help_of = f"ser-ray {name} --help" if name in VERBS else "ser-ray --help"
        print(one_line(f"{said}: {error.format_message()} See {help_of}"), file=sys.stderr)
        return 2
    except OSError as error:
        if (line := disk.explain(error)) is None:
            raise
        print(one_line(f"{said}: {line}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{said}: interrupted; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
