"""The memory that docs/gains.md states, by what small models of the same classes really take; and the page itself."""

import pytest
from benchmarks import gains

import dpcache
from dpcache.measure.recording import record
from tests.pipelines.every import SMALL
from tests.pipelines.small import STEPS

#: Small pipeline -> what becomes one latent, batch of all calls of a step, tokens of text and of sound.
SIZES: dict[str, tuple[tuple[int, int], int, int, int]] = {
    "FluxPipeline": ((16, 1), 2, 0, 0),
    "Flux2Pipeline": ((16, 1), 1, 5, 0),
    "QwenImagePipeline": ((8, 1), 2, 0, 0),
    "WanPipeline (2.1)": ((8, 4), 2, 0, 0),
    "HunyuanVideoPipeline": ((8, 4), 2, 0, 0),
    "HunyuanVideo15Pipeline": ((16, 4), 2, 0, 0),
    "LTX2Pipeline": ((8, 2), 4, 0, 5),
    "StableDiffusion3Pipeline": ((8, 1), 2, 0, 0),
    "StableDiffusionXLPipeline": ((8, 1), 2, 0, 0),
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.filterwarnings("ignore")
def test_held_and_recorded_is_what_the_page_computes(name: str) -> None:
    pipe, call = SMALL[name].build()
    call = {**call, "num_inference_steps": STEPS, "output_type": "latent"}
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    packed, batch, text, audio = SIZES[name]
    size = call.get("height", 32), call.get("width", 32), call.get("num_frames", 1)
    found = gains.value(dict(denoiser.config), size, packed, batch, text, audio)
    bytes_each = next(denoiser.parameters()).element_size()
    assert sorted(found) == sorted(SMALL[name].boundaries)
    for boundary, count in found.items():
        schedule = dpcache.Schedule.from_key_steps((0, 1, 2, 5), STEPS, order=2, boundary=boundary)
        with dpcache.enabled(pipe, schedule):
            pipe(**call)
            held = dpcache.stats(pipe).peak_cached_bytes
        assert held == gains.HELD * count * bytes_each, boundary
        run = record(pipe, call, boundary=boundary)
        values = sum(value.nbytes for steps in run.values.values() for value in steps.values())
        assert values == STEPS * count * bytes_each, boundary
        received = sum(given.nbytes for given in run.received.values())
        assert received <= STEPS * found["output"] // batch * gains.RECEIVED_BYTES, boundary
    with dpcache.enabled(pipe, num_key_steps=4):
        pipe(**call)
        held = dpcache.stats(pipe).peak_cached_bytes
    assert held == gains.HELD_UNCALIBRATED * found["output"] * bytes_each


def test_the_page_is_up_to_date() -> None:
    assert gains.PAGE.read_text(encoding="utf-8") == gains.render(), "run `python -m benchmarks.gains`"
    readme = gains.README.read_text(encoding="utf-8")
    assert "\n".join(gains.rows()) in readme, "run `python -m benchmarks.gains`"
