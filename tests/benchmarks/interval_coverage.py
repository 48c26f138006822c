"""Do 95 % intervals hold the truth 95 % of the time, and does the paired test cry wolf 5 % of the time? By simulation.

    python tests/benchmarks/interval_coverage.py [SIMULATIONS] > results/benchmarks/coverage.md

Predictions of classifiers whose figures over all speakers that there could be are known: every speaker is recognised
more or less well, and leans towards some emotions; a few of them are drawn, and the intervals are made of what is said
about these. Beside the interval in use stands the percentile bootstrap of the same draws. Minutes on one core.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from scipy import stats

from ser_ray.evaluation import intervals
from ser_ray.evaluation.metrics import HEADLINE, headline

SHARES: Final = np.array([0.30, 0.22, 0.18, 0.14, 0.10, 0.06])
"""Of the six emotions."""
EACH: Final = 60
"""Utterances of a speaker, on average."""
CONFUSED: Final = 0.5 * np.random.default_rng(99).standard_normal((6, 6)) * (1 - np.eye(6))
"""Emotions that are alike for every speaker, on the logit scale."""
SPEAKERS: Final = (4, 10, 24, 45, 90)
LEVELS: Final = (0.3, 0.6, 0.8, 0.95)
"""Of the true UAR."""
EFFECT: Final = {level: 0.05 if level < 0.95 else 0.02 for level in LEVELS}
"""By how much the better classifier is."""
DRAWS: Final = 1000


@dataclass(frozen=True)
class Classifier:
    """Says k of an utterance of emotion j and speaker s with the probability softmax_k(z), where z is
    ``CONFUSED[j, k]``, plus ``skill + spread * u_s`` where k is j, plus ``bias * b_sk``; u and b are standard normal.
    """

    skill: float
    spread: float = 0.6
    bias: float = 0.7

    def confuses(self, u_S: np.ndarray, b_SK: np.ndarray) -> np.ndarray:
        """(S, K, K): the probability of every answer (column) to every emotion (row)."""
        right = (self.skill + self.spread * u_S)[:, None, None] * np.eye(len(SHARES))
        odds = np.exp(CONFUSED + right + self.bias * b_SK[:, None, :])
        return odds / odds.sum(axis=-1, keepdims=True)


@cache
def truth(classifier: Classifier, speakers: int = 40_000) -> dict[str, float]:
    """The figures over a population of speakers, every utterance counted by its probabilities: no sampling of it."""
    rng = np.random.default_rng(7)
    confuses = classifier.confuses(rng.standard_normal(speakers), rng.standard_normal((speakers, len(SHARES))))
    return {name: float(value) for name, value in headline(confuses.mean(axis=0) * SHARES[:, None]).items()}


@cache
def of_uar(uar: float, spread: float = 0.6) -> Classifier:
    """The classifier with that true UAR."""
    low, high = -3.0, 15.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        found = truth(Classifier(middle, spread))["uar"]
        low, high = (middle, high) if found < uar else (low, middle)
    return Classifier(low, spread)


Simulated = tuple[np.ndarray, list[np.ndarray], list[str]]


def simulate(rng: np.random.Generator, classifiers: list[Classifier], speakers: int, uneven: bool) -> Simulated:
    """Labels, what each classifier says, and speakers of one test set. A speaker who is hard for one classifier is
    hard for the others as well, in part: half of the variance of u and b is common.

    ``uneven``: speakers differ in how much, and in which emotions, they speak.
    """
    kinds = len(SHARES)
    mean_SK = EACH * np.tile(SHARES, (speakers, 1))
    if uneven:
        mean_SK *= rng.lognormal(-0.125, 0.5, (speakers, 1)) * rng.lognormal(-0.08, 0.4, (speakers, kinds))
    n_SK = rng.poisson(mean_SK)
    common_S, common_SK = rng.standard_normal(speakers), rng.standard_normal((speakers, kinds))
    label_N = np.repeat(np.tile(np.arange(kinds), speakers), n_SK.reshape(-1))
    said = []
    for classifier in classifiers:
        u_S = (common_S + rng.standard_normal(speakers)) / np.sqrt(2)
        b_SK = (common_SK + rng.standard_normal((speakers, kinds))) / np.sqrt(2)
        answers = rng.multinomial(n_SK, classifier.confuses(u_S, b_SK))
        said.append(np.repeat(np.tile(np.arange(kinds), speakers * kinds), answers.reshape(-1)))
    names = np.repeat([f"corpus/{s:02}" for s in range(speakers)], n_SK.sum(axis=1))
    return label_N, said, names.tolist()


def percentiles(
    labels: np.ndarray, said: np.ndarray, speakers: list[str], draws: int
) -> dict[str, tuple[float, float]]:
    """The alternative: the 2.5th and 97.5th percentile of the same draws."""
    drawn = intervals._over_speakers(labels, said, speakers, len(SHARES), draws, seed=0)
    return {name: tuple(np.percentile(values, (2.5, 97.5))) for name, values in drawn.items()}


def share(found: list[bool]) -> str:
    """In per cent."""
    return f"{100 * np.mean(found):.1f}"


def intervals_of(speakers: int, simulations: int) -> list[str]:
    """A row a figure: how often both intervals hold the truth, in all and in the worst and the best case."""
    held: dict[tuple[str, bool], dict[tuple[float, bool], list[bool]]] = {}
    width: dict[tuple[str, bool], list[float]] = {}
    for level in LEVELS:
        classifier = of_uar(level)
        for number in range(2 * simulations):
            uneven = number % 2 == 1
            rng = np.random.default_rng([speakers, int(100 * level), number])
            labels, (said,), names = simulate(rng, [classifier], speakers, uneven)
            ours, _ = intervals.bootstrap_ci95(labels, said, names, len(SHARES), DRAWS)
            for new, limits in ((False, percentiles(labels, said, names, DRAWS)), (True, ours)):
                for name, (low, high) in limits.items():
                    right = bool(low <= truth(classifier)[name] <= high)
                    held.setdefault((name, new), {}).setdefault((level, uneven), []).append(right)
                    width.setdefault((name, new), []).append(high - low)
    rows = []
    for name in HEADLINE:
        cells = []
        for new in (False, True):
            each = [100 * float(np.mean(case)) for case in held[name, new].values()]
            cells += [f"{np.mean(each):.1f} ({min(each):.1f} to {max(each):.1f})"]
        widths = " | ".join(f"{np.mean(width[name, new]):.3f}" for new in (False, True))
        rows.append(f"| {speakers} | {name} | {' | '.join(cells)} | {widths} |")
    return rows


def alarms_of(speakers: int, simulations: int) -> str:
    """How often the paired test of UAR says p < 0.05: of two that are equal, and of two that are not."""
    alarms: dict[str, list[bool]] = {"alike": [], "other spread": [], "better": []}
    held = []
    for level in LEVELS:
        first = of_uar(level)
        seconds = {"alike": first, "other spread": of_uar(level, spread=1.2), "better": of_uar(level + EFFECT[level])}
        for kind, second in seconds.items():
            for number in range(simulations):
                rng = np.random.default_rng([speakers, int(100 * level), len(kind), number])
                labels, said, names = simulate(rng, [second, first], speakers, number % 2 == 1)
                gap = intervals.paired_gap(labels, *said, names, len(SHARES), DRAWS)["uar"]
                alarms[kind].append(gap.p < 0.05)
                held.append(gap.low <= truth(second)["uar"] - truth(first)["uar"] <= gap.high)
    cells = []
    for kind in ("alike", "other spread"):
        ends = stats.binomtest(sum(alarms[kind]), len(alarms[kind])).proportion_ci(method="exact")
        cells.append(f"{share(alarms[kind])} [{100 * ends.low:.1f}, {100 * ends.high:.1f}]")
    return f"| {speakers} | {' | '.join(cells)} | {share(held)} | {share(alarms['better'])} |"


def main() -> None:
    """Print all of it as Markdown."""
    simulations = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    started = time.process_time()
    cases = 2 * len(LEVELS)
    print("# Coverage of the intervals, false alarms of the paired test\n")
    print(f"```\npython tests/benchmarks/interval_coverage.py {simulations} > results/benchmarks/coverage.md\n```\n")
    print(f"Simulated test sets of six emotions ({', '.join(f'{100 * s:.0f} %' for s in SHARES)}), about {EACH}")
    print("utterances a speaker; speakers are recognised unequally well and lean towards some emotions. True UAR")
    print(f"{', '.join(map(str, LEVELS))}; speakers who speak equally much, and not: {cases} cases of {simulations}")
    print(f"simulations each, so {cases * simulations} a row; {DRAWS} bootstrap draws. The truth is the figure over")
    print("40,000 speakers.\n\n## Intervals\n")
    print("How many of 100 intervals hold the truth (worst and best case); 93 to 97 is the aim.\n")
    print("| speakers | figure | percentiles | in use | mean width, percentiles | in use |")
    print("|---|---|---|---|---|---|", flush=True)
    for speakers in SPEAKERS:
        print("\n".join(intervals_of(speakers, simulations)), flush=True)
    print("\n## Paired test\n\nOf UAR: how often in 100 it says p < 0.05, with the exact binomial interval. Alike: two")
    print("classifiers of one kind. Other spread: equal in UAR, but speakers matter twice as much to one. Better: by 5")
    print(f"points of UAR, at {LEVELS[-1]} by 2. {simulations * len(LEVELS)} simulations a cell.\n")
    print("| speakers | false alarms, alike | false alarms, other spread | the gap's interval holds | power, better |")
    print("|---|---|---|---|---|", flush=True)
    for speakers in SPEAKERS:
        print(alarms_of(speakers, simulations), flush=True)
    print(f"\nMade in {(time.process_time() - started) / 60:.0f} minutes of one core.")


if __name__ == "__main__":
    main()
