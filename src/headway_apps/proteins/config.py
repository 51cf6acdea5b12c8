"""What a training run is: a YAML file, checked whole before anything is begun. No key is ignored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from headway import HeadwayError
from headway_apps.proteins.alphabet import ALPHABETS, Alphabet
from headway_apps.proteins.diffusion.curriculum import Curriculum, EarlyTimes, LessNoise, Steady
from headway_apps.proteins.diffusion.graphs import Absorbing, Graph, Uniform
from headway_apps.proteins.diffusion.schedules import Schedule
from headway_apps.proteins.model.config import DiTConfig
from headway_apps.proteins.model.presets import PRESETS, preset
from headway_apps.proteins.trained import SCHEDULES

FILE = "config.yaml"
"""In a run's folder, with all defaults."""

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConfigError(HeadwayError, ValueError):
    """A config, or a change to one, is not what it should be."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    def given(self, *without: str) -> dict[str, Any]:
        """What was said, but for these keys and those left to their default."""
        said = {name: getattr(self, name) for name in self.model_fields_set if name not in without}
        return {name: value for name, value in said.items() if value is not None}


class Data(Section):
    folder: str
    """Made by `headway proteins prepare`."""
    alphabet: Literal["esm", "seed"] = "esm"

    @property
    def symbols(self) -> Alphabet:
        return ALPHABETS[self.alphabet]


class Model(Section):
    """A named size, fields of a size, or a named size with fields changed. Symbols are the alphabet's."""

    preset: str | None = None
    width: Count | None = None
    blocks: Count | None = None
    heads: Count | None = None
    cond: Count | None = None
    mlp_ratio: Count | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    scale_by_sigma: bool | None = None
    head_bias: bool | None = None
    gelu: Literal["tanh", "erf"] | None = None
    silu_after_time: bool | None = None
    final: Literal["shift and scale", "scale"] | None = None

    @model_validator(mode="after")
    def _whole(self) -> Model:
        if self.preset is None and (missing := {"width", "blocks", "heads", "cond"} - self.model_fields_set):
            raise ValueError(f"has neither a preset ({', '.join(PRESETS)}) nor {', '.join(sorted(missing))}")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"got preset {self.preset!r}, takes {', '.join(PRESETS)}")
        return self

    def network(self, alphabet: Alphabet, graph: str) -> DiTConfig:
        changes = self.given("preset") | {"embedded": alphabet.size, "scored": alphabet.size}
        changes["mask"] = alphabet.mask if graph == "absorbing" else None
        if graph == "uniform":
            changes.setdefault("scale_by_sigma", False)
        return DiTConfig(**changes) if self.preset is None else preset(self.preset, **changes)


class Noise(Section):
    graph: Literal["absorbing", "uniform"] = "absorbing"
    schedule: Literal["log-linear", "geometric", "cosine"] = "log-linear"
    eps: Positive | None = None
    sigma_min: Positive | None = None
    sigma_max: Positive | None = None
    reaches: Share | None = None
    """The least probability of having jumped by the end that is taken."""
    loss: Literal["cross-entropy", "score-entropy"] = "cross-entropy"

    @model_validator(mode="after")
    def _one_of_them(self) -> Noise:
        if self.graph == "uniform" and self.loss == "cross-entropy":
            raise ValueError("got the cross-entropy with uniform noise, takes loss: score-entropy there")
        _ = self.levels
        return self

    @property
    def levels(self) -> Schedule:
        kind, said = SCHEDULES[self.schedule], self.given("graph", "schedule", "loss")
        fields = {each.name: each.default is dataclasses.MISSING for each in dataclasses.fields(kind)}
        if more := said.keys() - fields.keys():
            raise ValueError(f"got {', '.join(sorted(more))}, takes {', '.join(fields)} with schedule: {self.schedule}")
        if missing := {name for name, needed in fields.items() if needed} - said.keys():
            raise ValueError(f"has no {', '.join(missing)}, which schedule: {self.schedule} needs")
        return kind(**said)

    def of(self, alphabet: Alphabet, letters: str) -> Graph:
        """Over the letters that occur in the data, the twenty residues at least."""
        ids = tuple(sorted({*alphabet.residues, *map(alphabet.id_of, letters)}))
        if self.graph == "absorbing":
            return Absorbing(alphabet.size, mask=alphabet.mask, ids=ids)
        return Uniform(alphabet.size, ids=ids)


class Stages(Section):
    kind: Literal["none", "less-noise", "early-times"] = "none"
    steps: Count | None = None
    shape: Literal["linear", "exponential", "cosine"] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Stages:
        fits = {"none": set(), "less-noise": {"steps", "shape"}, "early-times": {"steps"}}[self.kind]
        if more := self.given("kind").keys() - fits:
            raise ValueError(f"got {', '.join(sorted(more))}, which kind: {self.kind} does not take")
        return self

    @property
    def curriculum(self) -> Curriculum:
        kinds: dict[str, type[Curriculum]] = {"none": Steady, "less-noise": LessNoise, "early-times": EarlyTimes}
        return kinds[self.kind](**self.given("kind"))


class Batching(Section):
    tokens: Count = 16384
    """Of one batch of one process, boundary tokens with them."""
    per_step: Count = 1
    """Batches of all processes together that make one step of the optimizer."""
    buckets: list[Count] = []


class Optim(Section):
    lr: Positive = 3e-4
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup: Annotated[int, Field(ge=0)] = 2500
    least: Share = 0.0
    """The share of `lr` that the last step has."""
    clip: Positive | None = 1.0
    average: Annotated[float, Field(ge=0, lt=1)] | None = 0.9999
    """Decay of the weights' moving average, which is what is evaluated and sampled."""


class Run(Section):
    steps: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: str = "auto"
    precision: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    checkpointing: bool = False
    """Keep no activations inside blocks, but compute them again."""
    compile: bool = False
    replay: Literal["auto"] | bool = "auto"
    """Record a batch's passes once, as a CUDA graph, and replay them; by itself wherever that can be."""
    shard: bool = False
    """Split weights and optimizer over the processes (FSDP2), where there are several."""


class Every(Section):
    """After how many steps something is done."""

    log: Count = 20
    save: Count = 1000
    evaluate: Count = 1000
    samples: Count = 1000


class Keeping(Section):
    checkpoints: Count = 3
    """The last so many, and the best."""
    trackers: list[Literal["jsonl", "tensorboard", "wandb", "trackio"]] = ["jsonl"]
    project: str = "headway-proteins"
    name: str | None = None


class Looking(Section):
    part: str = "held_out"
    sequences: Count | None = None
    """So many of the part, drawn by the seed; all, where not given."""
    draws: Count = 1
    samples: Annotated[int, Field(ge=0)] = 20


class Config(Section):
    """All of a run."""

    data: Data
    model: Model
    run: Run
    noise: Noise = Noise()
    curriculum: Stages = Stages()
    batch: Batching = Batching()
    optim: Optim = Optim()
    every: Every = Every()
    keep: Keeping = Keeping()
    look: Looking = Looking()

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        try:
            _ = self.network
        except HeadwayError as error:
            raise ValueError(f"model: {error}") from error
        if self.optim.warmup >= self.run.steps:
            raise ValueError(
                f"got optim.warmup={self.optim.warmup} in run.steps={self.run.steps}, takes less; say optim.warmup"
            )
        return self

    @property
    def network(self) -> DiTConfig:
        return self.model.network(self.data.symbols, self.noise.graph)

    def to_yaml(self) -> str:
        """All keys with their values, also those left to their defaults; reading it gives this config again."""
        return str(yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True))


# -- from a file ------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 1e-4 is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is no word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_NUMBER = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def read(path: Path, changes: Sequence[str] = ()) -> Config:
    """The config in a file, with changes such as 'optim.lr=1e-4'."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return parse(text, changes, name=str(path))


def parse(text: str, changes: Sequence[str] = (), name: str = "the config") -> Config:
    try:
        node = yaml.compose(text, Loader=_Loader)
        held = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none is a ValueError
        raise ConfigError(_broken(error, name)) from error
    if not isinstance(held, dict):
        raise ConfigError(f"got {name}, which holds no sections, takes {', '.join(Config.model_fields)}")
    lines = dict(_lines(node))
    for change in changes:
        _change(held, change)
        at = tuple(change.split("=", 1)[0].split("."))
        lines = {key: line for key, line in lines.items() if key[: len(at)] != at} | {at: f"--set {change}"}
    try:
        return Config.model_validate(held)
    except ValidationError as error:
        raise ConfigError("; ".join(_told(each, lines, name) for each in error.errors())) from None
    except HeadwayError as error:
        raise ConfigError(f"{name}: {error}") from error


def _broken(error: Exception, name: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
    said = [each for each in (getattr(error, "context", None), getattr(error, "problem", None)) if each]
    return f"{name}{where}: cannot be read as YAML: {', '.join(said) or ' '.join(str(error).split())}"


def _lines(node: yaml.Node | None, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where each key stands."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            yield here, f"line {key.start_mark.line + 1}"
            yield from _lines(value, here)


def _change(held: dict[str, Any], change: str) -> None:
    path, equals, value = change.partition("=")
    *sections, last = path.split(".")
    if not equals or not last:
        raise ConfigError(f"got --set {change}, takes section.key=value, such as optim.lr=1e-4")
    for section in sections:
        held = held.setdefault(section, {})
        if not isinstance(held, dict):
            raise ConfigError(f"got --set {change}, but {section} is no section")
    try:
        held[last] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"got --set {change}, whose value is no YAML: {' '.join(str(error).split())}") from error


def _told(error: Any, lines: dict[tuple[str, ...], str], name: str) -> str:
    loc = tuple(str(each) for each in error["loc"])
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), "")
    where = f"{name}, {line}" if line and not line.startswith("--set") else line or name
    # What a section as a whole is wrong in may come from a change to a part of it.
    inside = [line for at, line in lines.items() if loc and line.startswith("--set") and at[: len(loc)] == loc != at]
    where = ", ".join((where, *inside))
    key = ".".join(loc)
    if error["type"] == "extra_forbidden":
        known = _section(loc[:-1])
        return f"{where}: {key} is unknown, takes {', '.join(known.model_fields)}"
    if error["type"] == "missing":
        return f"{where}: {key} is missing, and has no default"
    said = error["msg"].removeprefix("Value error, ")
    got = f", got {error['input']!r}" if not isinstance(error["input"], dict) and error["type"] != "value_error" else ""
    return ": ".join(filter(None, (where, key, said + got)))


def _section(loc: tuple[str, ...]) -> type[BaseModel]:
    found: type[BaseModel] = Config
    for each in loc:
        found = found.model_fields[each].annotation  # type: ignore[assignment]
    return found


def parameters(config: DiTConfig) -> int:
    """How many weights the network will have, without making it."""
    d, c, v = config.width, config.cond, config.scored
    block = (4 + 2 * config.mlp_ratio) * d * d + (3 + config.mlp_ratio) * d + 6 * d * c + 6 * d
    time = 256 * c + c + c * c + c
    chunks = 2 if config.final == "shift and scale" else 1
    head = d * v + (v if config.head_bias else 0) + d + chunks * (c * d + d)
    return config.embedded * d + time + config.blocks * block + head
