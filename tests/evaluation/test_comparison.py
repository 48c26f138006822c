"""Several searches side by side: what differs, gaps on the same utterances, the page and the command."""

import dataclasses
import json

import numpy as np
import pytest
from report_fixtures import HOSTILE, Page, predictions, write_everything, write_results, write_search

from ser_ray import config
from ser_ray.evaluation.comparison import differing, gap, gaps, labels
from ser_ray.evaluation.intervals import paired_gap
from ser_ray.evaluation.metrics import HEADLINE, confusion, headline
from ser_ray.evaluation.results import read_results
from ser_ray.evaluation.summary import write_predictions
from ser_ray.report import main
from ser_ray.schema import UserError


def _rename(folder, **changes):
    space = config.to_dict(config.load(folder / "search.yaml"))
    space["experiment"] |= changes
    (folder / "search.yaml").write_text(config.dump(config.SearchSpace.model_validate(space)))
    return folder


@pytest.fixture
def three(tmp_path):
    one = write_everything(tmp_path / "one")
    other = _rename(write_everything(tmp_path / "other"), name="other", backbone="microsoft/wavlm-base", epochs=3)
    running = _rename(write_search(tmp_path / "running"), name="running")
    return [one, other, running]


def test_a_gap_is_paired_whatever_the_order_of_utterances():
    first = predictions(seed=1)
    other = dataclasses.replace(first, probabilities=np.roll(first.probabilities, 1, axis=1))
    order = np.random.default_rng(0).permutation(len(first))
    shuffled = dataclasses.replace(
        other,
        **{name: tuple(getattr(other, name)[i] for i in order) for name in ("utterance_ids", "corpora", "speakers")},
        labels=other.labels[order],
        probabilities=other.probabilities[order],
    )
    found = gap("a", "b", first, shuffled)
    here, there = (headline(confusion(p.labels, p.predicted, 7)) for p in (first, other))
    by_id = np.argsort(np.asarray(first.utterance_ids), kind="stable")
    expected = paired_gap(
        first.labels[by_id],
        first.predicted[by_id],
        other.predicted[by_id],
        [first.speakers[i] for i in by_id],
        num_labels=7,
    )
    for name in HEADLINE:
        assert found.metrics[name]["difference"] == pytest.approx(here[name] - there[name])
        assert found.metrics[name]["ci95"] == [expected[name].low, expected[name].high]
        assert found.metrics[name]["p"] == expected[name].p


def test_no_gap_without_the_same_utterances():
    first = predictions(seed=1)
    assert "no test predictions" in gap("a", "b", first, None).no_gap_reason
    assert gap("a", "b", first, None).no_gap_reason.startswith("b ")
    assert "different utterances" in gap("a", "b", first, predictions(seed=1, n=100)).no_gap_reason
    assert "different labels" in gap("a", "b", first, predictions(seed=2)).no_gap_reason
    assert "classify" in gap("a", "b", first, dataclasses.replace(first, emotions=tuple("abcdefg"))).no_gap_reason
    alone = dataclasses.replace(first, speakers=("s",) * len(first))
    assert "one test speaker" in gap("a", "b", alone, alone).no_gap_reason


def test_what_differs_and_nothing_else(three):
    searches = [read_results(folder) for folder in three]
    assert labels(searches) == ["ravdess-whisper", "other", "running"]
    found = differing(searches)
    assert found == {
        "backbone": ["openai/whisper-base", "microsoft/wavlm-base", "openai/whisper-base"],
        "epochs": ["10", "3", "10"],
    }


def test_equal_names_are_told_apart_by_folder(tmp_path):
    searches = [read_results(write_search(tmp_path / name / "search")) for name in ("a", "b")]
    assert labels(searches) == ["a/search", "b/search"]
    assert differing(searches) == {}


def test_the_page_and_the_terminal(three, tmp_path, capsys):
    assert main(three) == 0
    page = Page(tmp_path / "comparison.html")
    assert page.open == []
    assert "3 searches side by side" in page.text
    assert "microsoft/wavlm-base" in page.text
    assert "LEAKY" not in page.text
    assert "ravdess-whisper other 0.0 cannot be tested 0.0 cannot be tested" in page.text  # the same predictions
    assert "no gap: running has no test predictions yet" in page.text
    assert page.read_aloud() == {"test metrics with intervals", "learning curves of the winners"}
    said = capsys.readouterr().out
    assert "ravdess-whisper minus other: 0.0 points UAR cannot be tested" in said
    assert str(tmp_path / "comparison.html") in said
    assert not (three[0] / "report.html").exists()


def test_several_pairs_are_corrected_on_the_page_and_in_the_terminal(tmp_path, capsys):
    folders = []
    for number, name in enumerate(("a", "b", "c")):
        folders.append(_rename(write_everything(tmp_path / name), name=name))
        first = predictions(seed=1)
        changed = np.random.default_rng(number).choice(len(first), 10 * number, replace=False)
        probabilities = first.probabilities.copy()
        probabilities[changed] = np.roll(probabilities[changed], 1, axis=1)
        (folders[-1] / "evaluation/predictions.parquet").unlink()
        said = dataclasses.replace(first, probabilities=probabilities)
        write_predictions(said, "test", folders[-1] / "evaluation/predictions.parquet")
    pairs = gaps([read_results(folder) for folder in folders])
    raw = [pair.metrics["uar"]["p"] for pair in pairs]
    by_hand = [3 * min(raw), 2 * sorted(raw)[1], max(raw)]
    expected = np.maximum.accumulate(by_hand)
    assert sorted(pair.metrics["uar"]["p_holm"] for pair in pairs) == pytest.approx(sorted(expected))
    assert main(folders) == 0
    assert capsys.readouterr().out.count("corrected for 3 comparisons (Holm)") == 3
    page = Page(tmp_path / "comparison.html")
    assert page.text.count("; Holm ") == 3 * len(HEADLINE)
    assert "p, corrected for the number of pairs (Holm, metric by metric)" in page.text


def test_leaky_ones_are_stamped_and_names_escaped(tmp_path):
    folders = [write_everything(tmp_path / "a", leaky=True), write_results(tmp_path / HOSTILE.replace("/", "") / "a")]
    test = json.loads((folders[1] / "evaluation/test.json").read_text())
    assert main(folders, output=tmp_path / "x" / "page.html") == 0
    page = Page(tmp_path / "x" / "page.html")
    assert page.count("script") == 1
    assert "LEAKY a: train shares" in page.text
    assert f"{test['uar']:.3f}" in page.text


def test_a_search_beside_itself_is_refused(tmp_path):
    folder = write_search(tmp_path / "a")
    with pytest.raises(UserError, match="named twice"):
        main([folder, folder / "."])


def test_output_is_for_several(tmp_path):
    with pytest.raises(UserError, match="name several"):
        main([write_search(tmp_path / "a")], output=tmp_path / "page.html")
    assert len(gaps([read_results(tmp_path / "a")] * 3)) == 3
