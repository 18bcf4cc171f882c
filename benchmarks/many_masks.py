"""Many tasks over one frozen network: masks on a Switchboard beside reloading weights and beside a network per task.

    python benchmarks/many_masks.py [--widths 800,800,800,800] [--tasks 10] [--batch 128] [--json FILE]

All ways are first checked to give the same outputs; then they take turns within one process, and the median time of a
call is printed, with the memory that each needs for all tasks (counted from the tensors and files themselves).

- one task: the same task call after call.
- switching: another task at every call.
- mixed batch: each example of the batch has its own task, in random order.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sublens as sl

INPUTS, OUTPUTS = 42, 20
Call = Callable[[str, Tensor], Tensor]


def network(widths: list[int]) -> nn.Sequential:
    """A feed-forward ReLU network of the add-mul study."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise([INPUTS, *widths, OUTPUTS]):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def bytes_of(tensors: Any) -> int:
    """Bytes of distinct tensors."""
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def mixed(call: Call, tasks: list[str], x: Tensor) -> Tensor:
    """A batch of examples of several tasks by calls of one task each, sorted and put back in order by hand."""
    out = x.new_empty(len(x), OUTPUTS)
    for task in sorted(set(tasks)):
        mine = torch.tensor([i for i, name in enumerate(tasks) if name == task])
        out[mine] = call(task, x[mine])
    return out


def main() -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--widths", default="800,800,800,800")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    net = network([int(width) for width in asked.widths.split(",")]).eval()
    full = sl.Mask.full(net)
    half = sl.Mask(
        {name: torch.arange(full[name].numel()).view(full[name].shape) % 2 == 0 for name in full}, full.network
    )
    masks = {f"task{i}": sl.Mask.random_like(half, i) for i in range(asked.tasks)}
    x = torch.randn(asked.batch, INPUTS)
    generator = torch.Generator().manual_seed(1)
    names = [f"task{i}" for i in torch.randint(0, asked.tasks, (asked.batch,), generator=generator).tolist()]

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        board = sl.Switchboard(net, masks)
        separate = {name: mask.apply(net) for name, mask in masks.items()}
        stored = {name: {k: v.clone() for k, v in one.state_dict().items()} for name, one in separate.items()}
        for name, weights in stored.items():
            save_file(weights, f"{folder}/{name}.safetensors")
            masks[name].save(f"{folder}/{name}.mask.safetensors")
        from_memory, from_disk = (
            network([int(w) for w in asked.widths.split(",")]),
            network([int(w) for w in asked.widths.split(",")]),
        )
        loaded: dict[str, str] = {}

        def reload_memory(task: str, batch: Tensor) -> Tensor:
            if loaded.get("memory") != task:
                from_memory.load_state_dict(stored[task])
                loaded["memory"] = task
            return from_memory(batch)

        def reload_disk(task: str, batch: Tensor) -> Tensor:
            if loaded.get("disk") != task:
                from_disk.load_state_dict(load_file(f"{folder}/{task}.safetensors"))
                loaded["disk"] = task
            return from_disk(batch)

        calls: dict[str, Call] = {
            "Switchboard": board,
            "weights reloaded from memory": reload_memory,
            "weights reloaded from disk": reload_disk,
            "a network per task": lambda task, batch: separate[task](batch),
        }
        shared = bytes_of(net.parameters())
        bits = sum(packed.numel() for mask in masks.values() for packed in mask._packed.values())
        memory = {
            "Switchboard": shared + bits + sum(4 * full[name].numel() for name in full),
            "weights reloaded from memory": shared * (asked.tasks + 1),
            "weights reloaded from disk": shared,
            "a network per task": shared * asked.tasks,
        }
        disk = {
            "Switchboard": sum(Path(f"{folder}/{name}.mask.safetensors").stat().st_size for name in masks),
            "weights reloaded from disk": sum(Path(f"{folder}/{name}.safetensors").stat().st_size for name in masks),
        }
        for task in masks:
            for way, call in calls.items():
                torch.testing.assert_close(call(task, x), separate[task](x), rtol=1e-5, atol=1e-5, msg=way)
        for call in calls.values():
            torch.testing.assert_close(mixed(call, names, x), board(names, x), rtol=1e-4, atol=1e-5)

        times: dict[str, dict[str, list[float]]] = {}
        order = list(masks)
        for turn in range(asked.rounds):
            for way, call in calls.items():
                on_board = way == "Switchboard"
                kinds: dict[str, Callable[[], Any]] = {
                    "one task": lambda call=call: call(order[0], x),
                    "switching": lambda call=call, turn=turn: call(order[1 + turn % (len(order) - 1)], x),
                    "mixed batch": lambda call=call, on=on_board: board(names, x) if on else mixed(call, names, x),
                }
                call(order[0], x)  # so that the first kind finds its task in place
                for kind, run in kinds.items():
                    start = time.perf_counter()
                    run()
                    times.setdefault(way, {}).setdefault(kind, []).append(time.perf_counter() - start)
    result = {
        way: {kind: statistics.median(seen) * 1e3 for kind, seen in kinds.items()}
        | {"memory MB": memory[way] / 1e6, "disk MB": disk[way] / 1e6 if way in disk else None}
        for way, kinds in times.items()
    }
    columns = ("one task", "switching", "mixed batch", "memory MB", "disk MB")
    print(
        f"{asked.tasks} tasks, batch {asked.batch}, widths {asked.widths}, {torch.get_num_threads()} threads; ms a call"
    )
    print(f"{'':32}" + "".join(f"{column:>14}" for column in columns))
    for way, row in result.items():
        shown = ("-" if row[column] is None else f"{row[column]:.2f}" for column in columns)
        print(f"{way:32}" + "".join(f"{text:>14}" for text in shown))
    if asked.json:
        asked.json.write_text(json.dumps({"settings": vars(asked) | {"json": None}, "result": result}, indent=1))


if __name__ == "__main__":
    main()
