"""Makes the schedules that ship with the package: plans, exactly, from the cost tensor published for FLUX.1-dev.

    python -m benchmarks.builtin

writes src/dpcache/builtin_schedules/flux1-dev.json. The same costs, constraints and model give the same file.
"""

from pathlib import Path

import diffusers
import numpy as np
import torch

from dpcache import plan_all
from dpcache.files.whole import write_whole
from dpcache.plan.builtin import FOLDER, Builtin, BuiltinPlan
from dpcache.plan.schedule import ModelIdentity
from dpcache.run.denoisers import identify

COST = Path(__file__).parents[1] / "tests" / "reference" / "flux1_dev_t50_cost.npz"
KEY_STEPS = range(7, 26)
#: As published with the tensor: so many first steps are key steps, and no jump is longer.
FIRST_KEY_STEPS, MAX_GAP, ORDER = 3, 15, 2
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
SOURCE = (
    f"planned exactly from the cost tensor published for FLUX.1-dev with DPCache (CVPR 2026, arXiv 2602.22654): 50 "
    f"steps, Taylor order {ORDER}, boundary blocks, the first {FIRST_KEY_STEPS} steps computed, no jump above "
    f"{MAX_GAP} steps"
)


def flux1_dev() -> ModelIdentity:
    """The denoiser of FLUX.1-dev, built without its weights."""
    with torch.device("meta"):
        return identify([diffusers.FluxTransformer2DModel(**FLUX1_DEV)])


def builtin(model: ModelIdentity) -> Builtin:
    """The schedules for FLUX.1-dev; for a model of its structure and another width, with another identity."""
    cost = np.load(COST)["cost"]
    plans = plan_all(cost, first_key_steps=FIRST_KEY_STEPS, max_gap=MAX_GAP, max_key_steps=max(KEY_STEPS))
    return Builtin(
        name="flux1-dev",
        models=("black-forest-labs/FLUX.1-dev",),
        model=model,
        num_inference_steps=cost.shape[1] - 1,
        boundary="blocks",
        order=ORDER,
        source=SOURCE,
        plans={k: BuiltinPlan(key_steps=plans[k].key_steps, cost=round(plans[k].cost, 9)) for k in KEY_STEPS},
    )


def written(one: Builtin, folder: Path = FOLDER) -> Path:
    """Writes the file; each plan on a line of its own."""
    text = one.model_dump_json(indent=1, exclude={"plans"}).removesuffix("\n}")
    plans = ",\n".join(f'  "{k}": {plan.model_dump_json()}' for k, plan in one.plans.items())
    whole = f'{text},\n "plans": {{\n{plans}\n }}\n}}\n'
    return write_whole(folder / f"{one.name}.json", lambda part: part.write_text(whole, encoding="utf-8"))


if __name__ == "__main__":
    print(f"wrote {written(builtin(flux1_dev()))}")
