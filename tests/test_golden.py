"""Figures that were published stay what they were, unless somebody says why not."""

import golden


def test_figures_are_those_that_were_stored():
    found = list(golden.differences(golden.figures(), golden.read("figures"), 1e-12))
    assert not found, f"{len(found)} figures differ, {found[:3]}: {golden.MEANS['figures']}"


def test_every_measure_game_and_baseline_is_stored():
    stored = golden.read("figures")
    for respondent in stored.values():
        assert len(respondent["groups"]) == 7
        for figures in (
            respondent["metrics"],
            *(g["metrics"] for g in respondent["groups"].values()),
        ):
            assert len(figures) == 9
            for figure in figures.values():
                assert {"value", "ci95", "floor", "ceiling", "skill", "baselines"} <= set(figure)
