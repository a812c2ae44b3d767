"""Every head in a few numbers, and which heads are remarkable."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from conf.diagnosis import ThresholdsConfig
from lightning_modules.diagnosis.reading import Measures

Head = dict[str, Any]

NAMED_CHANNELS = 5  # of an outlier head


def head_rows(measures: Measures, thresholds: ThresholdsConfig) -> list[Head]:
    """One row a head, in the order of layers and heads, both counted from 0.

    variance_inside, variance_beyond, rms_inside, rms_beyond: maxima over samples within the training length
    and beyond it; variance_ratio: their quotient, None where the state is zero inside. exceeds: the first
    position at which the variance is above thresholds.variance_ratio times its maximum inside. retention:
    what is left of the first token over the training length; half_life: tokens until half of it is left,
    half_life_extrapolated where that is longer than the prompt; None where nothing is ever lost. dt, decay
    (the retention of one token, geometric mean) and insertion are means over the prompt; top_share is the
    share of the variance in the top channels, the largest beyond the training length.
    """
    inside, positions, values = measures.inside, measures.positions, measures.values
    _, layers, heads = values["rms"].shape
    variance, rms = (
        (_peak(values[name][inside]), _peak(values[name][~inside])) for name in ("variance", "rms")
    )
    weight = np.diff(positions, prepend=0) / positions[-1]
    mean = {name: np.tensordot(weight, values[name], 1) for name in ("dt", "log_decay", "insertion")}
    top_share = _peak(values["top_share"][~inside])
    rows = []
    for layer, head in np.ndindex(layers, heads):
        log_retention = values["log_retention"][:, layer, head]
        half_life, extrapolated = _half_life(positions, log_retention)
        variance_inside, variance_beyond = (float(peak[layer, head]) for peak in variance)
        limit = thresholds.variance_ratio * variance_inside
        above = ~inside & (values["variance"][:, layer, head] > limit) & (variance_inside > 0)
        rows.append(
            {
                "layer": layer,
                "head": head,
                "variance_inside": variance_inside,
                "variance_beyond": variance_beyond,
                "variance_ratio": variance_beyond / variance_inside if variance_inside > 0 else None,
                "exceeds": int(positions[above][0]) if above.any() else None,
                "rms_inside": float(rms[0][layer, head]),
                "rms_beyond": float(rms[1][layer, head]),
                "top_share": float(top_share[layer, head]),
                "retention": float(np.exp(_at(measures.train_length, positions, log_retention))),
                "half_life": half_life,
                "half_life_extrapolated": extrapolated,
                "dt": float(mean["dt"][layer, head]),
                "decay": float(np.exp(mean["log_decay"][layer, head])),
                "insertion": float(mean["insertion"][layer, head]),
            }
        )
    return rows


def collapsed_heads(rows: list[Head]) -> list[Head]:
    """Heads whose variance exceeds its limit beyond the training length, the worst first."""
    kept = ("layer", "head", "variance_inside", "variance_beyond", "variance_ratio", "exceeds")
    return _some(rows, lambda row: row["exceeds"] is not None, kept, "variance_ratio")


def over_retaining_heads(rows: list[Head], thresholds: ThresholdsConfig) -> list[Head]:
    """Heads that keep more of the first token than thresholds.retention, the longest memory first."""
    kept = ("layer", "head", "retention", "half_life", "half_life_extrapolated")
    return _some(rows, lambda row: row["retention"] > thresholds.retention, kept, "retention")


def outlier_channels(rows: list[Head], measures: Measures, thresholds: ThresholdsConfig) -> list[Head]:
    """Heads whose top channels hold more of the variance than thresholds.channel_share, the worst first.

    channels: the strongest at the last sample, as [p, n, share of the head's variance].
    """
    found = _some(
        rows,
        lambda row: row["top_share"] > thresholds.channel_share,
        ("layer", "head", "top_share"),
        "top_share",
    )
    for row in found:
        energy = measures.channels_end[row["layer"]][row["head"]]
        shares = energy / energy.sum()
        top = np.argsort(-shares, axis=None)[:NAMED_CHANNELS]
        where = zip(*np.unravel_index(top, shares.shape), strict=True)
        row["channels"] = [[int(p), int(n), float(shares[p, n])] for p, n in where]
    return found


def _some(rows: list[Head], keep: Any, names: tuple[str, ...], by: str) -> list[Head]:
    kept = sorted((row for row in rows if keep(row)), key=lambda row: -row[by])
    return [{name: row[name] for name in names} for row in kept]


def _peak(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest over samples that are finite, (layers, heads); 0 without samples."""
    return np.max(np.where(np.isfinite(values), values, 0.0), 0, initial=0.0)


def _at(position: int, positions: NDArray[np.int64], log_retention: NDArray[np.float64]) -> float:
    """log retention of the first token at a position; between samples it is taken to change evenly."""
    return float(np.interp(position, [1, *positions], [0.0, *log_retention]))


def _half_life(positions: NDArray[np.int64], log_retention: NDArray[np.float64]) -> tuple[float | None, bool]:
    """Tokens after the first until half of it is left, and whether that lies beyond the prompt."""
    tokens, levels = np.array([0.0, *(positions - 1)]), np.array([0.0, *log_retention])
    half = -np.log(2.0)
    if levels[-1] <= half:  # log retention never rises
        return float(np.interp(-half, -levels, tokens)), False
    if levels[-1] == 0.0:
        return None, True
    return float(half / levels[-1] * tokens[-1]), True
