"""The table of last-block modes of dense CLIP methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from clipdense.clip.attention.block import Block, History, TokenStream

ModeFunction = Callable[..., TokenStream]
"""From (block, stream), or (history) if the mode reads earlier blocks, then the guidance if the mode takes
one, and keyword options, to the stream that leaves the last block."""
AnyMode = TypeVar("AnyMode", bound=ModeFunction)


@dataclass(frozen=True)
class Mode:
    """A last-block mode: from the tokens that enter the last block to the tokens that leave it.

    Attributes:
        name: first name of the mode.
        function: takes the block view and the token stream (with ``reads_history``: the history), and the
            guidance if the mode has one. The returned stream may have another grid (ProxyCLIP: the grid of
            the external features), and may lack the tokens before the patches.
        class_token: whether the mode reads the class token; towers without one do not offer it.
        guidance: what the guidance tensor must be (meaning and shape, e.g. "patch features (B, C, h, w) of
            another model"); empty if the mode takes none.
        reads_history: whether the mode reads the tokens of earlier blocks.
    """

    name: str
    function: ModeFunction
    class_token: bool = False
    guidance: str = ""
    reads_history: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword options of the mode."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)

    def __call__(
        self,
        block: Block,
        stream: TokenStream,
        guidance: Tensor | None = None,
        *,
        history: History | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> TokenStream:
        """Run the mode.

        Args:
            block: view of the last block.
            stream: tokens that enter it.
            guidance: external tensor that steers the attention; see the attribute.
            history: the whole forward up to the last block; only for a mode that reads earlier blocks.
            options: keyword options of the mode; None for its defaults.

        Raises:
            ValueError: If the mode takes guidance and there is none, or the reverse, if it does not have an
                option, or if it reads earlier blocks and there is no history.
        """
        self.check_guidance(guidance)
        self.check_options(options or {})
        arguments: tuple[Any, ...] = (block, stream)
        if self.reads_history:
            if history is None:
                raise ValueError(f"mode '{self.name}' reads earlier blocks: pass the history of the forward")
            arguments = (history,)
        if guidance is not None:
            arguments = (*arguments, guidance)
        return self.function(*arguments, **(options or {}))

    def check_guidance(self, guidance: Tensor | None) -> None:
        """Raise ValueError unless guidance is given exactly if the mode takes it."""
        if guidance is None and self.guidance:
            raise ValueError(
                f"mode '{self.name}' needs guidance: pass {self.guidance} in TowerRequest.guidance"
            )
        if guidance is not None and not self.guidance:
            raise ValueError(f"mode '{self.name}' takes no guidance, but TowerRequest.guidance is set")

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Raise ValueError if the mode does not have one of the options."""
        if unknown := sorted(set(options) - set(self.options)):
            known = ", ".join(self.options) or "none"
            raise ValueError(
                f"mode '{self.name}' has no option {', '.join(unknown)}; its options are {known}"
            )


MODES: dict[str, Mode] = {}


def dense_mode(
    *names: str, class_token: bool = False, guidance: str = "", reads_history: bool = False
) -> Callable[[AnyMode], AnyMode]:
    """Register a last-block mode.

    Args:
        names: names that methods use for the mode; the first is the main one.
        class_token: see `Mode`.
        guidance: see `Mode`.
        reads_history: see `Mode`.

    Returns:
        Decorator that returns the function unchanged.
    """

    def register(function: AnyMode) -> AnyMode:
        MODES.update(dict.fromkeys(names, Mode(names[0], function, class_token, guidance, reads_history)))
        return function

    return register


def get_mode(name: str) -> Mode:
    """Return a last-block mode by name.

    Raises:
        ValueError: If the mode is unknown.
    """
    if name not in MODES:
        raise ValueError(f"unknown last-block mode '{name}'; known: {', '.join(MODES)}")
    return MODES[name]
