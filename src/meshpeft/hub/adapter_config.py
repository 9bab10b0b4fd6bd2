"""`adapter_config.json` of Hugging Face PEFT: which modules of a model an adapter changes, and how strongly.

It is written with the fields that decide numbers; everything else is left to PEFT's defaults. A field that changes
numbers in a way that is not implemented is an error on reading. Checked against peft 0.21.

Anyone may have written the file's patterns. peft gives them to `re`, in which `(a+)+b` on a name of sixty letters does
not end, and goes through all keys of `rank_pattern` for every module. Here a plain name is looked up, an expression has
a bounded size and runs against a clock, and the result is peft's.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from meshpeft.hub.tensor_files import CheckpointError, read_json
from meshpeft.parallel.errors import first_line, shown

__all__ = [
    "CONFIG_NAME",
    "FACTOR_A",
    "FACTOR_B",
    "MAGNITUDE",
    "PREFIX",
    "WEIGHTS_NAME",
    "AdapterShape",
    "Clock",
    "EndsOfNames",
    "Expression",
    "KeyedValues",
    "PeftConfig",
    "describe",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What every name in the weights file begins with; what follows a module's name is one of these:"""
FACTOR_A, FACTOR_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"

_READ = frozenset(
    {
        "peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules",
        "layers_to_transform", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights", "bias",
    }
)  # fmt: skip
# Fields that change no number of an adapter that is trained already. `fan_in_fan_out` says that the layer stores its
# weight transposed, which the layer knows better: peft itself corrects the field by the layer's class.
_IRRELEVANT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
        "layers_pattern", "megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "loftq_config",
        "eva_config", "corda_config", "lora_ga_config", "fan_in_fan_out",
    }
)  # fmt: skip
# These start from a changed base model: an adapter that was not converted when it was saved needs that one.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
_LARGEST = 2**31


@dataclass(frozen=True)
class AdapterShape:
    """Rank and strength of the adapter on one module. `alpha / rank` scales it, or `alpha / sqrt(rank)`."""

    rank: int
    alpha: float

    @classmethod
    def of_scale(cls, rank: int, scale: float, use_rslora: bool) -> AdapterShape:
        """Make a shape of this rank, with the alpha that gives this scale."""
        return cls(rank, scale * (math.sqrt(rank) if use_rslora else rank))

    def scale(self, use_rslora: bool) -> float:
        """Factor of B A."""
        return self.alpha / (math.sqrt(self.rank) if use_rslora else self.rank)


@dataclass(frozen=True)
class PeftConfig:
    """The content of an `adapter_config.json`, read and checked.

    Attributes:
        default: Rank and alpha of modules that no pattern names.
        use_rslora: The scale is `alpha / sqrt(rank)`.
        use_dora: The modules have magnitudes.
        dropout: On the adapters' input, in training.
        all_linear: Every linear layer but the vocabulary head is targeted; `target_modules` is empty.
        target_modules: Names (the ends of full names), or one regular expression of full names.
        target_parameters: Names (the ends of full names) of parameters.
        exclude_modules: Names, or an expression, as `target_modules`.
        rank_pattern, alpha_pattern: Regular expression of the end of a full name -> rank, alpha.
        some_layers_only: `target_modules` speak only of the layers that `layers_to_transform` numbers.
    """

    default: AdapterShape
    use_rslora: bool
    use_dora: bool
    dropout: float
    all_linear: bool
    target_modules: EndsOfNames | Expression
    target_parameters: EndsOfNames
    exclude_modules: EndsOfNames | Expression
    rank_pattern: KeyedValues
    alpha_pattern: KeyedValues
    some_layers_only: bool

    @classmethod
    def read(cls, path: Path) -> PeftConfig:
        """Read and check the file.

        Raises:
            CheckpointError: It cannot be read, is of another method than LoRA (or DoRA), or has a field that changes
                numbers in a way that is not implemented.
        """
        fields, clock = read_json(path, CheckpointError, "the directory of an adapter"), Clock(path)
        if fields.get("peft_type") != "LORA":
            raise CheckpointError(f"{path}: peft_type is {shown(fields.get('peft_type'))}; expected 'LORA'")
        unknown = {name: value for name, value in fields.items() if name not in _READ and name not in _IRRELEVANT}
        defaults = _peft_defaults() if any(unknown.values()) else {}
        for name, value in unknown.items():
            # None, False, 0 and empty collections switch a feature off; so does the default of a field that a newer
            # peft has, where that peft is installed and can be asked.
            if value and value != defaults.get(name):
                raise CheckpointError(
                    f"{path}: {_plainly(name)}={shown(value)} is not implemented and may change numbers; remove it if "
                    "it does not"
                )
        if fields.get("bias", "none") != "none":
            raise CheckpointError(
                f"{path}: bias={shown(fields['bias'])} is not implemented; adapters here have no biases"
            )
        if not 0 <= _number(path, "lora_dropout", fields.get("lora_dropout", 0.0)) < 1:
            raise CheckpointError(
                f"{path}: lora_dropout={shown(fields['lora_dropout'])}; expected a probability below 1"
            )
        start = fields.get("init_lora_weights", True)
        start = start.lower() if isinstance(start, str) else ""
        if start.startswith(_CHANGES_BASE):
            raise CheckpointError(
                f"{path}: init_lora_weights={shown(start)} changed the base model; save the adapter again with peft's "
                "path_initial_model_for_weight_conversion, which makes it one for the unchanged base"
            )
        every = fields.get("target_modules") == "all-linear"
        return cls(
            default=AdapterShape(
                _number(path, "r", fields.get("r", 8), int), _number(path, "lora_alpha", fields.get("lora_alpha", 8))
            ),
            use_rslora=bool(fields.get("use_rslora")),
            use_dora=bool(fields.get("use_dora")),
            dropout=_number(path, "lora_dropout", fields.get("lora_dropout", 0.0)),
            all_linear=every,
            target_modules=_names(clock, "target_modules", None if every else fields.get("target_modules")),
            target_parameters=_list(clock, "target_parameters", fields.get("target_parameters")),
            exclude_modules=_names(clock, "exclude_modules", fields.get("exclude_modules")),
            rank_pattern=_pattern(clock, "rank_pattern", fields.get("rank_pattern"), int),
            alpha_pattern=_pattern(clock, "alpha_pattern", fields.get("alpha_pattern"), float),
            some_layers_only=fields.get("layers_to_transform") not in (None, []),
        )

    def shape_of(self, module: str) -> AdapterShape:
        """Look up rank and alpha of the module with this full name."""
        return AdapterShape(
            int(self.rank_pattern.find(module, self.default.rank)),
            self.alpha_pattern.find(module, self.default.alpha),
        )

    def targets(self, modules: Collection[str]) -> set[str]:
        """Select the full names of modules that the configuration targets."""
        chosen = {
            name for name in modules if (name != "lm_head" if self.all_linear else self.target_modules.matches(name))
        }
        return {name for name in chosen if not self.exclude_modules.matches(name)}

    def parameters(self, names: Collection[str]) -> set[str]:
        """Select the full names of parameters that the configuration targets."""
        return {name for name in names if self.target_parameters.matches(name)}


def describe(
    adapted: Collection[str],
    modules: Collection[str],
    parameters: Collection[str],
    shape: AdapterShape,
    *,
    use_dora: bool,
    dropout: float,
    base_model_name_or_path: str | None,
    task: Mapping[str, object],
) -> dict[str, Any]:
    """Make the content of an `adapter_config.json`.

    Args:
        adapted: Full name of each adapted module.
        modules: Full names of all modules that could have an adapter.
        parameters: Full name of each parameter that is adapted as such.
        shape: Rank and alpha of all of them; alpha / rank is their scale.
        use_dora, dropout: Options of all of them; peft takes no dropout where parameters are adapted.
        base_model_name_or_path: Where the base model is to be found.
        task: The fields that say what model that is.
    """
    return {
        "peft_type": "LORA",
        **task,
        "base_model_name_or_path": base_model_name_or_path,
        "inference_mode": True,
        "r": shape.rank,
        "lora_alpha": _plain(shape.alpha),
        "lora_dropout": 0.0 if parameters else dropout,
        "target_modules": _short_names(adapted, modules),
        **({"target_parameters": sorted(parameters)} if parameters else {}),
        # Serving systems pass over these three, or refuse them; see meshpeft.hub.adapter_scales.
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "use_rslora": False,
        "use_dora": use_dora,
    }


def _short_names(adapted: Collection[str], modules: Collection[str]) -> list[str]:
    """Shorten names to their last component where that selects exactly the adapted modules."""
    others = {_leaf(name) for name in modules if name not in adapted}
    return sorted({name if _leaf(name) in others else _leaf(name) for name in adapted})


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _peft_defaults() -> dict[str, Any]:
    """Get the fields of an adapter without special features from the installed peft; empty without one."""
    try:
        from peft import LoraConfig
    except ImportError:
        return {}
    fields: dict[str, Any] = LoraConfig().to_dict()
    return fields


def _plainly(name: str) -> str:
    return name if name.isidentifier() and len(name) < 80 else shown(name)


def _number(path: Path, name: str, value: Any, kind: type = float) -> Any:
    right = isinstance(value, int) if kind is int else isinstance(value, int | float)
    # 2^31: no adapter has such a rank, and no float overflows when it is multiplied.
    if not right or isinstance(value, bool) or not -_LARGEST < value < _LARGEST or (kind is int and value < 1):
        raise CheckpointError(
            f"{path}: {name}={shown(value)}; expected {'an integer of at least 1' if kind is int else 'a number'}"
        )
    return value


def _names(clock: Clock, name: str, value: Any) -> EndsOfNames | Expression:
    if isinstance(value, str) and value:
        return Expression(value, clock, name)
    if not value or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return EndsOfNames(value or ())
    raise CheckpointError(f"{clock.path}: {name}={shown(value)}; expected a list of names, or one regular expression")


def _list(clock: Clock, name: str, value: Any) -> EndsOfNames:
    if isinstance(value, str):
        raise CheckpointError(f"{clock.path}: {name}={shown(value)}; expected a list of names")
    found = _names(clock, name, value)
    assert isinstance(found, EndsOfNames)
    return found


def _pattern(clock: Clock, name: str, value: Any, kind: type) -> KeyedValues:
    if not isinstance(value or {}, dict):
        raise CheckpointError(f"{clock.path}: {name}={shown(value)}; expected an object of names and numbers")
    for key, number in (value or {}).items():
        _number(clock.path, f"{name}[{shown(key)}]", number, kind)
    return KeyedValues(value or {}, clock, name)


_MOST_CHARACTERS = 16_384
"""Of an expression that is no plain name; compiling takes seconds for more."""
_LARGEST_EXPRESSION = 200_000
"""Its characters times its counted repetitions, which `regex` writes out when it compiles."""
_SECONDS = 4.0
_PLAIN = re.compile(r"[\w.-]+")
_COUNTED = re.compile(r"\{(\d*),?(\d*)\}")


class Clock:
    """Budget of processor time for matching all expressions of one file.

    Args:
        path: The file, for the message.
        seconds: For all of them; honest ones take milliseconds.
    """

    def __init__(self, path: Path, seconds: float = _SECONDS) -> None:
        self.path, self._left = path, seconds

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
            CheckpointError: None are left.
        """
        if self._left <= 0:
            raise CheckpointError(
                f"{self.path}: its expressions take longer than any honest one to match the model's layers; write "
                "names in their place"
            )
        return self._left

    def take(self, seconds: float) -> None:
        """Use up some of it."""
        self._left -= seconds


class Expression:
    """A regular expression, as `re` reads it.

    Args:
        text: The expression.
        clock: Clock of its file.
        field: Where it stands, for messages.
        template: Text that it is put into before it is compiled.

    Raises:
        CheckpointError: It is none, or larger than any that selects layers.
    """

    def __init__(self, text: str, clock: Clock, field: str, template: str = "{}") -> None:
        self.text, self._clock, self._field, self._template = text, clock, field, template
        self._compiled: regex.Pattern[str] | None = None
        size = len(text)
        for least, most in _COUNTED.findall(text[:_MOST_CHARACTERS]):
            size = min(size * max(int(least[:9] or 0), int(most[:9] or 0), 1), 10**12)
        if len(text) > _MOST_CHARACTERS or size > _LARGEST_EXPRESSION:
            raise CheckpointError(
                f"{clock.path}: {field}: {shown(text)} is larger than any expression that selects layers: "
                f"{len(text):,} characters, {size:,} with its repetitions; write names in its place"
            )
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                # What will change in a later Python, as a set in a set, is not what peft meant either.
                warnings.simplefilter("error", FutureWarning)
                re.compile(text)
        except (re.error, FutureWarning, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{clock.path}: {field}: {shown(text)} is not a regular expression: {first_line(error)}"
            ) from error
        clock.take(time.process_time() - start)
        # `regex` has fuzzy matching there, `re` a brace.
        if "{" in _COUNTED.sub("", text):
            raise CheckpointError(f"{clock.path}: {field}: {shown(text)}: no module's name has a brace in it")

    def matches(self, name: str) -> bool:
        """Whether the expression matches all of a name.

        Raises:
            CheckpointError: It takes too long to find out.
        """
        left, start = self._clock.left(), time.process_time()
        try:
            if self._compiled is None:
                self._compiled = regex.compile(self._template.format(self.text), regex.VERSION0)
            return self._compiled.fullmatch(name, timeout=left) is not None
        except TimeoutError as error:
            self._clock.take(left)
            raise CheckpointError(
                f"{self._clock.path}: {self._field}: {shown(self.text)} takes longer than {_SECONDS:.0f} s to match; "
                "write the names of the layers in its place"
            ) from error
        except (regex.error, RecursionError, MemoryError) as error:
            raise CheckpointError(
                f"{self._clock.path}: {self._field}: {shown(self.text)} is not a regular expression: "
                f"{first_line(error)}"
            ) from error
        finally:
            self._clock.take(time.process_time() - start)


class EndsOfNames:
    """A list of names. A name matches that is one of them, or ends in one after a dot."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)

    def matches(self, name: str) -> bool:
        """Whether the list has the name, or its end."""
        return any(end in self._names for end in _ends(name))


class KeyedValues:
    """`rank_pattern` or `alpha_pattern`: the value of the first key that matches a name, or its end after a dot.

    A key is an expression. Most are plain names, whose dots match any character: they are looked up, by the places of
    their dots.

    Raises:
        CheckpointError: A key is no expression.
    """

    def __init__(self, values: Mapping[str, float], clock: Clock, field: str) -> None:
        self._values = list(values.values())
        self._found: dict[str, int | None] = {}
        self._expressions: list[tuple[int, Expression]] = []
        # Length of a key -> places of its dots -> what stands between them -> the key's number.
        self._plain: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        for number, key in enumerate(values):
            if _PLAIN.fullmatch(key):
                dots = tuple(at for at, character in enumerate(key) if character == ".")
                self._plain.setdefault(len(key), {}).setdefault(dots, {}).setdefault(_between(key, dots), number)
            else:
                clock.left()
                self._expressions.append((number, Expression(key, clock, field, r"(.*\.)?({})")))

    def __len__(self) -> int:
        return len(self._values)

    def find(self, name: str, default: float) -> float:
        """Look up the value of a full name.

        Raises:
            CheckpointError: An expression takes too long.
        """
        if name not in self._found:
            self._found[name] = self._first(name)
        number = self._found[name]
        return default if number is None else self._values[number]

    def _first(self, name: str) -> int | None:
        plain = [
            keys[between]
            for end in _ends(name)
            for dots, keys in self._plain.get(len(end), {}).items()
            if (between := _between(end, dots)) in keys
        ]
        best = min(plain, default=None)
        for number, expression in self._expressions:
            if best is not None and best < number:
                return best
            if expression.matches(name):
                return number
        return best


def _ends(name: str) -> Iterator[str]:
    """Yield a name, and what follows each of its dots."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _between(text: str, dots: tuple[int, ...]) -> str:
    """Remove the characters at some indices from a text."""
    starts = (0, *(at + 1 for at in dots))
    return "\n".join(text[start:end] for start, end in zip(starts, (*dots, len(text)), strict=True))
