"""Classes of one's own at the boundary "blocks", descriptions that do not fit, and values of several tensors."""

import copy
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

import dpcache
from dpcache.run import layouts
from dpcache.run.hooks import listen
from dpcache.run.packing import pack, take_apart, unpack

STEPS = 6


class Double(nn.Module):
    """Takes two streams, returns the other one first."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, image: torch.Tensor, context: torch.Tensor, time: torch.Tensor) -> Any:
        return context + self.two(image).mean(1, keepdim=True), image + torch.tanh(self.one(image)) * time


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(4, 4)

    def forward(self, tokens: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        return tokens + torch.tanh(self.one(tokens)) * time


class Unheard(nn.Module):
    """Two stacks, streams with names of their own, no cache contexts, no configuration: no model of diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.ModuleList([Double(), Double()])
        self.lone = nn.ModuleList([Single(), Single()])
        self.head = nn.Linear(4, 4)

    def forward(self, image: torch.Tensor, context: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        for block in self.joint:
            context, image = block(image, context=context, time=time)
        tokens = torch.cat([context, image], dim=1)
        for block in self.lone:
            tokens = block(tokens, time)
        return self.head(tokens[:, context.shape[1] :])


class UnheardPipeline(DiffusionPipeline):
    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int, generator: torch.Generator) -> torch.Tensor:
        image = torch.randn(1, 3, 4, generator=generator)
        context = torch.ones(1, 2, 4)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.progress_bar(self.scheduler.timesteps):
            image = self.scheduler.step(self.transformer(image, context, t / 1000), t, image).prev_sample
        return image


@pytest.fixture
def pipe() -> Any:
    torch.manual_seed(0)
    pipe = UnheardPipeline(Unheard(), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def table_as_it_was() -> Iterator[None]:
    before = dict(layouts.BLOCK_STACKS)
    yield
    layouts.BLOCK_STACKS.clear()
    layouts.BLOCK_STACKS.update(before)


def draw(pipe: Any) -> torch.Tensor:
    return pipe(STEPS, torch.Generator().manual_seed(0))


def schedule(boundary: str, keys: tuple[int, ...] = (0, 1, 4)) -> dpcache.Schedule:
    return dpcache.Schedule.from_key_steps(keys, STEPS, order=1, boundary=boundary)


STACKS = {"joint": ("context", "image"), "lone": "tokens"}


def test_an_unknown_class_is_refused_with_both_remedies(pipe: Any) -> None:
    with pytest.raises(dpcache.UnsupportedPipelineError, match=r'Unheard.*boundary="output".*register_denoiser'):
        dpcache.enable(pipe, schedule("blocks"))
    plain = draw(pipe)
    with dpcache.enabled(pipe, schedule("output")):
        assert not torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_registered_class_is_cached_at_its_blocks(pipe: Any, by_name: bool) -> None:
    dpcache.register_denoiser("Unheard" if by_name else Unheard, STACKS, head="tokens")
    plain = draw(pipe)
    with dpcache.enabled(pipe, schedule("blocks", tuple(range(STEPS)))):
        assert torch.equal(draw(pipe), plain)
    runs = [0]
    handle = pipe.transformer.lone[0].one.register_forward_pre_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
    with dpcache.enabled(pipe, schedule("blocks")):
        cached = draw(pipe)
    handle.remove()
    assert runs == [3]
    assert not torch.equal(cached, plain)
    # A subclass that inherits the forward runs the same blocks, as quantized and sharded models do.
    pipe.transformer.__class__ = type("Sharded", (Unheard,), {})
    with dpcache.enabled(pipe, schedule("blocks")):
        assert torch.equal(draw(pipe), cached)
    # One with a forward of its own may run others: it is not taken for the class it comes from.
    own = {"forward": lambda self, *args, **kwargs: Unheard.forward(self, *args, **kwargs)}
    pipe.transformer.__class__ = type("Heir", (Unheard,), own)
    with pytest.raises(dpcache.UnsupportedPipelineError, match="Heir"):
        dpcache.enable(pipe, schedule("blocks"))


@pytest.mark.parametrize(
    "stacks, head, fault",
    [
        ({"joint": ("context", "image"), "triple": "tokens"}, "tokens", "has no `triple`"),
        ({"joint": ("hidden", "image"), "lone": "tokens"}, "tokens", "take image, context, time, not hidden, image"),
        ({"joint": ("context", "image"), "double": "tokens"}, "tokens", "`double` is no list of blocks"),
        ({"lone": "tokens", "empty": ("tokens", "image")}, "image", "last block does not return image"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(pipe: Any, stacks: Any, head: str, fault: str) -> None:
    pipe.transformer.empty = None
    dpcache.register_denoiser(Unheard, stacks, head=head)
    with pytest.raises(dpcache.UnsupportedPipelineError, match=rf"{fault}.*register_denoiser"):
        dpcache.enable(pipe, schedule("blocks"))


@pytest.mark.parametrize("stacks, head", [({}, "tokens"), (STACKS, "image"), (STACKS, ())])
def test_a_head_that_no_block_feeds_is_refused(stacks: Any, head: Any) -> None:
    with pytest.raises(ValueError, match="name the streams in `head`"):
        dpcache.register_denoiser(Unheard, stacks, head=head)


def test_a_copied_scheduler_steps_by_itself(pipe: Any) -> None:
    heard = []
    plain = inspect.signature(pipe.scheduler.step)
    leave = listen(pipe.scheduler, "step", lambda _, result, *__: heard.append(result) or result)
    assert inspect.signature(pipe.scheduler.step) == plain
    twin = copy.deepcopy(pipe.scheduler)
    for scheduler in (pipe.scheduler, twin):
        scheduler.set_timesteps(STEPS)
    sample = torch.ones(2)
    stepped = twin.step(sample, twin.timesteps[0], sample).prev_sample
    assert twin.step_index == 1
    assert pipe.scheduler.step_index is None
    assert heard == []
    assert torch.equal(pipe.scheduler.step(sample, twin.timesteps[0], sample).prev_sample, stepped)
    assert len(heard) == 1
    leave()
    assert "step" not in vars(pipe.scheduler)


class Pair(NamedTuple):
    left: Any
    right: Any


def test_outputs_are_taken_apart_and_put_together_alike() -> None:
    a, b, c = torch.ones(2, 3), torch.zeros(4), torch.full((1, 1, 2), 5.0)
    output = (Transformer2DModelOutput(sample=[a, b]), None, Pair(left=c, right="kept"))
    found, build = take_apart(output)
    assert [t.shape for t in found] == [a.shape, b.shape, c.shape]
    value = pack(found)
    assert value.shape == (12,)
    other = build(iter(unpack(2 * value, [t.shape for t in found])))
    assert type(other) is tuple
    assert type(other[0]) is Transformer2DModelOutput
    assert torch.equal(other[0].sample[0], 2 * a)
    assert torch.equal(other[0].sample[1], 2 * b)
    assert other[1] is None
    assert type(other[2]) is Pair
    assert torch.equal(other[2].left, 2 * c)
    assert other[2].right == "kept"


def test_a_lone_tensor_is_not_copied() -> None:
    value = torch.ones(2, 3)
    assert pack([value]) is value
    assert unpack(value, [value.shape]) == [value]


@pytest.mark.parametrize("other", [torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.long)])
def test_tensors_of_different_kinds_are_refused(other: torch.Tensor) -> None:
    with pytest.raises(dpcache.UnsupportedPipelineError, match="Try the other boundary"):
        pack([torch.ones(2), other])
