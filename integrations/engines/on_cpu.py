"""The code with which SGLang, vLLM-Omni and xDiT put cache-dit on a transformer, from their own wheels, on a CPU.

Each engine here loads its plug-ins by its own loader, and then does with a pipeline of diffusers what it does with its
own at the beginning of every request. Real are the modules named in `Engine.modules`, with all they import; what stands
in for the rest is said where each is imported, and is for GPUs, kernels and vLLM.
"""

import importlib
import json
import logging
import os
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any, ClassVar

from packaging.version import Version
from stand_ins import bare, stand_in

_TRITON = {"triton": {"__version__": "3.7.0"}}
_VLLM: dict[str, dict[str, Any]] = {
    "vllm.logger": {"init_logger": logging.getLogger},
    "vllm.envs": {"VLLM_PLUGINS": None},
    "vllm.config.utils": {"config": lambda kind: kind},
    "vllm.model_executor.layers.quantization": {"QUANTIZATION_METHODS": []},
}


class Engine:
    """One engine, with one pipeline at a time.

    Attributes:
        name: on the package index, and what its version is looked up by.
        target: what `dpcache export --to` calls it.
        modules: what of it is imported.
    """

    name: ClassVar[str]
    target: ClassVar[Any]
    modules: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self.prepare()
        self.loaded = [importlib.import_module(module) for module in self.modules]
        self.pipe: Any = None

    @property
    def label(self) -> str:
        """Its name and version, with cache-dit's."""
        names = dict.fromkeys((self.name, "cache-dit"))
        return ", ".join(f"{name} {version(name)}" for name in names)

    def prepare(self) -> None:
        """Makes its modules importable here."""

    def load_plugins(self) -> None:
        """Loads every installed plug-in, as the engine does when it starts; ours by hand where it knows none."""
        importlib.import_module("dpcache_engines").register()

    def request(self, pipe: Any, steps: int, settings: "dict[str, Any] | None" = None) -> None:
        """What happens before the first step of a request.

        Args:
            pipe: of diffusers; its transformer is what the engine gets.
            steps: of the request.
            settings: an export, as `dpcache export --json` has it; None for the defaults of the engine.
        """
        raise NotImplementedError

    def leave(self) -> None:
        """Takes cache-dit off."""
        raise NotImplementedError


class CacheDiT(Engine):
    """Cache-dit by itself."""

    name, target = "cache-dit", "cache-dit"
    modules = ("cache_dit",)

    def request(self, pipe: Any, steps: int, settings: "dict[str, Any] | None" = None) -> None:
        cache_dit = self.loaded[0]
        self.leave()
        self.pipe = pipe
        if settings is None:
            cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(num_inference_steps=steps))
        else:
            cache_dit.enable_cache(pipe, **cache_dit.load_configs({"cache_config": settings["cache_config"]}))

    def leave(self) -> None:
        if self.pipe is not None:
            self.loaded[0].disable_cache(self.pipe)
        self.pipe = None


class SGLang(Engine):
    """`DenoisingStage`, which decides about cache-dit for every batch; it needs no server to do that."""

    name, target = "sglang", "sglang"
    modules = (
        "sglang.multimodal_gen.runtime.platforms.plugins",
        "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising",
        "sglang.multimodal_gen.runtime.pipelines_core.schedule_batch",
        "sglang.multimodal_gen.configs.sample.sampling_params",
    )

    def prepare(self) -> None:
        """Kernels, and torchvision, whose wheels are for one version of torch."""
        for seen_without in ("transformers", "diffusers", "torch._inductor.debug"):
            importlib.import_module(seen_without)
        stand_in("triton", "sgl_kernel", "flashinfer", "tvm_ffi", "torchvision", known=_TRITON)

    def load_plugins(self) -> None:
        self.loaded[0].load_plugins()

    def request(self, pipe: Any, steps: int, settings: "dict[str, Any] | None" = None) -> None:
        denoising, batches, parameters = self.loaded[1:]
        environment = {"SGLANG_CACHE_DIT_ENABLED": "true", **(settings or {}).get("environment", {})}
        for name in [name for name in os.environ if name.startswith("SGLANG_CACHE_DIT_")]:
            del os.environ[name]
        os.environ.update(environment)
        if self.pipe is not pipe:  # its constructor asks for a server's settings
            self.pipe, self.stage = pipe, object.__new__(denoising.DenoisingStage)
            self.stage.transformer, self.stage.transformer_2 = pipe.transformer, None
            self.stage._cache_dit_enabled, self.stage._cache_dit_active_key = False, None
            self.stage.server_args = SimpleNamespace(enable_cfg_parallel=False, enable_breakable_cuda_graph=False)
            denoising.get_world_size = lambda: 1  # no processes are started
        batch = batches.Req(sampling_params=parameters.SamplingParams(num_inference_steps=steps))
        self.stage._maybe_enable_cache_dit(steps, batch)

    def leave(self) -> None:
        if self.stage._cache_dit_enabled:
            self.stage._unmount_cache_dit()
        _unmark()
        self.pipe = None


class VLLMOmni(Engine):
    """`CacheDiTBackend`, which is enabled once and refreshed by every request."""

    name, target = "vllm-omni", "vllm-omni"
    modules = ("vllm_omni.plugins", "vllm_omni.diffusion.cache.cachedit", "vllm_omni.diffusion.data")

    def prepare(self) -> None:
        """VLLM, all of it, and what the package patches in it when it is imported."""
        stand_in("triton", "vllm", known=_VLLM)
        bare("vllm_omni")

    def load_plugins(self) -> None:
        self.loaded[0].load_omni_general_plugins()

    def request(self, pipe: Any, steps: int, settings: "dict[str, Any] | None" = None) -> None:
        if self.pipe is not pipe:
            self.pipe = pipe
            self.backend = self.loaded[1].CacheDiTBackend((settings or {}).get("cache_config"))
            self.backend.enable(pipe)
        self.backend.refresh(pipe, steps, verbose=False)

    def leave(self) -> None:
        self.backend.disable(self.pipe)
        _unmark()
        self.pipe = None


class XDiT(Engine):
    """`apply_cache`, with the preset that xDiT has for FLUX.1; it is told the number of steps when it starts."""

    name, target = "xfuser", "xdit"
    modules = (
        "xfuser.model_executor.cache",
        "xfuser.model_executor.models.runner_models.flux",
        "xfuser.core.distributed",
    )

    def prepare(self) -> None:
        """Kernels, and the version of CUDA, which it looks up when it is imported."""
        stand_in("triton")
        bare("xfuser")
        envs = importlib.import_module("xfuser.envs")
        del sys.modules["xfuser"]
        envs.variables["CUDA_VERSION"] = lambda: Version("0.0")

    def request(self, pipe: Any, steps: int, settings: "dict[str, Any] | None" = None) -> None:
        self.leave()  # another number of steps takes another start
        self.pipe = pipe
        cache, flux, distributed = self.loaded
        for name in ("get_sequence_parallel_world_size", "get_pipeline_parallel_world_size"):
            setattr(distributed, name, lambda: 1)  # no processes are started
        own = flux.xFuserFluxModel.settings.step_cache_config["dbcache"]
        config = json.dumps(settings["cache_config"]) if settings else None
        cache.apply_cache(
            "dbcache", steps, pipe, preset_kwargs=own.preset, cache_config=config, adapter_config=own.adapter
        )

    def leave(self) -> None:
        if self.pipe is not None:
            importlib.import_module("cache_dit").disable_cache(self.pipe)
        self.pipe = None


def _unmark() -> None:
    """Cache-dit before 1.5.3 leaves a mark when it is taken off a transformer, and then fails to get on another."""
    fake = importlib.import_module("cache_dit.caching.block_adapters").FakeDiffusionPipeline
    if "_is_cached" in vars(fake):
        del fake._is_cached


def installed() -> Engine:
    """The engine that is installed here; cache-dit by itself where there is none.

    Raises:
        PackageNotFoundError: nor is that one.
    """
    for kind in (SGLang, VLLMOmni, XDiT):
        with suppress(PackageNotFoundError):
            version(kind.name)
            return kind()
    return CacheDiT()
