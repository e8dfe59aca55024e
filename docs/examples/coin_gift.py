"""A game of your own: the one in docs/own_data.md."""

from befm_jax.data.games import AnswerSet, Game, register

register(
    Game(
        id="coin_gift",
        title="Coin gift",
        roles=("giver", "receiver"),
        role="giver",
        parameters={"coins": 10},
        answers_of=lambda coins: AnswerSet.numbers(range(coins + 1), "coins"),
        instructions=lambda coins: (
            f"You found {coins} coins and may give some of them to a stranger. How many do you "
            f"give? Answer with one number from 0 to {coins} in square brackets, such as [3]."
        ),
        payoff_of=lambda given, coins: coins - given,
        equilibrium_of=lambda coins: 0,
    )
)
