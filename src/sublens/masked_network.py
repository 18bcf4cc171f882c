"""``MaskedNetwork``: a frozen network, a selection and a gate make a module to call and to train."""

import math
import operator
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sublens import recomputation
from sublens.errors import CutGraphError, MismatchError, SettingError
from sublens.gates import Gate, GumbelSigmoid, Penalty
from sublens.groups import Grouping, Groups, group
from sublens.kernels import LOGIT_BOUND
from sublens.kernels.threads import untraced
from sublens.mask import Mask, binarise, fingerprint
from sublens.noise import Draw, parameter_id
from sublens.routes import Routes, Sampling
from sublens.selection import Where
from sublens.splitting import flatten


def _settled(name: str, text: str) -> Any:
    """A property that routes rest on, and which therefore stays as it was when the masked network was made."""

    def get(self: "MaskedNetwork") -> Any:
        return getattr(self._routes, name)

    def refuse(self: "MaskedNetwork", value: Any) -> None:
        raise SettingError(
            f"{name} is {get(self)!r} and stays so: it is settled when a masked network is made. Make another one, "
            f"MaskedNetwork(network, {name}={value!r}, ...), and give it these logits by load_state_dict if you like."
        )

    return property(get, refuse, doc=text)


class MaskedNetwork(nn.Module):
    """A frozen network seen through gates: one logit for each selected weight, or for each group of them.

    In training mode (``train()``, the state it begins in) every call draws K samples: the batch is split in K chunks of
    equal size (of sizes that differ by one, if K does not divide it), each goes through its own draw of all gates, and
    the outputs are joined again. In evaluation mode (``eval()``) every call uses the mask itself.

    The network is never modified. For the time of a call its masked weights are put in by
    :func:`torch.func.functional_call`, its other parameters are detached, its buffers are copies, and its modules run
    in evaluation mode: a frozen network does not train, so BatchNorm uses its running statistics and dropout is off.
    All of that is undone when the call ends, whichever way it ends. What a hook captures inside a training call belongs
    to one chunk, or is a tensor of :func:`torch.func.vmap` that has no meaning outside; put what a loss needs into the
    network's output. Parts of the network may be checkpointed (:mod:`torch.utils.checkpoint`): their second run, in the
    backward pass, gets the same masked weights again. A checkpoint around the masked network is refused at the first
    training call.

    ``parameters()`` and ``state_dict()`` hold the logits and nothing else. ``to(device)`` moves the network and the
    logits; the logits stay float32 whatever dtype the network has.

    Args:
        network: any trained module.
        keep: keep probability that all gates start from, strictly between 0 and 1 (the paper's text says 0.9; its code
            starts from a logit of 2.0, which is 0.881). :class:`sublens.TopK` has its own start.
        samples: number K of samples per step, 1 or more (the paper: 4, or 8). A gate without noise has one.
        seed: names the noise; any integer.
        where: which parameters are masked, see :func:`sublens.select`.
        biases: also mask the biases of the modules whose weights are masked. A bias shares the logit of the group in
            which all weights of its output are; where they are in several groups, it is not masked.
        gate: the estimator; :class:`sublens.GumbelSigmoid` if not given.
        groups: what shares one logit (see ``docs/groups.md``): ``"weight"`` (nothing), ``"row"`` or ``"channel"`` (all
            weights of an output), ``"column"`` (all of an input), ``"kernel"`` (of a pair of channels), ``"head"`` (of
            an attention head), ``"layer"`` (a whole parameter), ``"16x16"`` (blocks of outputs and inputs); a tuple
            with a block length for each dimension, ``None`` for a whole one; or a function ``groups(name, parameter,
            module)`` that returns one of these, or an integer tensor of the parameter's shape that numbers the groups.
        batch_dim: dimension of the batch in the first tensor that the network is called with (1 for sequence-first
            networks).
        frozen: whether the weights stay as they are. With ``False`` a loss also has gradients for the network's masked
            weights (none where a gate is closed in every sample), for an optimizer of yours that trains them along with
            the logits. Its other parameters stay out of that.

    Attributes:
        network: the network.
        step: number of training calls so far; names the noise of the next one. Not in ``state_dict()``.
        first_sample: number of the first of the K samples within a step, 0. Processes that train one mask together
            (:func:`sublens.fit` with ``processes``, or ``DistributedDataParallel`` around this module) each take other
            samples of the same step: the process of rank r begins at r K.

    Raises:
        SettingError: ``keep``, ``samples`` or ``groups`` is impossible.
        SelectionError: ``where`` matches nothing, or a selected parameter has no such groups.
    """

    gate: Gate = _settled("gate", "The estimator.")
    batch_dim: int = _settled("batch_dim", "Dimension of the batch in the first tensor of a call.")
    frozen: bool = _settled("frozen", "Whether the weights stay as they are.")

    def __init__(
        self,
        network: nn.Module,
        *,
        keep: float = 0.9,
        samples: int = 4,
        seed: int = 0,
        where: Where = None,
        biases: bool = False,
        gate: Gate | None = None,
        groups: Groups = "weight",
        batch_dim: int = 0,
        frozen: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(network, MaskedNetwork):
            raise SettingError("The network is a MaskedNetwork already; give the network that it masks.")
        if not isinstance(network, nn.Module):
            raise SettingError(f"The network is a {type(network).__name__}; it must be a torch.nn.Module.")
        start = initial_logit(keep)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise SettingError(f"samples is {samples!r}; it must be a whole number of 1 or more (the paper uses 4).")
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise SettingError(f"seed={seed!r} is not a whole number.")
        if not 0 <= operator.index(seed) < 2**63:
            raise SettingError(f"seed={seed!r} must be a whole number from 0 to 2**63-1.")
        if not (gate is None or isinstance(gate, Gate)):
            raise SettingError(
                f"gate={gate!r} is no gate; it must be an object such as sublens.GumbelSigmoid() or sublens.TopK(0.1)."
            )
        if isinstance(network, nn.DataParallel):
            raise SettingError("The network is wrapped in DataParallel; give the module in it (network.module).")
        for name, module in network.named_modules():
            if isinstance(module, torch.jit.ScriptModule) and [*module.parameters(), *module.buffers()]:
                raise SettingError(
                    f"{name or 'The network'} is a TorchScript module (torch.jit), whose weights cannot be replaced for"
                    " a call. Give the module that it was made from."
                )
        self._groupings = group(network, where, biases, groups)
        self._network = (network,)  # in a tuple, so that its parameters are not ours
        self.samples = samples
        self.seed = seed = operator.index(seed)
        self.step = 0
        self.first_sample = 0
        gate = gate if gate is not None else GumbelSigmoid()
        self._routes = Routes(network, self._groupings, gate, batch_dim=batch_dim, frozen=frozen)
        self._fingerprint = fingerprint(network)
        if samples > 1 and self.gate.noisy and batch_dim == 0 and _takes_sequence_first(network):
            warnings.warn(
                f"{type(network).__name__} takes the sequence first (batch_first=False), but batch_dim=0 says that the"
                f" batch is: each of the {samples} samples would be given a part of every sequence. Give batch_dim=1.",
                stacklevel=2,
            )
        self._seen_a_gradient = False
        self._penalised = False  # whether the penalty needs the sums of logits
        self._sums: dict[str, tuple[Tensor, int]] | None = None
        self._bounded: list[int] | None = None  # versions of the logits that are known to lie within their bound
        self.logits_tree = nn.Module()
        self._places: dict[str, tuple[nn.Module, str]] = {}  # of the logits in that tree
        parameters = dict(network.named_parameters())
        for name, grouping in self._groupings.items():
            if grouping.owner != name:
                continue
            logits = torch.full(grouping.grid, start, dtype=torch.float32, device=parameters[name].device)
            logits = self.gate.start(logits, Draw(seed, 0, 0, parameter_id(name)))
            self._places[name] = _plant(self.logits_tree, name, nn.Parameter(logits))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            network = self.__dict__.get("_network", (None,))[0]
            if name.startswith("_") or not hasattr(network, name):
                raise
            raise AttributeError(
                f"A MaskedNetwork has no {name!r}; its network has. Masked weights are in the network only while it is"
                f" called, so call the masked network as a whole. network.{name} is that of the unmasked network; in"
                " evaluation, `with masked.mask().applied(network)` puts the mask in.",
                name=name,
                obj=self,
            ) from error

    @property
    def network(self) -> nn.Module:
        """The frozen network."""
        return self._network[0]

    @property
    def logits(self) -> dict[str, nn.Parameter]:
        """Name of each masked parameter -> its logits: float32, of the parameter's shape, or one for each group.

        Parameters that share logits have one entry, under the first one's name.
        """
        return {name: module._parameters[last] for name, (module, last) in self._places.items()}  # type: ignore[misc]

    @property
    def groupings(self) -> dict[str, Grouping]:
        """Name of each masked parameter -> which of its elements share a logit."""
        return dict(self._groupings)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the network, see :func:`sublens.fingerprint`.

        Raises:
            MismatchError: the network's weights are frozen and yet no longer those it was made for.
        """
        if not self.frozen:
            return fingerprint(self.network)
        if fingerprint(self.network) != self._fingerprint:
            raise MismatchError(
                "The network's weights have changed since it was masked, so the logits belong to a network that no "
                "longer exists. Keep its parameters out of every optimizer (give it masked.parameters(), which are the "
                "logits only) and do not load, cast, edit or train it in between."
            )
        return self._fingerprint

    def mask(self) -> Mask:
        """The mask as it stands: an element is kept iff the gate's decision is above 0, for most gates its logit.

        Raises:
            MismatchError: the network has changed since.
        """
        return Mask.from_logits(self.decisions(), self.fingerprint, self._groupings)

    @property
    def kept(self) -> float:
        """The share of the masked elements that :meth:`mask` keeps as it stands, 0 to 1."""
        decisions = {name: binarise(decision) for name, decision in self.decisions().items()}
        parts = [(each.count(decisions[each.owner]), each.size) for each in self._groupings.values()]
        return sum(kept for kept, _ in parts) / sum(size for _, size in parts)

    def penalty(self, alpha: float | Mapping[str, float], kind: Penalty = "logits") -> Tensor:
        """What pushes gates shut, times ``alpha`` (of each masked parameter, if they are given); add it to the loss.

        ``"logits"`` is the paper's sum of all logits (section 2; its alpha is divided by the batch size there, not
        here), in which a group counts once, whatever its size. It cannot run away, since every training call puts the
        logits back within their bound of -10 to 10.
        ``"expected"`` is the expected number of open elements, or groups: the sum of the gate's keep probabilities in
        the last training call.

        Returns:
            float32 scalar tensor.

        Raises:
            SettingError: ``alpha`` is negative or not finite, or ``kind`` is unknown.
        """
        logits = self.logits
        alphas = dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(logits, alpha)
        if alphas.keys() != logits.keys():
            raise SettingError(f"alpha has values for {sorted(alphas)}; masked are {sorted(logits)}.")
        for value in alphas.values():
            if not (math.isfinite(value) and value >= 0):
                raise SettingError(
                    f"alpha is {value}; it must be a finite number of 0 or more. A negative one opens gates."
                )
        if kind not in get_args(Penalty):
            raise SettingError(f"The penalty {kind!r} does not exist; there are 'logits' and 'expected'.")
        if not any(alphas.values()):
            return torch.zeros((), device=next(iter(logits.values())).device, requires_grad=True)
        if self.penalty_slopes(alpha, kind) is not None:
            self._penalised = True
            parts = [alphas[name] * total for name, (total, _) in self._sums_now().items()]
        else:
            step, gates = max(self.step - 1, 0), self.gate.across(logits)
            parts = [alphas[name] * gates[name].penalty(layer, kind, step) for name, layer in logits.items()]
        summed = torch.stack(parts).sum()
        if not self.training and summed.requires_grad:
            summed.register_hook(_warn_of_evaluation)
        return summed

    def penalty_slopes(self, alpha: float | Mapping[str, float], kind: Penalty = "logits") -> dict[str, float] | None:
        """Gradient of :meth:`penalty` where it is one number for all logits of a parameter; otherwise ``None``."""
        if kind != "logits" or type(self.gate).penalty is not Gate.penalty or type(self.gate).across is not Gate.across:
            return None
        return dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(self.logits, alpha)

    def trust_bound(self) -> None:
        """Take it that the logits lie within their bound as they are, so that the next training call need not look."""
        self._bounded = self._versions()

    def _versions(self) -> list[int] | None:
        logits = self.logits.values()
        # Tensors made in inference mode count no versions.
        return None if any(each.is_inference() for each in logits) else [each._version for each in logits]

    def _summed(self) -> dict[str, tuple[Tensor, int]]:
        """Sum and version of each parameter's logits."""
        sums = {name: (logits.sum(), logits._version) for name, logits in self.logits.items()}
        for total, _ in sums.values():
            if total.requires_grad:
                total.register_hook(self._forget_sums)
        return sums

    def _forget_sums(self, gradient: Tensor) -> None:
        # After a backward pass comes a step, and PyTorch's fused optimizers count no versions.
        self._sums = None

    def _sums_now(self) -> dict[str, tuple[Tensor, int]]:
        # Those of the last training call, if nothing has changed since. They stand before that call in the graph, so
        # their backward comes after the call's: a dense gradient is there by then, and theirs, one number for all
        # logits, is added to it in place. The other way round PyTorch would first write it out.
        sums = self._sums
        if sums is not None and all(sums[name][1] == logits._version for name, logits in self.logits.items()):
            return sums
        return self._summed()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own output, for its own arguments, with sampled gates (training) or the mask (evaluation).

        Raises:
            BatchError: the batch cannot be split into the samples, or the outputs cannot be joined.
            SettingError: at the first training call, it is made inside a checkpoint.
            CutGraphError: at the first training call, the network's output does not depend on any logit.
        """
        if torch.compiler.is_dynamo_compiling():  # it would lose count of the steps, and one draw would serve two calls
            return _eagerly(self, args, kwargs)
        if not self.training:
            kept = {name: binarise(decision) for name, decision in self.decisions().items()}
            around = partial(recomputation.covered, self.network, again={})
            return self._routes.through(lambda name, w: self._masked_by(kept, name, w), args, kwargs, around)
        if self._bounded is None or self._versions() != self._bounded:
            with torch.no_grad():
                for logits in self.logits.values():
                    # Through .data: values within the bound do not change, so graphs of earlier calls stay valid.
                    logits.data.clamp_(-LOGIT_BOUND, LOGIT_BOUND)
        self._bounded = None  # for one call: PyTorch's fused optimizers count no versions
        self._sums = self._summed() if self._penalised and torch.is_grad_enabled() else None
        count = self.samples if self.gate.noisy else 1
        sampling = Sampling(self.logits, count, self.seed, self.step, self.first_sample)
        self.step += 1
        if self._seen_a_gradient:
            return self._routes.call(sampling, args, kwargs)
        with recomputation.watched():
            output = self._routes.call(sampling, args, kwargs)
        self._check_first_call(output)
        return output

    def _masked_by(self, kept: Mapping[str, Tensor], name: str, weight: Tensor) -> Tensor:
        grouping = self._groupings[name]
        return grouping.masked(weight, kept[grouping.owner])

    def keep_probabilities(self) -> dict[str, Tensor]:
        """How likely each element was to be open in the last training call: name -> float32 of the logits' shape."""
        step, logits = max(self.step - 1, 0), {name: layer.detach() for name, layer in self.logits.items()}
        return {name: gate.keep_probability(logits[name], step) for name, gate in self.gate.across(logits).items()}

    def mask_probabilities(self) -> dict[str, Tensor]:
        """How likely each element's sample was to be above one half in the last training call; likewise."""
        step, logits = max(self.step - 1, 0), {name: layer.detach() for name, layer in self.logits.items()}
        return {name: gate.mask_probability(logits[name], step) for name, gate in self.gate.across(logits).items()}

    def decisions(self) -> dict[str, Tensor]:
        """What the mask is read from, as it stands: name -> float32 of the logits' shape; kept iff above 0."""
        logits = {name: layer.detach() for name, layer in self.logits.items()}
        return {name: gate.decision(logits[name]) for name, gate in self.gate.across(logits).items()}

    def _check_first_call(self, output: Any) -> None:
        if not torch.is_grad_enabled():
            warnings.warn(
                "A MaskedNetwork in training mode was called under torch.no_grad() or inference_mode(), so no gradient "
                "can reach the logits. Call it with gradients to train, or after masked.eval() to evaluate the mask.",
                stacklevel=5,  # past forward, and torch's two layers around it,
            )
            return
        leaves = flatten(output)[0]
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise CutGraphError(
                f"The network's output is a {type(output).__name__}, in which no tensor is found. Let it return a"
                " tensor, or tuples, lists, dicts or dataclasses of tensors."
            )
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
            raise CutGraphError(
                "The network's output does not depend on the logits: inside its forward, something cuts the graph "
                "(torch.no_grad, detach, .data, .item, or an output computed from unmasked parameters only). "
                f"Masked are: {', '.join(self.logits)}."
            )
        recomputation.refuse_in_graph(leaves)
        self._seen_a_gradient = True

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskedNetwork":
        dtypes = [parameter.dtype for parameter in self.network.parameters()]
        unchanged = fingerprint(self.network) == self._fingerprint
        self.network._apply(fn)
        self._routes.forget()
        if unchanged and dtypes != [parameter.dtype for parameter in self.network.parameters()]:
            # A cast through us is meant: from here on the logits belong to the weights as they are now.
            self._fingerprint = fingerprint(self.network)

        def move(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no part in a graph that is under way.
        return {**self.__dict__, "_sums": None, "_bounded": None}

    def __repr__(self) -> str:
        """One line: the modules that hold the logits are as many as the network's, and say nothing."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        elements = sum(t.numel() for t in self.logits_tree.parameters())
        return f"{elements:,} logits of {type(self.network).__name__}, samples={self.samples}, gate={self.gate}"


def _warn_of_evaluation(gradient: Tensor) -> None:
    warnings.warn(
        "A MaskedNetwork's penalty that was asked for in evaluation mode is trained on. No gate is sampled in that"
        " mode, so nothing but the penalty moves the logits. Call masked.train() before training goes on.",
        stacklevel=2,
    )


@untraced
def _eagerly(masked: MaskedNetwork, args: Any, kwargs: Any) -> Any:
    return masked.forward(*args, **kwargs)


def _takes_sequence_first(network: nn.Module) -> bool:
    """Whether it is one of torch's recurrent networks or Transformer modules that count the batch second."""
    first = network
    if isinstance(network, (nn.TransformerEncoder, nn.TransformerDecoder)) and len(network.layers):
        first = network.layers[0]
    if isinstance(first, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        first = first.self_attn
    kinds = (nn.RNNBase, nn.Transformer, nn.MultiheadAttention)
    return isinstance(first, kinds) and not first.batch_first


def initial_logit(keep: float) -> float:
    """The logit of a keep probability.

    Raises:
        SettingError: not strictly between 0 and 1, or beyond the bound on logits.
    """
    if isinstance(keep, bool) or not hasattr(keep, "__float__"):
        raise SettingError(f"keep={keep!r} is no number; it is a probability, strictly between 0 and 1.")
    keep = float(keep)
    if not 0.0 < keep < 1.0:
        hint = ""
        if math.isfinite(keep):
            bounded = max(-LOGIT_BOUND, min(LOGIT_BOUND, keep))
            hint = f" If a logit was meant: a logit of {keep:g} is keep={1 / (1 + math.exp(-bounded)):.3g}."
        raise SettingError(f"keep is {keep:g}; it is a probability, strictly between 0 and 1.{hint}")
    logit = math.log(keep / (1.0 - keep))
    if abs(logit) > LOGIT_BOUND:
        limit = 1 / (1 + math.exp(-LOGIT_BOUND))
        raise SettingError(f"keep is {keep!r}; it must be between {1 - limit:.6f} and {limit:.6f}, or gates are stuck.")
    return logit


def _plant(tree: nn.Module, name: str, parameter: nn.Parameter) -> tuple[nn.Module, str]:
    """Put a parameter under its dotted name into a tree of empty modules, where names never collide as joined ones can.

    The modules are plain ones, so every name that a network's own modules and parameters can have is free.

    Returns:
        The module that holds it, and its name there.
    """
    *path, last = name.split(".")
    for part in path:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    tree.register_parameter(last, parameter)
    return tree, last


def load_logits(masked: MaskedNetwork, logits: Mapping[str, Tensor]) -> None:
    """Put stored logits (name -> float32 tensor) into a masked network.

    Raises:
        MismatchError: names or shapes differ.
    """
    own = masked.logits
    if {k: tuple(v.shape) for k, v in own.items()} != {k: tuple(v.shape) for k, v in logits.items()}:
        raise MismatchError(
            f"The logits are for {sorted(logits)}, but the selection masks {sorted(own)}, or their shapes differ. "
            "Use the selection they were trained with."
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(logits[name])
