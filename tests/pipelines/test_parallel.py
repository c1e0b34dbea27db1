"""One picture over several processes: a schedule under the context parallelism of diffusers, on the CPU with gloo."""

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import init_device_mesh

import dpcache
from tests.pipelines.every import SMALL
from tests.pipelines.small import STEPS
from tests.pipelines.test_table import Spy, Subject, same

RANKS = 2
WAN = "WanPipeline (2.1)"
BOTH_WANS = "WanPipeline (2.2, two transformers)"


@dataclass(frozen=True)
class Case:
    """A pipeline whose sequence is shared out among the ranks.

    Attributes:
        name: of the pipeline.
        boundary: where it is cached.
        dpcache_first: enabled before the parallelism, whose hooks then lie above.
        odd_text: of a length that the ranks cannot share evenly. (A picture of such a length gloo cannot gather.)
    """

    name: str
    boundary: str
    dpcache_first: bool = False
    odd_text: bool = False

    def __str__(self) -> str:
        more = [" dpcache first"] * self.dpcache_first + [" odd text"] * self.odd_text
        return f"{self.name}-{self.boundary}{''.join(more)}"

    def subject(self) -> Subject:
        facts = SMALL[self.name]
        pipe, arguments = facts.build()
        if not self.odd_text:
            arguments = {name: _longer(value) for name, value in arguments.items()}
        return Subject(facts, self.boundary, pipe, arguments)

    def share_out(self, subject: Subject) -> None:
        mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("ring", "ulysses"))
        # diffusers numbers a rank's device by how many accelerators there are, also where that is none.
        count = max(torch.accelerator.device_count(), 1)
        with mock.patch("torch.accelerator.device_count", return_value=count):
            for denoiser in subject.denoisers:
                config = ContextParallelConfig(ulysses_degree=RANKS, ulysses_anything=self.odd_text, mesh=mesh)
                denoiser.enable_parallelism(config=config)


def _longer(value: Any) -> Any:
    """Of a text's five tokens or their mask: with a sixth, which two ranks can share."""
    is_text = isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[1] == 5
    return torch.cat([value, value[:, :1]], dim=1) if is_text else value


CASES = [
    *(
        Case(name, boundary, dpcache_first)
        for name in ("FluxPipeline", WAN)
        for boundary in ("blocks", "output")
        for dpcache_first in (False, True)
    ),
    *(Case(name, "blocks") for name in ("Flux2Pipeline", "QwenImagePipeline", BOTH_WANS)),
    Case("FluxPipeline", "blocks", odd_text=True),
]


def run_rank(rank: int, folder: Path) -> None:
    """Everything that one process does; leaves what it found in a file."""
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=120)
    )
    torch.save({str(case): run_case(case) for case in CASES}, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_case(case: Case) -> dict[str, Any]:
    subject = case.subject()
    schedule = subject.schedule()
    with dpcache.enabled(subject.pipe, schedule):
        alone = subject.draw()
        alone_bytes = dpcache.stats(subject.pipe).peak_cached_bytes
    if case.dpcache_first:
        dpcache.enable(subject.pipe, schedule)
        case.share_out(subject)
        before = None
    else:
        case.share_out(subject)
        plain, before = subject.draw(), subject.traces()
        dpcache.enable(subject.pipe, schedule)
    with Spy() as spy:
        runs = [spy.count(layer) for _, layer in subject.layers()]
        shared = subject.draw()
    stats = dpcache.stats(subject.pipe)
    dpcache.disable(subject.pipe)
    if before is None:
        plain = subject.draw()
    undone = same(subject.draw(), plain) and before in (None, subject.traces())
    with dpcache.enabled(subject.pipe, subject.schedule(tuple(range(STEPS)))):
        all_keys = subject.draw()
    return {
        "stats": vars(stats),
        "runs": [count for (count,) in runs],
        "alone": alone,
        "shared": shared,
        "plain": subject.plain,
        "plain shared": plain,
        "bytes": (alone_bytes, stats.peak_cached_bytes),
        "all key steps change nothing": same(all_keys, plain),
        "undone": undone,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """What each rank found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (folder,), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def close(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Heads and tokens are summed in another order where they are shared out."""
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_context_parallelism(case: Case, ranks: list[dict[str, dict[str, Any]]]) -> None:
    first, second = (found[str(case)] for found in ranks)
    facts = SMALL[case.name]
    for found in (first, second):
        assert found["stats"]["computed_steps"] == facts.keys
        assert found["stats"]["predicted_steps"] == tuple(sorted(set(range(STEPS)) - set(facts.keys)))
        assert found["stats"]["full_calls"] == len(facts.keys) * facts.branches
        assert found["all key steps change nothing"]
        assert found["undone"]
        assert close(found["plain shared"], found["plain"])
        assert close(found["shared"], found["alone"]) and not same(found["shared"], found["plain shared"])
    # Every decision and every bit of the outcome is the same on both, though neither asks the other.
    assert first["stats"]["computed_steps"] == second["stats"]["computed_steps"]
    assert same(first["shared"], second["shared"])
    assert first["runs"] == second["runs"]
    per_denoiser = len(facts.keys) * facts.branches // (2 if facts.switch < STEPS else 1)
    assert set(first["runs"]) == {per_denoiser}
    # At the blocks a rank keeps its own share of the sequence; at the output all is there again.
    alone, *kept = first["bytes"][0], first["bytes"][1], second["bytes"][1]
    if case.boundary == "output":
        assert kept == [alone, alone]
    else:
        assert kept == [alone // 2, alone // 2]
