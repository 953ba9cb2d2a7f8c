"""The table of a saved folder."""

from batude_fx_cli.tables import saved_table
from tests.printed_tables import rows_of


def test_the_table_of_a_saved_folder_shows_its_ranks() -> None:
    facts = {
        "model_args": {"library": "timm", "base": "resnet18", "ranks": {"conv1": (8, 3), "fc": (16, 16)}},
        "params": 11_000_000, "bytes": 44_100_000, "flops": 900_000_000,
    }  # fmt: skip
    table = saved_table("small", facts)
    assert str(table.title) == "small: timm resnet18"
    assert rows_of(table) == [{"site": "conv1", "ranks": "8 / 3"}, {"site": "fc", "ranks": "16 / 16"}]
    assert str(table.caption).startswith("900 MFLOPs, 11 M parameters, 44.1 MB on disk; 2 sites in Tucker form.")
