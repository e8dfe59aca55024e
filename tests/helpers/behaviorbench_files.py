"""A small made-up directory in the layout of BehaviorBench, in words of our own."""

import json
from pathlib import Path

import numpy as np

from befm_jax.data import questionnaires

STATEMENTS = questionnaires.get("big_five_50").statements
TRAITS = ("Extraversion", "Neuroticism", "Agreeableness", "Conscientiousness", "Openness")
GAMES = {
    "dictator": 100,
    "ultimatum_proposer": 100,
    "ultimatum_responder": 100,
    "trust_investor": 100,
    "trust_banker": 150,
    "public_goods": 20,
    "bomb": 100,
    "guessing": 100,
}
ROUNDS = {
    "dictator": 100,
    "trust_investor": 100,
    "trust_banker_inv50": 150,
    "trust_banker_inv100": 300,
    "public_goods": 20,
    "bomb": 100,
    "guessing": 100,
}
STEPS = ("idea_generation", "method_recommendation", "outcome_prediction", "impact_prediction",
         "title_prediction")  # fmt: skip
WORDS = ["prices", "firms", "people", "choose", "learn", "give", "trust", "markets", "share"]


def write(folder: Path, records: int = 12, seed: int = 0) -> dict[str, list[dict]]:
    """Writes every file with so many records each; returns the records by path."""
    made = dict(_files(records, np.random.default_rng(seed)))
    for path, own in made.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in own))
    return made


def record(system: str, user: str, assistant: str, **more) -> dict:
    return {"system": system, "user": user, "assistant": assistant, **more}


def _files(records, rng):
    numbers = range(records)
    player, moblab = "You take part in a game.", "moblab"
    for name, most in {**GAMES, "push_pull": 1}.items():

        def answer(name=name, most=most):
            drawn = int(rng.binomial(most, 0.4))
            if name == "push_pull":
                return f"[{('Push', 'Pull')[drawn]}]"
            return f"[${drawn}]" if name == "dictator" else f"[{drawn}]"

        asked = f"This is {name}. Choose up to {most}; write it in []."
        yield (
            f"{moblab}/game_behavior/{name}_test.jsonl",
            [record(player, asked, answer()) for _ in numbers],
        )
        yield (
            f"{moblab}/acrossgame_behavior/acrossgame_{name}_test.jsonl",
            [
                record(
                    player,
                    f"Before, you chose [{rng.integers(100)}]. {asked}",
                    answer(),
                    metadata={"user_id": str(number), "target_game": name},
                )
                for number in numbers
            ],
        )
    for name, most in {**ROUNDS, "push_pull": 1}.items():
        choices = ("Push", "Pull") if name == "push_pull" else range(most + 1)
        yield (
            f"{moblab}/multiround_behavior/{name}_multiround_test.jsonl",
            [
                record(
                    player,
                    f"This is {name}. In round 1 you chose [{rng.choice(choices)}]. Choose again.",
                    f"[{rng.choice(choices)}]",
                    metadata={"user_id": str(number), "target_round": 2},
                )
                for number in numbers
            ],
        )
    yield (
        f"{moblab}/strategic_gameplay/guessing_strategic_gameplay_test.jsonl",
        [
            record(
                player,
                "Guess 2/3 of the average." + " Last time it was [20]." * (number % 2),
                f"[{rng.integers(60)}]",
                metadata={"other_players_choices": rng.integers(0, 70, 15).tolist()},
            )
            for number in numbers
        ],
    )
    codes = list(STATEMENTS)
    about = [f"Somebody of {rng.integers(18, 70)}, number {number}." for number in numbers]
    score = [f"[{rng.integers(10, 51)}]" for _ in range(3 * records)]
    traits = [TRAITS[number % 5] for number in numbers]
    survey = {
        "pers_score_pred": [
            record("Predict a score.", f"{about[n]} Which score in *{traits[n]}*?", score[n])
            for n in numbers
        ],
        "acrossdim_pers_score": [
            record("", f"Others: {score[n - 1]} of {about[n]} And *{traits[n]}*?", score[-n])
            for n in numbers
        ],
        "demo_pred_age": [
            record("Predict an age.", f"Scores: {score[n]}, {n}.", f"[{rng.integers(14, 80)}]")
            for n in numbers
        ],
        "surv_resp_pred": [
            record(
                about[n],
                f"From 1 to 5: {STATEMENTS[codes[n % 4]].text} Only a number.",
                f"[{rng.integers(1, 6)}]",
            )
            for n in numbers
        ],
    }
    for name in ("missing_surv_resp", "seq_surv_resp"):
        survey[name] = [
            record(
                "Predict an answer.",
                f"Others said [{rng.integers(1, 6)}]. {STATEMENTS[codes[1 + n % 4]].text}",
                f"[{rng.integers(1, 6)}]",
                metadata={"subject_idx": n, "target_item": codes[1 + n % 4]},
            )
            for n in numbers
        ]
    for name, own in survey.items():
        yield f"big_five/{name}/test.jsonl", own
    yield (
        "economics_contests/ieo_economics.jsonl",
        [
            record(
                "Give the letters of all that is right.",
                f"Question {number}?\n\nA. one\nB. two\nC. three\nD. four",
                str(rng.choice(["A", "B", "CD", "ABD"])),
            )
            for number in numbers
        ],
    )
    for name in STEPS:
        yield (
            f"workflows/{name}_test.jsonl",
            [
                record(
                    "You read papers.",
                    f"Paper {number} is on {rng.choice(WORDS)}. Go on with: {name}.",
                    " ".join(rng.choice(WORDS, 6)),
                    journal=("aer", "nhb")[number % 2],
                )
                for number in numbers
            ],
        )
