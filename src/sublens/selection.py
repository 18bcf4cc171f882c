"""Which parameters of a network are masked.

A selection says *where* to mask; the result is always the same: first names of distinct parameter tensors, in the
network's own order.
"""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.weight_norm import WeightNorm

from sublens.errors import SelectionError

Predicate: TypeAlias = Callable[[str, nn.Parameter, nn.Module], bool]
Where: TypeAlias = "str | type[nn.Module] | Predicate | Iterable[str | type[nn.Module] | Predicate] | None"

# _NormBase is the base of BatchNorm*, SyncBatchNorm and InstanceNorm*, lazy ones included.
_UNMASKED_KINDS = (
    nn.Embedding, nn.EmbeddingBag, _NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm,
)  # fmt: skip


def select(network: nn.Module, where: Where = None, *, biases: bool = False) -> dict[str, nn.Parameter]:
    """Choose the parameters of a network that get a mask.

    ``where`` is one of these:

    - ``None``: every weight of two or more dimensions outside embedding and normalisation modules.
    - ``"encoder.0.weight"``, the name of a parameter: that one, whatever it is.
    - ``"encoder"``, the name of a module: what ``None`` would select in it. If it is itself an embedding or a norm, or
      shares its own weight with one: its weights.
    - ``"encoder.*.weight"``, a glob (``*`` matches dots too): every parameter whose name matches, whatever it is; if
      there is none, the modules whose names match.
    - ``nn.Linear``, a module class: as the name of each module of this class.
    - ``predicate(name, parameter, module)``: where it returns ``True``; ``module`` is the one that holds the parameter.
    - ``"!head"``: not this, a name or a glob as above, and not what is below a module. It wins over everything else.
      Alone, it is taken from the selection of ``None``.
    - a sequence of these: the union.

    A parameter is a bias, and no weight, if a part of its own name between underscores is ``bias`` (``bias``,
    ``bias_ih_l0``, ``in_proj_bias``). A tensor that a module shares with an embedding counts as an embedding. The
    lengths of rows that ``weight_norm`` makes are no weights. Only floating-point parameters with at least one element
    can be selected.

    Args:
        network: any module. It is only read.
        where: see above.
        biases: also select the biases of the modules whose weights are selected.

    Returns:
        name -> parameter, in the order of ``network.named_parameters()``; a tensor under several names appears once,
        under the first.

    Raises:
        SelectionError: ``where``, or one of the things in it, matches nothing that can be masked.
    """
    return _Selector(network).select(where, biases)


def tied_names(network: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of each distinct parameter tensor: first name -> every name, in the network's order.

    Two names are one tensor if they give the same ``Parameter``, or parameters that share memory with the same layout.
    """
    first: dict[object, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        key: object = id(parameter)
        if parameter.layout is torch.strided and parameter.device.type != "meta" and parameter.numel():
            key = (parameter.data_ptr(), parameter.device, parameter.dtype, parameter.shape, parameter.stride())
        names.setdefault(first.setdefault(key, name), []).append(name)
    return {name: tuple(aliases) for name, aliases in names.items()}


def match_names(patterns: str | Iterable[str], names: Iterable[str]) -> list[str]:
    """The names that are meant by exact names, names of enclosing modules, or globs; in the order of ``names``.

    Raises:
        SelectionError: a pattern matches none of them.
    """
    names = list(names)
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        exact = [name for name in names if name == pattern or name.startswith(f"{pattern}.")]
        found = exact or fnmatch.filter(names, pattern)
        if not found:
            enclosing = {name[:dot] for name in names for dot in range(len(name)) if name[dot] == "."}
            raise SelectionError(f"'{pattern}' matches no name. {_hints(pattern, [*names, *sorted(enclosing)])}")
        chosen.update(found)
    return [name for name in names if name in chosen]


class _Selector:
    """The names of one network, looked up once."""

    def __init__(self, network: nn.Module) -> None:
        if not isinstance(network, nn.Module):
            raise SelectionError(f"select needs a torch.nn.Module, not {type(network).__name__}")
        self.modules = dict(network.named_modules(remove_duplicate=False))
        self.parameters = dict(network.named_parameters(remove_duplicate=False))
        if lazy := [name for name, parameter in self.parameters.items() if is_lazy(parameter)]:
            raise SelectionError(f"parameter '{lazy[0]}' has no shape yet; run one batch through the network first")
        self.first = {name: first for first, names in tied_names(network).items() for name in names}
        self.maskable = {
            name for name, parameter in self.parameters.items() if parameter.is_floating_point() and parameter.numel()
        }
        self.unmasked = {self.first[name] for name in self.parameters if self._in_unmasked_kind(name)}
        self.default = {
            name
            for name in self.maskable
            if self.parameters[name].dim() >= 2
            and not is_bias(name)
            and self.first[name] not in self.unmasked
            and not self._is_magnitude(name)
        }

    def select(self, where: Where, biases: bool) -> dict[str, nn.Parameter]:
        wanted, unwanted = self._split(where)
        chosen: set[str] = set() if wanted else set(self.default)
        for item in wanted:
            chosen |= self._matches(item)
        excluded: set[str] = set()
        for pattern in unwanted:
            excluded |= self._named(pattern, self._below)
        if biases:
            # Each module that holds the tensor, under whichever name, has a bias of its own.
            tensors = {self.first[name] for name in chosen if not is_bias(name)}
            modules = {_parent(name) for name in self.parameters if self.first[name] in tensors}
            chosen |= {name for name in self.maskable if is_bias(name) and _parent(name) in modules}
        barred = {self.first[name] for name in excluded}
        result = {self.first[name] for name in chosen} - barred
        if not result:
            raise SelectionError(self._nothing(where, bool(excluded and chosen)))
        return {name: parameter for name, parameter in self.parameters.items() if name in result}

    def _split(self, where: Where) -> tuple[list[object], list[str]]:
        """What to select, and the patterns (without their ``!``) of what not to."""
        items: list[object]
        if where is None:
            return [], []
        if isinstance(where, str | type) or (callable(where) and not isinstance(where, nn.Module)):
            items = [where]
        elif isinstance(where, Iterable) and not isinstance(where, bytes | Mapping | nn.Module | nn.Parameter):
            items = list(where)
        else:
            items = [where]
            self._refuse(where)
        if not items:
            raise SelectionError("an empty sequence selects nothing; pass None for the default selection")
        unwanted = [item[1:] for item in items if isinstance(item, str) and item.startswith("!")]
        return [item for item in items if not (isinstance(item, str) and item.startswith("!"))], unwanted

    def _matches(self, item: object) -> set[str]:
        if isinstance(item, str):
            found = self._named(item, self._weights_of)
            if floating := found & self.maskable:
                return floating
            sorts = sorted({f"{name} is {self.parameters[name].dtype}" for name in found if name not in self.default})
            reason = f" ({_listed(sorts)})" if sorts else ""
            raise SelectionError(
                f"where='{item}' matches nothing that can be masked{reason}. {_hints(item, self.default)}"
            )
        if isinstance(item, type) and issubclass(item, nn.Module):
            found = set()
            for name, module in self.modules.items():
                if isinstance(module, item):
                    found |= self._weights_below(name)
            if not found:
                kinds = sorted({type(module).__name__ for name, module in self.modules.items() if name})
                raise SelectionError(
                    f"where={item.__name__}: the network has no module of this class with weights to mask. "
                    f"It has {_listed(kinds)}"
                )
            return found
        if callable(item) and not isinstance(item, type | nn.Module):
            return self._accepted(item)
        self._refuse(item)
        return set()

    def _accepted(self, predicate: Predicate) -> set[str]:
        found = set()
        for name in self.parameters:
            if name in self.maskable:
                answer = predicate(name, self.parameters[name], self.modules[_parent(name)])
                if not isinstance(answer, bool):
                    raise SelectionError(
                        f"a predicate must return True or False; for '{name}' it returned a {type(answer).__name__}"
                    )
                if answer:
                    found.add(name)
        if not found:
            raise SelectionError(f"the predicate accepted none of the parameters {_listed(sorted(self.maskable))}")
        return found

    def _named(self, pattern: str, of_module: Callable[[str], set[str]]) -> set[str]:
        """Parameters that a string means: an exact name before a glob, a parameter before a module."""
        if pattern in self.parameters:
            return {pattern}
        if pattern and pattern in self.modules:
            return of_module(pattern)
        if found := set(fnmatch.filter(self.parameters, pattern)):
            return found
        for name in fnmatch.filter(filter(None, self.modules), pattern):
            found |= of_module(name)
        if not found:
            hints = _hints(pattern, [*self.parameters, *self.modules])
            raise SelectionError(f"where='{pattern}' matches no parameter and no module. {hints}")
        return found

    def _weights_of(self, module: str) -> set[str]:
        """What the name of a module means: also a weight of its own that it shares with an embedding elsewhere."""
        own = {name for name in self.maskable - self.default if _parent(name) == module and not is_bias(name)}
        tied = {name for name in own if self.first[name] in self.unmasked and not self._in_unmasked_kind(name)}
        return self._weights_below(module) | tied

    def _weights_below(self, module: str) -> set[str]:
        if isinstance(self.modules[module], _UNMASKED_KINDS):
            return {name for name in self.maskable if _parent(name) == module and not is_bias(name)}
        return self._below(module) & self.default

    def _below(self, module: str) -> set[str]:
        return {name for name in self.parameters if not module or name.startswith(f"{module}.")}

    def _in_unmasked_kind(self, name: str) -> bool:
        """Whether an enclosing module, at any depth, is an embedding or a norm."""
        while name:
            name = _parent(name)
            if isinstance(self.modules[name], _UNMASKED_KINDS):
                return True
        return False

    def _is_magnitude(self, name: str) -> bool:
        """Whether these are the lengths that ``weight_norm``, of either kind, gives to the rows of a weight."""
        holder, last = self.modules[_parent(name)], name.rpartition(".")[2]
        if isinstance(holder, ParametrizationList):
            return last == "original0" and type(holder[0]).__name__ == "_WeightNorm"
        hooks = holder._forward_pre_hooks.values()
        return any(isinstance(hook, WeightNorm) and last == f"{hook.name}_g" for hook in hooks)

    def _nothing(self, where: Where, all_excluded: bool) -> str:
        if all_excluded:
            return f"where={where!r} excludes everything that it selects"
        return (
            "the network has no weight of two or more dimensions outside embedding and normalisation modules; "
            f"name what to mask with where=. It has {_listed(list(self.parameters)) or 'no parameters'}"
        )

    def _refuse(self, item: object) -> None:
        hint = ""
        for name, found in (*self.modules.items(), *self.parameters.items()):
            if found is item and name:
                hint = f"; write where='{name}' for this one"
        raise SelectionError(
            "where must be None, a name or glob, a module class, a predicate, or a sequence of these, "
            f"not {getattr(item, '__name__', type(item).__name__)}{hint}"
        )


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def is_bias(name: str) -> bool:
    """Whether a parameter's dotted name is that of a bias: ``bias`` is a part of its last word."""
    return "bias" in name.rpartition(".")[2].split("_")


def _hints(pattern: str, names: Iterable[str]) -> str:
    names = [name for name in names if name]
    if close := difflib.get_close_matches(pattern, names, n=3, cutoff=0.5):
        return "Did you mean " + " or ".join(f"'{name}'" for name in close) + "?"
    return f"There is {_listed(names)}" if names else "There is nothing to mask"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
