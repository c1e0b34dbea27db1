"""The invariants of docs/architecture.md on every pipeline class in the table, each built from small random parts."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dpcache
from dpcache.measure.recording import record
from dpcache.run.denoisers import find_blocks, find_denoisers
from dpcache.run.packing import take_apart
from tests.pipelines.every import SMALL
from tests.pipelines.small import STEPS, Small, cast

CASES = [(name, boundary) for name, entry in SMALL.items() for boundary in entry.boundaries]


class Subject:
    """One small pipeline at one boundary, and ways to look at it from outside."""

    def __init__(self, facts: Small, boundary: str, pipe: Any, arguments: dict[str, Any]) -> None:
        self.facts, self.boundary, self.pipe = facts, boundary, pipe
        self.arguments = {
            "num_inference_steps": STEPS,
            "output_type": "latent",
            "return_dict": False,
            **arguments,
        }
        self.denoisers = find_denoisers(pipe)
        self.plain = self.draw()  # also sets attributes of the pipeline's own

    def schedule(self, keys: tuple[int, ...] | None = None) -> dpcache.Schedule:
        return dpcache.Schedule.from_key_steps(
            self.facts.keys if keys is None else keys, STEPS, order=self.facts.order, boundary=self.boundary
        )

    def call(self) -> dict[str, Any]:
        return {**self.arguments, "generator": torch.Generator().manual_seed(0)}

    def draw(self) -> list[torch.Tensor]:
        return tensors(self.pipe(**self.call()))

    def traces(self) -> dict[str, Any]:
        """Every place where a hook could hide: attributes of the pipeline, its scheduler, and of every module."""
        found: dict[str, Any] = {
            "pipeline": sorted(vars(self.pipe)),
            # What a scheduler computes changes from call to call; what hangs on it as a method must not.
            "scheduler": sorted(name for name, value in vars(self.pipe.scheduler).items() if callable(value)),
        }
        parts = {name: part for name, part in self.pipe.components.items() if isinstance(part, nn.Module)}
        for part, (name, module) in [(p, item) for p, root in parts.items() for item in root.named_modules()]:
            # Opening a cache context makes an (empty) registry on the denoiser: that is diffusers' own doing.
            own = sorted(key for key in vars(module) if key != "_diffusers_hook")
            registry = getattr(module, "_diffusers_hook", None)
            hooks = sorted(registry.hooks) if registry is not None else []
            plain = (len(module._forward_hooks), len(module._forward_pre_hooks))
            found[f"{part}.{name}"] = (own, hooks, registry is not None and name != "", plain)
        return found

    def layers(self) -> list[tuple[int, nn.Module]]:
        """Which denoiser, and a layer that runs once whenever a certain block (of a UNet: all of it) does."""
        return [
            (number, layer)
            for number, denoiser in enumerate(self.denoisers)
            for layer in ([b.layer() for b in find_blocks(denoiser)] if self.facts.heads else [denoiser.conv_in])
        ]


def tensors(output: Any) -> list[torch.Tensor]:
    return [torch.as_tensor(value) for value in output if value is not None]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


class Spy:
    """Counts, by plain torch hooks, how often layers run, and keeps what goes in or comes out of others."""

    def __init__(self) -> None:
        self.handles: list[Any] = []

    def count(self, layer: nn.Module) -> list[int]:
        runs = [0]
        self.handles.append(layer.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1)))
        return runs

    def inputs(self, layer: nn.Module, seen: list[torch.Tensor]) -> None:
        def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((*args, *kwargs.values())[0].clone())

        self.handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))

    def outputs(self, layer: nn.Module, seen: list[list[torch.Tensor]]) -> None:
        keep = lambda _, args, output: seen.append([t.clone() for t in take_apart(output)[0]])  # noqa: E731
        self.handles.append(layer.register_forward_hook(keep))

    def __enter__(self) -> "Spy":
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.fixture(scope="module", params=CASES, ids=[f"{name}-{boundary}" for name, boundary in CASES])
def built(request: pytest.FixtureRequest) -> Subject:
    name, boundary = request.param
    return Subject(SMALL[name], boundary, *SMALL[name].build())


@pytest.fixture
def subject(built: Subject) -> Iterator[Subject]:
    """The pipeline as built: a test that leaves something on it fails."""
    before = built.traces()
    yield built
    assert built.traces() == before


def test_1_all_key_steps_give_the_same_bits(subject: Subject) -> None:
    plain = subject.plain
    assert all(bool(value.isfinite().all()) for value in plain)
    with dpcache.enabled(subject.pipe, subject.schedule(tuple(range(STEPS)))):
        assert same(subject.draw(), plain)
    with dpcache.enabled(subject.pipe, subject.schedule()):
        cached = subject.draw()
    assert all(a.shape == b.shape and not torch.equal(a, b) for a, b in zip(cached, plain, strict=True))


def test_2_recording_changes_nothing(subject: Subject) -> None:
    plain, before = subject.plain, subject.traces()
    run = record(subject.pipe, subject.call(), boundary=subject.boundary)
    assert same(tensors(run.output), plain)
    assert subject.traces() == before
    assert same(subject.draw(), plain)
    assert [len(values) for values in run.complete_branches()] == [STEPS] * subject.facts.branches
    assert run.num_steps == STEPS


def test_3_disable_leaves_no_trace(subject: Subject) -> None:
    plain, before = subject.plain, subject.traces()
    dpcache.enable(subject.pipe, subject.schedule())
    assert subject.traces() != before
    subject.draw()
    dpcache.disable(subject.pipe)
    assert subject.traces() == before
    assert same(subject.draw(), plain)


def test_4_blocks_run_once_per_key_step_and_branch(subject: Subject) -> None:
    facts = subject.facts
    keys = [
        [key for key in facts.keys if key < facts.switch],
        [key for key in facts.keys if key >= facts.switch],
    ]
    with dpcache.enabled(subject.pipe, subject.schedule()), Spy() as spy:
        runs = [(number, spy.count(layer)) for number, layer in subject.layers()]
        for generation in (1, 2):
            subject.draw()
            expected = [len(keys[number]) * facts.branches * generation for number, _ in runs]
            assert [count for _, (count,) in runs] == expected
        stats = dpcache.stats(subject.pipe)
    assert stats.full_calls == len(facts.keys) * facts.branches * 2
    assert stats.predicted_calls == (STEPS - len(facts.keys)) * facts.branches * 2
    assert stats.computed_steps == facts.keys


def test_5_a_prediction_is_the_weighted_sum_of_the_cached_values(subject: Subject) -> None:
    check_predictions(subject, torch.float32)


def test_5_in_bfloat16(built: Subject) -> None:
    if not built.facts.bfloat16:
        pytest.skip("the pipeline does not run in bfloat16 here")
    pipe, arguments = built.facts.build()
    pipe.to(torch.bfloat16)
    arguments = {name: cast(value, torch.bfloat16) for name, value in arguments.items()}
    check_predictions(Subject(built.facts, built.boundary, pipe, arguments), torch.bfloat16)


def check_predictions(subject: Subject, dtype: torch.dtype) -> None:
    facts, schedule = subject.facts, subject.schedule()
    with dpcache.enabled(subject.pipe, schedule):
        streams = boundary_values(subject)
    for calls in streams:
        assert len(calls) == STEPS * facts.branches
        for branch in range(facts.branches):
            values = calls[branch :: facts.branches]
            for step, terms in schedule.predictions.items():
                weighted = [values[term.key_step].double() * term.coefficient for term in terms]
                exact, scale = sum(weighted), sum(w.abs() for w in weighted)
                # One rounding to the dtype, and the float32 arithmetic before it.
                bound = torch.finfo(dtype).eps * exact.abs() / 2 + 4 * torch.finfo(torch.float32).eps * scale
                assert bool(((values[step].double() - exact).abs() <= bound).all())
                assert not torch.equal(values[step], values[terms[-1].key_step])


def check_invariants(subject: Subject, dtype: torch.dtype = torch.float32) -> None:
    """Invariants 1 to 5 on a pipeline that was made ready by the caller."""
    before = subject.traces()
    test_1_all_key_steps_give_the_same_bits(subject)
    test_2_recording_changes_nothing(subject)
    test_3_disable_leaves_no_trace(subject)
    test_4_blocks_run_once_per_key_step_and_branch(subject)
    check_predictions(subject, dtype)
    assert subject.traces() == before


def boundary_values(subject: Subject) -> list[list[torch.Tensor]]:
    """Of one generation, for every stream at the boundary: its value at every call."""
    heads = subject.facts.heads if subject.boundary == "blocks" else ()
    streams: list[list[torch.Tensor]] = [[] for _ in heads]
    returned: list[list[torch.Tensor]] = []
    with Spy() as spy:
        for denoiser in subject.denoisers:
            spy.outputs(denoiser, returned)
            for head, seen in zip(heads, streams, strict=True):
                spy.inputs(denoiser.get_submodule(head), seen)
        subject.draw()
    return streams or [list(stream) for stream in zip(*returned, strict=True)]


def test_every_transformer_block_is_in_the_table(subject: Subject) -> None:
    """No block of the denoiser's runs at a skipped step: all of them are among those described."""
    if subject.boundary != "blocks":
        pytest.skip("nothing of the denoiser runs there")
    for denoiser in subject.denoisers:
        described = {inside for block in find_blocks(denoiser) for inside in block.module.modules()}
        named_blocks = {module for module in denoiser.modules() if type(module).__name__.endswith("Block")}
        blocks = {block for block in named_blocks if any("att" in name for name, _ in block.named_modules())}
        assert blocks <= described
