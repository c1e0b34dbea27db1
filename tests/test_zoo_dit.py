"""The bundled class-conditional model: it loads without us, draws its classes, can be cached and trained again."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training import stages, tiny_dit
from training.judge import draw, judge_anywhere

import dpcache
from dpcache.zoo import BUNDLED, classes, load_pipeline, shapes

TINY_DIT = BUNDLED["tiny-dit"]
CPU = torch.device("cpu")
LITTLE = tiny_dit.Settings(pictures=40, steps=5, batch=4)


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = load_pipeline("tiny-dit", device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_plain_diffusers_loads_and_draws_by_class_name() -> None:
    code = """
import sys
from diffusers import DiTPipeline
pipeline = DiTPipeline.from_pretrained(sys.argv[1])
image = pipeline(class_labels=pipeline.get_label_ids(["red ring"]), num_inference_steps=4).images[0]
print(image.size, len(pipeline.labels), "dpcache" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(TINY_DIT.directory)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert output.strip() == "(32, 32) 32 False"


def test_it_is_small() -> None:
    size = sum(path.stat().st_size for path in TINY_DIT.directory.rglob("*") if path.is_file())
    assert 1e6 < size < 7e6


def test_nine_of_ten_pictures_are_of_their_class(pipeline: Any) -> None:
    inputs = TINY_DIT.held_out_inputs(96)
    pictures = draw(pipeline, inputs, batch=48, num_inference_steps=50, **TINY_DIT.call_defaults)
    wanted = [classes.CLASSES[item["class_labels"][0]] for item in inputs]
    right = [judge_anywhere(picture).shows(one) for picture, one in zip(pictures, wanted, strict=True)]
    assert np.mean(right) >= 0.9


@pytest.mark.parametrize("boundary", ["blocks", "output"])
def test_it_can_be_planned_and_cached(pipeline: Any, boundary: Any) -> None:
    inputs, call = TINY_DIT.calibration_inputs(2), TINY_DIT.call_defaults
    calibration = dpcache.calibrate(pipeline, inputs, num_inference_steps=12, boundary=boundary, progress=False, **call)
    schedule = calibration.plan(8)
    held_out = TINY_DIT.held_out_inputs(2)
    comparison = dpcache.compare(pipeline, schedule, held_out, seeds=1000, progress=False, **call)
    assert comparison.cached_block_runs == comparison.full_block_runs * 8 / 12
    assert min(sample.psnr for sample in comparison.samples) > 15
    names = [classes.CLASSES[item["class_labels"][0]].caption for item in held_out]
    assert [sample.label for sample in comparison.samples] == names


def test_inputs_are_every_class_in_a_fixed_order() -> None:
    pools = [TINY_DIT.calibration_inputs(64), TINY_DIT.held_out_inputs(64)]
    for pool in pools:
        for turn in (pool[:32], pool[32:]):
            assert sorted(item["class_labels"][0] for item in turn) == list(range(32))
    assert pools[0] != pools[1]
    assert pools[0][:3] == TINY_DIT.calibration_inputs(3)


def test_the_judge_finds_renderings_anywhere() -> None:
    scenes = classes.all_scenes()[:100]
    verdicts = [judge_anywhere(picture) for picture in shapes.render(scenes, seed=77)]
    assert np.mean([verdict.shows(scene) for verdict, scene in zip(verdicts, scenes, strict=True)]) >= 0.99
    others = [classes.CLASSES[(classes.class_of(scene) + 5) % 32] for scene in scenes]
    assert not any(verdict.shows(other) for verdict, other in zip(verdicts, others, strict=True))
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert not any(judge_anywhere(noise).shows(one) for one in classes.CLASSES)


def test_saved_blocks_embed_time_and_class_alike(pipeline: Any) -> None:
    embeddings = [block.norm1.emb.state_dict() for block in pipeline.transformer.transformer_blocks]
    table = embeddings[0]["class_embedder.embedding_table.weight"]
    assert len(table) == tiny_dit.NO_CLASS + 1
    assert table[[*range(32), tiny_dit.NO_CLASS]].any(dim=1).all()
    assert not table[32 : tiny_dit.NO_CLASS].any()
    for other in embeddings[1:]:
        for name, tensor in embeddings[0].items():
            assert torch.equal(tensor, other[name]), name


def weights(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.rglob("*.safetensors"))
    assert len(files) == 2
    return {f"{file.parent.name}/{name}": t for file in files for name, t in load_file(file).items()}


def test_interrupted_training_gives_the_same_weights(tmp_path: Path) -> None:
    common: dict[str, Any] = {"device": CPU, "seed": 5, "settings": LITTLE}
    tiny_dit.train(tmp_path / "a", tmp_path / "whole", **common)
    with pytest.raises(stages.Interrupted):
        tiny_dit.train(tmp_path / "b", tmp_path / "parts", should_stop=lambda step: step == 2, **common)
    tiny_dit.train(tmp_path / "b", tmp_path / "parts", **common)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole["transformer/proj_out_2.weight"].any()
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    with pytest.raises(ValueError, match="--restart"):
        longer = tiny_dit.Settings(pictures=40, steps=9, batch=4)
        tiny_dit.train(tmp_path / "b", tmp_path / "parts", **{**common, "settings": longer})
