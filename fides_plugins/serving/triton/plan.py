"""What attach writes for one model, worked out in memory before anything touches the disk.

MODEL/configs/fides.pbtxt   the ensemble under the model's own name: exactly its outputs
MODEL__base/                the model itself, by links
MODEL__fides_verify/        asks the verifiers, next to the base model
MODEL__fides_validate/      judges
MODEL__fides_fallback/      marks or refuses while a step is dead; idle otherwise
MODEL__fides/               the ensemble that adds the verdict, and the manifest of what was written
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from fides_plugins.bundle import MANIFEST_NAME, Bundle
from fides_plugins.errors import ServerError, SettingsError
from fides_plugins.pipeline import Pipeline
from fides_plugins.serving.triton import wire
from fides_plugins.serving.triton.config import (
    CONFIG_FILE,
    ModelInfo,
    Tensor,
    class_output,
    is_batchless,
    parse_json,
    to_text,
    verified_input,
)
from fides_plugins.serving.triton.decoders import make_decoder
from fides_plugins.settings import PARAMETER_PREFIX, Settings, nest

#: Name of the alternative configuration: `configs/fides.pbtxt`, `--model-config-name=fides`.
CONFIG_NAME = "fides"
#: Settings that attach works out or checks itself, each with an option of the same name.
_OWN_OPTIONS = {"bundle", "input", "output", "output_kind"}
_SHIM = (
    "# Settings are the parameters `fides.*` of config.pbtxt.\n"
    "from fides_plugins.serving.triton.entry import {entry} as TritonPythonModel\n"
)


@dataclass(frozen=True)
class AttachOptions:
    """What the user asks for.

    Attributes
    ----------
    bundle:
        Folder of the bundle; it is copied into the repository.
    serve_as:
        Name under which the protected model appears; empty: the model's own name (takeover).
    version, input, output, output_kind, decode:
        What cannot be told from the configuration.
    pass_inputs:
        Hand the inputs to `fides_validate` as well, for plug-ins that look at them; costs a copy.
    settings:
        Keys of `fides_plugins.settings` as dotted text, such as {"mode": "flag", "plugins.blocked": "a"}.
    """

    bundle: Path
    serve_as: str = ""
    version: int | None = None
    input: str = ""
    output: str = ""
    output_kind: str = ""
    decode: str = ""
    pass_inputs: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Plan:
    """Everything to be written, by path relative to the repository.

    Attributes
    ----------
    model, public:
        The protected model, and the name under which clients reach the protected one.
    files, links, folders:
        Contents, link targets, and folders that may stay empty (version folders of ensembles).
    ensembles:
        Name of each ensemble to its configuration text.
    notes:
        What the user should know.
    """

    model: str
    public: str
    files: dict[str, bytes] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    ensembles: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def takeover(self) -> bool:
        """Whether the protected model answers under the model's own name."""
        return self.model == self.public

    @property
    def base(self) -> str:
        """Name under which the unprotected model is reached."""
        return f"{self.model}__base" if self.takeover else self.model

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the python models that attach adds."""
        return tuple(f"{self.public}__fides_{part}" for part in ("verify", "validate", "fallback"))

    @property
    def verdict_model(self) -> str:
        """Name of the ensemble with the verdict outputs."""
        return f"{self.public}__fides"


def make_plan(info: ModelInfo, options: AttachOptions) -> Plan:
    """Work out everything that is written besides the base model.

    Raises
    ------
    FidesError
        If the model cannot be protected with this bundle and these settings; nothing was written.
    """
    clash = {i.name for i in info.inputs} & {o.name for o in info.outputs}
    if clash:
        raise ServerError(
            f"{info.name!r} has an input and an output called {sorted(clash)[0]!r}; an ensemble cannot tell them "
            "apart.",
            "Rename one of them.",
        )
    for key in sorted(_OWN_OPTIONS & options.settings.keys()):
        raise SettingsError(f"{key!r} is no setting for attach.", f"Use the option --{key.replace('_', '-')}.")
    bundle = Bundle.load(options.bundle)
    plan = Plan(info.name, options.serve_as or info.name)
    output = class_output(info, bundle, options.output)
    batchless = is_batchless(output, info.max_batch_size)
    tensor, cast = verified_input(info, bundle, options.input, make_decoder(options.decode), batchless)
    if cast:
        plan.notes.append(
            f"The input {tensor.name!r} ({tensor.dtype}) is converted to {cast} for the verification model."
        )
    if len(info.outputs) > 1:
        others = ", ".join(o.name for o in info.outputs if o.name != output.name)
        plan.notes.append(f"Validation judges {output.name!r}; {others} passes as the service gives it.")
    parameters = {
        PARAMETER_PREFIX + "service_name": plan.public,
        **{PARAMETER_PREFIX + k: v for k, v in options.settings.items()},
        PARAMETER_PREFIX + "bundle": f"../{plan.steps[0]}/bundle",
        PARAMETER_PREFIX + "input": tensor.name,
        PARAMETER_PREFIX + "output": output.name,
        PARAMETER_PREFIX + "output_kind": options.output_kind or bundle.manifest.service.output_kind,
    }
    if batchless:
        parameters[wire.STEP_PREFIX + "batchless"] = "true"
    # Loading the plug-ins now shows what would otherwise stop the server at its next start.
    settings = Settings.from_mapping({**nest(parameters), "bundle": str(options.bundle.resolve())})
    Pipeline.from_settings(settings).close()
    for_verify = {**parameters, PARAMETER_PREFIX + "bundle": "bundle"}
    if options.decode:
        for_verify[wire.STEP_PREFIX + "decode"] = options.decode
    elif cast:
        for_verify[wire.STEP_PREFIX + "cast"] = cast
    for name in bundle.file_names:
        plan.files[f"{plan.steps[0]}/bundle/{name}"] = bundle.file(name)
    plan.files[f"{plan.steps[0]}/bundle/{MANIFEST_NAME}"] = (options.bundle / MANIFEST_NAME).read_bytes()
    writer = _Writer(plan, info, output, batchless, bundle.n_classes, options.pass_inputs)
    writer.add_steps(parameters, for_verify)
    writer.add_ensembles()
    for folder in plan.steps[1:]:
        _link_labels(plan, folder, [output])
    for folder in plan.ensembles:
        if folder != plan.model:
            _link_labels(plan, folder, info.outputs)
    return plan


def _link_labels(plan: Plan, folder: str, outputs: Sequence[Tensor]) -> None:
    """Link the label files that `folder` declares; Triton does not load a model without them."""
    for label in filter(None, (o.label_file for o in outputs)):
        depth = PurePosixPath(label).parts
        # A file beside the model's folder is found from any folder of the repository.
        if ".." not in depth:
            plan.links[f"{folder}/{label}"] = "../" * len(depth) + f"{plan.model}/{label}"


@dataclass(frozen=True)
class _Writer:
    """Adds the configurations of steps and ensembles to a plan; `batchless`: the class output has no row axis."""

    plan: Plan
    info: ModelInfo
    output: Tensor
    batchless: bool
    n_classes: int
    pass_inputs: bool

    @property
    def internal(self) -> list[Tensor]:
        """What travels from `fides_verify` to `fides_validate`; these tensors always have a row axis."""
        rows = () if self.info.max_batch_size else (-1,)
        return [
            Tensor(wire.REFERENCES, "FP32", (*rows, -1, self.n_classes)),
            Tensor(wire.AVAILABLE, "UINT8", (*rows, -1)),
            Tensor(wire.VERIFICATION, "UINT8", (*rows, -1)),
        ]

    @property
    def verdict(self) -> list[Tensor]:
        rows = () if self.info.max_batch_size or self.batchless else (-1,)
        column = (1,) if self.info.max_batch_size else (-1,)
        wide = {wire.PROBABILITIES: (*rows, self.n_classes)}
        return [Tensor(name, dtype, wide.get(name, column)) for name, dtype in wire.VERDICT_TYPES.items()]

    def add_steps(self, parameters: Mapping[str, str], for_verify: Mapping[str, str]) -> None:
        verify, validate, fallback = self.plan.steps
        given = [replace(self.output, label_file=""), *(self.info.inputs if self.pass_inputs else ())]
        answers = [self.output, *self.verdict]
        steps = {
            verify: ("Verify", self.info.inputs, self.internal, for_verify),
            validate: ("Validate", [*given, *self.internal], answers, parameters),
            fallback: ("Validate", given, answers, parameters),
        }
        # Requests that wait for an instance are taken together: one call of the verification model, and if
        # the instance died they fail together instead of one second after the other.
        batching: dict[str, Any] = {"dynamic_batching": {}} if self.info.max_batch_size else {}
        for name, (entry, taken, made, settings) in steps.items():
            group = [{"kind": "KIND_CPU", "count": 1}]
            config = self._config(taken, made, backend="python", instance_group=group, **batching)
            # One line each, because operators edit them; strings of JSON are strings of protobuf's text format.
            for key, value in sorted(settings.items()):
                name_text, value_text = (json.dumps(text, ensure_ascii=False) for text in (key, value))
                config += f"parameters {{ key: {name_text} value {{ string_value: {value_text} }} }}\n"
            self.plan.files[f"{name}/{CONFIG_FILE}"] = config.encode()
            self.plan.files[f"{name}/1/model.py"] = _SHIM.format(entry=entry).encode()

    def add_ensembles(self) -> None:
        plan = self.plan
        for name, verdict in ((plan.public, []), (plan.verdict_model, self.verdict)):
            text = plan.ensembles[name] = self._ensemble(verdict)
            if name == plan.model:
                plan.files[f"{name}/configs/{CONFIG_NAME}.pbtxt"] = text.encode()
            else:
                plan.files[f"{name}/{CONFIG_FILE}"] = text.encode()
                plan.folders.append(f"{name}/{self.info.version}")

    def _ensemble(self, verdict: Sequence[Tensor]) -> str:
        verify, validate, _ = self.plan.steps
        output, version = self.output.name, self.info.version
        service = {o.name: (f"service.{o.name}" if o.name == output else o.name) for o in self.info.outputs}
        same = {i.name: i.name for i in self.info.inputs}
        between = {t.name: t.name for t in self.internal}
        judged = {output: service[output], **(same if self.pass_inputs else {}), **between}
        answer = {output: output, **{t.name: t.name for t in verdict}}
        # The order matters. Steps that wait for nothing are started one after the other, and if the first fails
        # before the second is started, Triton 2.51 crashes (triton-inference-server/core#483). The service
        # answers with errors whenever a client's input is bad; `fides_verify` never does.
        steps = [
            _step(verify, 1, same, between),
            _step(self.plan.base, version, same, service),
            _step(validate, 1, judged, answer),
        ]
        return self._config(
            self.info.inputs,
            [*self.info.outputs, *verdict],
            platform="ensemble",
            version_policy={"specific": {"versions": [version]}},
            ensemble_scheduling={"step": steps},
        )

    def _config(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], **fields: Any) -> str:
        tensors = {"input": [t.entry for t in inputs], "output": [t.entry for t in outputs]}
        return to_text(parse_json({"max_batch_size": self.info.max_batch_size, **tensors, **fields}))


def _step(model: str, version: int, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> dict[str, Any]:
    return {"model_name": model, "model_version": version, "input_map": inputs, "output_map": outputs}
