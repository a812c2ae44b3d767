"""Figures show what they were given."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from lightning_modules import figures

ROWS = [
    {"length": length, "exact": exact, "exact_low": exact - 0.1, "exact_high": exact + 0.1}
    for length, exact in ((1024, 0.5), (256, 0.9), (512, 0.7))
]


def test_accuracy_is_drawn_in_order_of_length_with_bands_and_the_training_length() -> None:
    bare = [{"length": 256, "exact": 0.3}, {"length": 512, "exact": 0.2}]
    figure = figures.accuracy_by_length({"with band": ROWS, "without": bare}, 256)
    axes = figure.axes[0]
    first, second, mark = axes.lines
    assert first.get_xydata().tolist() == [[256, 0.9], [512, 0.7], [1024, 0.5]]
    assert second.get_xydata().tolist() == [[256, 0.3], [512, 0.2]]
    assert list(mark.get_xdata()) == [256, 256]
    assert len(axes.collections) == 1
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["with band", "without"]
    assert "intervals" in legend.get_title().get_text()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "512", "1K"]
    assert "tokens" in axes.get_xlabel()


def test_no_line_and_no_caption_where_there_is_nothing_to_mark() -> None:
    figure = figures.accuracy_by_length({"mean": [{"length": 256, "exact": 0.3}]}, None)
    assert len(figure.axes[0].lines) == 1
    assert figure.legends[0].get_title().get_text() == ""


@pytest.mark.parametrize("lines", [1, 4, 12])
def test_the_legend_stands_below_all_data_and_inside_the_figure(lines: int, tmp_path: Path) -> None:
    labels = [f"forget_more alpha_scale 0.998, insert_scale {i / 10}" for i in range(lines)]
    curve = {"position": [1.0, 100.0], "loss": [1.0, 0.5]}
    for figure in (
        figures.accuracy_by_length(dict.fromkeys(labels, ROWS), 256),
        figures.loss_by_position(dict.fromkeys(labels, curve), 64),
    ):
        figures.save(figure, tmp_path / "a.png")
        legend, axes = figure.legends[0].get_window_extent(), figure.axes[0]
        assert legend.y1 <= axes.get_tightbbox().y0
        assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width
        assert legend.y0 >= 0
        assert axes.get_window_extent().height > 2.5 * figure.dpi  # nothing of it is given away


def test_heatmap_puts_each_cell_at_its_depth_and_length() -> None:
    cells = [
        {"length": length, "depth": depth, "exact": depth if length == 256 else 0.0}
        for length in (512, 256)
        for depth in (0.75, 0.25)
    ]
    figure = figures.passkey_heatmap(cells, 256)
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[0.25, 0.0], [0.75, 0.0]])
    assert axes.lines[0].get_xdata()[0] == 0.5  # between the trained column and the other
    assert [label.get_text() for label in axes.get_yticklabels()] == ["25%", "75%"]
    assert axes.yaxis_inverted()  # the start of the prompt is on top


def test_loss_has_gaps_where_it_was_not_finite() -> None:
    curve = {"position": [32.5, 96.5, 160.5], "loss": [1.0, None, 2.0]}
    figure = figures.loss_by_position({"text": curve}, 64)
    y = figure.axes[0].lines[0].get_ydata()
    assert np.isnan(y[1])
    assert (y[0], y[2]) == (1.0, 2.0)


def test_loss_is_averaged_over_training_lengths_and_wider_far_out() -> None:
    position = 64.0 * np.arange(256) + 32.5
    loss = np.where(position < 128, 1.0, position)
    figure = figures.loss_by_position({"text": {"position": position, "loss": loss}}, 128)
    x, y = figure.axes[0].lines[1].get_data()
    assert (x[0], y[0]) == (64.5, 1.0)  # the two buckets of the first 128 tokens
    np.testing.assert_allclose(y[1:], x[1:])
    widths = np.diff(x)
    assert set(widths[:10]) == {128}
    assert widths.max() >= 1024
    assert len(x) < 50


def test_a_saved_figure_is_a_picture(tmp_path: Path) -> None:
    path = figures.save(figures.accuracy_by_length({"a": ROWS}, 256), tmp_path / "new" / "a.png")
    pixels = image.imread(path)
    assert pixels.shape[1] > 900
    assert pixels[..., :3].std() > 0.05


@pytest.mark.parametrize(
    ("n", "text"), [(1, "1"), (256, "256"), (1024, "1K"), (1536, "1.5K"), (65536, "64K"), (2**20, "1M")]
)
def test_short_number(n: int, text: str) -> None:
    assert figures.short_number(n) == text
