"""``Switchboard``: each call, or each example, through the mask that it names; the network is left alone."""

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import sublens as sl
from sublens.errors import BatchError, MismatchError, SettingError

if TYPE_CHECKING:
    from conftest import Case


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 3))


def masks(network: nn.Module, count: int = 3, **settings: Any) -> dict[str, sl.Mask]:
    """Masks that keep half of the elements, others each time."""
    full = sl.Mask.full(network, **settings)
    half = sl.Mask(
        {name: torch.arange(full[name].numel()).view(full[name].shape) % 2 == 0 for name in full}, full.network
    )
    return {f"task {i}": sl.Mask.random_like(half, i) for i in range(count)}


def leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def test_a_call_is_that_of_the_masked_network() -> None:
    network, x = mlp(), normal(5, 6)
    board = sl.Switchboard(network, masks(network))
    for name in ("task 0", "task 2", "task 0", "task 1"):
        torch.testing.assert_close(board(name, x), board.masks[name].apply(network).eval()(x))
    torch.testing.assert_close(board(None, x), copy.deepcopy(network).eval()(x))


def test_each_example_goes_through_its_own_mask(case: "Case") -> None:
    settings = {key: value for key, value in case.settings.items() if key != "batch_dim"}
    network = case.made()
    batch_dim = case.settings.get("batch_dim", 0)
    board = sl.Switchboard(network, masks(network, 2, **settings), batch_dim=batch_dim)
    tasks = ["task 1", None, "task 0", "task 1", "task 0", "task 1", None]
    args, kwargs = case.inputs(len(tasks))
    output = leaves(board(tasks, *args, **kwargs))
    assert len(output) == len(case.axes)
    for name in ("task 0", "task 1", None):
        mine = [i for i, task in enumerate(tasks) if task == name]
        # In one call too, for networks that look at all examples that they are given.
        index = torch.tensor(mine)
        inputs = [case.part(case.inputs(len(tasks)), i, i + 1) for i in mine]
        together = _joined(inputs, case)
        for found, expected, axis in zip(
            output, leaves(board(name, *together[0], **together[1])), case.axes, strict=True
        ):
            per = found.shape[axis] // len(tasks)
            chosen = found.unflatten(axis, (len(tasks), per)).index_select(axis, index).flatten(axis, axis + 1)
            torch.testing.assert_close(
                chosen,
                expected,
                rtol=2e-2 if found.dtype == torch.bfloat16 else 1e-4,
                atol=1e-2 if found.dtype == torch.bfloat16 else 1e-5,
            )


def _joined(parts: list[Any], case: "Case") -> Any:
    """Arguments for several examples, from those for each: what differs in size between one and two is concatenated."""
    from sublens.splitting import flatten

    one, two = (flatten(case.inputs(count))[0] for count in (3, 4))
    columns = [flatten(part)[0] for part in parts]
    rebuilt = []
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        grows = [d for d in range(a.dim()) if a.shape[d] != b.shape[d]] if isinstance(a, Tensor) else []
        rebuilt.append(torch.cat([column[i] for column in columns], grows[0]) if grows else columns[0][i])
    return flatten(parts[0])[1](rebuilt)


def test_the_network_is_never_modified_and_its_weights_are_not_copied_twice() -> None:
    network, x = mlp().train(), normal(6, 6)
    before = {name: (t.data_ptr(), t._version, t.clone()) for name, t in network.state_dict(keep_vars=True).items()}
    board = sl.Switchboard(network, masks(network, 40))
    for name in board:
        board(name, x)
    board([*list(board)[:5], None], x)
    with pytest.raises(RuntimeError):
        board("task 1", normal(5, 5))
    for name, tensor in network.state_dict(keep_vars=True).items():
        pointer, version, value = before[name]
        assert (tensor.data_ptr(), tensor._version) == (pointer, version)
        assert torch.equal(tensor, value)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    # One masked copy of the masked weights, whatever the number of masks; the rest is shared.
    held = board._held[1]
    assert set(held) == {"0.weight", "4.weight"}
    assert (
        sum(packed.numel() for mask in board.masks.values() for packed in mask._packed.values()) == 40 * (48 + 24) // 8
    )


def test_gradients_reach_the_inputs() -> None:
    network, x = mlp(), normal(5, 6).requires_grad_()
    board = sl.Switchboard(network, masks(network))
    board(["task 0", "task 1", "task 1", None, "task 2"], x).sum().backward()
    assert x.grad is not None
    assert bool((x.grad.norm(dim=1) > 0).all())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_masked_weights_are_exact_and_written_in_place_without_gradients_only(dtype: torch.dtype) -> None:
    network = nn.Linear(5, 4).to(dtype)
    with torch.no_grad():
        network.weight[0, 0], network.weight[1, 1] = float("inf"), -0.0
    board = sl.Switchboard(network, masks(network))
    x = torch.ones(2, 5, dtype=dtype)
    with torch.no_grad():
        for name, mask in board.masks.items():
            board(name, x)
            held = board._held[1]["weight"]
            assert torch.equal(held, mask.apply(network).weight)  # type: ignore[arg-type]
            assert not bool(torch.signbit(held[~mask["weight"]]).any())
        pointer = held.data_ptr()
        board("task 0", x)
        assert board._held[1]["weight"].data_ptr() == pointer
    x = x.requires_grad_()
    out = board("task 0", x)
    with torch.no_grad():
        board("task 1", x)
    out.nan_to_num().sum().backward()  # needs the weights of task 0
    assert x.grad is not None


def test_masks_come_and_go() -> None:
    network, x = mlp(), normal(5, 6)
    made = masks(network)
    board = sl.Switchboard(network, {"a": made["task 0"]})
    first = board("a", x)
    board.add("a", made["task 1"])
    assert not torch.equal(board("a", x), first)
    torch.testing.assert_close(board("a", x), made["task 1"].apply(network).eval()(x))
    board.add("b", ~made["task 1"])
    assert (list(board), len(board), "b" in board) == (["a", "b"], 2, True)
    board.remove("a")
    with pytest.raises(SettingError, match=r"No mask is called 'a'\. There are 'b'"):
        board("a", x)
    with pytest.raises(SettingError, match="No mask is called 'a'"):
        board.remove("a")
    with pytest.raises(SettingError, match="must be text"):
        board.add(3, made["task 0"])  # type: ignore[arg-type]


def test_a_mask_of_another_network_is_refused() -> None:
    network = mlp()
    with pytest.raises(MismatchError, match="names and shapes fit, but weights or buffers differ"):
        sl.Switchboard(network, masks(mlp(1)))
    with pytest.raises(MismatchError, match=r"no parameter '4\.weight'"):
        sl.Switchboard(nn.Sequential(nn.Linear(6, 8)), masks(network))


@pytest.mark.parametrize("how", ["in place", "replaced", "buffer"])
def test_a_network_that_has_changed_is_refused(how: str) -> None:
    network, x = mlp(), normal(5, 6)
    made = masks(network)
    board = sl.Switchboard(network, made)
    board("task 0", x)
    original = network[0].weight
    with torch.no_grad():
        if how == "in place":
            original[0, 0] += 1
        elif how == "replaced":
            network[0].weight = nn.Parameter(original + 1)
        else:
            network[1].running_mean[0] += 1
    with pytest.raises(MismatchError, match="have changed since its Switchboard was made"):
        board("task 0", x)
    with pytest.raises(MismatchError, match="have changed"):
        board.add("more", made["task 1"])


def test_equal_weights_written_again_are_the_same_network() -> None:
    network, x = mlp(), normal(5, 6)
    board = sl.Switchboard(network, masks(network))
    before = board("task 0", x)
    network.load_state_dict(copy.deepcopy(network.state_dict()))
    assert torch.equal(board("task 0", x), before)


def test_names_must_be_as_many_as_examples() -> None:
    network = mlp()
    board = sl.Switchboard(network, masks(network))
    with pytest.raises(SettingError, match="2 masks are named for a batch of 5 examples"):
        board(["task 0", "task 1"], normal(5, 6))
    with pytest.raises(SettingError, match="No mask is called 'nothing'"):
        board(["task 0", "nothing"], normal(2, 6))
    with pytest.raises(BatchError, match="without any tensor"):
        board(["task 0"])


def test_several_masks_train_over_one_copy_of_the_weights() -> None:
    # Interleaved step by step, each comes out as if it had been trained alone.
    network, x = nn.Linear(6, 3), normal(8, 6)

    def trained(masked: sl.MaskedNetwork, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        (masked(x).square().mean() + masked.penalty(1e-3)).backward()
        optimizer.step()

    def made(seed: int) -> tuple[sl.MaskedNetwork, torch.optim.Optimizer]:
        masked = sl.MaskedNetwork(network, samples=2, seed=seed)
        return masked, torch.optim.Adam(masked.parameters(), lr=0.3)

    together, alone = [made(seed) for seed in range(3)], [made(seed) for seed in range(3)]
    for _ in range(5):
        for pair in together:
            trained(*pair)
    for pair in alone:
        for _ in range(5):
            trained(*pair)
    for (one, _), (other, _) in zip(together, alone, strict=True):
        assert torch.equal(one.logits["weight"], other.logits["weight"])
        assert one.network is network
    board = sl.Switchboard(network, {str(i): one.mask() for i, (one, _) in enumerate(together)})
    one, _ = together[1]
    torch.testing.assert_close(board("1", x), one.eval()(x))


def test_a_run_in_place_of_its_mask_is_named() -> None:
    network = nn.Linear(4, 2)
    run = sl.fit(network, lambda step: torch.ones(8, 4), lambda net, x: net(x).sum(), steps=1, progress=False)
    with pytest.raises(sl.errors.SettingError, match=r"The mask 'a' is a Run, not a mask. Give its mask, run\.mask"):
        sl.Switchboard(network, {"a": run})  # type: ignore[dict-item]
