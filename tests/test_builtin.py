"""Ready-made schedules: as published, for the published model, run on a pipeline of its structure."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from benchmarks import builtin as making
from PIL import Image

import dpcache
from dpcache.apps.sources import schedule_from
from dpcache.judge.comparison import count_block_runs
from dpcache.plan import builtin
from dpcache.run.denoisers import identify

from .conftest import type_in
from .test_planner import path_cost

REFERENCE = Path(__file__).parent / "reference"
FLUX1_DEV = "black-forest-labs/FLUX.1-dev"
#: As published with FLUX.1-dev.
SCHEDULER = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "shift": 3.0}
CALL = {"num_inference_steps": 50, "height": 64, "width": 64, "max_sequence_length": 24}
PROMPT = "a small red ring on a striped background, top left"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Folder of a pipeline built as FLUX.1-dev is, 19 + 38 blocks and all, 32 wide; its encoders are tiny-flux's."""
    tiny = dpcache.load_pipeline("tiny-flux", device="cpu")
    torch.manual_seed(0)
    narrow = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    encoders = {"joint_attention_dim": 64, "pooled_projection_dim": 64}
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULER, use_dynamic_shifting=True),
        transformer=diffusers.FluxTransformer2DModel(**making.FLUX1_DEV | narrow | encoders).eval(),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
            latent_channels=16,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        **{name: getattr(tiny, name) for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")},
    )
    folder = tmp_path_factory.mktemp("small") / FLUX1_DEV
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(small) -> Any:
    loaded = dpcache.load_pipeline(small, device="cpu")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def for_small(pipe, tmp_path, monkeypatch):
    """The same schedules, by the same command, for the small model's configuration instead of the published one."""
    for make in (making.from_runs, making.from_paper_cost):
        making.written(make(identify([pipe.transformer])), tmp_path / "schedules")
    monkeypatch.setattr(builtin, "FOLDER", tmp_path / "schedules")
    builtin.builtins.cache_clear()
    yield
    builtin.builtins.cache_clear()


def test_the_command_makes_what_is_shipped(tmp_path):
    for make in (making.from_runs, making.from_paper_cost):
        made = making.written(make(making.flux1_dev()), tmp_path)
        assert made.read_text() == (builtin.FOLDER / made.name).read_text()


def test_what_there_is():
    assert dpcache.Schedule.builtin_names() == {
        "flux1-dev": tuple(range(5, 26)),
        "flux1-dev-paper-cost": tuple(range(7, 26)),
    }
    assert builtin.builtin_of(FLUX1_DEV) == "flux1-dev"
    for name, there in dpcache.Schedule.builtin_names().items():
        for k in there:
            assert schedule_from(f"builtin:{name}:{k}") == dpcache.Schedule.builtin(name, k)
    assert schedule_from("builtin:9", FLUX1_DEV) == dpcache.Schedule.builtin("flux1-dev", 9)


def test_what_real_runs_found_is_as_published():
    runs = json.loads((REFERENCE / "flux1_dev_t50_real_runs.json").read_text())
    expected = {9: runs["exhaustive"]["best"]}
    expected |= {k: runs["by_method"][str(k)]["budcache_search"] for k in (13, 21)}
    for k in range(5, 26):
        schedule = dpcache.Schedule.builtin("flux1-dev", k)
        assert (schedule.num_key_steps, schedule.num_inference_steps, schedule.cost) == (k, 50, None)
        assert (schedule.predictor, schedule.order, schedule.boundary) == ("taylor", 0, "blocks")
        assert all(len(terms) == 1 and terms[0].coefficient == 1 for terms in schedule.predictions.values())
        assert "arXiv 2609.39343" in schedule.source and "0, 1, 2 and 49 forced" in schedule.source
        assert (schedule.key_steps[0], schedule.key_steps[-1]) == (0, 49)
        assert ("not run; " in schedule.source) == (k not in expected)
        if k in expected:
            assert list(schedule.key_steps) == expected[k]
    best = dpcache.Schedule.builtin("flux1-dev", 9)
    assert best.key_steps == (0, 1, 2, 4, 6, 11, 24, 41, 49)
    assert "22.75 dB" in best.source and "20.94 dB on 7,151 other runs" in best.source
    assert "between the published ones for 9 and 13" in dpcache.Schedule.builtin("flux1-dev", 11).source
    assert "along the curve of the published one for 21" in dpcache.Schedule.builtin("flux1-dev", 25).source


def test_between_published_ones_key_steps_go_from_one_to_the_other():
    published = {3: (0, 2, 8), 5: (0, 1, 2, 4, 8)}
    assert making.between(published, 3, 9) == (0, 2, 8)
    assert making.between(published, 4, 9) == (0, 1, 4, 8)  # at a third and two thirds: 1.33 and 4, 1.33 and 3.33
    assert making.between(published, 2, 9) == (0, 8)
    assert making.between(published, 9, 9) == tuple(range(9))
    found = {k: making.between({5: (0, 1, 2, 3, 40)}, k, 50) for k in range(2, 51)}
    assert all(len(keys) == k and np.diff(keys).min() >= 1 and keys[-1] < 50 for k, keys in found.items())


def test_every_plan_by_cost_is_optimal_on_the_published_costs():
    cost = np.load(REFERENCE / "flux1_dev_t50_cost.npz")["cost"]
    published = json.loads((REFERENCE / "flux1_dev_t50_schedules.json").read_text())
    for k in range(7, 26):
        schedule = dpcache.Schedule.builtin("flux1-dev-paper-cost", num_key_steps=k)
        assert (schedule.num_key_steps, schedule.num_inference_steps) == (k, 50)
        assert (schedule.predictor, schedule.order, schedule.boundary) == ("taylor", 2, "blocks")
        assert schedule.cost == pytest.approx(published["by_full_steps"][str(k)]["optimal_cost"], rel=1e-9)
        assert path_cost(cost, schedule.key_steps) == pytest.approx(schedule.cost, rel=1e-9)
        assert np.diff([*schedule.key_steps, 50]).max() <= published["max_gap"]
        assert "arXiv 2602.22654" in schedule.source


@pytest.mark.parametrize(
    "more",
    [
        {"_diffusers_version": "0.30.0.dev0", "_name_or_path": "../checkpoints/flux-dev/transformer"},
        {"_diffusers_version": "0.34.0.dev0", "axes_dims_rope": [16, 56, 56], "out_channels": None},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
    ],
)
def test_admits_the_published_model_however_it_was_stored(tmp_path, more):
    """Read from its config.json as diffusers reads it; which release wrote it, and from where, is of no account."""
    config = {"_class_name": "FluxTransformer2DModel", **making.FLUX1_DEV}
    admits = dpcache.Schedule.builtin("flux1-dev", num_key_steps=13).model.admits
    for changed, expected in (({}, True), ({"guidance_embeds": False}, False), ({"num_layers": 18}, False)):
        (tmp_path / "config.json").write_text(json.dumps({**config, **more, **changed}))
        read = diffusers.FluxTransformer2DModel.load_config(tmp_path)
        quantization = {name: read.pop(name) for name in ("quantization_config",) if name in read}
        with torch.device("meta"):
            model = diffusers.FluxTransformer2DModel.from_config(read)
        model.register_to_config(**quantization, _name_or_path=str(tmp_path))
        assert admits(identify([model])) == expected


def test_blocks_run_as_often_as_there_are_key_steps(pipe, for_small):
    blocks = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    assert blocks == 19 + 38
    assert pipe.transformer.config.guidance_embeds and pipe.scheduler.config.use_dynamic_shifting
    for name, k in (("flux1-dev", 9), ("flux1-dev-paper-cost", 13)):
        schedule = dpcache.Schedule.builtin(name, num_key_steps=k)
        with dpcache.enabled(pipe, schedule), count_block_runs([pipe.transformer]) as count:
            output = pipe(PROMPT, generator=torch.Generator().manual_seed(0), output_type="np", **CALL).images
            assert dpcache.stats(pipe).computed_steps == schedule.key_steps
        assert count == [k * blocks]
        assert np.isfinite(output).all()


def test_refused_by_a_model_of_another_width(pipe):
    with pytest.raises(dpcache.ScheduleMismatchError, match="made for FluxTransformer2DModel"):
        dpcache.enable(pipe, dpcache.Schedule.builtin("flux1-dev", num_key_steps=13))


@pytest.fixture
def run(monkeypatch, capsys):
    """Types a command in a wide terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    return partial(type_in, monkeypatch, capsys)


def test_generate_without_calibration(small, pipe, for_small, run, monkeypatch, tmp_path):
    """The command as it is typed for FLUX.1-dev; what lies here under its name is the small one."""
    monkeypatch.chdir(small.parents[1])
    settings = [f"--set={name}={value}" for name, value in CALL.items() if name != "num_inference_steps"]
    drawn = tmp_path / "drawn.png"
    words = ("generate", FLUX1_DEV, PROMPT, "--schedule", "builtin:7", "-o", str(drawn), *settings)
    code, out, err = run(*words)
    assert code == 0, err
    assert f"wrote {drawn}" in out.replace("\n", "")
    call = {**CALL, "generator": torch.Generator().manual_seed(0), "output_type": "pil"}
    with dpcache.enabled(pipe, schedule_from("builtin:7", FLUX1_DEV)):
        cached = np.asarray(pipe(PROMPT, **call).images[0]).astype(int)
    full = np.asarray(pipe(PROMPT, **{**call, "generator": torch.Generator().manual_seed(0)}).images[0])
    found = np.asarray(Image.open(drawn)).astype(int)
    assert abs(found - cached).max() <= 1  # rounded in another place
    assert abs(found - full).max() > 1


def test_show_lists_them(run):
    code, out, _ = run("show", "builtin")
    assert code == 0
    assert FLUX1_DEV in out and "cost tensor published for FLUX.1-dev" in out and "arXiv 2602.22654" in out
    rows = [line.split() for line in out.splitlines() if re.search(r"[·▌▐█]{25}", line)]
    assert [int(row[0]) for row in rows] == [*range(5, 26), *range(7, 26)]
    keys = [sum(map({"·": 0, "▌": 1, "▐": 1, "█": 2}.__getitem__, row[-1])) for row in rows]  # two steps a cell
    assert keys == [int(row[0]) for row in rows]
    assert [row[2] == "-" for row in rows] == [True] * 21 + [False] * 19
    assert "K = 9: run: the best of all 1,370,754 schedules" in out and "K = 13, 21: run: found by a search" in out
    assert "K = 10, 11, 12: between the published ones for 9 and 13 key steps, not run" in out
    assert " ".join(out.split()).count(f"or builtin:K with {FLUX1_DEV}") == 1
    code, out, _ = run("show", "builtin:flux1-dev:13")
    assert code == 0
    assert "13 of 50 steps in full (0 to 4, 6, 11, 15, 21, 29, 39, 45, 49)" in out
    code, out, _ = run("show", "builtin:flux1-dev-paper-cost:13")
    assert code == 0
    assert "13 of 50 steps in full (0 to 2, 4, 7, 10, 14, 19, 23, 28, 34, 40, 45)" in out


@pytest.mark.parametrize(
    ("text", "model", "message"),
    [
        ("builtin:13", "tiny-flux", "no built-in schedules for tiny-flux: there are flux1-dev, for black-forest-labs"),
        ("builtin:13", None, "say builtin:NAME:K"),
        ("builtin", FLUX1_DEV, "is not builtin:K or builtin:NAME:K"),
        ("builtin:flux9:13", None, "named 'flux9': there are flux1-dev"),
        ("builtin:26", FLUX1_DEV, "have 5 to 25 key steps, not 26"),
        ("builtin:flux1-dev:4", None, "have 5 to 25 key steps, not 4"),
        ("builtin:flux1-dev-paper-cost:6", None, "have 7 to 25 key steps, not 6"),
    ],
)
def test_what_there_is_not(text, model, message):
    with pytest.raises(ValueError, match=message) as caught:
        schedule_from(text, model)
    assert "\n" not in str(caught.value)


def test_files_and_directories_go_before_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule = dpcache.Schedule.uniform(5, 20)
    schedule.save_pretrained("me/flux")
    schedule.save("me/s.json")
    for text in ("me/flux", "me/flux/schedule.json", "me/s.json"):
        assert schedule_from(text) == schedule
    with pytest.raises(FileNotFoundError, match=r"no file me/t\.json"):
        schedule_from("me/t.json")
