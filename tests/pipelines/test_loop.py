"""What a sampling loop does not do: wait for the device, run what nothing reads, hold more than it needs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dpcache
from dpcache.measure.recording import Recording
from dpcache.plan.schedule import Boundary
from dpcache.run import boundary as boundary_module
from dpcache.run import sums
from dpcache.run.denoisers import find_feeders
from dpcache.run.entry import entered
from dpcache.run.layouts import BLOCK_STACKS
from dpcache.run.loop import _position
from dpcache.run.packing import take_apart
from tests.pipelines.every import SMALL
from tests.pipelines.test_table import Spy, Subject, same

SOURCES = str(Path(dpcache.__file__).parent)
#: What a GPU would have to be waited for.
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select", "_unique2", "unique_dim"}
LOOPS = [
    (name, boundary)
    for name in ("FluxPipeline", "DiTPipeline", "CogVideoXPipeline", "StableDiffusion3Pipeline", "HunyuanVideoPipeline")
    for boundary in ("blocks", "output")
]


class Waits(Exception):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises where this library's own code reads a tensor's values or moves it to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        own = caller().startswith(SOURCES)
        self.operations += own
        moved = name == "_to_copy" and (kwargs or {}).get("device") is not None
        if own and (name in READS or moved):
            raise Waits(f"{name} in the loop")
        return operation(*args, **(kwargs or {}))


def caller() -> str:
    """The file of the innermost function that is not torch's, nor this one's."""
    frame: Any = sys._getframe(2)
    while frame is not None and "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_filename if frame is not None else ""


def subject(name: str, boundary: str) -> Subject:
    return Subject(SMALL[name], boundary, *SMALL[name].build())


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(("name", "boundary"), LOOPS)
def test_nothing_of_ours_waits_for_the_device(name: str, boundary: str, offload: bool) -> None:
    watched = subject(name, boundary)
    with dpcache.enabled(watched.pipe, watched.schedule(), offload=offload):
        expected = watched.draw()
        with NoWaiting() as mode:
            assert same(watched.draw(), expected)
        assert dpcache.stats(watched.pipe).predicted_calls
    assert mode.operations


@pytest.mark.parametrize(("name", "boundary"), LOOPS)
def test_recording_does_not_wait_either(name: str, boundary: Boundary) -> None:
    recorded = subject(name, boundary)
    recording = Recording()
    with entered(recorded.pipe, boundary, recording), NoWaiting() as mode:
        assert same(recorded.draw(), recorded.plain)
    run = recording.run()
    assert run is not None
    assert mode.operations and len(run.influence) == run.num_steps


def test_waiting_would_be_noticed() -> None:
    """A timestep that is a copy can only be found in the grid by its value."""
    watched = subject("DiTPipeline", "output")
    scheduler = watched.pipe.scheduler
    with dpcache.enabled(watched.pipe, watched.schedule()):
        listened = scheduler.step
        scheduler.step = lambda output, timestep, *more, **named: listened(output, timestep.clone(), *more, **named)
        with pytest.raises(Waits, match="nonzero"), NoWaiting():
            watched.draw()
        scheduler.step = listened
        watched.draw()


def test_position_of_a_timestep_in_its_grid() -> None:
    grid = torch.linspace(1000, 0, 12)
    assert [_position(t, grid) for t in grid] == list(range(12))
    late = grid[5:]
    assert [_position(t, late) for t in late] == list(range(7))
    assert [_position(t, grid) for t in late] == list(range(5, 12))
    assert [_position(t, grid[2:9:2]) for t in grid[2:9:2]] == [0, 1, 2, 3]
    for stranger in (grid[3].clone(), grid[3].item(), grid[:1], late.double()[0]):
        assert _position(stranger, grid) is None
    assert _position(grid[2], late) is None


def test_offloaded_values_give_the_same_bits() -> None:
    watched = subject("FluxPipeline", "blocks")
    with dpcache.enabled(watched.pipe, watched.schedule()):
        expected, peak = watched.draw(), dpcache.stats(watched.pipe).peak_cached_bytes
    with dpcache.enabled(watched.pipe, watched.schedule(), offload=True):
        assert same(watched.draw(), expected)
        assert dpcache.stats(watched.pipe).peak_cached_bytes == peak


def with_feeders(feeders: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BLOCK_STACKS[name]
    monkeypatch.setitem(BLOCK_STACKS, name, type(layout)(layout.stacks, layout.head, feeders))


def nothing_but_nan(output: Any) -> Callable[[], Any]:
    tensors, build = take_apart(output)
    blanks = [torch.full_like(t, float("nan")) if t.is_floating_point() else torch.zeros_like(t) for t in tensors]
    return lambda: build(iter(blanks))


@pytest.mark.parametrize("name", [name for name, small in SMALL.items() if small.heads])
def test_nothing_reads_what_feeds_the_blocks_where_none_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = subject(name, "blocks")
    kind = type(watched.denoisers[0]).__name__
    feeders = BLOCK_STACKS[kind].feeders
    with_feeders((), kind, monkeypatch)
    with dpcache.enabled(watched.pipe, watched.schedule()):
        expected = watched.draw()
    with_feeders(feeders, kind, monkeypatch)
    monkeypatch.setattr(boundary_module, "blank_like", nothing_but_nan)
    with dpcache.enabled(watched.pipe, watched.schedule()), Spy() as spy:
        runs = [spy.count(next(iter(m.modules()))) for d in watched.denoisers for m in find_feeders(d)]
        assert same(watched.draw(), expected)
    assert runs or not feeders


def test_what_feeds_the_blocks_runs_at_key_steps_alone() -> None:
    watched = subject("HunyuanVideoPipeline", "blocks")
    transformer = watched.pipe.transformer
    with dpcache.enabled(watched.pipe, watched.schedule()), Spy() as spy:
        # Inside them: a plain hook on a module itself is called whether or not the module runs.
        embeddings = [spy.count(m) for m in (transformer.x_embedder.proj, transformer.context_embedder.proj_in)]
        head = spy.count(transformer.time_text_embed.timestep_embedder)
        watched.draw()
        stats = dpcache.stats(watched.pipe)
    assert embeddings == [[stats.full_calls]] * 2
    assert head == [stats.full_calls + stats.predicted_calls]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_sum_in_pieces_is_the_sum(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [torch.randn(3, 41).to(dtype) for _ in range(3)]
    coefficients = [0.31, -1.7, 2.39]
    cpu = torch.device("cpu")
    whole = sums.weighted_sum(values, coefficients, cpu)
    monkeypatch.setattr(sums, "_PIECE", {"cpu": 10})
    assert torch.equal(sums.weighted_sum(values, coefficients, cpu), whole)
    exact = sum(value.double() * coefficient for value, coefficient in zip(values, coefficients, strict=True))
    torch.testing.assert_close(whole.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert whole.dtype == dtype and all(torch.isfinite(value).all() for value in values)
