"""Schedule files of dpcache, read without dpcache."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT, VERSION = "dpcache.schedule", 4

Terms = tuple[tuple[int, float], ...]


class EngineError(RuntimeError):
    """What cannot be done here, and what to do instead."""


@dataclass(frozen=True)
class Schedule:
    """What an engine needs of a schedule.

    Attributes:
        name: of its file, for people.
        num_steps: T.
        key_steps: the steps to compute.
        predictions: skipped step -> multiples of the values at key steps.
        corrections: key step -> multiples of values that are added to what it hands on.
        model: class of the transformer it was made for; None admits any.
        config: digest of that one's configuration; None admits every model of the class.
    """

    name: str
    num_steps: int
    key_steps: tuple[int, ...]
    predictions: dict[int, Terms]
    corrections: dict[int, Terms]
    model: "str | None" = None
    config: "str | None" = None

    @property
    def mask(self) -> list[int]:
        """For every step, 1 if it is computed."""
        return [int(step in self.key_steps) for step in range(self.num_steps)]

    @property
    def last_uses(self) -> dict[int, int]:
        """Key step -> the last step that is made from its value."""
        uses: dict[int, int] = {}
        for step, terms in sorted([*self.predictions.items(), *self.corrections.items()]):
            uses.update({key: step for key, _ in terms})
        return uses

    @classmethod
    def read(cls, path: "str | Path") -> "Schedule":
        """A file that `dpcache.Schedule.save` wrote.

        Raises:
            EngineError: it is none, of another version, or was edited.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            kind, version, digest = (document.pop(name, None) for name in ("format", "version", "digest"))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise EngineError(f"{path} cannot be read as a dpcache schedule: {error}.") from error
        if (kind, version) != (FORMAT, VERSION):
            raise EngineError(
                f"{path} is {kind or 'no dpcache schedule'} of version {version}, this plug-in reads {FORMAT} of "
                f"version {VERSION}: make it with the dpcache that this plug-in came with."
            )
        if hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest() != digest:
            raise EngineError(f"{path} was edited after it was written: make it again with dpcache.")
        model = document["model"] or {}
        return cls(
            Path(path).name,
            document["num_inference_steps"],
            tuple(document["key_steps"]),
            _terms(document["predictions"]),
            _terms(document["corrections"]),
            model.get("denoiser"),
            model.get("config"),
        )

    def is_for(self, transformer: Any) -> bool:
        """Whether it was made for a transformer of this class, or of one that this class derives from."""
        inner = [getattr(transformer, name, transformer) for name in ("_orig_mod", "_fsdp_wrapped_module", "module")]
        return self.model is None or any(kind.__name__ == self.model for one in inner for kind in type(one).__mro__)

    def knows(self, transformer: Any) -> bool:
        """Whether the configuration is the one it was made for; True where there is none to be read."""
        settings = getattr(transformer, "config", None)
        if self.config is None or not hasattr(transformer, "register_to_config"):  # not a model of diffusers
            return True
        left_out = "quantization_config"
        shown = {name: value for name, value in dict(settings).items() if name[0] != "_" and name != left_out}
        text = json.dumps(shown, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16] == self.config


def _terms(found: dict[str, list[dict[str, Any]]]) -> dict[int, Terms]:
    return {int(step): tuple((one["key_step"], one["coefficient"]) for one in terms) for step, terms in found.items()}
