"""Which folds and seeds a search trains: those of the experiment, ``tune.final_folds`` and ``tune.final_seeds``."""

from __future__ import annotations

import itertools

import pyarrow as pa

from ser_ray.config import Protocol, SearchSpace
from ser_ray.protocols.folds import count_folds, make_fold
from ser_ray.schema import Fold, UserError


def final_runs(space: SearchSpace, index: pa.Table) -> list[tuple[int, int]]:
    """The (fold, seed) pairs that every finalist is trained with; the experiment's own is first, if it is one of them.

    Raises UserError if ``tune.final_folds`` names a fold that the labelled ``index`` does not have.
    """
    own = (space.experiment.protocol.fold, space.experiment.seed)
    asked = space.tune.final_folds
    count = count_folds(index, space.experiment.protocol)
    folds = [own[0]] if asked is None else list(range(count)) if asked == "all" else list(asked)
    if unknown := [fold for fold in folds if fold >= count]:
        raise UserError(f"tune.final_folds: {unknown[0]}, but the protocol has folds 0 to {count - 1}")
    pairs = itertools.product(folds, range(own[1], own[1] + space.tune.final_seeds))
    return sorted(pairs, key=lambda pair: (pair != own, pair))


def dev_after(space: SearchSpace, seed: int) -> int:
    """`Protocol.dev_after` for a seed: with `Tune.rotate_dev` each further seed moves dev by one fold."""
    moved = seed - space.experiment.seed if space.tune.rotate_dev else 0
    return space.experiment.protocol.dev_after + moved


def trained_protocols(space: SearchSpace, index: pa.Table) -> list[Protocol]:
    """Every distinct protocol (fold, dev_after) that the search trains. The experiment's own, which all trials use, is
    first."""
    own = space.experiment.protocol
    protocols = [own]
    for fold, seed in final_runs(space, index):
        protocol = own.model_copy(update={"fold": fold, "dev_after": dev_after(space, seed)})
        protocols += [protocol] if protocol not in protocols else []
    return protocols


def trained_folds(space: SearchSpace, index: pa.Table) -> dict[str, Fold]:
    """The folds of `trained_protocols`, named ``fold 2`` or ``fold 2, dev_after 3``; identical splits occur once."""
    folds: dict[str, Fold] = {}
    for protocol in trained_protocols(space, index):
        rotated = f", dev_after {protocol.dev_after}" if space.tune.rotate_dev else ""
        fold = make_fold(index, protocol)
        if all(fold.splits != other.splits for other in folds.values()):
            folds[f"fold {protocol.fold}{rotated}"] = fold
    return folds


def more_dev(space: SearchSpace, index: pa.Table) -> str:
    """What to set so that more dev speakers decide between the trials."""
    folds = {protocol.fold for protocol in trained_protocols(space, index)}
    if len(folds) < count_folds(index, space.experiment.protocol):
        return "tune.final_folds: all"
    if space.experiment.protocol.scheme != "official" and not space.tune.rotate_dev:
        return "tune.final_seeds: 3 and tune.rotate_dev: true"
    return "more speakers in the data"
