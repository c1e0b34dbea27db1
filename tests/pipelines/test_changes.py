"""What changes in the middle of a sampling loop: the denoiser, the guidance, the number of calls, the shapes."""

from typing import Any

import diffusers
import pytest
import torch

import dpcache
from dpcache.measure.recording import record
from tests.pipelines.every import SMALL, small_video
from tests.pipelines.small import STEPS, assemble


def draw(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor:
    call = {"output_type": "latent", "return_dict": False, **arguments}
    return pipe(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), **call)[0]


def schedule(keys: tuple[int, ...], boundary: str = "blocks", order: int = 1) -> dpcache.Schedule:
    return dpcache.Schedule.from_key_steps(keys, STEPS, order=order, boundary=boundary)


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_values_of_one_transformer_predict_nothing_of_the_other(boundary: str) -> None:
    """Wan 2.2 calls `transformer` in steps 0 to 3 and `transformer_2` from then on."""
    pipe, arguments = SMALL["WanPipeline (2.2, two transformers)"].build()
    runs = {"transformer": 0, "transformer_2": 0}
    for name in runs:

        def count(*_: Any, name: str = name) -> None:
            runs[name] += 1

        getattr(pipe, name).blocks[0].norm1.register_forward_pre_hook(count)
    with dpcache.enabled(pipe, schedule((0, 1, 5, 6), boundary)):
        draw(pipe, arguments)
        stats = dpcache.stats(pipe)
    # Step 4 is predicted from steps 0 and 1 in the schedule: those were of the other transformer.
    assert stats.computed_steps == (0, 1, 4, 5, 6)
    assert stats.predicted_steps == (2, 3, 7)
    assert runs == {"transformer": 2 * 2, "transformer_2": 3 * 2}


def test_two_transformers_are_calibrated_as_one_trajectory() -> None:
    pipe, arguments = SMALL["WanPipeline (2.2, two transformers)"].build()
    call = {**arguments, "num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    run = record(pipe, {**call, "generator": torch.Generator().manual_seed(0)})
    assert {branch.denoiser: len(steps) for branch, steps in run.values.items()} == {0: 4, 1: 4}
    calibration = dpcache.calibrate(pipe, [call], num_inference_steps=STEPS, order=1, progress=False)
    planned = calibration.plan(4, recipe=dpcache.Recipe(first_key_steps=2))
    with dpcache.enabled(pipe, planned):
        draw(pipe, arguments)
    pipe.transformer_2.register_to_config(eps=1e-5)
    with pytest.raises(dpcache.ScheduleMismatchError, match="calibrate this model"):
        dpcache.enable(pipe, planned)


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_a_third_call_in_some_steps_is_a_branch_of_its_own(boundary: str) -> None:
    """Skip-layer guidance of Stable Diffusion 3 calls the transformer once more, in the middle of the loop only."""
    pipe, arguments = SMALL["StableDiffusion3Pipeline"].build()
    guidance = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.7}
    plain = draw(pipe, {**arguments, **guidance})
    assert not torch.equal(plain, draw(pipe, arguments))
    with dpcache.enabled(pipe, schedule(tuple(range(STEPS)), boundary)):
        assert torch.equal(draw(pipe, {**arguments, **guidance}), plain)
    with dpcache.enabled(pipe, schedule((0, 2, 3, 6), boundary)):
        draw(pipe, {**arguments, **guidance})
        stats = dpcache.stats(pipe)
    assert stats.full_calls == 4 + 2  # the third call at its key steps 2 and 3
    assert stats.predicted_calls == 4 + 2  # and predicted at 4 and 5


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_values_of_another_shape_are_not_used(boundary: str) -> None:
    """Z-Image leaves guidance, and with it half of the list that it calls the transformer with, in the late steps."""
    pipe, arguments = SMALL["ZImagePipeline"].build()
    truncated = {**arguments, "cfg_truncation": 0.5}
    plain = draw(pipe, truncated)
    with dpcache.enabled(pipe, schedule(tuple(range(STEPS)), boundary)):
        assert torch.equal(draw(pipe, truncated), plain)
    with dpcache.enabled(pipe, schedule((0, 1), boundary)):
        draw(pipe, truncated)
        stats = dpcache.stats(pipe)
    assert stats.computed_steps == (0, 1, 5, 6)
    assert stats.predicted_steps == (2, 3, 4, 7)


def test_another_dtype_of_the_timestep_is_of_no_account() -> None:
    """HunyuanVideo in bfloat16 hands its timestep over in float32 at step 0 and in bfloat16 from then on."""
    pipe, arguments = SMALL["HunyuanVideoPipeline"].build()
    pipe.to(torch.bfloat16)
    dtypes = []
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda **inputs: dtypes.append(inputs["timestep"].dtype) or forward(**inputs)
    draw(pipe, arguments)
    del pipe.transformer.forward
    assert dtypes == [torch.float32] * 2 + [torch.bfloat16] * (2 * STEPS - 2)
    with dpcache.enabled(pipe, schedule((0, 3))):
        draw(pipe, arguments)
        assert dpcache.stats(pipe).computed_steps == (0, 3)


def test_frames_that_step_one_by_one_are_refused() -> None:
    """Diffusion forcing of SkyReels V2 steps copies of its scheduler, one for each frame: there is no step of all."""
    transformer = small_video.wan("SkyReelsV2Transformer3DModel")
    pipe = assemble("SkyReelsV2DiffusionForcingPipeline", transformer, small_video.flow_unipc())
    with pytest.raises(dpcache.UnsupportedPipelineError, match="SkyReelsV2Pipeline"):
        dpcache.enable(pipe, schedule((0, 1, 4, 5)))
    with pytest.raises(dpcache.UnsupportedPipelineError, match="steps every frame by itself"):
        dpcache.calibrate(pipe, [{}], num_inference_steps=STEPS, progress=False)


def test_another_cache_on_the_same_denoiser_is_refused() -> None:
    pipe, arguments = SMALL["FluxPipeline"].build()
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(dpcache.UnsupportedPipelineError, match=r"disable_cache\(\)"):
        dpcache.enable(pipe, schedule((0, 1, 4, 5)))
    pipe.transformer.disable_cache()
    with dpcache.enabled(pipe, schedule((0, 1, 4, 5))):
        draw(pipe, arguments)
        assert dpcache.stats(pipe).computed_steps == (0, 1, 4, 5)
