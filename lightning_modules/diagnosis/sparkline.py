"""Curves of a word's size, as SVG inside HTML: thousands of heads fit on a page."""

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, POINTS = 96, 24, 48


def sparkline(
    positions: NDArray[np.int64], values: NDArray[np.float64], mark: float, *, log: bool = True
) -> str:
    """The curve of values over log position, scaled to its own range; a line at position `mark`.

    log: the values on a log scale; those not positive are left out.
    """
    keep = np.isfinite(values) & ((values > 0) | (not log))
    if keep.sum() < 2:
        return ""
    x = np.log2(positions[keep])
    y = np.log(values[keep]) if log else values[keep]
    grid = np.linspace(x[0], x[-1], min(POINTS, len(x)))
    span = float(np.ptp(y)) or 1.0
    xs = (grid - x[0]) / (x[-1] - x[0]) * WIDTH
    ys = HEIGHT - 2 - (np.interp(grid, x, y) - y.min()) / span * (HEIGHT - 4)
    points = " ".join(f"{a:.0f},{b:.1f}" for a, b in zip(xs, ys, strict=True))
    at = np.clip((np.log2(mark) - x[0]) / (x[-1] - x[0]), 0, 1) * WIDTH
    return (
        f'<svg class="spark" width="{WIDTH}" height="{HEIGHT}" role="img">'
        f'<path d="M{at:.0f} 0V{HEIGHT}" class="mark"/><polyline points="{points}"/></svg>'
    )
