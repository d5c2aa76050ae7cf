"""Strict loading: every key of file and model is accounted for; otherwise an error lists all differences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from clipdense.checkpoint.io import CheckpointError


@dataclass(frozen=True)
class DropRule:
    """Keys of a file that are ignored on purpose.

    Attributes:
        name: name of the rule, for the report.
        pattern: regular expression that matches the whole key.
        reason: why the model does not need these keys.
    """

    name: str
    pattern: str
    reason: str


@dataclass
class Report:
    """Result of comparing the keys of a file and a model.

    Attributes:
        loaded: keys that both sides have, with equal shapes.
        missing: keys of the model that the file lacks.
        defaulted: keys of the model that the file lacks and may lack.
        unexpected: keys of the file that the model lacks.
        dropped: keys of the file that a rule ignores, by the rule's name.
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
        """Whether neither side has missing, unexpected or mismatched keys."""
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
    """The keys or shapes of a file do not fit the model; ``report`` lists all differences."""

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
    """Compare the keys and shapes of two state dicts; meta tensors are allowed.

    Args:
        model: state dict of the model.
        file: state dict of the file.
        drops: rules for keys of the file that are ignored.
        optional: regular expression of keys that the file may lack.
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
    """Load a state dict into a module completely or not at all.

    Args:
        module: the module.
        state: tensors by key.
        source: name of the file, for the error.
        drops: rules for keys of the file that are ignored.
        optional: regular expression of keys that the file may lack.
        remedy: what the user can do, for the error.

    Raises:
        CheckpointMismatch: If keys are missing or unexpected, or shapes differ; the module is unchanged.
    """
    report = account(module.state_dict(), state, drops=drops, optional=optional)
    if not report.complete:
        raise CheckpointMismatch(source, report, remedy)
    module.load_state_dict({key: state[key] for key in report.loaded}, strict=False)
    return report
