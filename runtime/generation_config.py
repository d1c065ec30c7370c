"""What the `generation_config.json` of a checkpoint directory asks for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import LoadError

if TYPE_CHECKING:
    from runtime.sampling import Sampling

FILE = "generation_config.json"
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "do_sample": ((bool,), "true or false"),
    "temperature": ((int, float), "a number"),
    "top_k": ((int,), "an integer"),
    "top_p": ((int, float), "a number"),
    "min_p": ((int, float), "a number"),
    "repetition_penalty": ((int, float), "a number"),
    "max_new_tokens": ((int,), "an integer"),
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """The fields that this runtime heeds; None: the file does not say, or there is no file."""

    file: Path
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def sampling(
        self,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Sampling:
        """How to draw: what is given wins over the file, and the file over `Sampling`'s defaults.

        Without a `temperature`, tokens are drawn only where the file has `do_sample: true`, at its temperature or 1.
        Raises `ValueError` for a value of the caller out of range, `LoadError` for one of the file.
        """
        from runtime.sampling import Sampling

        given: dict[str, Any] = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
        }
        declared = {name: getattr(self, name) for name in given}
        if not self.do_sample:
            declared["temperature"] = None
        elif self.temperature is None:
            declared["temperature"] = 1.0
        given, declared = ({k: v for k, v in values.items() if v is not None} for values in (given, declared))
        Sampling(**given, seed=seed)
        try:
            return Sampling(**(declared | given), seed=seed)
        except ValueError as error:
            raise LoadError(f"{self.file}: {error}; correct the file, or pass another value") from None


def read_generation_config(directory: str | Path) -> GenerationConfig:
    """Read the file, if there is one.  Raises `LoadError` where it is damaged or a field has another type."""
    file = Path(directory) / FILE
    data = read_object(file)
    values: dict[str, Any] = {}
    for name, (types, what) in KINDS.items():
        value = data.get(name)
        if value is None:
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise LoadError(f"{file}: {name}: expected {what}, found {value!r}; correct the file")
        values[name] = value
    if values.get("max_new_tokens", 1) < 1:
        raise LoadError(f"{file}: max_new_tokens: expected 1 or more, found {values['max_new_tokens']}; correct the file")
    return GenerationConfig(file, eos_token_ids=_ids(file, data.get("eos_token_id")), **values)


def declared_eos_ids(directory: str | Path, declared: int | Sequence[int] | None) -> frozenset[int]:
    """The end-of-text ids that configs name: `declared` (the architecture's) and those of `generation_config.json`."""
    own = () if declared is None else (declared,) if isinstance(declared, int) else declared
    return frozenset((*own, *read_generation_config(directory).eos_token_ids))


def _ids(file: Path, value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise LoadError(f"{file}: eos_token_id: expected an id or a list of ids, found {token!r}; correct the file")
    return tuple(ids)


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, empty when there is no such file.  Raises `LoadError` for anything else."""
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoadError(f"{file}: expected JSON in UTF-8, found {error}; copy the file again") from None
    if not isinstance(data, dict):
        raise LoadError(f"{file}: expected a JSON object, found {type(data).__name__}; copy the file again")
    return data
