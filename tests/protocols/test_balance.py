"""Groups of speakers are as alike as whole speakers allow: never worse, on average, than chance."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray.protocols.balance import Rows, balanced_groups

SPEAKER = st.tuples(
    st.sampled_from(["a", "b"]),
    st.sampled_from(["male", "female", None]),
    st.lists(st.sampled_from(["angry", "happy", "sad"]), min_size=1, max_size=8),
)


def rows_of(speakers: list[tuple[str, str | None, list[str]]]) -> Rows:
    return [
        {"speaker": f"{corpus}/{number}", "corpus": corpus, "gender": gender, "emotion": emotion}
        for number, (corpus, gender, emotions) in enumerate(speakers)
        for emotion in emotions
    ]


def imbalance(rows: Rows, group_of: dict[str, int], groups: int) -> float:
    """Squared shares of every trait, summed over groups; 1 a trait and 1/groups at best. A plain loop."""
    total = 0.0
    for key in ("corpus", "emotion", "gender"):
        for value in {row[key] for row in rows}:
            shares = Counter(group_of[str(row["speaker"])] for row in rows if row[key] == value)
            total += sum((n / shares.total()) ** 2 for n in shares.values())
    for shares in (Counter(group_of[str(row["speaker"])] for row in rows), Counter(group_of.values())):
        total += sum((n / shares.total()) ** 2 for n in shares.values())
    return total


def test_balance_is_better_than_a_random_assignment_on_average():
    """Over many corpora: of four speakers a greedy choice may be the worse one."""
    rng = np.random.default_rng(0)
    ours, chance = [], []
    for _ in range(60):
        speakers = [
            (
                str(rng.choice(["a", "b"])),
                str(rng.choice(["male", "female"])),
                [str(emotion) for emotion in rng.choice(["angry", "happy", "sad"], size=rng.integers(1, 9))],
            )
            for _ in range(rng.integers(4, 13))
        ]
        rows, groups = rows_of(speakers), int(rng.integers(2, 5))
        found = balanced_groups(rows, groups, seed=0)
        ours.append(imbalance(rows, found, groups))
        for _ in range(10):
            dealt = rng.permutation(np.arange(len(found)) % groups).tolist()
            chance.append(imbalance(rows, dict(zip(found, dealt, strict=True)), groups))
    assert np.mean(ours) < np.mean(chance) - 0.05


@given(speakers=st.lists(SPEAKER, min_size=3, max_size=12), groups=st.integers(2, 3))
def test_no_group_is_empty(speakers, groups):
    assert set(balanced_groups(rows_of(speakers), groups, 0).values()) == set(range(groups))


@settings(deadline=None)
@given(speakers=st.lists(SPEAKER, min_size=2, max_size=8), order=st.randoms(), seed=st.integers(0, 9))
def test_groups_do_not_depend_on_the_order_of_rows(speakers, order, seed):
    rows = list(rows_of(speakers))
    shuffled = list(rows)
    order.shuffle(shuffled)
    assert balanced_groups(shuffled, 2, seed) == balanced_groups(rows, 2, seed)


def test_groups_of_a_large_corpus_are_known():
    """The same on every machine and with every version: figures of folds must stay comparable."""
    rows = rows_of([("a", "male" if n % 2 else "female", ["angry", "sad"] * (1 + n % 3)) for n in range(12)])
    found = balanced_groups(rows, 3, 0)
    assert [sorted(int(s[2:]) for s in found if found[s] == group) for group in range(3)] == [
        [0, 3, 5, 8],
        [1, 2, 6, 7],
        [4, 9, 10, 11],
    ]
