"""The files of docs/examples are those of the pages, and are read to the last line."""

from collections import Counter
from pathlib import Path

import pytest

from befm_jax.data import choices, examples, games
from befm_jax.tasks import sources

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs" / "examples"


@pytest.mark.parametrize(
    ("page", "name"), [("docs/own_data.md", "coin_gift.py"), ("README.md", "commute.py")]
)
def test_the_code_is_that_of_the_page(page, name):
    shown = (ROOT / page).read_text().split(f"```python\n# {name}\n")[1].split("```")[0]
    assert (EXAMPLES / name).read_text().split('"""')[2].strip() == shown.strip()


def test_the_tables_are_read_to_the_last_line():
    selected = games.select(f"all,{EXAMPLES / 'coin_gift.py'}")
    people = choices.read(EXAMPLES / "people.csv", selected)
    assert not people.left_out.counts
    assert len(people.rows) == 150
    commuters = f"{EXAMPLES / 'commute.py'}={EXAMPLES / 'trips.csv'}"
    (source,) = sources.select(commuters, selected, "")
    assert not source.rows.left_out.counts
    cities = Counter(item.labels["city"] for item in source.items())
    tables = f"survey/next={EXAMPLES / 'bigfive.csv'},rounds/next={EXAMPLES / 'public_goods.csv'}"
    for table, rows in zip(sources.select(tables, []), (60, 115), strict=True):
        assert not table.rows.left_out.counts
        assert len(table.rows.rows) == rows
    assert len(examples.read(EXAMPLES / "examples.jsonl")) == 6
    assert cities == {"Ulm": 100, "Bern": 100, "Graz": 100}
