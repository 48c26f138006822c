"""Writing a results folder: histories that repeat, rows of the best epoch."""

from __future__ import annotations

from ser_ray.evaluation import folder
from ser_ray.evaluation.folder import TrialRecord


def record(epoch: int, uar: float, best_epoch: int) -> dict:
    metrics = {"dev_uar": uar, "dev_accuracy": uar, "dev_macro_f1": uar, "dev_kappa": uar}
    return {
        "epoch": epoch,
        "seconds": float(epoch),
        "best_epoch": best_epoch,
        "peak_memory_mb": 100.0 + epoch,
        "trainable_parameters": 7,
    } | metrics


def test_a_row_shows_the_best_epoch_and_its_checkpoint(tmp_path):
    trial = tmp_path / "trials" / "a"
    for line in (record(1, 0.3, 1), record(2, 0.6, 2), record(3, 0.5, 2)):
        folder.append_history(trial, line)
    folder.write_trial(tmp_path / "trials", TrialRecord("a", {"adapter.rank": 4, "epochs": [1]}, "finished", "", 12.34))
    folder.write_trial(tmp_path / "trials", TrialRecord("b", {"adapter.rank": 8}, "failed", "out of memory"))
    tried = folder.read_trials(tmp_path / "trials")
    assert [(t.trial_id, t.over, t.best.get("dev_uar")) for t in tried] == [("a", True, 0.6), ("b", True, None)]
    row, other = (folder.trial_row(one, ["adapter.rank"]) for one in tried)
    assert (row["epochs"], row["best_epoch"], row["dev_uar"]) == (3, 2, 0.6)
    assert row["checkpoint"] == "trials/a/epoch_002"
    assert row["peak_memory_mb"] == 103.0
    assert row["seconds_per_epoch"] == 2.0
    folder.write_trials(tmp_path, [row, other])
    first, second = folder.read_trial_rows(tmp_path)
    assert first["adapter.rank"] == "4"
    assert (second["checkpoint"], second["error"]) == ("", "out of memory")


def test_an_epoch_trained_again_counts_once_with_its_last_line(tmp_path):
    for line in (record(1, 0.3, 1), record(2, 0.6, 2), record(2, 0.7, 2)):
        folder.append_history(tmp_path, line)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"epoch": 3, "dev_u')  # a kill in the middle of a line
    assert [(r["epoch"], r["dev_uar"]) for r in folder.trial_history(tmp_path)] == [(1, 0.3), (2, 0.7)]
    folder.append_history(tmp_path, record(3, 0.8, 3))
    assert [r["epoch"] for r in folder.trial_history(tmp_path)] == [1, 2, 3]
