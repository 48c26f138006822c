"""The report of a results folder that the test writes: finished, leaky, interrupted, and with hostile names."""

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from ser_ray import config
from ser_ray.evaluation.baselines import chance, majority
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.evaluation.results import read_history, read_results
from ser_ray.evaluation.summary import summarise
from ser_ray.report import build, main, print_summary, show
from ser_ray.schema import Predictions, UserError

HOSTILE = '<script>alert("x")</script> $\\frac{[red]'
SPACE = {
    "experiment": {
        "name": "ravdess-whisper",
        "corpora": {"ravdess": "data/ravdess", "emodb": "data/emodb"},
        "backbone": "openai/whisper-base",
        "protocol": {"scheme": "speaker_kfold", "folds": 6, "fold": 0},
    },
    "search": {"adapter.rank": {"choice": [4, 8, 16]}, "optimizer.lr": {"loguniform": [1e-5, 1e-3]}},
}
TRIALS = (  # not in the order of their dev UAR; 0007 and 1e10 must stay as they are
    {"trial_id": "0007", "status": "stopped", "adapter.rank": 4, "optimizer.lr": 2.5e-5, "dev_uar": 0.41},
    {"trial_id": "1e10", "status": "finished", "adapter.rank": 16, "optimizer.lr": 3.14159e-4, "dev_uar": 0.713},
    {"trial_id": "broken", "status": "failed", "adapter.rank": 8, "optimizer.lr": 9e-4, "dev_uar": ""},
    {"trial_id": "second", "status": "finished", "adapter.rank": 8, "optimizer.lr": 1.2e-4, "dev_uar": 0.688},
)
DEV_UAR = {"0007": [0.2, 0.41], "1e10": [0.3, 0.5, 0.64, 0.713], "second": [0.28, 0.55, 0.688]}


def _predictions(seed, n=140, speakers=5):
    emotions = config.Experiment.model_fields["emotions"].default
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, len(emotions) - 1, n)  # nobody is surprised
    logits = rng.standard_normal((n, len(emotions))) + 2 * np.eye(len(emotions))[labels]
    speakers = tuple(f"{'ravdess' if i % 2 else 'emodb'}/{i % (2 * speakers):02}" for i in range(n))
    return Predictions(
        emotions=emotions,
        utterance_ids=tuple(f"{speaker}-{i}" for i, speaker in enumerate(speakers)),
        corpora=tuple(speaker.partition("/")[0] for speaker in speakers),
        speakers=speakers,
        labels=labels,
        probabilities=np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True),
    )


def _write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_search(folder: Path, leaky=False, detail="none") -> Path:
    """What there is while trials are running."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.yaml").write_text(config.dump(config.SearchSpace.model_validate(SPACE)))
    provenance = {
        "version": "0.1.0",
        "argv": ["tune", "search spaces/reference.yaml"],
        "started": "2026-01-05 09:00",
        "finished": None,
        "host": HOSTILE,
        "python": "3.11.9",
        "packages": {"torch": "2.14.1", "ray": "2.60.0"},
        "gpus": ["H100"],
        "seed": 0,
        "data": [{"corpus": "ravdess", "fingerprint": "abc123", "utterances": 1440, "hours": 1.48, "rejected": 1}],
    }
    _write_json(folder / "provenance.json", provenance)
    splits = {
        s: {"utterances": n, "speakers": 10, "emotions": {"angry": n}} for s, n in (("train", 900), ("test", 140))
    }
    finding = {"level": "leak" if leaky else "note", "what": "the same audio twice", "detail": detail}
    _write_json(folder / "audit.json", {"leaky": leaky, "findings": [finding], "splits": splits})
    constant = {"dev_accuracy": 0.7, "dev_macro_f1": 0.69, "dev_kappa": 0.64, "peak_memory_mb": 2048.0}
    rows = [constant | {"epochs": 4, "seconds": 4000, "best_epoch": 3, "checkpoint": ""} | row for row in TRIALS]
    with (folder / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[1]))
        writer.writeheader()
        writer.writerows(rows)
    for trial, values in DEV_UAR.items():
        history = folder / "trials" / trial / "history.jsonl"
        history.parent.mkdir(parents=True)
        lines = [
            {"epoch": e, "train_loss": None if e == 0 else 2 / (e + 1), "dev_loss": 2.1 / (e + 1), "dev_uar": value}
            for e, value in enumerate(values)
        ]
        history.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_results(folder: Path, leaky=False, detail="none") -> Path:
    """A finished search: the above and an evaluation of the winner."""
    write_search(folder, leaky, detail)
    protocol = SPACE["experiment"]["protocol"]
    test = _predictions(seed=1)
    baselines = {"chance": chance(7), "majority": majority(np.array([3, 3, 1]), test.labels, 7)}
    _write_json(folder / "evaluation/dev.json", summarise(_predictions(seed=0), protocol, leaky))
    _write_json(folder / "evaluation/test.json", summarise(test, protocol, leaky) | {"baselines": baselines})
    choice = {"trial_id": "second", "finalists": [{"trial_id": "second", "dev_uar": 0.72}], "why": "best rescored UAR"}
    _write_json(folder / "evaluation/choice.json", choice)
    _write_json(folder / "evaluation/test_openings.json", [{"when": "2026", "trial_id": "second", "argv": []}])
    (folder / "best").mkdir()
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished search with its report, for tests that only read."""
    folder = write_results(tmp_path_factory.mktemp("finished") / "search")
    build(folder)
    return folder


class _Page(HTMLParser):
    """The text of a page, its elements, and whether every element that opens is closed."""

    VOID = ("meta", "br", "img", "link", "use", "path", "defs")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.words, self.elements, self.open = path.read_text(encoding="utf-8"), [], [], []
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)

    def count(self, tag):
        return sum(1 for name, _ in self.elements if name == tag)


def _printed(folder: Path, width=160) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_summary(folder, console)
    return console.file.getvalue()


def test_page_holds_the_answer(finished):
    page = _Page(finished / "report.html")
    assert page.open == []
    test = json.loads((finished / "evaluation/test.json").read_text())
    for name in HEADLINE:
        low, high = test["ci95"][name]
        assert f"{test[name]:.3f} [{low:.3f}, {high:.3f}]" in page.text, name
    assert "Chosen: second" in page.text
    assert "Speaker-disjoint" in page.text
    assert "LEAKY" not in page.text
    assert "The test set was opened once." in page.text
    assert "chance 0.143" in page.text
    assert "ser-ray tune 'search spaces/reference.yaml'" in page.text
    for speaker in test["per_speaker"]:
        assert speaker in page.text
    assert page.count("svg") == 3
    read_aloud = [attributes.get("aria-label") for _, attributes in page.elements]
    assert {"confusion matrix test", "confusion matrix dev", "learning curves"} <= set(read_aloud)


def test_page_opens_offline(finished):
    page = _Page(finished / "report.html")
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert "@import" not in page.source
    assert "url(http" not in page.source


def test_trials_are_listed_best_first_and_ids_stay_as_they_are(finished):
    assert [row["trial_id"] for row in read_results(finished).trials] == ["1e10", "second", "0007", "broken"]
    page = _Page(finished / "report.html")
    table = page.text[page.text.index("Trials") :]
    assert table.index("1e10") < table.index("second") < table.index("0007") < table.index("broken")
    assert "1e10 finished 4 1 h 07 min 16 0.000314" in table


def test_figures_are_written_as_png(finished):
    for name in ("evaluation/confusion_dev.png", "evaluation/confusion_test.png", "learning_curves.png"):
        image = imread(finished / name)
        assert min(image.shape[:2]) > 500
        assert image[0, 0, :3].tolist() == [1, 1, 1]  # on white
        assert image[..., :3].std() > 0.05  # and not empty
    assert not list(finished.rglob("*.part"))


def test_names_are_escaped_everywhere(tmp_path):
    folder = write_results(tmp_path / "search", detail=HOSTILE)
    for split in ("dev", "test"):
        path = folder / "evaluation" / f"{split}.json"
        path.write_text(path.read_text().replace("surprised", json.dumps(HOSTILE)[1:-1]))
    with (folder / "trials.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["", "", "", "", 1, 1, 1, "", HOSTILE, HOSTILE, HOSTILE, HOSTILE, 0.1])
    page = _Page(build(folder))
    assert page.count("script") == 1
    assert HOSTILE in page.text  # as text, where it was markup
    assert "[red]" in _printed(folder)


def test_a_leaky_search_is_stamped(tmp_path):
    folder = write_results(tmp_path / "search", leaky=True)
    page = _Page(build(folder))
    assert "LEAKY" in page.text
    assert "Speaker-disjoint" not in page.text
    assert "LEAKY" in _printed(folder)


def test_a_second_opening_of_the_test_set_is_said(tmp_path):
    folder = write_results(tmp_path / "search")
    _write_json(folder / "evaluation/test_openings.json", [{"trial_id": "second"}] * 3)
    assert "The test set was opened 3 times." in _Page(build(folder)).text
    assert "opened 3 times" in _printed(folder)


def test_an_interrupted_search_shows_what_there_is(tmp_path):
    folder = write_search(tmp_path / "search")
    page = _Page(build(folder))
    assert "No test figures." in page.text
    assert "Best so far: 1e10" in page.text
    assert page.count("svg") == 1
    assert not (folder / "evaluation").exists()
    printed = _printed(folder)
    assert "no test figures yet" in printed
    assert "best so far: 1e10" in printed


def test_a_search_that_has_not_begun_shows_that(tmp_path):
    (tmp_path / "search.yaml").write_text(config.dump(config.SearchSpace.model_validate(SPACE)))
    assert "None has begun." in _Page(build(tmp_path)).text
    assert "0 trials" in _printed(tmp_path)


def test_summary_in_the_terminal(finished):
    printed = _printed(finished)
    test = json.loads((finished / "evaluation/test.json").read_text())
    low, high = test["ci95"]["uar"]
    assert f"{test['uar']:.3f} [{low:.3f}, {high:.3f}]" in printed
    assert "* second" in printed
    assert "chosen: second" in printed
    assert "adapter.rank: 8\n" in printed
    assert "majority" in printed
    assert "the test set was opened once" in printed
    assert str(finished / "best") in printed
    assert str(finished / "report.html") in printed


def test_command_writes_the_page_and_prints_where(tmp_path, capsys):
    folder = write_results(tmp_path / "search")
    assert main([str(folder)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    assert (folder / "report.html").is_file()


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="no results folder"):
        main([str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("provenance.json", "{", "not readable as JSON"),
        ("trials.csv", "a,b\n1,2\n", "no column trial_id"),
        ("trials/1e10/history.jsonl", '{"loss": 1}\n', "a line is no epoch"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    folder = write_search(tmp_path / "search")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=f"{Path(name).name}: .*{message}"):
        build(folder)


def test_history_takes_the_last_line_of_an_epoch_and_drops_one_cut_off(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"epoch": 1, "x": 1}\n{"epoch": 2, "x": 2}\n{"epoch": 1, "x": 3}\n{"epoch": 3, "x"')
    assert read_history(path) == [{"epoch": 1, "x": 3}, {"epoch": 2, "x": 2}]
    path.write_text('{"epoch": 1, "x": 1}')  # complete, though the line is not ended
    assert read_history(path) == [{"epoch": 1, "x": 1}]


@pytest.mark.parametrize(("method", "has_rank"), [("qlora", True), ("full", False)])
def test_rank_is_shown_only_where_there_is_lora(tmp_path, method, has_rank):
    space = {**SPACE, "search": {"adapter.method": {"choice": ["qlora", "full"]}}}
    (tmp_path / "search.yaml").write_text(config.dump(config.SearchSpace.model_validate(space)))
    (tmp_path / "trials.csv").write_text(f"trial_id,status,adapter.method,dev_uar\n1,finished,{method},0.5\n")
    chosen = read_results(tmp_path).chosen_config
    assert chosen["adapter.method"] == method
    assert ("adapter.rank" in chosen) is has_rank


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("trial_id", "0012", "0012"),
        ("optimizer.lr", "0.000312987", "0.000313"),
        ("dev_uar", 0.71249, "0.712"),
        ("trainable_parameters", "1186823", "1,186,823"),
        ("seconds", "7199", "2 h 00 min"),
        ("seconds", 90, "1.5 min"),
        ("dev_uar", "nan", "nan"),
        ("adapter.targets", None, "-"),
        ("best_epoch", 0, "0"),
    ],
)
def test_show(key, value, shown):
    assert show(key, value) == shown
