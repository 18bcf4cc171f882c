"""Does the optimizer hold these logits, and does it move them?"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sublens.diagnosis.findings import Finding
from sublens.diagnosis.inputs import listed, shapes


def optimizer_checks(logits: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> tuple[list[Finding], list[Finding]]:
    """Findings and notes about an optimizer's parameter groups."""
    findings: list[Finding] = []
    notes: list[Finding] = []
    group_of = {id(tensor): group for group in groups for tensor in group["params"]}
    missing = [name for name, tensor in logits.items() if id(tensor) not in group_of and _should_be_held(tensor)]
    if missing:
        findings.append(_not_held(logits, missing, groups))
    held = {name: group_of[id(tensor)] for name, tensor in logits.items() if id(tensor) in group_of}
    still = [name for name, group in held.items() if float(group.get("lr", 1.0)) == 0.0]
    scheduled = [name for name in still if float(held[name].get("initial_lr", 0.0)) != 0.0]
    if scheduled:
        notes.append(
            Finding(
                "learning-rate-zero-now",
                f"The learning rate of {listed(scheduled)} is 0 at present, under a schedule that began at "
                f"{float(held[scheduled[0]]['initial_lr']):g}.",
                "At this step these logits do not move. That is right at the first step of a warm-up and at the end "
                "of a decay, and wrong anywhere else.",
                "Print scheduler.get_last_lr() over a few steps.",
            )
        )
    still = [name for name in still if name not in scheduled]
    if still:
        findings.append(
            Finding(
                "learning-rate-zero",
                f"The optimizer's learning rate is 0 for {listed(still)}.",
                "Each step multiplies the gradient by 0, so these logits stay as they are.",
                "Give their parameter group a learning rate:\n    optimizer = torch.optim.Adam(logits, lr=1e-2)",
            )
        )
    ascending = [name for name, group in held.items() if group.get("maximize")]
    if ascending:
        findings.append(
            Finding(
                "optimizer-maximizes",
                f"The optimizer has maximize=True for {listed(ascending)}.",
                "It climbs the loss: the mask learns to do the task badly, and the penalty opens gates.",
                "Leave maximize at False, or negate the loss.",
            )
        )
    decayed = [name for name, group in held.items() if float(group.get("weight_decay") or 0.0) != 0.0]
    if decayed:
        decay = float(held[decayed[0]]["weight_decay"])
        notes.append(
            Finding(
                "weight-decay",
                f"The optimizer has weight_decay={decay:g} for {listed(decayed)}.",
                "Weight decay pulls every logit towards 0, which is a keep probability of one half, and not towards "
                "shut. It acts beside the penalty and blurs what that means. (AdamW has 0.01 unless told otherwise.)",
                "Say weight_decay=0 for the logits, unless it is meant.",
            )
        )
    return findings, notes


def _should_be_held(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.is_leaf  # other logits have a finding of their own


def _not_held(logits: Mapping[str, Tensor], missing: list[str], groups: list[dict[str, Any]]) -> Finding:
    known = {id(tensor) for tensor in logits.values()}
    others = [tensor for group in groups for tensor in group["params"] if id(tensor) not in known]
    wanted = {tuple(logits[name].shape) for name in missing}
    twins = [tensor for tensor in others if tuple(tensor.shape) in wanted]
    cure = "Make the optimizer last, from the very tensors that the loss uses:\n    optimizer = Adam(logits, lr=1e-2)"
    if twins:
        gpu = " on another device" if any(t.device != logits[missing[0]].device for t in twins) else ""
        return Finding(
            "optimizer-holds-others",
            f"The optimizer does not hold {listed(missing)}, but it holds other tensors of the same shape{gpu}: "
            f"{shapes(twins)}.",
            "It steps those, and the logits stay as they are. Usually the logits were made again after the optimizer "
            "(by .to(device), by nn.Parameter(...), by loading), or the optimizer was given the network's weights.",
            cure,
        )
    return Finding(
        "logits-not-in-optimizer",
        f"The optimizer does not hold {listed(missing)}. It holds {len(others)} other tensor(s): {shapes(others)}.",
        "No step ever changes these logits, whatever their gradient is.",
        cure,
    )
