"""What the engines' cache-dit makes of a schedule: by what is exported and by the plug-in, beside dpcache itself.

    python integrations/engines/check.py                     # cache-dit, or the engine, that is installed here
    python integrations/engines/check.py --install .engines  # all those below, each installed into a folder of its own

Draws held-out prompts of tiny-flux in 50 steps on the CPU, 13 and 9 of them computed, and prints a table: steps that
were computed, PSNR against the full run, largest difference of latents to dpcache's, as a share of the largest latent.
"export" is what `dpcache export` says, given to the engine as it takes it; "plug-in" is `dpcache_engines`. What of each
engine runs is in on_cpu.py.
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
HEAD = ("engine", "key steps", "way", "computed as planned", "PSNR, mean (worst)", "largest difference to dpcache")
ITSELF = "dpcache itself"

#: Folder -> what is installed there, without dependencies: an engine with the cache-dit it asks for, and what the
#: modules named in on_cpu.py import besides.
ENGINES = {
    "cache-dit-1.5.0": "cache-dit==1.5.0",
    "cache-dit-1.5.3": "cache-dit==1.5.3",
    "sglang": "sglang==0.5.23 cache-dit==1.5.1 IPython addict aiohappyeyeballs aiohttp aiosignal compressed-tensors "
    "dill einops frozenlist gguf loguru msgspec multidict openai partial-json-parser propcache pybase64 pyzmq "
    "sentencepiece sniffio traitlets yarl",
    "vllm-omni": "vllm-omni==0.30.0 cache-dit==1.5.0 aenum",
    "xdit": "xfuser==0.7.0 cache-dit==1.5.3 distvae einops",
}


def measured(count: int) -> list[list[str]]:
    """The rows of the engine that is installed here."""
    import dpcache_engines
    import numpy as np
    import torch
    from on_cpu import installed

    import dpcache
    from dpcache.integrations import cache_dit as exports
    from dpcache.judge.metrics import psnr
    from dpcache.run.denoisers import find_blocks
    from dpcache.zoo import BUNDLED

    engine = installed()
    model = BUNDLED["tiny-flux"]
    pipe = dpcache.load_pipeline(model.name, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    prompts = model.held_out_inputs(count)
    steps: list[int] = []
    calls = [0]
    block = find_blocks(pipe.transformer)[-1].layer()
    block.register_forward_hook(lambda *_: steps.append(calls[0]))
    pipe.transformer.proj_out.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def draw(output_type: str, begin: Any = lambda: None) -> Any:
        steps.clear()
        found = []
        for number, prompt in enumerate(prompts):
            begin()
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

    def row(engine: str, k: int, way: str, as_planned: str, pictures: Any, difference: str) -> None:
        values = [psnr(a, b) for a, b in zip(full, pictures, strict=True)]
        shown = f"{np.mean(values):.1f} ({min(values):.1f})"
        rows.append([engine, f"{k} of {STEPS}", way, as_planned, shown, difference])

    for k in KEY_STEPS:
        schedule = calibration.plan(k)
        with dpcache.enabled(pipe, schedule):
            latents = draw("latent")
            row("", k, ITSELF, "", draw("np"), "")
        planned = sorted([*schedule.key_steps] * count)
        for way in ("export", "plug-in"):
            settings = exports.as_json(schedule, engine.target) if way == "export" else None
            with tempfile.TemporaryDirectory() as folder:
                if settings is None:
                    schedule.save(Path(folder) / "s.json")
                    dpcache_engines.register(Path(folder) / "s.json")

                def begin(settings: Any = settings) -> None:
                    engine.request(pipe, STEPS, settings)

                try:
                    there, pictures = draw("latent", begin), draw("np", begin)
                finally:
                    engine.leave()
                    dpcache_engines.unregister()
            as_planned = "yes" if sorted(steps) == planned else f"no, {len(steps) // count}"
            row(
                engine.label,
                k,
                way,
                as_planned,
                pictures,
                f"{np.abs(there - latents).max() / np.abs(latents).max():.1e}",
            )
    return rows


def install(folder: Path, packages: str) -> None:
    """Puts packages, and the plug-in, into a folder, unless it is there."""
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, *packages.split(), str(HERE)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="where the engines are, or are to be installed")
    parser.add_argument("--only-install", action="store_true", help="and print no table")
    parser.add_argument("--count", type=int, default=16, help="held-out prompts (default 16)")
    parser.add_argument("--rows", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path[:0] = [str(HERE), str(ROOT / "src")]
    if options.rows:
        print(json.dumps(measured(options.count)))
        return
    folders: list[Path | None] = [None]
    if options.install is not None:
        folders = []
        for name, packages in ENGINES.items():
            install(options.install / name, packages)
            folders.append(options.install / name)
    if options.only_install:
        return
    rows: list[list[str]] = []
    for folder in folders:
        path = os.pathsep.join(str(part) for part in (folder, os.environ.get("PYTHONPATH")) if part)
        command = [sys.executable, __file__, "--rows", "--count", str(options.count)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
        rows += json.loads(done.stdout.decode().splitlines()[-1])
    # dpcache itself is the same beside every engine: once, and first.
    alone = [row for number, row in enumerate(rows) if row[2] == ITSELF and row not in rows[:number]]
    for line in [HEAD, ["---"] * len(HEAD), *alone, *(row for row in rows if row[2] != ITSELF)]:
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
