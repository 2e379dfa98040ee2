"""Every class of transformers' mappings is placed without help; `docs/coverage.md` names what is refused, and why."""

import pytest
from zoo import classes, small

import symlm
from symlm.roles.assignment import UnplacedParameters

LEAST = {"CAUSAL_LM": 0.98, "MASKED_LM": 0.95, "SEQ_TO_SEQ_CAUSAL_LM": 0.95, "IMAGE_TEXT_TO_TEXT": 0.95}
LEAST |= {"AUDIO_CLASSIFICATION": 0.95, "CTC": 0.95, "IMAGE_CLASSIFICATION": 0.9}


FINE_TUNED = ("QUESTION_ANSWERING", "TOKEN_CLASSIFICATION", "MULTIPLE_CHOICE", "SPEECH_SEQ_2_SEQ", "PRETRAINING")


def swept(mapping):
    """Return how many classes were built, and {class: why} of the refused."""
    built, refused = 0, {}
    for kind, name in classes(mapping):
        if (model := small(kind, name)) is None:
            continue
        built += 1
        try:
            assert symlm.param_groups(model)
        except (UnplacedParameters, ValueError) as error:
            refused[name] = str(error)
    return built, refused


@pytest.mark.parametrize("mapping", LEAST)
def test_the_classes_of_a_mapping_are_placed(mapping):
    built, refused = swept(mapping)
    print(f"{mapping}: {built} built, {len(refused)} refused {sorted(refused)}")
    assert built > 10
    assert 1 - len(refused) / built >= LEAST[mapping], refused


@pytest.mark.slow
@pytest.mark.parametrize("mapping", FINE_TUNED)
def test_the_classes_of_other_tasks_are_placed(mapping):
    built, refused = swept(mapping)
    assert built > 10
    assert not refused
