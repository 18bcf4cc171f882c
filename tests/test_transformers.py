"""Hugging Face networks, unmodified: what goes in and comes out, ties, `Conv1D`, both kinds of attention, files."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import sublens as sl
from sublens.noise import Draw, parameter_id
from sublens.routes import eligibility

transformers = pytest.importorskip(
    "transformers", reason="needs Hugging Face transformers: python -m pip install 'sublens[transformers]'"
)
from transformers import modeling_outputs, pytorch_utils  # noqa: E402

B, T, VOCABULARY, K = 8, 5, 29, 4


def bert(**changes: Any) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16, **changes,
    )  # fmt: skip
    return seeded(lambda: transformers.BertModel._from_config(config, attn_implementation="sdpa"))


def bert_eager() -> nn.Module:
    network = bert()
    network.set_attn_implementation("eager")
    return network


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make()
        for module in network.modules():  # GPT-2's and T5's first weights are so small that masks change little
            if isinstance(module, nn.Linear | pytorch_utils.Conv1D):
                module.weight.data.normal_(std=0.3)
        return network.train()


def tokens(batch: int = B) -> dict[str, Tensor]:
    """Token ids and an attention mask whose rows have 2 to T tokens."""
    ids = torch.randint(1, VOCABULARY, (batch, T), generator=torch.Generator().manual_seed(1))
    there = (torch.arange(T) < (2 + torch.arange(batch) % (T - 1))[:, None]).long()
    return {"input_ids": ids * there, "attention_mask": there}


def encoded(batch: int = B) -> dict[str, Any]:
    """For T5's decoder: what its encoder put out, as the object that it puts out."""
    states = torch.randn(batch, T, 16, generator=torch.Generator().manual_seed(2))
    outputs = modeling_outputs.BaseModelOutput(last_hidden_state=states)
    return {"encoder_outputs": outputs, "attention_mask": tokens(batch)["attention_mask"],
            "decoder_input_ids": tokens(batch)["input_ids"]}  # fmt: skip


def chunk(inputs: Any, k: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[k * (B // K) : (k + 1) * (B // K)]
    made = {name: chunk(value, k) for name, value in inputs.items()}
    return type(inputs)(**made) if isinstance(inputs, modeling_outputs.BaseModelOutput) else made


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], str, dict[str, Any]]] = {
    "BERT, SDPA": (bert, tokens, "last_hidden_state", {"where": "encoder"}),
    "BERT, eager": (bert_eager, tokens, "last_hidden_state", {"where": "encoder"}),
    "BERT, some layers": (bert, tokens, "pooler_output", {"where": ["encoder.layer.1", "pooler"]}),
    "GPT-2, Conv1D and a tied head": (gpt2, tokens, "logits", {}),
    "GPT-2, the tied embedding masked": (gpt2, tokens, "logits", {"where": "transformer.wte"}),
    "T5, a ModelOutput in": (t5, encoded, "logits", {"where": "decoder"}),
}


@pytest.mark.parametrize(("make", "inputs", "field", "settings"), CASES.values(), ids=CASES)
def test_outputs_and_gradients_are_those_of_the_chunks_one_by_one(make, inputs, field, settings):
    network = make()
    masked = sl.MaskedNetwork(network, samples=K, seed=3, keep=0.7, **settings)
    output = masked(**inputs())
    assert type(output) is type(network(**inputs()))
    cotangent = torch.randn(output[field].shape, generator=torch.Generator().manual_seed(9))
    (output[field] * cotangent).sum().backward()

    network.eval()  # dropout is off in what the mask sees
    aliases = {id(parameter): [] for parameter in network.parameters()}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        aliases[id(parameter)].append(name)
    for k in range(K):
        weights = {}
        for name, logits in masked.logits.items():
            weight = dict(network.named_parameters())[name].detach()
            gated = masked.gate.masked(weight, logits.detach(), Draw(3, 0, k, parameter_id(name)))
            weights[name] = gated.requires_grad_()
        given = {
            alias: gated
            for name, gated in weights.items()
            for alias in aliases[id(dict(network.named_parameters())[name])]
        }
        expected = functional_call(network, given, (), chunk(inputs(), k))[field]
        torch.testing.assert_close(chunk(output[field], k), expected, rtol=1e-4, atol=1e-5)
        gradients = torch.autograd.grad((expected * chunk(cotangent, k)).sum(), list(weights.values()))
        for (name, logits), gradient in zip(masked.logits.items(), gradients, strict=True):
            weight = dict(network.named_parameters())[name].detach()
            logits.grad -= masked.gate.logit_gradient(
                gradient, weight, logits.detach(), Draw(3, 0, k, parameter_id(name))
            )
    for name, logits in masked.logits.items():
        assert logits.grad.abs().max() < 1e-3, name


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("samples", [1, K])
def test_layers_stored_as_inputs_by_outputs_go_the_linear_route(samples, biases, monkeypatch):
    network = gpt2().eval()

    def found():
        masked = sl.MaskedNetwork(network, samples=samples, seed=3, keep=0.7, biases=biases)
        logits = masked(**tokens()).logits
        logits.square().mean().backward()
        return [logits, *(scores.grad for scores in masked.logits.values())], masked._routes.general

    fast, general = found()
    assert not all(general.values())  # vmap does not take code that looks whether something is padded
    monkeypatch.setattr(eligibility, "stores_transposed", lambda module: False)
    expected, general = found()
    assert all(general.values())
    # Rounding of float32 in another order, through eight layers and back.
    torch.testing.assert_close(fast, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("samples", [1, 2])
def test_of_such_layers_a_gradient_may_be_penalised(samples, frozen, dtype, monkeypatch):
    torch.manual_seed(0)
    network = nn.Sequential(pytorch_utils.Conv1D(12, 6), nn.Tanh(), pytorch_utils.Conv1D(3, 12))
    nn.init.normal_(network[0].weight)
    x = torch.randn(8, 6)

    def found():
        network.zero_grad()
        masked = sl.MaskedNetwork(network, samples=samples, keep=0.6, frozen=frozen)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = masked(at := x.clone().requires_grad_())
        assert y.dtype == dtype
        (of_x,) = torch.autograd.grad(y.float().square().sum(), at, create_graph=True)
        (y.float().square().sum() + of_x.square().sum()).backward()
        gradients = [logits.grad for logits in masked.logits.values()]
        gradients += [layer.weight.grad for layer in network[::2] if not frozen]
        return gradients, masked._routes.general

    fast, general = found()
    assert not any(general.values())
    monkeypatch.setattr(eligibility, "stores_transposed", lambda module: False)
    expected, general = found()
    assert all(general.values())
    for one, other in zip(fast, expected, strict=True):
        # In bfloat16 rounded four times: each layer's outputs, and the gradient on the way back.
        assert (one - other).norm() <= (1e-4 if dtype == torch.float32 else 4 * 2.0**-8) * other.norm()


def test_the_default_selection_leaves_embeddings_and_what_is_tied_to_them_alone():
    names = list(sl.select(gpt2()))
    assert names == [
        f"transformer.h.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert all("embed" not in name for name in sl.select(bert()))
    assert list(sl.select(gpt2(), "lm_head.weight")) == ["transformer.wte.weight"]


def test_padding_changes_nothing_for_the_tokens_that_are_there():
    masked = sl.MaskedNetwork(bert(), samples=K, keep=0.7)
    inputs = tokens()
    other = {**inputs, "input_ids": torch.where(inputs["attention_mask"] > 0, inputs["input_ids"], 7)}
    there = inputs["attention_mask"].bool()
    first = masked(**inputs).last_hidden_state[there]
    masked.step = 0
    torch.testing.assert_close(first, masked(**other).last_hidden_state[there])


def test_a_cache_cannot_be_joined_and_says_so_when_it_is_used():
    masked = sl.MaskedNetwork(gpt2(), samples=K)
    assert masked(**tokens()).past_key_values.get_seq_length() == T  # computed as a whole, after looking at chunks
    output = masked(input_ids=tokens()["input_ids"])  # chunk by chunk; use_cache is on by default
    assert output.logits.shape == (B, T, VOCABULARY)
    with pytest.raises(sl.BatchError, match=r"DynamicCache.*cannot be joined"):
        output.past_key_values.get_seq_length()
    assert masked(**tokens(), use_cache=False).past_key_values is None
    assert masked.eval()(**tokens()).past_key_values.get_seq_length() == T


def test_a_mask_trains_inside_a_network_that_computes_its_own_loss():
    inputs = tokens(16)
    run = sl.fit(
        gpt2(), lambda step: inputs, lambda net, batch: net(**batch, labels=batch["input_ids"]).loss,
        steps=60, alpha=0.0, lr=0.1, record_every=20, evaluate_every=60, progress=False,
    )  # fmt: skip
    assert run.history[-1]["loss"] < 0.93 * run.history[1]["loss"]


@pytest.mark.parametrize("make", [bert, gpt2, t5])
def test_a_mask_lies_beside_a_checkpoint_and_fits_the_loaded_weights(make, tmp_path):
    network = make()
    mask = sl.Mask.random_like(sl.Mask.full(network), seed=1)
    network.save_pretrained(tmp_path)
    mask.save(tmp_path / "mask.safetensors")
    loaded = type(network).from_pretrained(tmp_path)
    assert sl.Mask.load(tmp_path / "mask.safetensors", loaded) == mask
    with torch.no_grad():
        next(iter(sl.select(loaded).values())).add_(1)
    with pytest.raises(sl.MismatchError):
        sl.Mask.load(tmp_path / "mask.safetensors", loaded)


PLAIN = """
import sys
sys.modules["sublens"] = None  # importing it would fail
import torch, transformers
network = getattr(transformers, sys.argv[1]).from_pretrained("masked").eval()
inputs = torch.load("inputs.pt")
with torch.no_grad():
    torch.save(network(**inputs)[0], "output.pt")
"""


def test_a_pruned_network_is_stored_and_loaded_without_sublens(tmp_path):
    network = gpt2().eval()
    full = sl.Mask.full(network, ["transformer.h", "transformer.wte"])
    mask = full & sl.Mask({name: torch.rand(full[name].shape) < 0.8 for name in full}, sl.fingerprint(network))
    mask.apply(network).save_pretrained(tmp_path / "masked")
    torch.save(tokens(), tmp_path / "inputs.pt")
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, type(network).__name__], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad(), mask.applied(network):
        expected = network(**tokens())[0]
    stored = type(network).from_pretrained(tmp_path / "masked")
    for name, parameter in mask.apply(network).named_parameters():
        assert torch.equal(stored.get_parameter(name), parameter)
    # Outputs of two processes may be summed in another order (once they differed by 4e-5 of themselves). What the mask
    # removes changes them by far more.
    near = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), expected, **near)
    assert not torch.allclose(network(**tokens())[0], expected, **near)


def test_text_is_generated_under_a_mask():
    network = gpt2().eval()
    mask = sl.Mask.random_like(sl.Mask.full(network), seed=1)
    prompt = tokens(2)["input_ids"][:, :2]

    def continued(net: Any) -> list[list[int]]:
        return net.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None).tolist()

    with mask.applied(network):
        inside = continued(network)
    assert inside == continued(mask.apply(network))
    assert len(inside[0]) == 5
