"""What ``evovlm bench mpo`` says of its epochs: ratios, rates, the split of the gain, and numbers that must agree.

epochs of ours and of TRL's, in turn ─┬─ least seconds of each ─► pairs/s, ratio_vs_trl, ratio_vs_trl_cached
                                      └─ log π_ref of every pair, losses of first steps ─► equal, or an error
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evovlm.engine.preference_loss import preference_terms
from evovlm.launch.bench_mpo_ours import LOSS, Epoch

TOLERANCE = 1e-4


def expected_loss(scores: NDArray[np.float64], num_chosen: NDArray[np.int64], groups: Sequence[Sequence[int]]) -> float:
    """The loss of a first step, where the policy is the reference model: 0.8·ln 2 + 0.2·2 ln 2 + NLL.

    Args:
        scores: Float64 ``[pairs, 2]``, log π_ref.
        num_chosen: int64 ``[pairs]``, tokens of the chosen answers.
        groups: The step's pairs. The NLL is a mean over the tokens of each group, and over groups: ours has one, TRL's
            ``sft`` term has one for each forward pass, whatever their tokens.
    """
    losses = []
    for group in groups:
        log_probs = torch.from_numpy(scores[list(group)])
        losses.append(preference_terms(log_probs, log_probs, 0.0, int(num_chosen[list(group)].sum()), LOSS).loss)
    return statistics.mean(losses)


def check_agreement(ours: Epoch, theirs: Epoch, num_chosen: NDArray[np.int64]) -> dict[str, float]:
    """Make sure that both sides score and train the same: each side's first loss follows from the other's scores.

    Args:
        ours: An epoch of ours with scores.
        theirs: One of the peer's, over the same pairs.
        num_chosen: int64 ``[pairs]``.

    Returns:
        ``reference_error``, the largest relative difference of a log-probability; ``first_loss`` and
        ``first_loss_expected`` of ours, ``trl_first_loss`` and ``trl_first_loss_expected``.

    Raises:
        RuntimeError: Log-probabilities or losses differ by more than 1e-4 of them.
    """
    assert ours.reference is not None
    assert theirs.reference is not None
    found = {
        "reference_error": float(np.max(np.abs(ours.reference / theirs.reference - 1.0))),
        "first_loss": ours.losses[0],
        "first_loss_expected": expected_loss(theirs.reference, num_chosen, ours.first),
        "trl_first_loss": theirs.losses[0],
        "trl_first_loss_expected": expected_loss(ours.reference, num_chosen, theirs.first),
    }
    errors = [found["reference_error"]]
    errors += [abs(found[name] / found[f"{name}_expected"] - 1.0) for name in ("first_loss", "trl_first_loss")]
    if not all(error <= TOLERANCE for error in errors):
        numbers = ", ".join(f"{name} {value:.6g}" for name, value in found.items())
        raise RuntimeError(
            f"bench mpo: evovlm and TRL differ by more than {TOLERANCE:g}, so they do not train on the same pairs in "
            f"the same way: {numbers}"
        )
    return found


def best(epochs: Sequence[Epoch], num_pairs: int) -> dict[str, float]:
    """Seconds and pairs/s of the fastest of several epochs, part by part.

    Args:
        epochs: Of one way.
        num_pairs: Pairs of an epoch.
    """
    train = min(epoch.train_seconds for epoch in epochs)
    reference = min(epoch.reference_seconds for epoch in epochs)
    return {
        "reference_seconds": reference,
        "train_seconds": train,
        "seconds": reference + train,
        "pairs_per_second": num_pairs / (reference + train),
        "pairs_per_second_cached": num_pairs / train,
    }


def split(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """What each idea gains: seconds of an epoch without it, over those with all (``evovlm``)."""
    return {name: {"seconds": value, "gain": value / seconds["evovlm"]} for name, value in seconds.items()}


def table(results: dict[str, Any], cpu: str) -> Any:
    """Lay the results out as a rich table; ``cpu`` names the processor."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    lines = [
        f"{results['parameters'] / 1e6:.0f} million parameters, {results['pairs']} pairs with "
        f"{results['tiles']} tiles, {results['threads']} threads; least of {results['repetitions']}",
        "score: the reference pass; pairs/s and / ours with it, cached: its scores known",
        "below: ours with an idea off",
    ]
    if "trl" in results:
        agreement = results["agreement"]
        lines.append(
            f"log π_ref within {agreement['reference_error']:.0e} of TRL's; first loss {agreement['first_loss']:.4f}, "
            f"by TRL's scores {agreement['first_loss_expected']:.4f}"
        )
    made = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="\n".join([*lines, cpu]))
    made.add_column("way", no_wrap=True)
    for heading in ("score, s", "epoch, s", "pairs/s", "cached", "/ ours", "cached"):
        made.add_column(heading, justify="right")
    ours = results["ours"]
    ways = {"evovlm": ours, "evovlm, resident reference": results["ours_resident"]}
    ways |= {f"TRL, {name}": way for name, way in results.get("trl", {}).items()}
    for name, way in ways.items():
        resident = not way["reference_seconds"]
        made.add_row(
            name,
            "" if resident else f"{way['reference_seconds']:.2f}",
            f"{way['train_seconds']:.2f}",
            f"{way['pairs_per_second']:.2f}",
            "" if resident else f"{way['pairs_per_second_cached']:.2f}",
            f"{way['seconds'] / ours['seconds']:.2f}",
            "" if resident else f"{way['train_seconds'] / ours['train_seconds']:.2f}",
        )
    made.add_section()
    for name, way in results["split"].items():
        if name != "evovlm":
            made.add_row(f"  {name}", "", f"{way['seconds']:.2f}", "", "", "", f"{way['gain']:.2f}")
    return made
