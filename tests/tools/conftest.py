"""Tables that benchmarks read, made by hand."""

import pytest

ITEMS = [f"{trait}{number}" for trait in "ENACO" for number in range(1, 11)]


@pytest.fixture
def questionnaires(tmp_path):
    """Three respondents who can be described, one of whom left an item out; two who can't."""
    folder = tmp_path / "bigfive"
    folder.mkdir()
    rows = [
        ["3", "30", "1", "2", "1", "1", "US", *["4"] * 50],
        ["3", "1975", "1", "2", "1", "1", "US", *["4"] * 50],
        ["3", "25", "2", "1", "1", "1", "RO", "0", *["2"] * 49],
        ["3", "25", "0", "1", "1", "1", "RO", *["2"] * 50],
        ["3", "19", "1", "3", "1", "1", "PK", *["5"] * 50],
    ]
    head = ["race", "age", "engnat", "gender", "hand", "source", "country", *ITEMS]
    (folder / "bigfive_data.csv").write_text("\n".join("\t".join(row) for row in [head, *rows]))
    (folder / "bigfive.tsv").write_text("".join(f"{item}\tI am {item}.\n" for item in ITEMS))
    return tmp_path
