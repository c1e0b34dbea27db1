"""Another cache on the same denoiser, put there before or after: refused or told, never both unnoticed."""

import types
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_first_block_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)

import dpcache
from tests.conftest import draw
from tests.kinds.conftest import KEYS


def enable_first_block(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))


def hook_first_block(pipe: Any) -> None:
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.2))


def hook_taylorseer(pipe: Any) -> None:
    config = TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=3, max_order=1)
    apply_taylorseer_cache(pipe.transformer, config)


def hook_attention(pipe: Any) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 900),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.transformer, config)


def cache_dit(pipe: Any) -> None:
    import cache_dit

    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0))


def forward_on_the_instance(pipe: Any) -> None:
    """As TeaCache and DeepCache do it."""
    inner = pipe.transformer.forward

    def teacache_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    pipe.transformer.forward = types.MethodType(teacache_forward, pipe.transformer)


def forward_on_the_class(pipe: Any) -> None:
    kind = type(pipe.transformer)
    own = kind.forward

    def teacache_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    kind.forward = teacache_forward


KNOWN = [enable_first_block, hook_first_block, hook_taylorseer, hook_attention, cache_dit]
REPLACED = [forward_on_the_instance, forward_on_the_class]


@pytest.fixture
def pipe() -> Any:
    own, call = diffusers.FluxTransformer2DModel.forward, diffusers.FluxPipeline.__call__
    pipe = dpcache.load_pipeline("tiny-flux", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    diffusers.FluxTransformer2DModel.forward = own
    diffusers.FluxPipeline.__call__ = call
    for name in ("_is_cached", "_context_manager", "_context_names"):  # what cache-dit leaves on the class
        if name in vars(diffusers.FluxPipeline):
            delattr(diffusers.FluxPipeline, name)


@pytest.mark.parametrize("put_on", KNOWN)
@pytest.mark.parametrize("call", ["enable", "calibrate", "compare", "following"])
def test_before_it_is_refused_with_the_remedy(pipe: Any, put_on: Callable[[Any], None], call: str) -> None:
    put_on(pipe)
    with pytest.raises(dpcache.UnsupportedPipelineError, match=r"another cache .*(disable_cache|remove_hook)"):
        if call == "enable":
            dpcache.enable(pipe, KEYS)
        elif call == "calibrate":
            dpcache.calibrate(pipe, ["x"], num_inference_steps=4, progress=False)
        elif call == "compare":
            dpcache.compare(pipe, KEYS, ["x"], progress=False)
        else:
            with dpcache.following(pipe.transformer, KEYS):
                pass


@pytest.mark.parametrize("put_on", KNOWN)
def test_after_it_is_left_alone_with_one_warning(pipe: Any, put_on: Callable[[Any], None]) -> None:
    dpcache.enable(pipe, KEYS)
    put_on(pipe)
    with pytest.warns(UserWarning, match="every step in full: another cache is enabled") as told:
        draw(pipe)
        draw(pipe)
    assert len([one for one in told if issubclass(one.category, UserWarning)]) == 1
    assert dpcache.stats(pipe).generations == 0
    dpcache.disable(pipe)


@pytest.mark.parametrize("put_on", REPLACED)
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_replaced_forward_is_told_of_once(pipe: Any, put_on: Callable[[Any], None], first: bool) -> None:
    expected = None
    with dpcache.enabled(pipe, KEYS):
        expected = draw(pipe)
    if first:
        put_on(pipe)
    else:
        dpcache.enable(pipe, KEYS)
        put_on(pipe)
    with pytest.warns(UserWarning, match="teacache_forward runs in place of the forward") as told:
        if first:
            dpcache.enable(pipe, KEYS)
        for _ in range(2):
            assert np.array_equal(draw(pipe), expected)
    assert len(told) == 1
    dpcache.disable(pipe)


def test_what_is_no_cache_is_no_reason_to_warn(pipe: Any) -> None:
    """Offloading, casting, compiling and plain torch hooks wrap the forward as well."""
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with dpcache.enabled(pipe, KEYS):
            draw(pipe)
            pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
            draw(pipe)
    handle.remove()
