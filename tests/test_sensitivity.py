"""How much an error at a step matters, measured by repeating runs, on trained and on analytic pipelines."""

from typing import Any

import numpy as np
import pytest
import torch

import dpcache
from dpcache.measure import sensitivity
from dpcache.measure.interpolation import interpolated
from dpcache.measure.recording import record
from tests.conftest import PROMPT, QUICK, STEPS, draw, traces
from tests.pipelines.every import SMALL


def arguments(**more: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "generator": torch.Generator().manual_seed(0), **QUICK, **more}


def test_it_is_what_a_wrong_output_does_to_the_sample(flux):
    """Against runs in which the denoiser's output is spoilt by hand at one step."""
    before = traces(flux)
    measured = sensitivity.measure(flux, lambda: arguments(output_type="latent"))
    assert traces(flux) == before
    assert sorted(measured) == sensitivity.probe_steps(STEPS)
    truth = draw(flux, output_type="latent")
    run = record(flux, arguments(output_type="latent"), boundary="output")
    (outputs,) = run.complete_branches()
    for step in (1, 5, STEPS - 1):
        early, late = max(0, step - 6), max(0, step - 3)
        slope = (outputs[late] - outputs[early]) / max(1, late - early)
        wrong = outputs[late] + slope * (step - late)
        calls = iter(range(STEPS))

        def spoil(_: Any, __: Any, output: Any, step: int = step, wrong: Any = wrong, calls: Any = calls) -> Any:
            return (wrong.reshape(output[0].shape),) if next(calls) == step else None

        handle = flux.transformer.register_forward_hook(spoil)
        spoilt = draw(flux, output_type="latent")
        handle.remove()
        expected = (spoilt - truth).norm() / (wrong.flatten() - outputs[step].flatten()).norm()
        assert measured[step] == pytest.approx(float(expected), rel=1e-3)


def test_at_the_last_step_only_the_sampler_matters(flux):
    calibration = dpcache.calibrate(flux, [PROMPT], sensitivity="measured", progress=False, **QUICK)
    influence, measured = calibration.weights(0), calibration.weights(1)
    assert measured[-1] == pytest.approx(influence[-1], rel=1e-3)
    np.testing.assert_allclose(calibration.weights() ** 2, influence * measured)
    recipe = dpcache.Recipe(measured=1)
    schedule = calibration.plan(5, recipe=recipe)
    assert schedule.cost == pytest.approx(dpcache.plan(calibration.cost(recipe), 5, first_key_steps=1).cost)


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "WanPipeline (2.2, two transformers)", "DiTPipeline"])
def test_with_several_branches_and_denoisers(name):
    """Guidance mixes the branches before the scheduler sees them: the error is measured there."""
    pipe, given = SMALL[name].build()
    call = {"output_type": "latent", **given, "num_inference_steps": 8, "return_dict": False}
    found = sensitivity.measure(pipe, lambda: {**call, "generator": torch.Generator().manual_seed(0)})
    # Where Wan 2.2 changes its transformer, at step 4, nothing of the new one is known to predict from.
    assert set(sensitivity.probe_steps(8)) - set(found) == ({4} if "2.2" in name else set())
    assert all(np.isfinite(value) and value > 0 for value in found.values())


def test_full_steps_are_as_many_as_announced(flux):
    steps = []
    sensitivity.measure(flux, lambda: arguments(output_type="latent"), lambda: steps.append(1))
    assert len(steps) == sensitivity.probing_calls(STEPS)


def test_between_the_probes_the_ratio_is_smooth():
    influence = -np.linspace(0.2, 0.1, 11)
    calls = [{1: 0.9, 9: 0.11}, {1: 0.4, 9: 0.11, 10: 0.1}]
    ratio = interpolated(np.stack([sensitivity.ratios(call, influence) for call in calls]))
    assert ratio[1] * -influence[1] == pytest.approx(np.sqrt(0.9 * 0.4))
    assert ratio[10] == pytest.approx(1.0)
    assert ratio[0] == pytest.approx(ratio[1])
    np.testing.assert_allclose(np.diff(np.log(ratio[1:10])), np.log(ratio[9] / ratio[1]) / 8)
