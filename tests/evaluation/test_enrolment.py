"""The curve of `protocol.enrolment`: who is answered with what, the metrics of the draws, and what the report says."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_fixtures import predictions, write_everything
from rich.console import Console
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score

from ser_ray import config, report
from ser_ray.config import OTHERS, Enrolment
from ser_ray.evaluation import enrolment
from ser_ray.evaluation.enrolment import Enrolled, answered_with
from ser_ray.evaluation.summary import summarise
from ser_ray.schema import UserError, unknown_speaker

ROWS = st.lists(
    st.tuples(st.sampled_from(["c/a", "c/b", "d/z", "unknown"]), st.sampled_from(["sad", "happy", "neutral"])),
    min_size=1,
    max_size=30,
)


def _columns(rows: list[tuple[str, str]]) -> tuple[list[str], list[str], list[str]]:
    ids = [f"c/{n}" for n in range(len(rows))]
    speakers = [unknown_speaker("c", i) if s == "unknown" else s for i, (s, _) in zip(ids, rows, strict=True)]
    return ids, speakers, [emotion for _, emotion in rows]


@given(
    rows=ROWS,
    which=st.sampled_from(["any", ("neutral",), ("neutral", "sad")]),
    count=st.sampled_from([0, 1, 2, 5, OTHERS]),
    draw=st.integers(0, 4),
)
@settings(max_examples=150, deadline=None)
def test_an_utterance_is_answered_with_others_of_its_speaker(rows, which, count, draw):
    ids, speakers, emotions = _columns(rows)
    chosen = answered_with(ids, speakers, emotions, Enrolment(which=which), count, draw)
    for row, own in enumerate(chosen):
        others = [
            n
            for n in range(len(ids))
            if n != row and speakers[n] == speakers[row] and (which == "any" or emotions[n] in which)
        ]
        assert row not in own
        assert set(own) <= set(others)
        assert len(set(own)) == len(own) == (len(others) if count == OTHERS else min(count, len(others)))


@given(rows=ROWS, draw=st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_more_recordings_are_the_same_and_further_ones(rows, draw):
    columns = _columns(rows)
    few, many = (answered_with(*columns, Enrolment(), count, draw) for count in (2, 5))
    assert all(set(a) <= set(b) for a, b in zip(few, many, strict=True))


@given(rows=ROWS, names=st.permutations(["c/a", "c/b", "d/z"]), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_neither_names_of_speakers_nor_the_order_of_rows_nor_labels_matter(rows, names, seed):
    ids, speakers, emotions = _columns(rows)
    expected = answered_with(ids, speakers, emotions, Enrolment(), 3, 1)
    renamed = [dict(zip(["c/a", "c/b", "d/z"], names, strict=True)).get(s, s) for s in speakers]
    for other in (
        answered_with(ids, renamed, emotions, Enrolment(), 3, 1),
        answered_with(ids, speakers, ["sad"] * len(ids), Enrolment(), 3, 1),
    ):
        assert all(set(a) == set(b) for a, b in zip(expected, other, strict=True))
    order = np.random.default_rng(seed).permutation(len(ids))
    moved = answered_with(*([column[n] for n in order] for column in (ids, speakers, emotions)), Enrolment(), 3, 1)
    for place, row in enumerate(order):
        assert {order[n] for n in moved[place]} == set(expected[row])


def test_every_draw_and_seed_is_another():
    ids, speakers, emotions = _columns([("c/a", "sad")] * 40)
    found = {
        tuple(own[0] for own in answered_with(ids, speakers, emotions, Enrolment(seed=seed), 1, draw))
        for seed in range(2)
        for draw in range(5)
    }
    assert len(found) == 10


def _enrolled(recordings, seeds, used):
    """Draws over the same utterances: other probabilities of the same labels."""
    first = predictions(seed=seeds[0])
    return Enrolled(
        recordings, tuple(replace(first, probabilities=predictions(seed=s).probabilities) for s in seeds), used
    )


def test_a_metric_is_the_mean_over_draws_of_all_runs_together():
    runs = [[_enrolled(0, [1], 0.0), _enrolled(4, [2, 3], 3.5)], [_enrolled(0, [5], 0.0), _enrolled(4, [6, 7], 4.0)]]
    none, four = enrolment.curve(runs)
    assert (none["recordings"], none["draws"], none["used"]) == (0, 1, 0)
    assert (four["recordings"], four["draws"], four["used"], four["n"]) == (4, 2, 3.75, 280)
    assert four["said"] == "used 4 unlabelled recordings of the speaker"
    for name, oracle in (("uar", balanced_accuracy_score), ("kappa", cohen_kappa_score)):
        expected = [
            oracle(
                np.concatenate([run[1].draws[draw].labels for run in runs]),
                np.concatenate([run[1].draws[draw].predicted for run in runs]),
            )
            for draw in range(2)
        ]
        assert four[name] == pytest.approx(np.mean(expected))
        assert four["ci95"][name][0] < four[name] < four["ci95"][name][1]
    assert four["ci95_unit"] == "speakers"


def test_more_draws_do_not_narrow_the_interval_over_speakers():
    """They are of the same speakers."""
    one, five = (enrolment.curve([[_enrolled(1, [1] * n, 1.0)]])[0] for n in (1, 5))
    assert five["ci95"]["uar"] == pytest.approx(one["ci95"]["uar"], abs=1e-6)


def test_nor_that_over_the_utterances_of_a_single_speaker():
    """Draws are of the same utterances; the interval is about as wide as that of one draw."""

    def of_one(point):
        draws = [replace(draw, speakers=("ravdess/01",) * len(draw)) for draw in point.draws]
        return Enrolled(point.recordings, tuple(draws), point.used)

    one, five = (enrolment.curve([[of_one(_enrolled(1, [1] * n, 1.0))]])[0] for n in (1, 5))
    assert one["ci95_unit"] == five["ci95_unit"] == "utterances"
    widths = [row["ci95"]["uar"][1] - row["ci95"]["uar"][0] for row in (one, five)]
    assert widths[1] == pytest.approx(widths[0], rel=1e-6)
    plain = summarise(of_one(_enrolled(0, [1], 0.0)).draws[0], {}, False)["ci95"]["uar"]
    assert widths[0] == pytest.approx(plain[1] - plain[0], rel=0.1)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "used no unlabelled recordings of the speaker"),
        (1, "used 1 unlabelled recording of the speaker"),
        (OTHERS, "used all other unlabelled recordings of the speaker"),
    ],
)
def test_what_was_used_is_said(count, expected):
    assert enrolment.said(count) == expected


# -- the configuration


@pytest.mark.parametrize(
    ("given_keys", "message"),
    [
        ({"recordings": [1, 1]}, "recordings.1: 1 is named twice"),
        ({"recordings": []}, "recordings: it is empty"),
        ({"recordings": [-1]}, "recordings.0"),
        ({"recordings": ["all"]}, "recordings.0"),
        ({"which": ["neutrl"]}, "which.0: 'neutrl' is not among the experiment's emotions; did you mean neutral"),
        ({"draws": 0}, "draws"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, given_keys, message):
    experiment = {"name": "x", "corpora": {"synthetic": None}, "backbone": "b", "protocol": {"enrolment": given_keys}}
    path = tmp_path / "space.yaml"
    path.write_text(json.dumps({"experiment": experiment}))
    with pytest.raises(UserError, match=re.escape(message)):
        config.load(path)


def test_it_is_no_part_of_how_utterances_are_split():
    protocol = config.Protocol(enrolment=Enrolment(draws=2))
    assert protocol.split() == config.Protocol().split()
    assert protocol.split()["scheme"] == "speaker_kfold"
    assert "enrolment" not in protocol.split()


# -- the report


def test_the_report_shows_the_curve_with_its_words(tmp_path):
    folder = write_everything(tmp_path / "results")
    plain = report.build(folder, audio=False).read_text()
    assert "unlabelled" not in plain
    assert not (folder / "evaluation/enrolment.png").exists()
    rows = enrolment.curve([[_enrolled(0, [1], 0.0), _enrolled(8, [2, 3], 7.5), _enrolled(OTHERS, [4], 13.0)]])
    record = {"trial_id": "second", "checkpoints": [], "settings": config.to_dict(Enrolment()), "dev": rows}
    (folder / "evaluation/enrolment.json").write_text(json.dumps(record | {"test": rows}))
    page = report.build(folder, audio=False).read_text()
    for row in rows:
        assert page.count(f"{row['said']} <small>") == 2, "a row of test and of dev"
        assert f"{row['uar']:.3f} <small>[{row['ci95']['uar'][0]:.3f}" in page
    assert (folder / "evaluation/enrolment.png").read_bytes()[:4] == b"\x89PNG"
    console = Console(file=io.StringIO(), width=200)
    report.print_summary(folder, console)
    assert f"test UAR by how many unlabelled recordings of the speaker were used: 0: {rows[0]['uar']:.3f}, 8:" in (
        console.file.getvalue()
    )
