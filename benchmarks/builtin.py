"""Makes the schedules that ship with the package for FLUX.1-dev, from what was published of it.

    python -m benchmarks.builtin

writes two files to src/dpcache/plan/builtin_schedules/. flux1-dev.json holds what real runs found best, and curves
between these for other numbers of key steps. flux1-dev-paper-cost.json holds exact plans from the published cost
tensor. The same references and model give the same files.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from dpcache import plan_all
from dpcache.files.whole import write_whole
from dpcache.plan.builtin import FOLDER, Builtin, BuiltinPlan
from dpcache.plan.schedule import ModelIdentity
from dpcache.run.denoisers import identify

REFERENCE = Path(__file__).parents[1] / "tests" / "reference"
MODELS = ("black-forest-labs/FLUX.1-dev",)

KEY_STEPS = range(5, 26)
SEARCHED = (13, 21)
"""Numbers of key steps for which a search on real runs was published, beside the 9 of the golden path."""
#: What was measured of them, and with what: see the file of published runs.
RUN_SOURCE = (
    "FLUX.1-dev, 50 steps at 1024 x 1024, guidance 3.5, mu 1.15, with steps 0, 1, 2 and 49 forced and with reuse, by "
    '"The Golden Path Hypothesis" (arXiv 2609.39343). There the residual of all blocks was reused, here it is their '
    "output, which has not been run on FLUX.1-dev; nor has a predictor that follows a trend"
)
BEST = (
    "run: the best of all {tried:,} schedules with 9 key steps, PSNR {four} dB on the 4 prompts that it was chosen by, "
    "{others} dB on 7,151 other runs"
)
FOUND = "run: found by a search on real runs (BudCache's) for the least error of the final latents; no PSNR known here"
BETWEEN = "between the published ones for {below} and {above} key steps, not run"
BEYOND = "along the curve of the published one for {nearest} key steps, not run"

PAPER_KEY_STEPS = range(7, 26)
#: As published with the tensor: so many first steps are key steps, and no jump is longer.
FIRST_KEY_STEPS, MAX_GAP, ORDER = 3, 15, 2
PAPER_SOURCE = (
    f"planned exactly from the cost tensor published for FLUX.1-dev with DPCache (CVPR 2026, arXiv 2602.22654): 50 "
    f"steps, Taylor order {ORDER}, boundary blocks, the first {FIRST_KEY_STEPS} steps computed, no jump above "
    f"{MAX_GAP} steps"
)
#: The configuration that FLUX.1-dev's transformer is published with; all else is at the class's defaults.
FLUX1_DEV = {
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}


def flux1_dev() -> ModelIdentity:
    """The denoiser of FLUX.1-dev, built without its weights."""
    with torch.device("meta"):
        return identify([diffusers.FluxTransformer2DModel(**FLUX1_DEV)])


def from_runs(model: ModelIdentity) -> Builtin:
    """What real runs found best; for a model of FLUX.1-dev's structure and another width, with another identity."""
    runs: dict[str, Any] = json.loads((REFERENCE / "flux1_dev_t50_real_runs.json").read_text(encoding="utf-8"))
    best, steps = runs["exhaustive"], runs["num_inference_steps"]
    found = {k: runs["by_method"][str(k)]["budcache_search"] for k in SEARCHED}
    published = {len(best["best"]): best["best"], **found}
    sources = dict.fromkeys(SEARCHED, FOUND) | {
        len(best["best"]): BEST.format(
            tried=best["schedules_tried"],
            four=best["best_psnr_mean_of_four"],
            others=best["best_psnr_on_7151_held_out_runs"],
        )
    }
    return Builtin(
        name="flux1-dev",
        models=MODELS,
        model=model,
        num_inference_steps=steps,
        boundary="blocks",
        order=0,
        source=RUN_SOURCE,
        plans={
            k: BuiltinPlan(key_steps=between(published, k, steps), source=sources.get(k) or _how(published, k))
            for k in KEY_STEPS
        },
    )


def between(published: dict[int, Sequence[int]], num_key_steps: int, num_steps: int) -> tuple[int, ...]:
    """Key steps for a number of them that nothing was published for.

    Each published schedule is a curve, t over m / (K - 1), straight between its key steps. What is asked for lies
    between the curves of the nearest numbers of key steps, as K lies between these; below the least and above the most
    it lies on the curve itself. It is rounded, and moved on where two key steps would be one.
    """
    below = max((k for k in published if k <= num_key_steps), default=min(published))
    above = min((k for k in published if k >= num_key_steps), default=max(published))
    at = np.linspace(0, 1, num_key_steps)
    curves = [np.interp(at, np.linspace(0, 1, k), published[k]) for k in (below, above)]
    share = (num_key_steps - below) / (above - below) if above > below else 0.0
    found: list[int] = []
    for place, step in enumerate(np.rint(curves[0] + share * (curves[1] - curves[0])).astype(int).tolist()):
        found.append(min(max(step, found[-1] + 1 if found else 0), num_steps - num_key_steps + place))
    return tuple(found)


def _how(published: dict[int, Sequence[int]], num_key_steps: int) -> str:
    below = [k for k in published if k < num_key_steps]
    above = [k for k in published if k > num_key_steps]
    if below and above:
        return BETWEEN.format(below=max(below), above=min(above))
    return BEYOND.format(nearest=max(below) if below else min(above))


def from_paper_cost(model: ModelIdentity) -> Builtin:
    """Exact plans from the published cost tensor; model as in `from_runs`."""
    cost = np.load(REFERENCE / "flux1_dev_t50_cost.npz")["cost"]
    plans = plan_all(cost, first_key_steps=FIRST_KEY_STEPS, max_gap=MAX_GAP, max_key_steps=max(PAPER_KEY_STEPS))
    return Builtin(
        name="flux1-dev-paper-cost",
        models=MODELS,
        model=model,
        num_inference_steps=cost.shape[1] - 1,
        boundary="blocks",
        order=ORDER,
        source=PAPER_SOURCE,
        plans={k: BuiltinPlan(key_steps=plans[k].key_steps, cost=round(plans[k].cost, 9)) for k in PAPER_KEY_STEPS},
    )


def written(one: Builtin, folder: Path = FOLDER) -> Path:
    """Writes the file; each plan on a line of its own."""
    text = one.model_dump_json(indent=1, exclude={"plans"}).removesuffix("\n}")
    plans = ",\n".join(f'  "{k}": {plan.model_dump_json(exclude_none=True)}' for k, plan in one.plans.items())
    whole = f'{text},\n "plans": {{\n{plans}\n }}\n}}\n'
    return write_whole(folder / f"{one.name}.json", lambda part: part.write_text(whole, encoding="utf-8"))


if __name__ == "__main__":
    for make in (from_runs, from_paper_cost):
        print(f"wrote {written(make(flux1_dev()))}")
