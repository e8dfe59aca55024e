"""The games that come with the package: seven with human data, two without.

The wording is the project's own. Payoffs are the money of the role who answers, its own choice
first. Predictions are those of the textbooks, for players who maximise their own money and are
neutral to risk.
"""

from collections.abc import Sequence
from fractions import Fraction

from befm_jax.data.games import Game, register
from befm_jax.data.items import AnswerSet
from befm_jax.errors import DataError


def _dollars(endowment: int) -> AnswerSet:
    return AnswerSet.numbers(range(endowment + 1), "dollars")


def _dictator(endowment: int) -> str:
    return (
        "You have been matched at random with another participant whom you will not meet. You "
        f"received ${endowment}; the other participant received nothing. You alone decide how much "
        "of your money goes to the other participant. You keep the remainder, the other "
        "participant cannot object, and the experiment ends after your decision. How much do you "
        f"give? {_dollars(endowment).request}"
    )


def _dictator_payoff(given: int, endowment: int) -> float:
    """What the dictator keeps."""
    return endowment - given


register(
    Game(
        id="dictator",
        title="Dictator",
        roles=("dictator", "recipient"),
        role="dictator",
        parameters={"endowment": 100},
        instructions=_dictator,
        answers_of=_dollars,
        payoff_of=_dictator_payoff,
        equilibrium_of=lambda endowment: 0,
        reference="dictator",
    )
)


def _proposer(endowment: int) -> str:
    return (
        f"Two participants can share ${endowment}, but only if they agree. You are the proposer: "
        "you name the part that goes to the other participant, the responder, and the rest would "
        "be yours. The responder then says yes or no. After a yes, the money is paid out as you "
        "proposed; after a no, both of you leave with nothing. There is no second attempt. How "
        f"much do you offer the responder? {_dollars(endowment).request}"
    )


def _proposer_payoff(offer: int, threshold: int, endowment: int) -> float:
    """The proposer's money; `threshold` is the least offer that the responder accepts."""
    return endowment - offer if offer >= threshold else 0


def _responder(endowment: int) -> str:
    return (
        f"Two participants can share ${endowment}, but only if they agree. The other participant, "
        "the proposer, names the part of it that would go to you, the responder, and would keep "
        "the rest. Before you learn that offer, you fix the smallest part that you would take. An "
        "offer at or above your limit is paid out as proposed; below it, both of you leave with "
        f"nothing. What is your limit? {_dollars(endowment).request}"
    )


def _responder_payoff(threshold: int, offer: int, endowment: int) -> float:
    """The responder's money; `threshold` is the least offer accepted, `offer` the proposer's."""
    return offer if offer >= threshold else 0


# Two pairs are subgame-perfect in whole dollars: (offer 0, accept all) and (offer 1, accept from
# 1), since a responder gains nothing by accepting 0. We take the second: an offer of 1 is accepted
# however the responder settles that tie, so the prediction does not rest on it.
register(
    Game(
        id="ultimatum_proposer",
        title="Ultimatum, proposer",
        roles=("proposer", "responder"),
        role="proposer",
        parameters={"endowment": 100},
        instructions=_proposer,
        answers_of=_dollars,
        payoff_of=_proposer_payoff,
        equilibrium_of=lambda endowment: 1,
        reference="ultimatum_1",
    )
)
register(
    Game(
        id="ultimatum_responder",
        title="Ultimatum, responder",
        roles=("proposer", "responder"),
        role="responder",
        parameters={"endowment": 100},
        instructions=_responder,
        answers_of=_dollars,
        payoff_of=_responder_payoff,
        equilibrium_of=lambda endowment: 1,
        reference="ultimatum_2",
    )
)


def _investor(endowment: int, multiplier: float) -> str:
    return (
        f"You are the investor and hold ${endowment}. You may send any part of it to another "
        "participant, the banker, and keep the rest. Whatever you send is multiplied by "
        f"{multiplier:g} on its way. The banker then chooses how much of the multiplied amount "
        "comes back to you and keeps the remainder; nothing obliges the banker to send anything "
        "back. The two of you are paired only once. How much do you send? "
        f"{_dollars(endowment).request}"
    )


def _investor_payoff(invested: int, returned: int, endowment: int, multiplier: float) -> float:
    """The investor's money; `returned` is what the banker sent back."""
    return endowment - invested + returned


register(
    Game(
        id="trust_investor",
        title="Trust, investor",
        roles=("investor", "banker"),
        role="investor",
        parameters={"endowment": 100, "multiplier": 3},
        instructions=_investor,
        answers_of=lambda endowment, multiplier: _dollars(endowment),
        payoff_of=_investor_payoff,
        equilibrium_of=lambda endowment, multiplier: 0,  # the banker will return nothing
        reference="trust_1",
    )
)


def _returns(endowment: int, multiplier: float, invested: int) -> AnswerSet:
    if not 0 <= invested <= endowment:
        raise DataError(f"invested: {invested} is not between 0 and the endowment, {endowment}")
    # 1.15 * 100 is a hair below 115 in floating point; the banker holds 115.
    return _dollars(int(multiplier * invested + 1e-9))


def _banker(endowment: int, multiplier: float, invested: int) -> str:
    return (
        "You are the banker, paired only once with another participant, the investor. The investor "
        f"started with ${endowment}, sent ${invested} of it to you and kept the rest. On its way "
        f"the amount was multiplied by {multiplier:g}, so that you now hold "
        f"${multiplier * invested:g}. You decide how much of this goes back to the investor, and "
        "what is left is yours. Nobody can overrule your decision. How much do you send back? "
        f"{_returns(endowment, multiplier, invested).request}"
    )


def _banker_payoff(returned: int, endowment: int, multiplier: float, invested: int) -> float:
    """What the banker keeps."""
    return multiplier * invested - returned


register(
    Game(
        id="trust_banker",
        title="Trust, banker",
        roles=("investor", "banker"),
        role="banker",
        parameters={"endowment": 100, "multiplier": 3, "invested": 50},
        instructions=_banker,
        answers_of=_returns,
        payoff_of=_banker_payoff,
        equilibrium_of=lambda endowment, multiplier, invested: 0,
        reference="trust_3",
    )
)


def _public_goods(endowment: int, group_size: int, return_rate: float) -> str:
    return (
        f"You belong to a group of {group_size} participants. Each member holds ${endowment} and "
        "decides, without knowing the decisions of the others, how much of it to put into a common "
        "project; what is not put in is kept. Every dollar in the project, whoever put it in, pays "
        f"{100 * return_rate:g} cents to each of the {group_size} members. Your earnings are what "
        "you kept plus what the project pays you. How much do you put in? "
        f"{_dollars(endowment).request}"
    )


def _public_goods_payoff(
    own: int, others_total: int, endowment: int, group_size: int, return_rate: float
) -> float:
    """A member's money; `others_total` is what the other members put in together."""
    return endowment - own + return_rate * (own + others_total)


register(
    Game(
        id="public_goods",
        title="Public goods",
        roles=("member",),
        role="member",
        parameters={"endowment": 20, "group_size": 4, "return_rate": 0.5},
        instructions=_public_goods,
        answers_of=lambda endowment, group_size, return_rate: _dollars(endowment),
        payoff_of=_public_goods_payoff,
        # A dollar put in brings its owner `return_rate` dollars, whatever the others do.
        equilibrium_of=lambda endowment, group_size, return_rate: (
            0 if return_rate < 1 else endowment
        ),
        reference="PG",
    )
)


def _boxes(boxes: int) -> AnswerSet:
    return AnswerSet.numbers(range(boxes + 1), "boxes")


def _bomb(boxes: int) -> str:
    return (
        f"In front of you are {boxes} closed boxes. They look alike, but one of them, placed at "
        "random, hides a bomb. You decide how many boxes to open, and all of them are opened at "
        "once. Each opened box earns you 1 point, unless the bomb is among them: then all your "
        "points are destroyed and you earn nothing. If you open no box, you earn nothing either. "
        f"How many boxes do you open? {_boxes(boxes).request}"
    )


def _bomb_payoff(opened: int, boxes: int) -> float:
    """The expected points: `opened`, with the chance that the bomb is in another box."""
    return opened * (boxes - opened) / boxes


register(
    Game(
        id="bomb",
        title="Bomb risk",
        roles=("player",),
        role="player",
        parameters={"boxes": 100},
        instructions=_bomb,
        answers_of=_boxes,
        payoff_of=_bomb_payoff,
        equilibrium_of=lambda boxes: boxes // 2,
        reference="bomb",
    )
)


_PUSH, _PULL = 0, 1


def _push_pull(both_push: float, both_pull: float, pull_alone: float, push_alone: float) -> str:
    return (
        "You and another participant decide at the same moment, each for one of two actions, Push "
        f"or Pull. If both of you choose Push, each receives ${both_push:g}. If both choose Pull, "
        f"each receives ${both_pull:g}. If one chooses Pull while the other chooses Push, the one "
        f"who chose Pull receives ${pull_alone:g} and the one who chose Push receives "
        f"${push_alone:g}. You meet only once and cannot talk beforehand. Which action do you "
        f"choose? {_ACTIONS.request}"
    )


_ACTIONS = AnswerSet.labels("Push", "Pull", values=(_PUSH, _PULL))


def _push_pull_payoff(
    own: int,
    other: int,
    both_push: float,
    both_pull: float,
    pull_alone: float,
    push_alone: float,
) -> float:
    """The money of one of the two; 0 is Push, 1 is Pull."""
    return ((both_push, push_alone), (pull_alone, both_pull))[own][other]


def _push_pull_equilibrium(
    both_push: float, both_pull: float, pull_alone: float, push_alone: float
) -> int:
    if pull_alone > both_push and both_pull > push_alone:
        return _PULL
    if pull_alone < both_push and both_pull < push_alone:
        return _PUSH
    raise DataError("at these payoffs neither Push nor Pull is best whatever the other does")


register(
    Game(
        id="push_pull",
        title="Push or pull",
        roles=("player",),
        role="player",
        parameters={"both_push": 400, "both_pull": 300, "pull_alone": 700, "push_alone": 0},
        instructions=_push_pull,
        answers_of=lambda **_: _ACTIONS,
        payoff_of=_push_pull_payoff,
        equilibrium_of=_push_pull_equilibrium,
    )
)


def _guesses(highest: int) -> AnswerSet:
    return AnswerSet.numbers(range(highest + 1))


def _guessing(highest: int, group_size: int, fraction: float, prize: float) -> str:
    factor = Fraction(fraction).limit_denominator(100)
    return (
        f"You are one of {group_size} participants. At the same moment, each of you picks a whole "
        f"number from 0 to {highest}. The average of all {group_size} numbers is then multiplied "
        f"by {factor}. The participant whose number lies closest to the result wins a prize of "
        f"${prize:g}; if several are equally close, they share it. All others win nothing. Nobody "
        "sees the numbers of the others before choosing. Which number do you pick? "
        f"{_guesses(highest).request}"
    )


def _guessing_payoff(
    own: int, others: Sequence[int], highest: int, group_size: int, fraction: float, prize: float
) -> float:
    """One participant's money; `others` are the numbers of all the others."""
    if len(others) != group_size - 1:
        raise DataError(f"others: {len(others)} numbers, where there are {group_size - 1} others")
    target = fraction * (own + sum(others)) / group_size
    distances = [abs(number - target) for number in (own, *others)]
    # Rounding must not decide who is closest: numbers at one distance share the prize.
    winners = sum(distance <= min(distances) + 1e-9 for distance in distances)
    return prize / winners if distances[0] <= min(distances) + 1e-9 else 0.0


register(
    Game(
        id="guessing",
        title="Guess a fraction of the average",
        roles=("participant",),
        role="participant",
        parameters={"highest": 100, "group_size": 16, "fraction": 2 / 3, "prize": 100},
        instructions=_guessing,
        answers_of=lambda highest, **_: _guesses(highest),
        payoff_of=_guessing_payoff,
        # Only 0 survives when dominated numbers are struck out again and again. (In whole numbers
        # everyone at 1 also holds still.) A fraction above 1 drives the numbers up instead.
        equilibrium_of=lambda highest, fraction, **_: 0 if fraction < 1 else highest,
    )
)
