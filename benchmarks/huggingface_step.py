"""Time and memory of one step on networks of Hugging Face: training a mask beside training the weights.

    python benchmarks/huggingface_step.py [--networks minilm gpt2] [--steps 3] [--batch 8] [--tokens 32]

minilm is the pretrained sentence encoder of ``sublens[probe]`` (22.7 M weights, 10.6 M masked), gpt2 a causal language
model of GPT-2's architecture from its default configuration with random weights (124 M weights, 84.9 M masked). Adam
both times. Each kind of step runs in a process of its own, which also reads its peak memory; the first step, in which
kernels are compiled and memory is first touched, is not counted.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sublens as sl

KINDS = ("plain", "masked 1", "masked 4")


def network_of(name: str) -> tuple[nn.Module, str]:
    """The network, and what of it is masked."""
    if name == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(use_cache=False)), "transformer.h"
    from sublens.studies.probe import study

    encoder: nn.Module = study().network(0).get_submodule("encoder")
    return encoder.requires_grad_(True), "encoder"


def loss_of(name: str, net: nn.Module, tokens: Tensor) -> Tensor:
    """A loss that reaches every masked weight."""
    if name == "gpt2":
        return cross_entropy(net(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return net(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state.square().mean()


def measure(name: str, kind: str, steps: int, batch: int, length: int) -> None:
    """Print the seconds of each step, and the peak memory in MB."""
    network, where = network_of(name)
    tokens = torch.randint(1000, (batch, length), generator=torch.Generator().manual_seed(0))
    net: nn.Module = network
    if kind != "plain":
        net = sl.MaskedNetwork(network, where=where, samples=int(kind.split()[1]))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    net.train()
    seconds = []
    for _ in range(steps + 1):
        clock = time.perf_counter()
        optimizer.zero_grad()
        loss = loss_of(name, net, tokens)
        if isinstance(net, sl.MaskedNetwork):
            loss = loss + net.penalty(1e-8)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - clock)
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024
    print(statistics.median(seconds[1:]), peak)


def main() -> None:
    """Run each kind of step in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=("minilm", "gpt2"), default=["minilm", "gpt2"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        measure(*asked.one, asked.steps, asked.batch, asked.tokens)
        return
    sizes = ["--steps", str(asked.steps), "--batch", str(asked.batch), "--tokens", str(asked.tokens)]
    for name in asked.networks:
        plain = 0.0
        for kind in KINDS:
            command = [sys.executable, __file__, "--one", name, kind, *sizes]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seconds, peak = map(float, done.stdout.split()[-2:])
            plain = plain or seconds
            print(f"{name:8} {kind:9} {seconds:8.3f} s  {seconds / plain:5.2f} plain steps  {peak:7.0f} MB", flush=True)


if __name__ == "__main__":
    main()
