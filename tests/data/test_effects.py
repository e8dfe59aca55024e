"""Published effects as two questions each; what can't be asked is counted with its reason."""

import csv

import pytest

from befm_jax.data import effects
from befm_jax.data.effects import Gift
from befm_jax.errors import DataError
from tests.conftest import SHARED

COLUMNS = [
    "id", "game", "parameters_control", "parameters_treatment", "outcome", "difference",
    "standard_error", "ci95", "adjusted_difference", "adjusted_standard_error", "units",
    "direction", "assignment", "source", "kind", "note",
]  # fmt: skip
LINE = {
    "id": "one", "game": "dictator", "parameters_control": "endowment=10",
    "parameters_treatment": "endowment=100", "outcome": "mean share given",
    "difference": "-0.03", "standard_error": "0.01", "ci95": "[-0.05, -0.01]", "units": "share",
    "direction": "-1", "assignment": "between people", "source": "A", "kind": "individual study",
}  # fmt: skip


def read(tmp_path, *lines):
    path = tmp_path / "effects.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for number, line in enumerate(lines):
            writer.writerow({**LINE, "id": str(number), **line})
    return effects.read(path)


def one(tmp_path, **line):
    (row,) = read(tmp_path, line).rows
    return row


def arms(tmp_path, game, control, treatment, outcome="the mean"):
    given = {"parameters_control": control, "parameters_treatment": treatment}
    row = one(tmp_path, game=game, outcome=outcome, **given)
    return row.control, row.treatment


class TestWhatIsKnown:
    def test_a_difference_its_error_and_interval_are_shares(self, tmp_path):
        known = one(tmp_path).published
        assert known == (-1, -0.03, 0.01, (-0.05, -0.01))
        given = {"difference": "20", "standard_error": "4", "ci95": "", "direction": "+1"}
        known = one(tmp_path, units="0-100", **given).published
        assert known.direction == 1
        assert (known.difference, known.standard_error) == (0.2, 0.04)
        assert known.interval == pytest.approx((0.2 - 1.96 * 0.04, 0.2 + 1.96 * 0.04))

    def test_an_adjusted_difference_comes_first(self, tmp_path):
        given = {"adjusted_difference": "0.02", "adjusted_standard_error": "0.03"}
        known = one(tmp_path, direction="0", **given).published
        assert known[:3] == (0, 0.02, 0.03)
        assert known.interval == pytest.approx((0.02 - 1.96 * 0.03, 0.02 + 1.96 * 0.03))

    def test_of_other_units_the_direction_is_known_alone(self, tmp_path):
        given = {"difference": "d = 0.3", "units": "standardised", "ci95": "[0.1, 0.5]"}
        assert one(tmp_path, **given).published == (-1, None, None, None)

    def test_what_groups_are_made_by(self, tmp_path):
        row = one(tmp_path, assignment="between people (one treatment a person)")
        assert row.labels == {
            "game": "dictator", "kind": "individual study", "source": "A",
            "assignment": "between people",
        }  # fmt: skip
        assert row.person == "A"


class TestArms:
    def test_gifts(self, tmp_path):
        control, treatment = arms(
            tmp_path, "dictator", "frame=give;recipient=charity", "frame=take;recipient=charity"
        )
        assert control.asked == Gift(100, take=False, charity=True)
        assert treatment.asked == Gift(100, take=True, charity=True)
        assert control.values == tuple(number / 100 for number in range(101))
        low, high = arms(tmp_path, "dictator", "stake=low", "stake=high")
        assert (low.asked.endowment, high.asked.endowment) == (10, 100)

    @pytest.mark.parametrize(("outcome", "counted"), [
        ("share of people who give nothing", [1, 0, 0, 0, 0]),
        ("share of people who give something", [0, 1, 1, 1, 1]),
        ("share of people who give exactly half", [0, 0, 1, 0, 0]),
        ("share of dictators who give everything", [0, 0, 0, 0, 1]),
        ("share choosing more than 1", [0, 0, 1, 1, 1]),
    ])  # fmt: skip
    def test_shares_of_people(self, tmp_path, outcome, counted):
        control, _ = arms(tmp_path, "dictator", "endowment=4", "endowment=5", outcome)
        assert list(control.values) == counted

    def test_a_veto_is_an_ultimatum(self, tmp_path):
        control, treatment = arms(
            tmp_path, "ultimatum proposer", "endowment=5-10;veto=no", "endowment=5-10;veto=yes"
        )
        assert control.asked == Gift(8)
        assert treatment.asked.id == "ultimatum_proposer"
        assert treatment.asked.parameters == {"endowment": 8}

    def test_public_goods_are_asked_in_the_round_that_the_outcome_is_of(self, tmp_path):
        shared = "endowment=20;group_size=2-20;mpcr=0.06-0.7;rounds=1-29;platform=online"
        rounds = {}
        for outcome in ("in round 1", "all rounds", "in the last third of the rounds"):
            control, treatment = arms(
                tmp_path, "public goods", f"{shared};chat=no", f"{shared};chat=yes", outcome
            )
            (decision,) = treatment.asked.decisions
            rounds[outcome] = decision.round
            assert treatment.asked.design == {**control.asked.design, "chat": True}
        assert list(rounds.values()) == [1, 8, 12]
        assert control.asked.design == {
            "group_size": 11, "multiplier": 4.18, "rounds": 15, "all_or_nothing": False,
            "opt_out": False, "chat": False, "punishment": False, "reward": False,
        }  # fmt: skip

    def test_of_a_parameter_that_is_there_twice_the_last_counts(self, tmp_path):
        low, high = arms(
            tmp_path, "public goods", "mpcr=0.1-0.7;mpcr=0.1-0.3", "mpcr=0.1-0.7;mpcr=0.5-0.7"
        )
        assert (low.asked.design["multiplier"], high.asked.design["multiplier"]) == (0.8, 2.4)

    def test_dilemmas(self, tmp_path):
        payoffs = "T=50;P=25;S=12;R=32"
        low, high = arms(
            tmp_path, "prisoner's dilemma", f"{payoffs};continuation=0.5",
            f"{payoffs};continuation=0.75", "cooperation, all rounds",
        )  # fmt: skip
        assert low.asked.design == {
            "reward": 32, "sucker": 12, "temptation": 50, "penalty": 25, "continuation": 0.5,
            "error": 0,
        }  # fmt: skip
        assert low.values == (1.0, 0.0)
        # Two rounds are expected, and four: the middle ones, rounded down.
        assert [arm.asked.decisions[0].round for arm in (low, high)] == [1, 2]
        finite, infinite = arms(
            tmp_path, "prisoner's dilemma", "horizon=finite;rounds=4",
            "horizon=infinite;continuation=0.75",
        )  # fmt: skip
        assert finite.asked.design["rounds"] == 4
        assert "rounds" not in infinite.asked.design
        label, other = arms(
            tmp_path, "prisoner's dilemma", "label=Wall Street Game;rounds=1",
            "label=Community Game;rounds=1",
        )  # fmt: skip
        assert (label.name, other.name) == ("Wall Street Game", "Community Game")
        assert label.asked.id == other.asked.id == "push_pull"

    def test_what_the_other_did_is_a_round_before(self, tmp_path):
        pulled, pushed = arms(
            tmp_path, "push/pull", "own_round1=push;other_round1=pull",
            "own_round1=push;other_round1=push",
        )  # fmt: skip
        assert [arm.asked.decisions[0].after for arm in (pulled, pushed)] == [
            {"own": 0, "other": 1}, {"own": 0, "other": 0},
        ]  # fmt: skip

    def test_persons_and_pay_are_told(self, tmp_path):
        uk, de = arms(
            tmp_path, "bomb risk", "boxes=25;gender=male;age=under 35;pay=real",
            "boxes=100;gender=male;age=under 35;pay=hypothetical",
        )  # fmt: skip
        assert (uk.asked.parameters["boxes"], de.asked.parameters["boxes"]) == (25, 100)
        assert uk.about == {"Sex": "male", "Age": "under 35"}
        assert (uk.pay, de.pay) == ("real", "hypothetical")

    def test_guesses(self, tmp_path):
        low, high = arms(
            tmp_path, "guessing", "p=2/3;range=0-100;players=15-18",
            "p=4/3;range=0-100;players=15-18", "share choosing more than 67",
        )  # fmt: skip
        assert low.asked.parameters["group_size"] == 16
        assert high.asked.parameters["fraction"] == pytest.approx(4 / 3)
        assert (sum(low.values), low.values[67], low.values[68]) == (33, 0, 1)


def test_what_is_not_asked_is_counted_with_its_reason(tmp_path):
    def contrast(control, treatment, **more):
        return {"parameters_control": control, "parameters_treatment": treatment, **more}

    rows = read(
        tmp_path,
        {},
        {"note": "Not replicated: do not score."},
        {"note": "The article says the reverse: sign not certain, leave out."},
        {"id": "0"},
        {"game": "lottery choice"},
        contrast("eyes=no", "eyes=yes"),
        contrast("endowment=1", "endowment=10"),
        contrast("endowment=tiny", "endowment=10"),
        contrast("platform=a;round=1", "platform=b;round=2"),
        contrast("platform=online", "platform=online"),
        contrast("frame=give", "frame=burn"),
        contrast("R=32;continuation=0.5", "R=48;continuation=0.5", game="prisoner's dilemma"),
        contrast("rounds=1", "rounds=2", outcome="rejection", game="ultimatum responder"),
        {"direction": "", "difference": ""},
        contrast("other_round1=pull", "other_round1=push", game="push/pull"),
    )
    assert len(rows.rows) == 1
    assert rows.left_out.counts == {
        "row: its note says 'do not score'": 1,
        "row: its note says 'sign not certain'": 1,
        "row: no id, or the id of another row": 1,
        "not asked: lottery choice is no game of this package": 1,
        "not asked: no question tells of eyes": 1,
        "not asked: endowment 1 is not asked in whole dollars": 1,
        "not asked: endowment tiny is not a number": 1,
        "not asked: no question tells of platform": 1,
        "not asked: both arms have the same question": 1,
        "not asked: no question tells of frame burn": 1,
        "not asked: some payoffs are not known": 1,
        "not asked: a rejection is no answer of the package's games": 1,
        "not asked: the number of rounds is not known": 1,
        "not asked: neither a direction nor a difference is known": 1,
    }


def test_another_table_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("id,game\n1,dictator\n")
    with pytest.raises(DataError, match=r"other.csv:1: no column 'parameters_control'"):
        effects.read(path)
    with pytest.raises(DataError, match="no effect; left out, not asked: chess is no game"):
        read(tmp_path, {"game": "chess"})


def test_the_real_table():
    path = SHARED / "effects" / "effects.csv"
    if not path.exists():
        pytest.skip(f"{path} is not there")
    rows = effects.read(path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(rows.rows) + sum(rows.left_out.counts.values()) == len(lines) == 179
    assert len(rows.rows) >= 70
    known = {row.id: row for row in rows.rows}
    assert not {"lit_trust_multiplier", "lit_time_pressure_original"} & set(known)
    published = {line["id"]: line for line in lines}
    for id, row in known.items():
        assert row.published.direction == int(published[id]["direction"])
        if row.published.interval and row.published.direction:
            # The sign that was given goes with the difference that was kept.
            assert row.published.difference * row.published.direction > 0, id
