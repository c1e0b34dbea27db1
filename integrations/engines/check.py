"""What the engines' cache-dit makes of a schedule: by the exported mask and by the plug-in, beside dpcache itself.

    python integrations/engines/check.py                          # with the cache-dit that is installed
    python integrations/engines/check.py --versions 1.5.0 1.5.3   # with these, each installed into a folder of its own

Draws held-out prompts of tiny-flux in 50 steps on the CPU, 13 and 9 of them computed, and prints a table: steps that
were computed, PSNR against the full run, largest difference of latents to dpcache's, as a share of the largest latent.
"mask" is what `dpcache export --to cache-dit` says, which SGLang and xDiT hand to cache-dit as it is; "plug-in" is
`dpcache_engines`; "vLLM-Omni" is what its settings can be told without the plug-in.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STEPS, KEY_STEPS, CALIBRATED = 50, (13, 9), 10
FIRST_SEED = 1000
HEAD = ("cache-dit", "key steps", "way", "computed as planned", "PSNR, mean (worst)", "largest difference to dpcache")


def measured(count: int) -> list[list[str]]:
    """The rows of the cache-dit that is imported here."""
    from importlib.metadata import version

    import cache_dit
    import dpcache_engines
    import numpy as np
    import torch

    import dpcache
    from dpcache.integrations import cache_dit as exports
    from dpcache.judge.metrics import psnr
    from dpcache.run.denoisers import find_blocks
    from dpcache.zoo import BUNDLED

    model = BUNDLED["tiny-flux"]
    pipe = dpcache.load_pipeline(model.name, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    prompts = model.held_out_inputs(count)
    steps: list[int] = []
    calls = [0]
    block = find_blocks(pipe.transformer)[-1].layer()
    block.register_forward_hook(lambda *_: steps.append(calls[0]))
    pipe.transformer.proj_out.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def draw(output_type: str) -> Any:
        steps.clear()
        calls[0] = 0
        found = []
        for number, prompt in enumerate(prompts):
            calls[0] = 0
            generator = torch.Generator().manual_seed(FIRST_SEED + number)
            call = {**model.call_defaults, "num_inference_steps": STEPS, "generator": generator}
            found.append(np.asarray(pipe(prompt, **call, output_type=output_type)[0][0]))
        return np.stack(found)

    calibration = dpcache.calibrate(
        pipe,
        model.calibration_inputs(CALIBRATED),
        num_inference_steps=STEPS,
        progress=False,
        **model.call_defaults,
    )
    full, rows = draw("np"), []
    for k in KEY_STEPS:
        schedule = calibration.plan(k)
        with dpcache.enabled(pipe, schedule):
            latents, pictures = draw("latent"), draw("np")
        planned = sorted([*schedule.key_steps] * count)

        def row(way: str, pictures: Any, difference: str, *, k: int = k, planned: list[int] = planned) -> None:
            values = [psnr(a, b) for a, b in zip(full, pictures, strict=True)]
            as_planned = "yes" if sorted(steps) == planned else f"no, {len(steps) // count}"
            shown = f"{np.mean(values):.1f} ({min(values):.1f})"
            rows.append([version("cache-dit"), f"{k} of {STEPS}", way, as_planned, shown, difference])

        row("dpcache itself", pictures, "")
        rows[-1][3] = ""  # what is corrected runs the head twice, so the counting above says nothing of it
        exported = exports.export(schedule)
        omni = cache_dit.load_configs({"cache_config": {**exports.vllm_omni(schedule), "num_inference_steps": STEPS}})
        plain = {"cache_config": cache_dit.DBCacheConfig(num_inference_steps=STEPS)}
        for way, arguments in (("mask", exported.arguments()), ("vLLM-Omni", omni), ("plug-in", plain)):
            with tempfile.TemporaryDirectory() as folder:
                if way == "plug-in":
                    schedule.save(Path(folder) / "s.json")
                    dpcache_engines.register(Path(folder) / "s.json")
                cache_dit.enable_cache(pipe, **arguments)
                try:
                    there, pictures = draw("latent"), draw("np")
                finally:
                    cache_dit.disable_cache(pipe)
                    dpcache_engines.unregister()
            row(way, pictures, f"{np.abs(there - latents).max() / np.abs(latents).max():.1e}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", metavar="VERSION", default=[], help="of cache-dit")
    parser.add_argument("--count", type=int, default=16, help="held-out prompts (default 16)")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(ROOT / "src")]
    if options.rows:
        print(json.dumps(measured(options.count)))
        return
    rows = []
    for version in options.versions or [None]:
        with tempfile.TemporaryDirectory() as folder:
            if version is not None:
                install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
                subprocess.run([*install, f"cache-dit=={version}"], check=True)
            path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
            command = [sys.executable, __file__, "--rows", "--count", str(options.count)]
            done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
            rows += json.loads(done.stdout.decode().splitlines()[-1])
    for line in [HEAD, ["---"] * len(HEAD), *rows]:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
