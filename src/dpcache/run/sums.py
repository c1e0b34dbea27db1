"""The weighted sum that predicts a value: the whole arithmetic of a skipped step."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dpcache.plan.schedule import Term

#: Elements taken at a time, by kind of device: the sum so far then stays in a processor's cache, and what it takes in
#: float32 is little next to the values themselves.
_PIECE = {"cpu": 2**18}
_PIECE_ELSEWHERE = 2**22


def weighted_sum(values: Sequence[torch.Tensor], coefficients: Sequence[float], device: torch.device) -> torch.Tensor:
    """Sum of coefficient x value, summed in float32 (float64 for float64 values) whatever the dtype, rounded once.

    Nothing is read back from the device. Where gradients are wanted, they pass through.

    Args:
        values: contiguous, of one shape and dtype, on the device or in host memory; at least one.
        coefficients: one for each.
        device: where the sum is wanted.

    Returns:
        a tensor of the values' shape and dtype.
    """
    like = values[0]
    wide = torch.promote_types(like.dtype, torch.float32)
    if torch.is_grad_enabled() and any(value.requires_grad for value in values):
        pairs = zip(values, coefficients, strict=True)
        return torch.stack([share * value.to(device, wide) for value, share in pairs]).sum(dim=0).to(like.dtype)
    result = torch.empty(like.shape, dtype=like.dtype, device=device)
    whole = result.view(-1)
    flat = [value.view(-1) for value in values]
    piece = _PIECE.get(device.type, _PIECE_ELSEWHERE)
    for start in range(0, len(whole), piece):
        into = whole[start : start + piece]
        first, *others = (value[start : start + piece].to(device, non_blocking=device.type == "cuda") for value in flat)
        total = into if wide == like.dtype else torch.empty(into.shape, dtype=wide, device=device)
        torch.mul(first.to(wide), coefficients[0], out=total)
        for coefficient, other in zip(coefficients[1:], others, strict=True):
            total.add_(other, alpha=coefficient)
        if total is not into:
            into.copy_(total)
    return result


def with_correction(
    value: torch.Tensor, step: int, terms: "Sequence[Term]", cached: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """The value computed at a key step with the schedule's correction added; the value itself where there is none.

    Args:
        value: what was computed at this step; not cached yet.
        step: the key step.
        terms: of the correction, none if it has no correction.
        cached: key step -> value. The correction is left out where it takes a value that is not there.
    """
    shares = {term.key_step: term.coefficient for term in terms}
    own = 1.0 + shares.pop(step, 0.0)
    if not terms or not shares.keys() <= cached.keys():
        return value
    values = [value.contiguous(), *(cached[key] for key in shares)]
    if not torch.is_grad_enabled():
        values[0] = values[0].detach()
    return weighted_sum(values, [own, *shares.values()], value.device)


def keep(value: torch.Tensor, *, offload: bool) -> torch.Tensor:
    """A contiguous copy, on the same device or, offloaded, in host memory; without waiting for it to be there.

    The host memory of a GPU's values is pinned, so that copies there and back are ordered like kernels. Where gradients
    are wanted, the copy has them too.
    """
    if value.requires_grad and torch.is_grad_enabled():
        return value.to("cpu" if offload else value.device, copy=True).contiguous()
    pinned = offload and value.is_cuda
    copy = torch.empty(value.shape, dtype=value.dtype, device="cpu" if offload else value.device, pin_memory=pinned)
    return copy.copy_(value.detach(), non_blocking=pinned)
