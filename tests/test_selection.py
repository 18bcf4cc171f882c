"""Which parameters a selection means: a table, properties, and what the errors say."""

import fnmatch
import string
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sublens.errors import SelectionError
from sublens.selection import match_names, select, tied_names


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer)


class Block(nn.Module):
    """A bit of everything that has parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4, bias=False))
        self.conv = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3))
        self.position = nn.Parameter(torch.zeros(5, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.count = nn.Parameter(torch.zeros(2, 2, dtype=torch.int64), requires_grad=False)
        self.head = nn.Linear(4, 7)


class TiedModel(nn.Module):
    """The head shares the embedding's weight; two layers share another; a third only shares its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.third = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight
        self.second.weight = self.first.weight
        self.third.weight = nn.Parameter(self.first.weight.detach())


DEFAULT = ["position", "encoder.0.weight", "encoder.2.weight", "conv.0.weight", "head.weight"]


def wide(name: str, parameter: nn.Parameter, module: nn.Module) -> bool:
    return parameter.dim() == 2 and isinstance(module, nn.Linear) and module.in_features == 4


@pytest.mark.parametrize(
    ("where", "biases", "expected"),
    [
        # the default, and biases
        (None, False, DEFAULT),
        (None, True, ["position", "encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "conv.0.weight",
                      "conv.0.bias", "head.weight", "head.bias"]),
        # exact names mean that parameter, whatever it is
        ("encoder.0.weight", False, ["encoder.0.weight"]),
        ("encoder.0.weight", True, ["encoder.0.weight", "encoder.0.bias"]),
        ("encoder.2.weight", True, ["encoder.2.weight"]),
        ("encoder.0.bias", False, ["encoder.0.bias"]),
        ("embed.weight", False, ["embed.weight"]),
        ("encoder.1.weight", True, ["encoder.1.weight", "encoder.1.bias"]),
        ("scale", False, ["scale"]),
        # modules mean their default
        ("encoder", False, ["encoder.0.weight", "encoder.2.weight"]),
        ("encoder.0", True, ["encoder.0.weight", "encoder.0.bias"]),
        ("embed", False, ["embed.weight"]),
        ("encoder.1", False, ["encoder.1.weight"]),
        ("conv", False, ["conv.0.weight"]),
        # globs
        ("encoder.*.weight", False, ["encoder.0.weight", "encoder.1.weight", "encoder.2.weight"]),
        ("*.bias", False, ["encoder.0.bias", "encoder.1.bias", "conv.0.bias", "conv.1.bias", "head.bias"]),
        ("encoder.[02].weight", False, ["encoder.0.weight", "encoder.2.weight"]),
        ("encoder.?", False, ["encoder.0.weight", "encoder.1.weight", "encoder.2.weight"]),
        # classes and predicates
        (nn.Linear, False, ["encoder.0.weight", "encoder.2.weight", "head.weight"]),
        (nn.Conv1d, True, ["conv.0.weight", "conv.0.bias"]),
        (nn.Sequential, False, ["encoder.0.weight", "encoder.2.weight", "conv.0.weight"]),
        (nn.Embedding, False, ["embed.weight"]),
        (nn.LayerNorm, False, ["encoder.1.weight"]),
        (wide, False, ["encoder.0.weight", "head.weight"]),
        (lambda name, parameter, module: name == "conv.1.weight", False, ["conv.1.weight"]),
        # unions keep the network's order; exclusions win wherever they stand
        (["head", "encoder.0"], False, ["encoder.0.weight", "head.weight"]),
        ((nn.Conv1d, "scale", wide), False, ["scale", "encoder.0.weight", "conv.0.weight", "head.weight"]),
        ({"head", "head.weight"}, False, ["head.weight"]),
        ("!head", False, DEFAULT[:-1]),
        (["!head", "!position"], False, ["encoder.0.weight", "encoder.2.weight", "conv.0.weight"]),
        (["!encoder.0", nn.Linear], False, ["encoder.2.weight", "head.weight"]),
        ([nn.Linear, "!*.2.*"], False, ["encoder.0.weight", "head.weight"]),
        (["encoder.0", "head", "!head.bias"], True, ["encoder.0.weight", "encoder.0.bias", "head.weight"]),
        (["head", "!encoder"], True, ["head.weight", "head.bias"]),
    ],
)  # fmt: skip
def test_table(where: object, biases: bool, expected: list[str]) -> None:
    network = Block()
    selected = select(network, where, biases=biases)
    assert list(selected) == expected
    parameters = dict(network.named_parameters())
    assert all(selected[name] is parameters[name] for name in selected)


@pytest.mark.parametrize(
    ("network", "weights", "biases"),
    [
        (nn.LSTM(3, 4, 2), 4, 4),
        (nn.GRU(3, 4, bidirectional=True), 4, 4),
        # bias_k and bias_v have three dimensions, and are biases all the same
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), 2, 4),
        (nn.MultiheadAttention(8, 2, kdim=4, vdim=6), 4, 2),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False), 8, 8),
        (
            nn.Sequential(
                nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.GroupNorm(1, 2), nn.InstanceNorm2d(2)
            ),
            1,
            1,
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.LayerNorm([2, 4, 4]), nn.RMSNorm([4, 4]), nn.SyncBatchNorm(2)), 1, 1),
        (nn.Bilinear(2, 3, 4), 1, 1),
        (nn.Sequential(nn.EmbeddingBag(4, 3), nn.Linear(3, 1)), 1, 1),
        (torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), 1, 0),
        (old_weight_norm(nn.Linear(3, 2)), 1, 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_default_in_standard_modules(network: nn.Module, weights: int, biases: int) -> None:
    assert len(select(network)) == weights
    assert all(parameter.dim() >= 2 for parameter in select(network).values())
    assert len(select(network, biases=True)) == weights + biases


def test_a_parametrised_embedding_is_still_an_embedding() -> None:
    network = nn.Sequential(torch.nn.utils.parametrizations.orthogonal(nn.Embedding(4, 4)), nn.Linear(4, 4))
    assert list(select(network)) == ["1.weight"]


def test_tied_tensors() -> None:
    network = TiedModel()
    # what an embedding shares is an embedding's, and is masked only by name
    assert list(select(network)) == ["first.weight"]
    assert list(select(network, nn.Linear)) == ["first.weight"]
    assert list(select(network, "head.weight")) == list(select(network, "head")) == ["embed.weight"]
    assert list(select(network, "head.weight", biases=True)) == ["embed.weight", "head.bias"]
    # every name means the tensor, also in exclusions
    assert list(select(network, "third")) == ["first.weight"]
    assert list(select(network, ["*.weight", "!head"])) == ["first.weight"]
    # each module that holds the tensor has its own bias
    assert list(select(network, biases=True)) == ["first.weight", "first.bias", "second.bias", "third.bias"]


def test_lengths_of_rows_are_selected_only_by_their_names() -> None:
    normed = torch.nn.utils.parametrizations.weight_norm
    network = nn.Sequential(normed(nn.Linear(3, 2)), old_weight_norm(nn.Linear(2, 2)))
    directions = ["0.parametrizations.weight.original1", "1.weight_v"]
    assert list(select(network)) == list(select(network, ["0", "1"])) == directions
    assert list(select(network, "1.weight_g")) == ["1.weight_g"]
    # Names alone say nothing.
    plain = nn.ParameterDict({name: nn.Parameter(torch.zeros(4, 6)) for name in ("w_g", "w_v", "original0")})
    assert list(select(plain)) == ["original0", "w_g", "w_v"]


def test_tied_names() -> None:
    names = tied_names(TiedModel())
    assert names["embed.weight"] == ("embed.weight", "head.weight")
    assert names["first.weight"] == ("first.weight", "second.weight", "third.weight")
    assert names["first.bias"] == ("first.bias",)
    assert list(names) == ["embed.weight", "first.weight", "first.bias", "second.bias", "third.bias", "head.bias"]
    # a part of a tensor is another tensor
    whole = torch.zeros(4, 4)
    network = nn.ParameterDict({"a": nn.Parameter(whole), "b": nn.Parameter(whole[:2]), "c": nn.Parameter(whole.t())})
    assert list(tied_names(network)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("encodr.0.weight", "'encodr.0.weight' matches no parameter and no module. Did you mean 'encoder.0.weight'"),
        ("zzz", "There is position, scale, count"),
        ("", "where='' matches no parameter"),
        ("encoder.*.wieght", "Did you mean 'encoder."),
        (["encoder", "haed"], "where='haed' matches no parameter and no module. Did you mean 'head'"),
        (["encoder", "!haed"], "where='haed' matches no parameter and no module. Did you mean 'head'"),
        ("count", r"where='count' matches nothing that can be masked \(count is torch.int64\)"),
        (nn.Conv2d, "where=Conv2d: the network has no module of this class .*It has BatchNorm1d, Conv1d"),
        (nn.Dropout, "where=Dropout"),
        (lambda *_: False, "the predicate accepted none of the parameters"),
        (lambda *_: torch.tensor(True), "a predicate must return True or False; for '.*' it returned a Tensor"),
        (["encoder", "!encoder"], "excludes everything that it selects"),
        ([], "an empty sequence selects nothing"),
        (3, "not int"),
        ([None], "not NoneType"),
        (b"head", "not bytes"),
        ({"head": True}, "not dict"),
        (int, "not int"),
    ],
)  # fmt: skip
def test_refusals(where: object, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select(Block(), where)


def test_a_module_or_parameter_in_place_of_its_name_is_refused_with_the_name() -> None:
    network = Block()
    with pytest.raises(SelectionError, match="not Linear; write where='head' for this one"):
        select(network, network.head)
    with pytest.raises(SelectionError, match=r"not Parameter; write where='head\.weight' for this one"):
        select(network, [network.head.weight])


def test_networks_with_nothing_to_mask_are_refused() -> None:
    with pytest.raises(SelectionError, match=r"no weight of two or more dimensions.*It has weight, bias"):
        select(nn.LayerNorm(3))
    with pytest.raises(SelectionError, match="It has no parameters"):
        select(nn.ReLU())
    with pytest.raises(SelectionError, match="parameter 'weight' has no shape yet; run one batch"):
        select(nn.LazyLinear(3))
    with pytest.raises(SelectionError, match=r"needs a torch.nn.Module, not dict"):
        select({})


def test_empty_tensors_are_not_selected() -> None:
    network = nn.ParameterDict({"empty": nn.Parameter(torch.zeros(0, 3)), "full": nn.Parameter(torch.zeros(1, 3))})
    assert list(select(network)) == ["full"]


def test_match_names() -> None:
    names = ["encoder.0.weight", "encoder.1.weight", "head.weight"]
    assert match_names("encoder", names) == names[:2]
    assert match_names(["head.weight", "*.0.*"], names) == [names[0], names[2]]
    assert match_names([], names) == []
    with pytest.raises(SelectionError, match=r"'encoder.2' matches no name. Did you mean 'encoder"):
        match_names(["head", "encoder.2"], names)


NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=3)


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Random trees of modules with some shared ones."""
    kinds = [
        lambda: nn.Linear(2, 2),
        lambda: nn.Embedding(2, 2),
        lambda: nn.LayerNorm(2),
        lambda: nn.Linear(2, 2, bias=False),
    ]
    made: list[nn.Module] = []

    def tree(depth: int) -> nn.Module:
        if made and draw(st.integers(0, 4)) == 0:
            return draw(st.sampled_from(made))
        if depth == 0 or draw(st.booleans()):
            made.append(draw(st.sampled_from(kinds))())
            return made[-1]
        return nn.ModuleDict({f"m{name}": tree(depth - 1) for name in draw(st.sets(NAMES, min_size=1, max_size=3))})

    return nn.ModuleDict({f"m{name}": tree(2) for name in draw(st.sets(NAMES, min_size=1, max_size=4))})


@settings(deadline=None, max_examples=60)
@given(networks(), st.data())
def test_properties(network: nn.Module, data: st.DataObject) -> None:
    order = [name for name, _ in network.named_parameters()]
    everything = list(select(network, "*"))
    assert everything == order  # once each, under the first name, in order
    some = data.draw(st.lists(st.sampled_from(order), min_size=1, unique=True))
    assert list(select(network, some)) == [name for name in order if name in some]
    # excluding is the complement
    if len(some) < len(order):
        rest = select(network, ["*", *(f"!{name}" for name in some)])
        assert list(rest) == [name for name in order if name not in some]
    # a glob is its matches
    pattern = data.draw(st.sampled_from(["*.weight", "*.bias", "m*", "*a*", "m?.*"]))
    names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    if found := fnmatch.filter(names, pattern):
        assert list(select(network, pattern)) == list(select(network, found))


@settings(deadline=None, max_examples=60)
@given(networks())
def test_selecting_changes_nothing(network: nn.Module) -> None:
    before = [
        (name, id(p), p.requires_grad, p._version) for name, p in network.named_parameters(remove_duplicate=False)
    ]
    select(network, "*", biases=True)
    after = [(name, id(p), p.requires_grad, p._version) for name, p in network.named_parameters(remove_duplicate=False)]
    assert after == before
