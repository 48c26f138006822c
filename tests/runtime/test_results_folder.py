"""A search goes on with the utterances that it began with."""

from __future__ import annotations

import pytest

from ser_ray.disk import write_json
from ser_ray.runtime.results_folder import check_excluded
from ser_ray.schema import UserError


def test_a_search_does_not_go_on_with_another_list_of_excluded_utterances(tmp_path):
    write_json(tmp_path / "audit.json", {"excluded": [{"utterance_id": "a/1"}, {"utterance_id": "a/2"}]})
    check_excluded(tmp_path, ["a/2", "a/1"])
    with pytest.raises(UserError, match="leaves out other utterances than when this search began, such as a/2"):
        check_excluded(tmp_path, ["a/1"])
    write_json(tmp_path / "audit.json", {"leaky": False})  # of an older version
    check_excluded(tmp_path, [])
