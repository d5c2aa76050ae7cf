"""Limits of the web page, and the errors that its users see."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Limits", "RequestError"]


class RequestError(ValueError):
    """A request of the page that cannot be served; its message is shown on the page."""


@dataclass(frozen=True)
class Limits:
    """What one request may contain, and how many requests may wait.

    Attributes:
        images: images of a request.
        megabytes: size of an uploaded file.
        megapixels: size of an image, in millions of pixels.
        vocabularies: lines of words in a request.
        words: classes of a vocabulary, with its background.
        characters: length of a text field.
        waiting: requests in the queue; further ones are refused.

    Raises:
        ValueError: If a limit is not positive.
    """

    images: int = 8
    megabytes: int = 20
    megapixels: int = 16
    vocabularies: int = 4
    words: int = 100
    characters: int = 4000
    waiting: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"the limit on {name} must be at least 1, got {value}")
