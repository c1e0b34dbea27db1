"""Absolute errors of Taylor predictions between all pairs of key steps at once: the work behind `costs.paper_cost`.

Nothing is read back from the device on the way, and only some columns of the values are on it at a time.
"""

import torch

#: Columns of the values taken at a time, and errors worked on at once, by kind of device: on a processor they stay in
#: its caches, elsewhere they keep it busy.
_COLUMNS = {"cpu": 2**11}
_ERRORS = {"cpu": 2**20}
_ELSEWHERE = 2**16, 2**26


class Errors:
    """Sums of absolute errors over the elements of the values, filled by `add`.

    Attributes:
        total: for every last key j, float64 [anchors, T - j]: summed errors of predicting steps j+1 .. T, one row for
            each anchor i, the key before it.
        finite: bool [T], whether all values of a step are.
    """

    def __init__(self, anchors: dict[int, range], steps: int, order: int, device: torch.device) -> None:
        self.anchors, self.order = anchors, order
        self.finite = torch.ones(steps, dtype=torch.bool, device=device)
        self.total = {j: torch.zeros(len(i), steps - j, dtype=torch.float64, device=device) for j, i in anchors.items()}
        self.device = device

    def add(self, values: torch.Tensor, sentinel: torch.Tensor) -> None:
        """Adds the errors of `values` [T, D]; what the weights `sentinel` [n] give of the last n steps is step T."""
        sentinel = sentinel.to(self.device)
        columns = _COLUMNS.get(self.device.type, _ELSEWHERE[0])
        for start in range(0, values.shape[1], columns):
            piece = values[:, start : start + columns].to(self.device, sentinel.dtype)
            self.finite &= torch.isfinite(piece).all(dim=1)
            self._add(torch.cat([piece, (sentinel @ piece[-len(sentinel) :])[None]]))

    def _add(self, truth: torch.Tensor) -> None:
        # Keys before i are consecutive steps, so their differences are the same for every j.
        consecutive = [truth]
        while len(consecutive) < self.order:
            consecutive.append(torch.cat([truth[:1], consecutive[-1].diff(dim=0)]))
        ahead = torch.arange(len(truth), dtype=truth.dtype, device=truth.device)[:, None]
        at_once = _ERRORS.get(truth.device.type, _ELSEWHERE[1]) // truth.shape[1]
        room = truth.new_empty(max(at_once, len(truth)), truth.shape[1])
        for j, i in self.anchors.items():
            gaps = (j - ahead[i.start : i.stop]) if self.order else ahead[:1]
            at_j = [truth[j : j + 1]]  # Dm_j = (D(m-1)_j - D(m-1)_i) / (j - i), [anchors, columns]
            for at_i in consecutive[: self.order]:
                at_j.append((at_j[-1] - at_i[i.start : i.stop]).div_(gaps))
            slopes = (truth[j] - truth[j + 1 :]).div_(ahead[1 : len(truth) - j])
            few = max(1, at_once // len(i))
            for first in range(0, len(slopes), few):
                slope, d = slopes[first : first + few], ahead[1 + first : 1 + first + len(slopes[first : first + few])]
                error = room[: len(i) * len(slope)].view(len(i), *slope.shape)
                _errors_by_distance(at_j, slope, d, error)
                self.total[j][:, first : first + few] += error.abs_().sum(dim=2) * d[:, 0]


def _errors_by_distance(at_j: list[torch.Tensor], slope: torch.Tensor, d: torch.Tensor, error: torch.Tensor) -> None:
    """error [anchors, targets, columns] = (sum over m of Dm_j d^m / m! - truth) / d, by Horner's rule."""
    differences = [difference[:, None] for difference in at_j]
    order = len(at_j) - 1
    if order == 0:
        error.copy_(slope)
    elif order == 1:
        torch.add(differences[1], slope, out=error)
    else:
        torch.addcmul(differences[order - 1], differences[order], d / order, out=error)
        for m in range(order - 1, 1, -1):
            error.mul_(d / m).add_(differences[m - 1])
        error.add_(slope)
