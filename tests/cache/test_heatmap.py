"""The small map of a live panel."""

from __future__ import annotations

from offload.cache.trace.heatmap import HeatMap, Part, as_html, squeezed


def test_a_squeezed_map_shows_how_full_each_part_is() -> None:
    full, half, none = (True,) * 8, (True, False) * 4, (False,) * 8
    assert squeezed((full, half, none), rows=4, width=2) == [
        Part(range(1), (1.0, 1.0)),
        Part(range(1, 2), (0.5, 0.5)),
        Part(range(2, 3), (0.0, 0.0)),
    ]


def test_layers_and_experts_share_rows_and_columns_where_there_are_too_many() -> None:
    layers = tuple((layer < 20,) * 128 for layer in range(40))
    assert squeezed(layers, rows=2, width=64) == [
        Part(range(20), (1.0,) * 64),
        Part(range(20, 40), (0.0,) * 64),
    ]


def test_layers_need_not_have_the_same_number_of_experts() -> None:
    parts = squeezed(((True,) * 4, (True,)))
    assert [part.shares for part in parts] == [(1.0,) * 4, (1.0,)]
    assert squeezed(((True,) * 4, (True,)), rows=1) == [Part(range(2), (1.0,) * 4)]


def test_a_notebook_shows_a_map_before_anything_was_asked_for() -> None:
    heat = HeatMap(((0.0, 0.0), (1.0, 0.0)), ((True, False), (True, True)), (None, 0.5))
    assert as_html(heat).count("hits</td>") == 1
