"""A question of your own: the one in the README."""

from dataclasses import dataclass

from befm_jax.data.items import AnswerSet, Item, Message
from befm_jax.data.rows import Rows
from befm_jax.tasks import Task, register

WAYS = AnswerSet.labels("Bus", "Bike", "Car")


@dataclass(frozen=True)
class Commuter:
    person: str
    way: int
    city: str


def read(path):
    def row(cells):
        return Commuter(cells["id"], WAYS.read_cell(cells["way"]), cells["city"])

    return Rows.read(path, ("id", "way", "city"), row)


def items(row, wording, rng):
    question = f"You live in {row.city}. How do you travel to work? {WAYS.request}"
    labels = {"person": row.person, "city": row.city}
    yield Item(row.person, (Message("user", question),), WAYS, WAYS.one(row.way), labels)


register(
    Task("commute", items, "commuters", ("log_score", "accuracy"), groups=("city",), read=read)
)
