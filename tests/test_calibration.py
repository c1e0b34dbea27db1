"""Calibrating, planning and comparing on the trained tiny-flux."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import dpcache
from dpcache.judge.metrics import psnr
from dpcache.measure.recording import record
from dpcache.measure.trials import Trial
from dpcache.zoo import BUNDLED
from tests.conftest import PROMPT, QUICK, STEPS

PROMPTS = [PROMPT, "a large blue star on a grey background, right"]


def test_cost_is_the_mean_over_inputs_and_branches(flux):
    guided = {**QUICK, "negative_prompt": "", "true_cfg_scale": 2.0}
    calibration = dpcache.calibrate(flux, PROMPTS, seed=3, progress=False, **guided)
    costs = []
    for seed, prompt in enumerate(PROMPTS, start=3):
        run = record(flux, {"prompt": prompt, "generator": torch.Generator().manual_seed(seed), **guided})
        branches = run.complete_branches()
        assert len(branches) == 2
        costs += [dpcache.paper_cost(values) for values in branches]
    np.testing.assert_allclose(calibration.cost(dpcache.Recipe(method="paper")), np.mean(costs, axis=0), rtol=1e-12)
    sigmas = flux.scheduler.sigmas.double()
    np.testing.assert_allclose(calibration.weights(), sigmas[1:] - sigmas[:-1], rtol=1e-3)
    facts = calibration.facts
    assert (facts.num_inputs, facts.num_branches, facts.num_inference_steps) == (2, 2, STEPS)
    assert facts.timesteps == tuple(flux.scheduler.timesteps.tolist())
    again = dpcache.calibrate(flux, PROMPTS, seed=3, progress=False, **guided)
    for recipe in (dpcache.Recipe(), dpcache.Recipe(method="paper")):
        np.testing.assert_array_equal(again.cost(recipe), calibration.cost(recipe))


def test_inputs_may_be_dicts_that_bring_their_own_generator(flux):
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    by_dict = dpcache.calibrate(flux, [{"prompt": PROMPT, "generator": generator}], progress=False, **QUICK)
    by_seed = dpcache.calibrate(flux, [PROMPT], seed=7, progress=False, **QUICK)
    np.testing.assert_array_equal(by_dict.cost(), by_seed.cost())
    assert torch.equal(generator.get_state(), state)


def test_planned_key_steps_beat_even_ones_on_held_out_prompts(flux):
    bundled = BUNDLED["tiny-flux"]
    arguments = {"num_inference_steps": 50, "max_sequence_length": 24}
    calibration = dpcache.calibrate(flux, bundled.calibration_inputs(5), progress=False, **arguments)
    prompts = bundled.held_out_inputs(32)

    def draw_all() -> np.ndarray:
        generators = [torch.Generator().manual_seed(1000 + n) for n in range(len(prompts))]
        return flux(prompts, generator=generators, output_type="np", **arguments)[0]

    full = draw_all()
    for budget in (13, 9):
        means = {}
        for schedule in (calibration.plan(budget), dpcache.Schedule.uniform(budget, 50)):
            with dpcache.enabled(flux, schedule):
                means[schedule.source] = np.mean([psnr(a, b) for a, b in zip(full, draw_all(), strict=True)])
        planned, uniform = means.values()
        assert planned > uniform, means


@pytest.mark.parametrize(
    ("inputs", "message"),
    [([], "no inputs"), (PROMPT, "wrap it in"), ({"prompt": PROMPT}, "wrap it in"), ([3], "input 0 is a int")],
)
def test_bad_inputs(flux, inputs, message):
    for call in (
        lambda: dpcache.calibrate(flux, inputs, progress=False, **QUICK),
        lambda: dpcache.compare(flux, dpcache.Schedule.uniform(4, STEPS), inputs, progress=False, **QUICK),
    ):
        with pytest.raises(dpcache.CalibrationError, match=message):
            call()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_input_and_step(flux, poison):
    calls = iter(range(1000))

    def spoil(module, args, output):
        return output * poison if next(calls) == STEPS + 3 else output

    handle = flux.transformer.single_transformer_blocks[-1].proj_out.register_forward_hook(spoil)
    try:
        with pytest.raises(dpcache.CalibrationError, match=r"input 1: .*step 3 is NaN or infinite"):
            dpcache.calibrate(flux, PROMPTS, progress=False, **QUICK)
    finally:
        handle.remove()


def test_unknown_boundary_blocks_are_refused_before_anything_runs(flux, monkeypatch):
    from dpcache.run import denoisers

    monkeypatch.setattr(denoisers, "BLOCK_STACKS", {})
    with pytest.raises(dpcache.UnsupportedPipelineError, match='Use boundary="output"'):
        dpcache.calibrate(flux, [PROMPT], progress=False, **QUICK)
    calibration = dpcache.calibrate(flux, [PROMPT], boundary="output", progress=False, **QUICK)
    assert calibration.plan(4).boundary == "output"


def test_plan_rejects_impossible_budgets(flux):
    calibration = dpcache.calibrate(flux, [PROMPT], progress=False, **QUICK)
    with pytest.raises(dpcache.InfeasibleBudgetError, match="smallest feasible number is 3"):
        calibration.plan(2, recipe=dpcache.Recipe(max_gap=4))
    for budget in (0, STEPS + 1):
        with pytest.raises(ValueError, match=f"from 1 to the number of steps \\({STEPS}\\)"):
            calibration.plan(budget)
    assert calibration.plan(STEPS).key_steps == tuple(range(STEPS))


def test_plan_for_a_speedup(flux):
    calibration = dpcache.calibrate(flux, [PROMPT], progress=False, **QUICK)
    for budget in range(1, STEPS + 1):
        assert calibration.plan(speedup=STEPS / budget).num_key_steps == budget
    assert calibration.plan(speedup=2.5) == calibration.plan(4)  # with 5 the speedup is 2.4
    for arguments in ({}, {"num_key_steps": 4, "speedup": 3.0}):
        with pytest.raises(ValueError, match="one of num_key_steps, speedup and max_error"):
            calibration.plan(**arguments)
    with pytest.raises(ValueError, match="from 1 to the number of steps"):
        calibration.plan(speedup=0.5)


def test_it_says_how_long_it_takes(flux, tmp_path, capsys):
    def said(*prompts: str) -> list[tuple[str, str]]:
        dpcache.calibrate(flux, prompts, checkpoint=tmp_path, **QUICK)
        return re.findall(r"a full run takes [\d.]+ s, the (\w+) about (\d+) s", capsys.readouterr().err)

    ((noun, _),) = said(PROMPT)
    assert noun == "whole"
    ((noun, _),) = said(PROMPT, PROMPTS[1])
    assert noun == "rest", "one input was measured already"
    assert said(PROMPT, PROMPTS[1]) == []


def test_compare_counts_and_measures(flux):
    schedule = dpcache.Schedule.uniform(4, STEPS)
    arguments = {key: value for key, value in QUICK.items() if key != "num_inference_steps"}
    own = {"largest": lambda output, reference: float(np.abs(output - reference).max())}
    found = dpcache.compare(flux, schedule, PROMPTS, seeds=[5, 6], metrics=own, progress=False, **arguments)
    blocks = len(flux.transformer.transformer_blocks) + len(flux.transformer.single_transformer_blocks)
    assert found.full_block_runs == 2 * STEPS * blocks
    assert found.cached_block_runs == 2 * 4 * blocks
    assert [(s.label, s.seed) for s in found.samples] == list(zip(PROMPTS, (5, 6), strict=True))
    expected = flux(PROMPTS[1], generator=torch.Generator().manual_seed(6), **QUICK)[0][0]
    np.testing.assert_array_equal(found.samples[1].full, expected)
    assert found.samples[1].psnr == psnr(expected, found.samples[1].cached)
    assert found.psnr_worst == min(s.psnr for s in found.samples) <= found.psnr_mean
    assert found.psnr_p5 is None, "of two pictures"
    many = replace(found, samples=found.samples * 10)
    assert found.psnr_worst <= many.psnr_p5 <= found.psnr_mean
    largest = [float(np.abs(s.cached - s.full).max()) for s in found.samples]
    assert [s.metrics["largest"] for s in found.samples] == largest
    assert found.metric_means == {"largest": pytest.approx(np.mean(largest))}
    assert len(found.full_seconds) == len(found.cached_seconds) == 2
    assert found.speedup > 1
    identical = dpcache.compare(flux, dpcache.Schedule.uniform(STEPS, STEPS), PROMPTS[:1], progress=False, **arguments)
    assert identical.psnr_mean == np.inf and identical.flip_mean in (0, None)
    with pytest.raises(ValueError, match="2 inputs but 1 seeds"):
        dpcache.compare(flux, schedule, PROMPTS, seeds=[1], progress=False, **arguments)


def test_readme_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert names["image"].size == (64, 64)
    assert names["schedule"].num_key_steps == 13


def test_merged_from_single_inputs(flux):
    """Inputs may be measured apart, on several machines for instance: the whole is the same, bit for bit."""
    whole = dpcache.calibrate(flux, PROMPTS, seed=3, progress=False, **QUICK)
    parts = [dpcache.calibrate(flux, [text], seed=3 + n, progress=False, **QUICK) for n, text in enumerate(PROMPTS)]
    merged = dpcache.Calibration.merged(parts)
    assert merged.facts == whole.facts
    for name in ("paper_cost", "gram", "value_gram", "influence"):
        np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))
    other = dpcache.calibrate(flux, PROMPTS[:1], boundary="output", progress=False, **QUICK)
    with pytest.raises(dpcache.CalibrationError, match="calibration 1 was made with another"):
        dpcache.Calibration.merged([parts[0], other])
    with pytest.raises(dpcache.CalibrationError, match="no calibrations"):
        dpcache.Calibration.merged([])


def test_as_few_key_steps_as_an_error_allows(flux):
    calibration = dpcache.calibrate(flux, PROMPTS, sensitivity="measured", progress=False, **QUICK)
    expected = {k: calibration.plan(k).expected_error for k in range(1, STEPS)}
    assert all(b < a for a, b in pairwise(expected.values()))
    for k in (3, 5, 8):
        assert calibration.plan(max_error=expected[k] * 1.001).num_key_steps == k
    assert calibration.plan(max_error=1e-20).num_key_steps == STEPS
    with pytest.raises(ValueError, match="above 0"):
        calibration.plan(max_error=0.0)
    # What is expected of plans that were not tried, against what they do to inputs that were not seen.
    for k in (4, 7):
        trial = Trial(flux, {"prompt": "a small green diamond on a white background, left", **QUICK})
        trial.arguments |= {"output_type": "latent", "generator": torch.Generator().manual_seed(77)}
        trial.run_in_full()
        assert expected[k] / 4 < trial.error(calibration.plan(k)) < expected[k] * 4
