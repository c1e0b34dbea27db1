"""A schedule's key steps for cache-dit, and for the serving engines that embed it.

cache-dit takes a step mask with a static policy, and forecasts the skipped steps with its own TaylorSeer. What each
program takes is documented at

- cache-dit: https://cache-dit.readthedocs.io/en/latest/user_guide/CACHE_API/ (`DBCacheConfig`,
  `TaylorSeerCalibratorConfig`, `load_configs`)
- SGLang Diffusion: https://docs.sglang.io/docs/sglang-diffusion/cache_dit and
  https://docs.sglang.io/docs/sglang-diffusion/environment_variables
- xDiT: `--cache_method dbcache --cache_config`, https://github.com/xdit-project/xDiT
- vLLM-Omni: https://docs.vllm.ai/projects/vllm-omni/en/stable/user_guide/diffusion/cache_acceleration/cache_dit/
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from dpcache.errors import ExportError, missing_extra
from dpcache.plan.schedule import Schedule

Target = Literal["cache-dit", "sglang", "vllm-omni", "xdit"]

#: Blocks that cache-dit computes at every step, before it decides: the fewest it works with.
_FIRST_BLOCKS = 1
#: Computed steps that masks go on with: cache-dit fails in calls that are longer than the mask.
_LONGER = 150
#: Denoisers, by the beginning of their names, of which cache-dit expects two calls a step, for guidance.
_TWO_CALLS = (
    "Wan", "HunyuanVideo", "QwenImage", "CogView4", "Cosmos", "SkyReelsV2", "Chroma", "Kandinsky5", "HunyuanImage",
    "ChronoEdit", "OvisImage", "LongCatImage", "GlmImage", "Helios",
)  # fmt: skip
#: So large that no difference between steps reaches it.
_NO_THRESHOLD = 1e6


@dataclass(frozen=True)
class Export:
    """What of a schedule cache-dit can be told.

    Attributes:
        mask: for every step, 1 if it is computed and 0 if it is forecast.
        order: of the Taylor forecast; 0 repeats what the last computed step gave.
        notes: what stays behind, for people; a sentence each.
    """

    mask: tuple[int, ...]
    order: int
    notes: tuple[str, ...]

    @property
    def cache_config(self) -> dict[str, Any]:
        """Arguments of `cache_dit.DBCacheConfig`."""
        return {
            "num_inference_steps": len(self.mask),
            "Fn_compute_blocks": _FIRST_BLOCKS,
            "Bn_compute_blocks": 0,
            "max_warmup_steps": _runs(self.mask)[0],
            "steps_computation_mask": [*self.mask, *[1] * _LONGER],
            "steps_computation_policy": "static",
        }

    @property
    def settings(self) -> dict[str, Any]:
        """A configuration for `cache_dit.load_configs`, as JSON or YAML."""
        taylor = {"enable_taylorseer": True, "enable_encoder_taylorseer": True, "taylorseer_order": self.order}
        return {"cache_config": self.cache_config | (taylor if self.order else {})}

    def arguments(self) -> dict[str, Any]:
        """Arguments of `cache_dit.enable_cache(pipe, ...)`.

        Raises:
            MissingExtraError: cache-dit is not installed.
        """
        try:
            import cache_dit
        except ImportError as error:
            raise missing_extra("enabling cache-dit", error, "cache-dit>=1.5") from error
        taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.order) if self.order else None
        return {"cache_config": cache_dit.DBCacheConfig(**self.cache_config), "calibrator_config": taylor}

    def snippet(self) -> str:
        """Python that enables this on a pipeline named `pipe`."""
        written = {name: repr(value) for name, value in self.cache_config.items()}
        written["steps_computation_mask"] = f"{list(self.mask)} + [1] * {_LONGER}"
        config = "".join(f"        {name}={value},\n" for name, value in written.items())
        taylor = f"cache_dit.TaylorSeerCalibratorConfig(taylorseer_order={self.order})" if self.order else "None"
        return (
            f"{_comments(_heading(self.mask), *self.notes)}"
            "import cache_dit\n\n"
            f"cache_dit.enable_cache(\n    pipe,\n    cache_config=cache_dit.DBCacheConfig(\n{config}    ),\n"
            f"    calibrator_config={taylor},\n)\n"
        )


def export(schedule: Schedule) -> Export:
    """The step mask of a schedule, and what cache-dit needs to compute exactly its key steps.

    Raises:
        ExportError: every step is a key step.
    """
    if schedule.num_key_steps == schedule.num_inference_steps:
        raise ExportError("the schedule computes every step, so there is nothing to export: run without a cache.")
    keys = set(schedule.key_steps)
    mask = tuple(int(step in keys) for step in range(schedule.num_inference_steps))
    return Export(mask, schedule.order, (*_left_behind(schedule), *_of_the_model(schedule, "cache-dit")))


def sglang(schedule: Schedule) -> dict[str, str]:
    """Environment variables of SGLang Diffusion (`sglang generate`, `sglang serve`) for its own pipelines.

    Its mask is written as lengths of the runs of computed and of cached steps. With `--backend diffusers` it reads
    `Export.settings` from a file instead.

    Raises:
        ExportError: as `export`.
    """
    exported = export(schedule)
    runs, order = _longer_runs(exported.mask), exported.order
    found = {
        "SGLANG_CACHE_DIT_ENABLED": "true",
        "SGLANG_CACHE_DIT_FN": str(_FIRST_BLOCKS),
        "SGLANG_CACHE_DIT_BN": "0",
        "SGLANG_CACHE_DIT_WARMUP": str(runs[0]),
        "SGLANG_CACHE_DIT_SCM_COMPUTE_BINS": ",".join(map(str, runs[0::2])),
        "SGLANG_CACHE_DIT_SCM_CACHE_BINS": ",".join(map(str, runs[1::2])),
        "SGLANG_CACHE_DIT_SCM_POLICY": "static",
        "SGLANG_CACHE_DIT_TAYLORSEER": "true" if order else "false",
    }
    return found | ({"SGLANG_CACHE_DIT_TS_ORDER": str(order)} if order else {})


def sglang_request(schedule: Schedule) -> dict[str, Any]:
    """`cache_dit_params` of one request to SGLang Diffusion, which then goes before the environment.

    Raises:
        ExportError: as `export`.
    """
    exported = export(schedule)
    runs, order = _longer_runs(exported.mask), exported.order
    return {
        "Fn_compute_blocks": _FIRST_BLOCKS,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": runs[0],
        "scm_compute_bins": runs[0::2],
        "scm_cache_bins": runs[1::2],
        "scm_policy": "static",
        "enable_taylorseer": bool(order),
    } | ({"taylorseer_order": order} if order else {})


def xdit(schedule: Schedule) -> dict[str, Any]:
    """`--cache_config` of xDiT, with `--cache_method dbcache`; it says the number of steps itself.

    Raises:
        ExportError: as `export`.
    """
    config = export(schedule).cache_config
    return {name: value for name, value in config.items() if name != "num_inference_steps"}


def vllm_omni(schedule: Schedule) -> dict[str, Any]:
    """`cache_config` of vLLM-Omni, for `cache_backend="cache_dit"`.

    It takes no mask of one's own, only four that have names, so the key steps cannot be carried over. What can be told
    is how many steps to compute at first and how many to forecast in a row after that: of these patterns this is the
    one with as many computed steps, nearest to the planned ones. See `vllm_omni_steps`.

    Raises:
        ExportError: as `export`.
    """
    exported = export(schedule)
    first, in_a_row = _even(schedule)
    taylor = {"enable_taylorseer": True, "taylorseer_order": exported.order}
    return {
        "Fn_compute_blocks": _FIRST_BLOCKS,
        "Bn_compute_blocks": 0,
        "max_warmup_steps": first,
        "max_continuous_cached_steps": in_a_row,
        "residual_diff_threshold": _NO_THRESHOLD,
    } | (taylor if exported.order else {"enable_taylorseer": False})


def vllm_omni_steps(schedule: Schedule) -> list[int]:
    """The steps that cache-dit computes with the settings of `vllm_omni`."""
    return _pattern(*_even(schedule), schedule.num_inference_steps)


def text(schedule: Schedule, target: Target) -> str:
    """What to paste: Python for cache-dit, a shell script for SGLang, a command line for vLLM-Omni and xDiT.

    Raises:
        ExportError: as `export`.
    """
    exported = export(schedule)
    if target == "cache-dit":
        return exported.snippet()
    about = _comments(_heading(exported.mask), *_notes(schedule, target))
    if target == "sglang":
        request = _comments(f"For one request instead: cache_dit_params={json.dumps(sglang_request(schedule))}")
        return about + request + "".join(f"export {name}={value}\n" for name, value in sglang(schedule).items())
    if target == "xdit":
        steps = schedule.num_inference_steps
        told = f"--num_inference_steps {steps} --cache_method dbcache --cache_config '{json.dumps(xdit(schedule))}'"
        return f"{about}xdit --model MODEL {told}\n"
    config = json.dumps(vllm_omni(schedule))
    return f"{about}vllm serve MODEL --omni --cache-backend cache_dit --cache-config '{config}'\n"


def as_json(schedule: Schedule, target: Target) -> dict[str, Any]:
    """The same as settings for programs, with the notes beside them.

    For cache-dit, and for SGLang with `--backend diffusers`, it is a file that `cache_dit.load_configs` reads.

    Raises:
        ExportError: as `export`.
    """
    exported = export(schedule)
    settings: dict[str, Any]
    if target == "cache-dit":
        settings = exported.settings
    elif target == "sglang":
        request = {"cache_dit_params": sglang_request(schedule)}
        settings = {"environment": sglang(schedule), **request, **exported.settings}
    elif target == "xdit":
        settings = {"cache_method": "dbcache", "cache_config": xdit(schedule)}
    else:
        settings = {"cache_backend": "cache_dit", "cache_config": vllm_omni(schedule)}
    return {**settings, "notes": list(_notes(schedule, target))}


def _notes(schedule: Schedule, target: Target) -> list[str]:
    notes = _left_behind(schedule)
    steps = schedule.num_inference_steps
    if target == "sglang":
        notes.append(
            f"The mask is for requests of {steps} steps: SGLang cuts it off for shorter ones, and computes what is "
            "beyond it in longer ones."
        )
    if target == "xdit" and schedule.order != 1:
        notes.append("xDiT forecasts by a Taylor series of order 1, whatever the schedule says.")
    if target == "vllm-omni":
        computed = vllm_omni_steps(schedule)
        notes.append(
            "vLLM-Omni takes no mask of one's own, so the key steps of the schedule cannot be carried over. For "
            f"requests of {steps} steps these settings compute {len(computed)} at even distances instead: "
            f"{', '.join(map(str, computed))}."
        )
        if vllm_omni(schedule)["max_continuous_cached_steps"] == 1:
            notes.append("cache-dit before 1.5.3 counts single skipped steps otherwise, and computes more steps.")
    return notes + _of_the_model(schedule, target)


def _of_the_model(schedule: Schedule, target: Target) -> list[str]:
    """What holds for some models."""
    denoiser = schedule.model.denoiser if schedule.model is not None else ""
    notes = []
    if denoiser.startswith(_TWO_CALLS):
        remedy = {
            "cache-dit": "say enable_separate_cfg=False in DBCacheConfig then",
            "xdit": 'add "enable_separate_cfg": false to the configuration then',
        }.get(target, "serve it with guidance in one process, or without this cache")
        notes.append(
            "cache-dit expects two calls of this model a step, with and without the prompt. Where guidance is off, or "
            f"split between processes, there is one, and other steps are computed: {remedy}."
        )
    if denoiser.startswith("Wan"):
        notes.append(
            "Wan 2.2 with two experts cannot be told: the second one starts the mask over. Use dpcache.enable there."
        )
    return notes


def _left_behind(schedule: Schedule) -> list[str]:
    order = schedule.order
    notes = [
        "cache-dit computes the first block at every step and forecasts what the other blocks add to it, so errors "
        "differ from those that dpcache plans by and measures."
    ]
    if schedule.corrections:
        notes.append("Key steps there make up for nothing: the corrections of this schedule stay behind.")
    if not _is_taylor(schedule):
        notes.append(
            f"The coefficients of this schedule ({schedule.predictor}) are not those of a Taylor series and stay "
            f"behind: cache-dit forecasts by a Taylor series of order {order}."
        )
    if schedule.boundary == "output":
        notes.append(
            "The schedule was planned for predicting the denoiser's output; cache-dit forecasts that of its blocks."
        )
    if not order:
        notes.append("The order is 0: what the last computed step gave is repeated, without TaylorSeer.")
    return notes


def _is_taylor(schedule: Schedule) -> bool:
    plain = Schedule.from_key_steps(schedule.key_steps, schedule.num_inference_steps, order=schedule.order)
    return all(
        [term.key_step for term in terms] == [term.key_step for term in plain.predictions[step]]
        and np.allclose([term.coefficient for term in terms], [term.coefficient for term in plain.predictions[step]])
        for step, terms in schedule.predictions.items()
    )


def _runs(mask: Sequence[int]) -> list[int]:
    """Lengths of the runs of equal entries; the first is of ones."""
    return [len(list(run)) for _, run in groupby(mask)]


def _longer_runs(mask: Sequence[int]) -> list[int]:
    """Likewise, and after the last step so many computed ones that no request is longer."""
    return _runs([*mask, *[1] * _LONGER])


def _even(schedule: Schedule) -> tuple[int, int]:
    """How many steps to compute at first and to forecast in a row, nearest to the schedule."""
    steps, keys = schedule.num_inference_steps, np.array(schedule.key_steps)

    def distance(pattern: tuple[int, int]) -> tuple[int, int]:
        computed = np.array(_pattern(*pattern, steps))
        return abs(len(computed) - len(keys)), int(np.abs(computed[:, None] - keys).min(axis=0).sum())

    return min(((first, row) for first in range(1, len(keys) + 1) for row in range(1, steps)), key=distance)


def _pattern(first: int, in_a_row: int, steps: int) -> list[int]:
    return [*range(first), *range(first + in_a_row, steps, in_a_row + 1)]


def _heading(mask: Sequence[int]) -> str:
    return (
        f"From a dpcache schedule: {sum(mask)} of {len(mask)} steps in full. Call with num_inference_steps={len(mask)}."
    )


def _comments(*sentences: str) -> str:
    return "".join(f"# {sentence}\n" for sentence in sentences)
