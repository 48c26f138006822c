"""The report of a results folder that the test writes: finished, leaky, interrupted, with hostile names."""

import csv
import dataclasses
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from matplotlib.image import imread
from report_fixtures import (
    HOSTILE,
    SPACE,
    Page,
    point_to_speech,
    predictions,
    printed,
    write_everything,
    write_export,
    write_json,
    write_results,
    write_search,
    write_speech,
    write_trials,
)
from typer.main import get_command

from ser_ray import config
from ser_ray.__main__ import app
from ser_ray.evaluation import calibration
from ser_ray.evaluation.metrics import HEADLINE
from ser_ray.evaluation.mistakes import most_confident
from ser_ray.evaluation.page import commands, show
from ser_ray.evaluation.results import read_history, read_results
from ser_ray.evaluation.summary import write_predictions
from ser_ray.report import build, main
from ser_ray.schema import UserError


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished search with its report, for tests that only read."""
    folder = write_results(tmp_path_factory.mktemp("finished") / "search")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    """A search that left everything, its speech included, with its report."""
    root = tmp_path_factory.mktemp("complete")
    folder = write_everything(root / "search")
    point_to_speech(folder, write_speech(root / "speech", predictions(seed=1).utterance_ids))
    build(folder)
    return folder


def test_page_holds_the_answer(finished):
    page = Page(finished / "report.html")
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
    assert "ser-ray rerun results/search" in page.text
    assert page.read_aloud() == {
        "confusion matrix test",
        "confusion matrix dev",
        "learning curves",
        "parallel coordinates of the trials",
        "cost of the trials",
    }
    for absent in ("Finalists,", "run by run", "Importance of", "The most confident mistakes", "published"):
        assert (absent in page.text) is (absent == "Finalists,"), absent


def test_page_opens_offline(complete):
    page = Page(complete / "report.html")
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in page.source
    assert "url(http" not in page.source


def test_trials_are_listed_best_first_and_ids_stay_as_they_are(finished):
    assert [row["trial_id"] for row in read_results(finished).trials] == ["1e10", "second", "0007", "broken"]
    page = Page(finished / "report.html")
    table = page.text[page.text.index("Trials") :]
    assert table.index("1e10") < table.index("second") < table.index("0007") < table.index("broken")
    assert "1e10 finished 4 1 h 07 min 16 0.000314" in table


def test_everything_that_a_search_leaves_is_shown(complete):
    page = Page(complete / "report.html")
    assert page.open == []
    assert "On test it beats the frozen backbone + linear by 4.1 points UAR [1.0, 7.2], p < 0.001." in page.text
    runner_up = "On dev it does not beat the runner-up, trial 1e10: +0.3 points UAR [-1.3, +0.7], p = 0.30."
    assert runner_up in page.text
    highest = "HuBERT-large, frozen, the highest of 2 published results (0.700, EmoBox, table 4; 6 folds)"
    published = f"1.2 points UAR above {highest}"
    assert published in page.text
    test = json.loads((complete / "evaluation/test.json").read_text())
    low, high = test["ci95"]["uar"]
    assert f"test UAR 0.712 pooled {test['uar']:.3f} [{low:.3f}, {high:.3f}]" in page.text
    assert "Large numbers: the mean over 3 runs" in page.text
    assert "test, mean of 3 runs" in page.text
    assert "gives UAR 0.735 on test, the mean over 3 folds; a single seed gives 0.712 on average." in page.text
    assert "test, seeds averaged, mean of folds" in page.text
    assert "frozen backbone + linear 0." in page.text
    assert "0.671 [0.640, 0.690]" in page.text
    assert "0 0 47 " in page.text[page.text.index("Test, run by run") :]
    assert "second 0.720 0.700 0.700 0.600 3 0.700 0.710 0.720 7" in page.text  # a finalist
    assert "reliability diagram" in page.read_aloud()
    assert runner_up in printed(complete)


def test_calibration_sets_and_abstention_are_shown(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "search")
    dev, test = predictions(seed=0), predictions(seed=1)
    dev = dataclasses.replace(dev, utterance_ids=tuple(f"dev-{i}" for i in dev.utterance_ids))
    record = calibration.record_of(calibration.fitted(dev), [dev], [test])
    write_json(folder / "evaluation/calibration.json", record)
    build(folder, audio=False)
    page = Page(folder / "report.html")
    assert page.open == []
    for sentence in calibration.sentences(record):
        assert sentence in page.text
        assert sentence in " ".join(printed(folder).split())
    error, held = record["test"]["ece"], record["test"]["sets"]
    cells = [f"{error[when]['value']:.3f} [{error[when]['ci95'][0]:.3f}, " for when in ("before", "after")]
    assert all(cell in page.text for cell in cells)
    assert f"{100 * held['coverage']:.1f} % [{100 * held['ci95'][0]:.1f}" in page.text
    by_speaker = page.text[page.text.index("Sets by speaker, test") :]
    for speaker, own in held["per_speaker"].items():
        assert f"{speaker} {own['n']} {own['coverage']:.3f}" in by_speaker
    assert "metrics of the surest answers" in page.read_aloud()
    half = next(row for row in calibration.abstention(test) if row["share"] == 0.6)
    assert f"60 % {half['n']} {half['confidence']:.3f} {half['accuracy']:.3f} {half['uar']:.3f}" in page.text


def test_what_was_exported_is_linked_with_its_difference_and_size(tmp_path):
    folder = write_results(tmp_path / "search")
    (folder / "best/head.safetensors").write_bytes(b"weights")
    (write_export(folder, "best-page", format="page", dtype="int8", bytes=1_250_000) / "page.html").touch()
    write_export(folder, "for others/a phone")
    write_export(folder, "old", fingerprint="of other weights")
    write_export(folder, "epoch_003-onnx", checkpoint="001/epoch_003")
    page, said = Page(build(folder)), printed(folder)
    assert page.open == []
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == ["best-page/page.html", "for%20others/a%20phone/", "old/"]
    assert all((folder / unquote(link)).exists() for link in links)
    assert "best-page page int8 1.2 1.2e-07 limit 0.0001 dev utterances of search" in page.text
    assert "for others/a phone onnx fp32 78.9 1.2e-07" in page.text
    assert page.text.count("earlier best/") == said.count("earlier best/") == 1
    assert "old of an earlier best/: export it again onnx" in page.text
    assert f"export: {folder}/best-page (page int8, 1.2 MB, probabilities differ by 1.2e-07)" in said


def test_a_damaged_record_of_an_export_is_one_line(tmp_path):
    folder = write_results(tmp_path / "search")
    record = write_export(folder, "best-onnx", proof={"largest": None}) / "export.json"
    with pytest.raises(UserError, match=r"best-onnx/export.json: not the record of an export"):
        build(folder)
    record.write_text("{")
    with pytest.raises(UserError, match=r"best-onnx/export.json: not the record of an export"):
        build(folder)


def tries(folder: Path) -> list[list[str]]:
    """The commands for a model, as a shell has them; the command line understands each."""
    found = [shlex.split(command) for _, command in commands(read_results(folder))]
    for words in found:
        for program, verb, *arguments in [part.split("\0") for part in "\0".join(words).split("\0&&\0")]:
            assert program == "ser-ray"
            get_command(app).commands[verb].make_context(verb, arguments)  # raises for what it does not know
    return found


def test_the_page_says_how_to_try_the_model(tmp_path, monkeypatch):
    folder = write_results(tmp_path / "my results" / "search")
    best = str(folder / "best")
    assert tries(folder) == [
        ["ser-ray", "predict", best, "call.wav"],
        ["ser-ray", "serve", best],
        ["ser-ray", "export", best, "--to", "page", "--ort", "package/dist"],
    ]
    text = Page(build(folder)).text
    assert all(f"{said} {command}" in text for said, command in commands(read_results(folder)))
    monkeypatch.chdir(tmp_path)
    best = "my results/search/best"
    assert tries(folder)[1] == ["ser-ray", "serve", best]
    write_json(folder / "evaluation/calibration.json", {"temperature": 1.2})
    write_json(folder / "evaluation/enrolment.json", {"test": []})
    assert tries(folder)[1] == ["ser-ray", "predict", best, "call.wav", "--sets"]
    enrolled = ["ser-ray", "enrol", best, "anna", "--output", "anna.json"]
    assert tries(folder)[2] == [*enrolled, "&&", "ser-ray", "predict", best, "call.wav", "--voice", "anna.json"]
    write_json(folder / "best/ensemble.json", {})
    assert [words[1] for words in tries(folder)] == ["predict", "predict", "enrol", "export"]
    (folder / "best/ensemble.json").unlink()
    (folder / "best").rmdir()
    assert tries(folder) == []


def test_people_without_a_uar_are_compared_by_accuracy(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "search")
    test = json.loads((folder / "evaluation/test.json").read_text())
    test["published"] = test["published"][-1:]
    (folder / "evaluation/test.json").write_text(json.dumps(test))
    gap = 100 * (0.9 - test["mean"]["accuracy"])
    build(folder)
    assert (
        f"It is {gap:.1f} points accuracy below people as published (0.900, them)." in Page(folder / "report.html").text
    )


def test_mistakes_can_be_heard(complete):
    page = Page(complete / "report.html")
    doubtful = most_confident(predictions(seed=1))
    assert len(doubtful) == page.count("audio") == page.count("img") == 12
    table = page.text[page.text.index("The most confident mistakes") :]
    for mistake in doubtful:
        assert f"{mistake.true} {mistake.predicted} {mistake.probability:.3f}" in table
        assert mistake.utterance_id in table
    assert "see what their licence allows" in table


def test_without_audio_nothing_of_the_recordings_is_in_the_page(complete, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(complete, folder)
    assert main([folder], audio=False) == 0
    page = Page(folder / "report.html")
    assert page.count("audio") == page.count("img") == 0
    assert "data:" not in page.source.replace("data-value", "")
    assert "The most confident mistakes" in page.text


def test_speech_that_is_gone_is_said(tmp_path):
    folder = write_everything(tmp_path / "search")
    assert "Without sound: provenance.json does not say" in Page(build(folder)).text
    point_to_speech(folder, tmp_path / "gone")
    page = Page(build(folder))
    assert page.count("audio") == 0
    assert f"Without sound: {tmp_path / 'gone'}: not prepared" in page.text
    point_to_speech(folder, write_speech(tmp_path / "other", ["ravdess/of another corpus"]))
    assert "not in the prepared speech any more" in Page(build(folder)).text


def test_many_trials_stay_small_without_audio(tmp_path):
    write_everything(tmp_path / "search")
    write_trials(tmp_path / "search", 60)
    page = build(tmp_path / "search", audio=False)
    assert page.stat().st_size < 3e6
    text = Page(page).text
    assert "60 trials, 60 finished" in text
    assert "the best 6 of 60 trials" in text
    shares = re.findall(r"(adapter\.method|adapter\.rank|optimizer\.lr|head\.dropout) (\d\.\d{3})", text)
    assert shares[0][0] == "optimizer.lr"
    assert sum(float(share) for _, share in shares) == pytest.approx(1, abs=0.002)


def test_few_trials_say_nothing_of_importance(tmp_path):
    write_trials(tmp_path, 7)
    text = Page(build(tmp_path)).text
    assert "What was tried" in text
    assert "Importance of searched keys" not in text


def test_figures_are_written_as_png(finished):
    for name in ("evaluation/confusion_dev.png", "evaluation/confusion_test.png", "learning_curves.png"):
        image = imread(finished / name)
        assert min(image.shape[:2]) > 500
        assert image[0, 0, :3].tolist() == [1, 1, 1]  # on white
        assert image[..., :3].std() > 0.05  # and not empty
    assert not list(finished.rglob("*.part"))


def test_names_are_escaped_everywhere(tmp_path):
    folder = write_everything(tmp_path / "search", detail=HOSTILE)
    for file in ("dev", "test", "choice"):
        path = folder / "evaluation" / f"{file}.json"
        text = path.read_text()
        for name in ("surprised", "HuBERT-large, frozen", "EmoBox, table 4", "frozen backbone + linear", "1e10"):
            text = text.replace(name, json.dumps(HOSTILE)[1:-1])
        path.write_text(text)
    hostile = dataclasses.replace(predictions(seed=1), speakers=(HOSTILE,) * 140, emotions=(HOSTILE, *"bcdefg"))
    (folder / "evaluation/predictions.parquet").unlink()
    write_predictions(hostile, "test", folder / "evaluation/predictions.parquet")
    with (folder / "trials.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["", "", "", "", 1, 1, 1, "", HOSTILE, HOSTILE, HOSTILE, HOSTILE, 0.1])
    page = Page(build(folder))
    assert page.count("script") == 1
    assert HOSTILE in page.text  # as text, where it was markup
    assert page.text.count(HOSTILE) > 20
    assert "[red]" in printed(folder)


def test_a_leaky_search_is_stamped(tmp_path):
    folder = write_results(tmp_path / "search", leaky=True)
    page = Page(build(folder))
    assert "LEAKY" in page.text
    assert "Speaker-disjoint" not in page.text
    assert "LEAKY" in printed(folder)


def test_a_second_opening_of_the_test_set_is_said(tmp_path):
    folder = write_results(tmp_path / "search")
    write_json(folder / "evaluation/test_openings.json", [{"trial_id": "second"}] * 3)
    assert "The test set was opened 3 times." in Page(build(folder)).text
    assert "opened 3 times" in printed(folder)


def test_an_interrupted_search_shows_what_there_is(tmp_path):
    folder = write_search(tmp_path / "search")
    page = Page(build(folder))
    assert "No test metrics." in page.text
    assert "Best so far: 1e10" in page.text
    assert page.count("svg") == 3  # curves, parallel coordinates, cost
    assert not (folder / "evaluation").exists()
    said = printed(folder)
    assert "no test metrics yet" in said
    assert "best so far: 1e10" in said


def test_a_search_that_has_not_begun_shows_that(tmp_path):
    (tmp_path / "search.yaml").write_text(config.dump(config.SearchSpace.model_validate(SPACE)))
    assert "None has started." in Page(build(tmp_path)).text
    assert "0 trials" in printed(tmp_path)


def test_summary_in_the_terminal(finished):
    said = printed(finished)
    test = json.loads((finished / "evaluation/test.json").read_text())
    low, high = test["ci95"]["uar"]
    assert f"{test['uar']:.3f} [{low:.3f}, {high:.3f}]" in said
    assert "* second" in said
    assert "chosen: second" in said
    assert "adapter.rank: 8\n" in said
    assert "majority" in said
    assert "the test set was opened once" in said
    assert str(finished / "best") in said
    assert str(finished / "report.html") in said


def _rewrite(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_winner_of_epoch_0_is_called_the_probe(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "search")
    assert "the probe" not in printed(folder)
    epochs = {"second": ["epoch_000"] * 3, "1e10": ["epoch_003"] * 3}

    def at(choice):
        for finalist in choice["finalists"]:
            for run, epoch in zip(finalist["runs"], epochs[finalist["trial_id"]], strict=True):
                run["checkpoint"] = f"finals/{finalist['trial_id']}/{epoch}"

    _rewrite(folder / "evaluation/choice.json", at)
    said, page = printed(folder), Page(build(folder)).text
    assert "chosen: second, the probe\n" in said
    assert "Chosen: second, the probe (epoch 0: logistic regression on the frozen backbone" in page
    assert "On test the probe beats the frozen backbone + linear" in page
    assert "adapter.method" not in said, "of what was not trained nothing is said"
    assert "optimizer.lr:" not in said
    assert "backbone: openai/whisper-base" in said
    epochs["second"][1:] = ["epoch_002", "epoch_002"]
    _rewrite(folder / "evaluation/choice.json", at)
    assert "chosen: second, the probe in 1 of 3 runs\n" in printed(folder)
    assert "adapter.method: lora" in printed(folder)


def test_before_the_choice_the_best_trial_may_be_the_probe(tmp_path):
    folder = write_search(tmp_path / "search")
    table = (folder / "trials.csv").read_text().splitlines()
    rows = list(csv.DictReader(table))
    for row in rows:
        row["checkpoint"] = f"trials/{row['trial_id']}/epoch_{0 if row['trial_id'] == '1e10' else 3:03}"
    with (folder / "trials.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert "best so far: 1e10, the probe\n" in printed(folder)


def test_every_interval_names_its_unit(complete, tmp_path):
    """Dev of one speaker is over utterances, while test is over speakers."""
    folder = shutil.copytree(complete, tmp_path / "search")
    _rewrite(folder / "evaluation/dev.json", lambda dev: dev.update(ci95_unit="utterances"))
    rows = {line.split("  ")[0].strip(): line for line in printed(folder).splitlines() if "speakers" in line}
    assert "test, runs pooled" in rows
    page = Page(build(folder)).text
    table = page[page.index("Metrics and baselines") :]
    assert " dev 95 % over utterances 0.693 [" in table
    assert " test, runs pooled 95 % over speakers 0." in table
    assert "chance 0.143" in table
    (folder / "evaluation/test.json").unlink()
    narrow = next(line for line in printed(folder).splitlines() if "95 % over" in line)
    assert narrow.split()[3:] == ["utterances"]


def test_what_chose_what_is_said_where_folds_rotate(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "search")
    _rewrite(folder / "evaluation/test.json", lambda test: test.update(tested=140, tested_in_dev=140))
    expected = "140 of the 140 tested utterances were dev in another run"
    assert expected in Page(build(folder)).text
    assert expected in " ".join(printed(folder).split())


def test_corrected_and_raw_p_are_on_the_page_and_in_the_terminal(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "search")

    def against(test):
        gap = {"difference": 0.041, "ci95": [0.01, 0.072], "p": 0.03, "p_holm": 0.06, "comparisons": 2}
        test["against"] = {"frozen backbone + linear": {"uar": gap}, "x": {"uar": gap | {"ci95": None, "p": None}}}

    _rewrite(folder / "evaluation/test.json", against)
    for text in (Page(build(folder)).text, " ".join(printed(folder).split())):
        assert "does not beat the frozen backbone + linear: +4.1 points UAR [+1.0, +7.2], p = 0.03, 0.06 corr" in text
        assert "cannot be compared with x: the same gap for every speaker (+4.1 points UAR)" in text


def test_the_audit_of_several_folds_says_so(complete, tmp_path):
    folder = shutil.copytree(complete, tmp_path / "search")
    assert "no speaker is in more than one split. " in Page(folder / "report.html").text
    _rewrite(folder / "audit.json", lambda audit: audit.update(folds={"fold 0": "a", "fold 1": "b"}))
    page = Page(build(folder)).text
    assert "no speaker is in more than one split of any of the 2 folds." in page
    assert "The audit covers the 2 folds that are trained: fold 0, fold 1." in page


def test_what_is_excluded_is_counted_and_what_to_set_is_said(tmp_path):
    folder = write_results(tmp_path / "x")
    gone = [{"utterance_id": f"a/{n}", "by": "duplicates" if n else "mine.csv"} for n in range(3)]
    _rewrite(folder / "audit.json", lambda audit: audit.update(excluded=gone, advice=["experiment.seed=1"]))
    page = " ".join(Page(build(folder)).text.split())
    assert "3 utterances are in no split (experiment.exclude)" in page
    assert "2 by duplicates, 1 by mine.csv" in page
    assert "To mend it: experiment.seed=1." in page


def test_command_writes_the_page_and_prints_where(tmp_path, capsys):
    folder = write_results(tmp_path / "search")
    assert main([folder]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    assert (folder / "report.html").is_file()


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a results folder"):
        main([tmp_path])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("provenance.json", "{", "not readable as JSON"),
        ("trials.csv", "a,b\n1,2\n", "no column trial_id"),
        ("trials/1e10/history.jsonl", '{"loss": 1}\n', "a line is not an epoch"),
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
        ("peak_memory_mb", "1378.796875", "1,379"),
        ("seconds", 90, "1.5 min"),
        ("dev_uar", "nan", "nan"),
        ("adapter.targets", None, "-"),
        ("best_epoch", 0, "0"),
    ],
)
def test_show(key, value, shown):
    assert show(key, value) == shown


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium to open the page in")
def test_a_browser_opens_the_page_without_a_word(complete, tmp_path):
    def console(page: Path) -> list[str]:
        command = [
            "chromium",
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'user'}",
        ]
        command += ["--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        assert "</html>" in done.stdout
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    broken = tmp_path / "broken.html"
    broken.write_text("<script>nothing.here()</script>")
    assert console(broken), "Chromium does not tell what its console says"
    assert console(complete / "report.html") == []
