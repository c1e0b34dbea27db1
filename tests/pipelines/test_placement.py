"""Pipelines whose weights are narrow, quantized or kept elsewhere, that are compiled, moved or copied."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import LazyPrefetchGroupOffloadingHook
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import dpcache
from tests.pipelines import small_image
from tests.pipelines.small import STEPS, Built, Small, cast
from tests.pipelines.test_table import Subject, check_invariants, same


def build() -> Built:
    """A small FLUX without guidance, with one block that works on two streams and two that work on one."""
    pipe, arguments = small_image.FluxPipeline()
    del pipe.transformer.transformer_blocks[1:]
    del arguments["true_cfg_scale"]
    return pipe, arguments


FLUX = Small("FluxPipeline", build)
BLOCKS = 3
FULL_CALLS = len(FLUX.keys)


def flux(boundary: str = "blocks", dtype: torch.dtype = torch.float32) -> Subject:
    pipe, arguments = FLUX.build()
    if dtype != torch.float32:
        pipe.to(dtype)
    return Subject(FLUX, boundary, pipe, {name: cast(value, dtype) for name, value in arguments.items()})


def cached(subject: Subject) -> list[torch.Tensor]:
    with dpcache.enabled(subject.pipe, subject.schedule()):
        return subject.draw()


def close(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Weights read from a disk lie elsewhere in memory, where a matrix product may be summed in another order."""
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("boundary", FLUX.boundaries)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights(dtype: torch.dtype, boundary: str) -> None:
    check_invariants(flux(boundary, dtype), dtype)


@pytest.mark.parametrize("boundary", FLUX.boundaries)
def test_layerwise_casting(boundary: str) -> None:
    pipe, arguments = FLUX.build()
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    subject = Subject(FLUX, boundary, pipe, arguments)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert not same(subject.plain, flux().plain)
    check_invariants(subject)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_quantized_by_torch() -> None:
    pipe, arguments = FLUX.build()
    torch.ao.quantization.quantize_dynamic(pipe.transformer, {nn.Linear}, dtype=torch.qint8, inplace=True)
    subject = Subject(FLUX, "blocks", pipe, arguments)
    assert not same(subject.plain, flux().plain)
    check_invariants(subject)


def test_layers_quantized_by_torchao() -> None:
    pipe, arguments = FLUX.build()
    quantize_(pipe.transformer, Int8WeightOnlyConfig())
    subject = Subject(FLUX, "blocks", pipe, arguments)
    assert not same(subject.plain, flux().plain)
    check_invariants(subject)


def offload_model(pipe: Any, directory: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def align_devices(pipe: Any, directory: Path) -> None:
    """The hooks of sequential offloading, on every module; without its weights on "meta", which need an accelerator."""
    for module in pipe.transformer.modules():
        add_hook_to_module(module, AlignDevicesHook(torch.device("cpu")))


def offload_blocks(pipe: Any, directory: Path) -> None:
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), num_blocks_per_group=1, offload_to_disk_path=str(directory)
    )


def offload_leaves(pipe: Any, directory: Path) -> None:
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(directory)
    )


def prefetch_blocks(pipe: Any, directory: Path) -> None:
    """What `use_stream=True` does on an accelerator, without the stream: hooks that go after the first call."""
    offload_blocks(pipe, directory)
    HookRegistry.check_if_exists_or_initialize(pipe.transformer).register_hook(
        LazyPrefetchGroupOffloadingHook(), "lazy_prefetch_group_offloading"
    )


OFFLOADS = [offload_model, align_devices, offload_blocks, offload_leaves, prefetch_blocks]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_weights(offload: Callable[[Any, Path], None], tmp_path: Path) -> None:
    """From the CPU to the CPU, or to a disk and back: every hook is there and runs, only the copies are short."""
    pipe, arguments = FLUX.build()
    offload(pipe, tmp_path)
    subject = Subject(FLUX, "blocks", pipe, arguments)
    check_invariants(subject)
    assert close(subject.plain, flux().plain)


@pytest.mark.parametrize("dpcache_first", [True, False], ids=["dpcache first", "offload first"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloading_in_either_order(offload: Callable[[Any, Path], None], dpcache_first: bool, tmp_path: Path) -> None:
    subject, only_offloaded = flux(), flux()
    expected = cached(subject)
    for each in (subject, only_offloaded):
        if each is only_offloaded or not dpcache_first:
            offload(each.pipe, tmp_path / str(id(each)))
        if each is subject:
            dpcache.enable(subject.pipe, subject.schedule())
            if dpcache_first:
                offload(subject.pipe, tmp_path / str(id(each)))
    for generation in (1, 2, 3):
        assert close(subject.draw(), expected)
        assert dpcache.stats(subject.pipe).predicted_calls == (STEPS - FULL_CALLS) * generation
    dpcache.disable(subject.pipe)
    assert close(subject.draw(), subject.plain)
    only_offloaded.draw()
    assert subject.traces() == only_offloaded.traces()
    if offload is offload_model:
        assert subject.pipe.transformer._old_forward == only_offloaded.pipe.transformer._old_forward.__func__.__get__(
            subject.pipe.transformer
        )


class Graphs:
    """A compiler that runs graphs as they are. `runs` has, for each of them, how often it ran."""

    def __init__(self) -> None:
        self.runs: list[int] = []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        number = len(self.runs)
        self.runs.append(0)

        def run(*args: Any) -> Any:
            self.runs[number] += 1
            return graph.forward(*args)

        return run


def compile_and_wrap(pipe: Any, **how: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, **how)


def compile_in_place(pipe: Any, **how: Any) -> None:
    pipe.transformer.compile(**how)


def compile_blocks(pipe: Any, **how: Any) -> None:
    pipe.transformer.compile_repeated_blocks(**how)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("compile_", "boundary"),
    [
        (compile_and_wrap, "blocks"),
        (compile_and_wrap, "output"),
        (compile_in_place, "blocks"),
        (compile_blocks, "blocks"),
    ],
)
def test_compiled(compile_: Callable[..., None], boundary: str, graphs: Graphs) -> None:
    """A transformer compiled as a whole gets two graphs more: with hooks in it, and without blocks. Else none."""
    subject = flux(boundary)
    expected = cached(subject)
    compile_(subject.pipe, backend=graphs, fullgraph=True)
    assert same(subject.draw(), subject.plain)
    runs = BLOCKS if compile_ is compile_blocks else 1
    assert sum(graphs.runs) == STEPS * runs
    hooked = runs == 1 and boundary == "blocks"
    for _ in range(1 if hooked else 2):
        compiled = len(graphs.runs)
        with dpcache.enabled(subject.pipe, subject.schedule()):
            assert same(subject.draw(), expected)
            assert len(graphs.runs) == compiled + (2 if hooked else 0)
            earlier = list(graphs.runs)
            assert same(subject.draw(), expected)
        ran = [now - then for now, then in zip(graphs.runs, earlier, strict=True)]
        if hooked:
            assert ran[compiled:] == [FULL_CALLS, STEPS - FULL_CALLS] == [count for count in ran if count]
        else:
            assert sum(ran) == FULL_CALLS * runs
    compiled = len(graphs.runs)
    assert same(subject.draw(), subject.plain)
    assert len(graphs.runs) == compiled
    with dpcache.enabled(subject.pipe, subject.schedule(tuple(range(STEPS)))):
        assert same(subject.draw(), subject.plain)


@pytest.mark.parametrize("compile_", [compile_and_wrap, compile_in_place, compile_blocks])
def test_compiled_while_enabled(compile_: Callable[..., None], graphs: Graphs) -> None:
    subject = flux()
    expected, before = cached(subject), subject.traces()
    dpcache.enable(subject.pipe, subject.schedule())
    subject.draw()
    compile_(subject.pipe, backend=graphs, fullgraph=True)
    for _ in range(2):
        assert same(subject.draw(), expected)
    if compile_ is compile_blocks:
        assert sum(graphs.runs) == 2 * FULL_CALLS * BLOCKS
    else:
        assert graphs.runs == [2 * FULL_CALLS, 2 * (STEPS - FULL_CALLS)]
    dpcache.disable(subject.pipe)
    assert same(subject.draw(), subject.plain)
    for module in subject.denoisers[0].modules():
        for left_by_torch in ("_compiled_call_impl", "_is_torch_compile"):
            vars(module).pop(left_by_torch, None)
    subject.pipe.transformer = subject.denoisers[0]
    assert subject.traces() == before


def test_moved_while_enabled() -> None:
    subject = flux()
    with dpcache.enabled(subject.pipe, subject.schedule()):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            subject.pipe.to(dtype)
            subject.arguments = {name: cast(value, dtype) for name, value in subject.arguments.items()}
            assert same(subject.draw(), cached(flux(dtype=dtype)))
            assert dpcache.stats(subject.pipe).computed_steps == FLUX.keys


def test_a_copy_is_on_its_own() -> None:
    """A copy is not enabled, and shares nothing with the original: neither made between calls nor in the middle."""
    subject = flux()
    before, expected = subject.traces(), cached(subject)
    dpcache.enable(subject.pipe, subject.schedule())
    copies = []

    def copy_at(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            copies.append(copy.deepcopy(pipe))
        return kwargs

    assert same(subject.draw(), expected)
    copies.append(copy.deepcopy(subject.pipe))
    subject.arguments["callback_on_step_end"] = copy_at
    assert same(subject.draw(), expected)
    del subject.arguments["callback_on_step_end"]
    for number, pipe in enumerate(copies):
        with pytest.raises(dpcache.CacheStateError, match="not enabled"):
            dpcache.stats(pipe)
        twin = Subject(FLUX, "blocks", pipe, subject.arguments)
        assert same(twin.plain, subject.plain)
        if number == 1:
            dpcache.disable(subject.pipe)
        assert same(cached(twin), expected)
        for parameter in pipe.transformer.parameters():
            parameter.data.zero_()
        assert not same(cached(twin), expected)
        assert same(subject.draw(), subject.plain if number == 1 else expected)
    assert subject.traces() == before


def test_a_saved_pipeline_knows_nothing_of_it(tmp_path: Path) -> None:
    subject = flux()
    subject.pipe.save_pretrained(tmp_path / "plain")
    with dpcache.enabled(subject.pipe, subject.schedule()):
        subject.draw()
        subject.pipe.save_pretrained(tmp_path / "enabled")
    assert files(tmp_path / "enabled") == files(tmp_path / "plain")


def files(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
