"""What a checkpoint was measured with: weights, adapters and scheduler, wherever the weights are."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig

import dpcache
from dpcache.measure.fingerprint import FILE, Fingerprint, fingerprint
from tests.conftest import PROMPT, STEPS
from tests.pipelines.every import SMALL

CALL = {"num_inference_steps": STEPS, "max_sequence_length": 24, "progress": False}
#: Of a search that is over soon.
QUICK = {"num_key_steps": 4, "budget": 2, **CALL}


def built() -> Any:
    return SMALL["FluxPipeline"].build()[0]


def changed(pipe: Any, before: Fingerprint) -> list[str]:
    return fingerprint(pipe).differences(before)


def test_it_is_the_same_for_the_same_and_for_nothing_else() -> None:
    pipe = built()
    before = fingerprint(pipe)
    assert changed(built(), before) == [] == changed(pipe, before)
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    with torch.no_grad():
        weight.mul_(1.001)
    assert changed(pipe, before) == ["weights"]
    pipe = built()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=7.0)
    assert changed(pipe, before) == ["scheduler"]
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(built().scheduler.config)
    assert changed(pipe, before) == ["scheduler"]
    pipe = built()
    pipe.to(torch.bfloat16)
    assert changed(pipe, before) == ["model or adapter", "weights"]


def test_adapters_and_their_scales() -> None:
    pipe = built()
    before = fingerprint(pipe)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name="one")
    loaded = fingerprint(pipe)
    assert loaded.differences(before) == ["model or adapter", "weights"]
    pipe.set_adapters("one", 0.5)
    halved = fingerprint(pipe)
    assert halved.differences(loaded) == ["model or adapter"]
    pipe.disable_lora()
    assert changed(pipe, halved) == ["model or adapter"]
    pipe.enable_lora()
    assert changed(pipe, halved) == []
    pipe.fuse_lora()
    assert "weights" in changed(pipe, before)


def test_wherever_the_weights_are(tmp_path: Path) -> None:
    before = fingerprint(built())
    offloaded = built()
    cpu_offload(offloaded.transformer, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.transformer.parameters())
    assert changed(offloaded, before) == []
    on_disk = built()
    disk_offload(on_disk.transformer, tmp_path, execution_device=torch.device("cpu"))
    # Not read, for that would take as long as loading: only names and shapes are compared.
    assert fingerprint(on_disk).weights is None and changed(on_disk, before) == []
    compiled = built()
    compiled.transformer = torch.compile(compiled.transformer)
    assert changed(compiled, before) == []
    turned = built()
    proj = turned.transformer.proj_out
    proj.weight = torch.nn.Parameter(proj.weight.detach().t().contiguous().t())
    assert fingerprint(turned) == fingerprint(turned)


def test_it_is_quick_for_large_models() -> None:
    """A billion numbers in three thousand tensors that nobody has written to: reading them all would take seconds."""
    large = torch.nn.ParameterList(
        torch.nn.Parameter(torch.empty(350_000, dtype=torch.bfloat16), requires_grad=False) for _ in range(3000)
    )
    scheduler = SimpleNamespace(config={"shift": 3.0})
    pipe = SimpleNamespace(components={"transformer": large}, config={}, scheduler=scheduler)
    start = time.process_time()
    assert fingerprint(pipe).weights is not None
    assert time.process_time() - start < 1


def spoilt(pipe: Any, how: str) -> Any:
    """Changes one thing in a pipeline."""
    if how == "scheduler":
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=5.0)
    elif how == "model or adapter":
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    else:
        with torch.no_grad():
            pipe.text_encoder.get_parameter(next(iter(dict(pipe.text_encoder.named_parameters())))).mul_(1.01)
    return pipe


@pytest.mark.parametrize("how", ["scheduler", "model or adapter", "weights"])
def test_a_checkpoint_made_with_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    own = dpcache.load_pipeline("tiny-flux", device="cpu")
    whole = dpcache.calibrate(own, [PROMPT], checkpoint=tmp_path / "c", **CALL)
    dpcache.optimize(own, [PROMPT], checkpoint=tmp_path / "s.jsonl", **QUICK)
    other = spoilt(dpcache.load_pipeline("tiny-flux", device="cpu"), how)

    def runs(*call: Any, **arguments: Any) -> None:
        raise AssertionError("it has run")

    monkeypatch.setattr(type(other), "__call__", runs)
    with pytest.raises(dpcache.CalibrationError, match=f"measured with another .*{how}.*: go on with the one"):
        dpcache.calibrate(other, [PROMPT], checkpoint=tmp_path / "c", **CALL)
    with pytest.raises(dpcache.FileFormatError, match=f"another search, with other .*{how.split()[0]}"):
        dpcache.optimize(other, [PROMPT], checkpoint=tmp_path / "s.jsonl", **QUICK)
    assert dpcache.calibrate(own, [PROMPT], checkpoint=tmp_path / "c", **CALL) == whole


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "dpcache.fingerprint", "version": 1, "pipeline": 3}'])
def test_a_checkpoint_that_does_not_say_is_refused(tmp_path: Path, flux: Any, text: str) -> None:
    whole = dpcache.calibrate(flux, [PROMPT], checkpoint=tmp_path, **CALL)
    known = json.loads((tmp_path / FILE).read_text())
    assert set(known) == {"format", "version", "pipeline", "scheduler", "model", "weights"}
    (tmp_path / FILE).write_text(text)
    with pytest.raises(dpcache.CalibrationError, match="cannot be read"):
        dpcache.calibrate(flux, [PROMPT], checkpoint=tmp_path, **CALL)
    (tmp_path / FILE).unlink()
    with pytest.raises(dpcache.CalibrationError, match="does not say with which model"):
        dpcache.calibrate(flux, [PROMPT], checkpoint=tmp_path, **CALL)
    (tmp_path / FILE).write_text(json.dumps(known))
    assert dpcache.calibrate(flux, [PROMPT], checkpoint=tmp_path, **CALL) == whole


def test_one_of_a_scheduler_that_cannot_be_seen_resumes(tmp_path: Path, flux: Any) -> None:
    """Nothing can be probed then, though it was asked for."""
    hidden = {"sensitivity": "measured", "checkpoint": tmp_path, **CALL}
    whole = dpcache.calibrate(flux, [PROMPT], **{**hidden, "sensitivity": "sampler"})
    blind = dpcache.Calibration(
        whole.facts, whole.paper_cost, whole.gram[:0], whole.value_gram, whole.influence[:0], *blank(whole)
    )
    blind.save(tmp_path / "input-0-seed-0.safetensors")
    assert dpcache.calibrate(flux, [PROMPT], **hidden) == blind


def blank(calibration: dpcache.Calibration) -> list[Any]:
    return [calibration.probes[:0], calibration.tried[:0], calibration.tried_error[:0]]
