"""A text on grounds of colour: every character in its place, legible, on its own value."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from hyperjax import plotting
from hyperjax.plotting import text


def test_every_character_lies_on_its_value():
    words, values = "a b\n$x$", np.array([1.0, 0.2, 0.5, 0.2, 0.9, 0.3, 0.2])
    _, axes = plotting.subplots()
    assert plotting.plot_text(axes, words, values, columns=4, given=2) is axes
    (image,) = axes.images
    want = [[1, 0.2, 0.5, 0.2, np.nan], [0.9, 0.3, 0.2, np.nan, np.nan]]
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), want)
    assert image.get_clim() == (0.2, 1.0)
    shown = {sign.get_position(): sign.get_text() for sign in axes.texts}
    assert shown == {(c % 4 + 0.5, c // 4 + 0.53): sign for c, sign in enumerate("a·b↵$x$")}
    light = [to_hex(sign.get_color()) == "#ffffff" for sign in axes.texts]
    assert light == [True, False, False, False, True, False, False]  # on a dark ground
    assert not any(sign.get_parse_math() for sign in axes.texts)  # a $ is a character
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[n, 0.93], [n + 1, 0.93]] for n in (0, 1)]


def test_limits_are_the_callers_or_hold_all_values():
    _, axes = plotting.subplots(1, 2)
    assert plotting.plot_text(axes[0], "ab", [1.0, 3.0], limits=(0.0, 2.0)).images[0].get_clim() == (0.0, 2.0)
    low, high = plotting.plot_text(axes[1], "abc", [1.0, 1.0, 1.0]).images[0].get_clim()
    assert low == 1 < high <= 1.2
    assert high > 1.01  # or the ticks of its colour bar could not be read


@pytest.mark.parametrize(("words", "values"), [("abc", [1.0, 0.5]), ("", [])])
def test_a_number_for_each_character(words, values):
    message = f"{len(values)} numbers for {len(words)} characters, expected one for each"
    with pytest.raises(ValueError, match=message):
        plotting.plot_text(plotting.subplots()[1], words, values)


def test_characters_fit_their_places():
    words = "the quick brown fox jumps over the lazy dog " * 3
    width, height = plotting.text_size(words, 48, 9.0)
    figure, axes = plotting.subplots(size=(width + 0.2, height + 0.2))
    figure.set_dpi(300)
    plotting.plot_text(axes, words, np.arange(len(words)), columns=48, size=9.0)
    figure.draw_without_rendering()
    boxes = [sign.get_window_extent() for sign in axes.texts]
    cell = axes.get_window_extent().width / 49
    assert max(box.width for box in boxes) <= 1.02 * cell
    assert min(box.width for box in boxes) >= 0.8 * cell


def test_lines_break_between_words_and_at_newlines():
    places = text.lay_out("ab cdef gh\n\nlonger_than_it", columns=7)
    lines = {}
    for symbol, (line, column) in zip("ab cdef gh\n\nlonger_than_it", places, strict=True):
        lines.setdefault(line, {})[column] = symbol
    assert all(list(row) == list(range(len(row))) for row in lines.values())
    assert ["".join(row.values()) for row in lines.values()] == ["ab cdef ", "gh\n", "\n", "longer_", "than_it"]


def test_blanks_are_visible_and_signs_without_a_glyph_replaced():
    assert "".join(text.drawable("a \n\t$\x07\U0001f600")) == "a\u00b7\u21b5\u2192$\ufffd\ufffd"
    assert text.ink_on((1, 1, 0.8, 1)) == "black"
    assert text.ink_on((0.2, 0.05, 0.4, 1)) == "white"
