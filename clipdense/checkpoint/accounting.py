"""Every key of a file and of a model is accounted for, or it is an error with the full list."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clipdense.checkpoint.io import CheckpointError


@dataclass(frozen=True)
class DropRule:
    """Keys of a file that are left out on purpose.

    Attributes:
        name: of the rule, for the report.
        pattern: regular expression that matches the whole key.
        reason: why the model does not need them.
    """

    name: str
    pattern: str
    reason: str


@dataclass
class Report:
    """What became of every key.

    Attributes:
        loaded: keys that both sides have, with equal shapes.
        missing: keys of the model that the file lacks; `defaulted` are those that may be missing.
        unexpected: keys of the file that the model lacks; `dropped` those that a rule names, by rule.
        mismatched: key -> (shape in the file, shape in the model).
    """

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    defaulted: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    dropped: dict[str, list[str]] = field(default_factory=dict)
    mismatched: dict[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether nothing is left over on either side."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} keys fit"]
        lines += [f"missing in the file: {key}" for key in self.missing]
        lines += [f"unknown to the model: {key}" for key in self.unexpected]
        lines += [
            f"shape of {key}: file {tuple(a)}, model {tuple(b)}" for key, (a, b) in self.mismatched.items()
        ]
        return "\n  ".join(lines)


class CheckpointMismatch(CheckpointError):
    """A file whose keys or shapes do not fit the model; `report` has the lists."""

    def __init__(self, source: str, report: Report, remedy: str = "") -> None:
        super().__init__(f"{source} does not fit the model{': ' + remedy if remedy else ''}\n  {report}")
        self.report = report


def account(
    model: Mapping[str, Tensor],
    file: Mapping[str, Tensor],
    *,
    drops: Sequence[DropRule] = (),
    optional: str | None = None,
) -> Report:
    """Compare the keys and shapes of two state dicts (meta tensors will do).

    Args:
        drops: rules for keys of the file that are left out.
        optional: pattern of keys that the file may lack.
    """
    report = Report()
    for key, tensor in file.items():
        if key in model:
            if tensor.shape == model[key].shape:
                report.loaded.append(key)
            else:
                report.mismatched[key] = (tensor.shape, model[key].shape)
            continue
        rule = next((rule for rule in drops if re.fullmatch(rule.pattern, key)), None)
        if rule is None:
            report.unexpected.append(key)
        else:
            report.dropped.setdefault(rule.name, []).append(key)
    for key in model:
        if key not in file:
            known = optional is not None and re.fullmatch(optional, key)
            (report.defaulted if known else report.missing).append(key)
    return report


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    drops: Sequence[DropRule] = (),
    optional: str | None = None,
    remedy: str = "",
) -> Report:
    """Load a state dict into a module, all or nothing.

    Raises:
        CheckpointMismatch: a key left over on either side, or a shape that differs; the module is unchanged.
    """
    report = account(module.state_dict(), state, drops=drops, optional=optional)
    if not report.complete:
        raise CheckpointMismatch(source, report, remedy)
    module.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    return report
