"""The SCAN studies: the grammar and the splits against the published ones, the networks against their definitions."""

import math

import pytest
import torch
from torch import Tensor, nn

from sublens import studies
from sublens.errors import StudyError
from sublens.mask import Mask, fingerprint
from sublens.selection import select
from sublens.studies.scan import tokens
from sublens.studies.scan_data import ACTIONS, SPLITS, WORDS, encoded, pairs, split
from sublens.studies.sequence_networks import (
    LSTMTranslator,
    TransformerTranslator,
    asked,
    sentence_loss,
    written,
)
from sublens.study import Asked

L, R, J, W, U, K = ACTIONS
BY_HAND = {
    "jump": [J],
    "turn left": [L],
    "walk right": [R, W],
    "turn opposite left": [L, L],
    "look opposite right": [R, R, K],
    "turn around right": [R, R, R, R],
    "run around left": [L, U, L, U, L, U, L, U],
    "jump thrice": [J, J, J],
    "walk left twice": [L, W, L, W],
    "jump and look left twice": [J, L, K, L, K],
    "run after turn right thrice": [R, R, R, U],
    "walk opposite left after look around right": [R, K, R, K, R, K, R, K, L, L, W],
}


@pytest.mark.parametrize("command", BY_HAND)
def test_commands_mean_what_one_reads_in_them(command: str) -> None:
    assert list(pairs()[command]) == BY_HAND[command]


def test_the_grammar_has_as_many_commands_as_the_published_data() -> None:
    assert len(pairs()) == 20_910
    assert {word for command in pairs() for word in command.split()} == set(WORDS)
    assert {action for done in pairs().values() for action in done} == set(ACTIONS)
    assert max(len(command.split()) for command in pairs()) == 9
    assert max(map(len, pairs().values())) == 48


@pytest.mark.parametrize(
    ("name", "lines", "distinct", "held"),
    [
        ("simple", 16_728, 16_728, 4_182),
        ("length", 16_990, 16_990, 3_920),
        ("jump", 14_670, 13_204, 7_706),
        ("turn-left", 21_890, 19_702, 1_208),
    ],
)
def test_the_splits_have_the_published_sizes(name: str, lines: int, distinct: int, held: int) -> None:
    trained, tested = split(name)
    assert (len(trained), len(set(trained)), len(tested), len(set(tested))) == (lines, distinct, held, held)
    assert set(trained).isdisjoint(tested)
    assert set(trained) | set(tested) == set(pairs())


def test_the_splits_hold_back_what_their_names_say() -> None:
    trained, held = split("jump")
    assert {command for command in trained if "jump" in command} == {"jump"}
    assert all("jump" in command.split() for command in held)
    trained, held = split("turn-left")
    assert {command for command in trained if "turn left" in command} == {"turn left"}
    assert "turn opposite left" in trained
    trained, held = split("length")
    assert max(len(pairs()[command]) for command in trained) == 22
    assert min(len(pairs()[command]) for command in held) == 24
    assert split("simple", 1) == split("simple", 1) != split("simple", 2)
    with pytest.raises(StudyError, match="No split 'left' of SCAN; there are simple, jump, turn-left, length"):
        split("left")


def test_sentences_are_read_back_from_their_rows() -> None:
    commands = ["jump", "walk opposite left after look around right"]
    sentences = encoded(commands)
    assert sentences.commands.tolist()[0] == [3, *[13] * 7]
    source, target = sentences.rows(torch.tensor([1, 0]))
    for row, done, command in zip(source, target, reversed(commands), strict=True):
        assert [WORDS[i] for i in row.tolist() if i < 13] == command.split()
        assert [ACTIONS[i] for i in done.tolist() if i < 6] == BY_HAND[command]
    assert sentences.rows(torch.tensor([0]))[1].tolist() == [[2, 6]]


def test_the_loss_adds_up_a_sentences_tokens_and_ends_with_its_end() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 4, 7)
    target = torch.tensor([[2, 6, 6, 6], [0, 1, 3, 6]])
    assert asked(target, 6).tolist() == [[True, True, False, False], [True] * 4]
    each = -torch.log_softmax(scores, -1)
    by_hand = sum(each[0, t, target[0, t]] for t in range(2)) + sum(each[1, t, target[1, t]] for t in range(4))
    assert sentence_loss(scores, target).item() == pytest.approx(by_hand.item() / 2, rel=1e-5)


NETWORKS = {
    "lstm": lambda: LSTMTranslator(13, 6, embedding=5, width=6, layers=2, dropout=0.5),
    "transformer": lambda: TransformerTranslator(13, 6, width=8, inner=12, heads=2, encoder_layers=2, decoder_layers=2),
    "tied transformer": lambda: TransformerTranslator(
        13, None, width=8, inner=12, heads=2, encoder_layers=1, decoder_layers=1
    ),
}


def greedy(net: nn.Module, source: Tensor, end: int, steps: int) -> list[int]:
    """Let ``net`` write a sentence on its own, one token after the other."""
    tokens: list[int] = []
    for _ in range(steps):
        target = torch.tensor([[*tokens, end]])
        tokens.append(int(net(source, target)[0, -1].argmax()))
        if tokens[-1] == end:
            break
    return tokens


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_score_depends_on_no_later_token_and_on_no_filling(kind: str) -> None:
    torch.manual_seed(0)
    net = NETWORKS[kind]().eval()
    end = 13 if kind.startswith("tied") else 6
    source, target = torch.tensor([[1, 2, 13]]), torch.tensor([[3, 0, 4, end]])
    scores = net(source, target)
    assert scores.shape == (1, 4, end + 1)
    changed = target.clone()
    changed[0, 2] = 5
    torch.testing.assert_close(net(source, changed)[:, :3], scores[:, :3])
    assert not torch.allclose(net(source, changed)[:, 3], scores[:, 3])
    filled = net(torch.tensor([[1, 2, 13, 13, 13], [4, 4, 4, 4, 13]]), torch.tensor([[3, 0, 4, end, end]] * 2))
    torch.testing.assert_close(filled[:1, :4], scores, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(net(torch.tensor([[2, 1, 13]]), target), scores)


@pytest.mark.parametrize("kind", NETWORKS)
def test_exactly_the_sentences_that_the_network_writes_itself_count_as_right(kind: str) -> None:
    end = 13 if kind.startswith("tied") else 6
    ended = 0
    for seed in range(40):
        torch.manual_seed(seed)
        net = NETWORKS[kind]().eval()
        source = torch.randint(13, (1, 4))
        source[0, -1] = 13
        own = greedy(net, source, end, 6)
        ended += own[-1] == end
        # One that does not come to its end in time is wrong.
        assert bool(written(net, source, torch.tensor([[*own[:-1], end]]))) == (own[-1] == end)
        wrong = [(own[0] + 1) % end, *own[1:-1], end]
        assert not written(net, source, torch.tensor([wrong]))
    assert 0 < ended < 40


def test_unforced_the_lstm_goes_on_with_its_own_tokens() -> None:
    torch.manual_seed(0)
    net = NETWORKS["lstm"]().eval()
    source = torch.tensor([[1, 13]])
    free = net(source, torch.tensor([[0, 1, 2, 3, 6]]), forced=False)
    torch.testing.assert_close(free, net(source, free.argmax(-1)))


def test_the_lstm_reads_and_writes_as_torchs_own() -> None:
    torch.manual_seed(0)
    net = LSTMTranslator(13, 6, embedding=5, width=6, layers=2, dropout=0.5).eval()
    source, target = torch.tensor([[1, 2, 3, 13]]), torch.tensor([[4, 5, 6]])
    _, state = net.encoder(net.source_embedding(source))
    states, _ = net.decoder(net.target_embedding(torch.tensor([[6, 4, 5]])), state)
    torch.testing.assert_close(net(source, target), net.output(states))


def test_places_are_told_apart_by_sines() -> None:
    net = NETWORKS["transformer"]().eval()
    placed = net._placed(torch.zeros(1, 3, 8))
    for place in range(3):
        for pair in range(4):
            angle = place / 10_000 ** (2 * pair / 8)
            assert placed[0, place, 2 * pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert placed[0, place, 2 * pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_the_paper_preset_is_the_papers() -> None:
    lstm, transformer = (studies.load(name, preset="paper") for name in ("scan", "scan-transformer"))
    for study in (lstm, transformer):
        assert (study.batch_size, study.network_steps, study.network_clip) == (256, 25_000, 5.0)
        assert (study.mask_steps, study.mask_lr, study.mask_clip, study.samples) == (25_000, 1e-2, 5.0, 4)
        assert [task.name for task in (study.control, *study.tasks)] == list(SPLITS)
        assert not study.biases
    assert (lstm.alpha, transformer.alpha) == (3e-5, 6e-4)
    assert (lstm.network_lr, transformer.network_lr) == (1e-3, 1e-3)
    net = lstm.network(0)
    shapes = {name: tuple(value.shape) for name, value in net.named_parameters() if value.dim() > 1}
    recurrent = {"ih_l0": (800, 16), "hh_l0": (800, 200), "ih_l1": (800, 200), "hh_l1": (800, 200)}
    assert shapes == {
        "source_embedding.weight": (14, 16),
        "target_embedding.weight": (7, 16),
        "output.weight": (7, 200),
        **{f"{part}.weight_{name}": shape for part in ("encoder", "decoder") for name, shape in recurrent.items()},
    }
    assert net.encoder.dropout == net.dropout.p == 0.5
    assert lstm.first_half == tuple(f"encoder.weight_{name}" for name in recurrent)
    net = transformer.network(0)
    # A layer of width d and inner size f has 4 d (d + 1) weights and biases in each attention, 2 d f + d + f in its
    # feed-forward part and 2 d in each normalisation: one attention and two of these in an encoder layer, two and
    # three in a decoder layer.
    attention, inner, norm = 4 * 100 * 101, 2 * 100 * 200 + 300, 200
    layers = 3 * (attention + inner + 2 * norm) + 3 * (2 * attention + inner + 3 * norm)
    assert sum(value.numel() for value in net.parameters()) == layers + (14 + 7) * 100 + 7 * 101
    assert not any("embedding" in name or "norm" in name for name in select(net))


def test_a_batch_is_drawn_from_the_splits_training_set() -> None:
    study = studies.load("scan")
    jump = next(task for task in study.tasks if task.name == "jump")
    commands, actions = jump.batches_for(3)(5)
    assert commands.shape[0] == 64
    for row, done in zip(commands, actions, strict=True):
        words = [WORDS[i] for i in row.tolist() if i < 13]
        assert words == ["jump"] or "jump" not in words
        assert [ACTIONS[i] for i in done.tolist() if i < 6] == list(pairs()[" ".join(words)])
    assert torch.equal(commands, jump.batches_for(3)(5)[0])
    assert not torch.equal(actions, jump.batches_for(4)(5)[1])


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(StudyError, match="No preset 'fast'"):
        studies.load("scan", preset="fast")
    with pytest.raises(StudyError, match="split_seed='a' must be a whole number"):
        studies.load("scan", split_seed="a")


def test_removed_output_weights_are_counted_for_each_token() -> None:
    network = studies.load("scan").network(0)
    full = {name: torch.ones(value.shape, dtype=torch.bool) for name, value in select(network).items()}
    control = {**full, "output.weight": full["output.weight"].clone()}
    control["output.weight"][1, 64:] = False
    control["output.weight"][3] = False
    jump = {**full, "output.weight": full["output.weight"].clone()}
    jump["output.weight"][2, :32] = False
    jump["output.weight"][1, :16] = False
    masks = {name: Mask(kept, fingerprint(network)) for name, kept in (("simple", control), ("jump", jump))}
    study = studies.load("scan")
    answer = tokens(Asked(network=network, masks=masks, metrics={"jump": study.tasks[0].metric}, study=study, seed=0))
    (series,) = answer.figures[0].series
    assert series.values == (0.0, 0.25, 0.25, None, 0.0, 0.0, 0.0)
    assert series.chance[0].mean == pytest.approx(48 / (7 * 128))
    assert series.chance[0].low < 48 / (7 * 128) < series.chance[0].high
    assert answer.numbers["jump: I_JUMP"] == 0.25
