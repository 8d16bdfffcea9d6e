"""The small map of a live panel."""

from __future__ import annotations

from offload.cache.trace.heatmap import squeezed


def test_a_squeezed_map_shows_how_full_each_part_is() -> None:
    full, half, none = (True,) * 8, (True, False) * 4, (False,) * 8
    assert squeezed((full, half, none), rows=4, width=2).splitlines() == [
        "layers  0 to  0 |██|",
        "layers  1 to  1 |▒▒|",
        "layers  2 to  2 |  |",
    ]


def test_layers_and_experts_share_rows_and_columns_where_there_are_too_many() -> None:
    layers = tuple((layer < 20,) * 128 for layer in range(40))
    assert squeezed(layers, rows=2, width=64).splitlines() == [
        f"layers  0 to 19 |{'█' * 64}|",
        f"layers 20 to 39 |{' ' * 64}|",
    ]


def test_layers_need_not_have_the_same_number_of_experts() -> None:
    assert squeezed(((True,) * 4, (True,))) == "layers  0 to  0 |████|\nlayers  1 to  1 |█|"
    assert squeezed(((True,) * 4, (True,)), rows=1) == "layers  0 to  1 |████|"
