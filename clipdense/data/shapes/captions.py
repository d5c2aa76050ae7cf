"""Captions of scenes of the `shapes` world, and synonyms of its class names."""

from collections.abc import Sequence

from clipdense.data.shapes.draw import Rng
from clipdense.data.shapes.world import COLORS, GROUNDS, SHAPES, Scene

SYNONYMS: dict[str, tuple[str, ...]] = {
    "red": ("red", "crimson", "scarlet"),
    "orange": ("orange",),
    "yellow": ("yellow", "golden"),
    "green": ("green", "emerald"),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue", "azure"),
    "purple": ("purple", "violet"),
    "pink": ("pink", "magenta"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "moon": ("moon", "crescent"),
    "arrow": ("arrow", "pointer"),
    "hourglass": ("hourglass", "bow tie"),
    "grass": ("grass", "lawn"),
    "sand": ("sand", "beach"),
    "water": ("water", "waves"),
    "brick": ("brick", "brick wall"),
    "wood": ("wood", "planks"),
    "gravel": ("gravel", "pebbles"),
    "snow": ("snow",),
    "tiles": ("tiles", "tiled floor"),
}
"""Synonyms of every colour, shape and ground. The first one is the word of the class name."""

_OPENINGS = ("", "", "a photo of ", "a picture of ", "an image of ", "there is ", "we see ")
_JOINTS = (" on ", " on ", " on the ", " over ", " against ")


def _word(rng: Rng, name: str) -> str:
    words = SYNONYMS[name]
    return words[0] if len(words) == 1 or rng.uniform(0, 1) < 0.6 else words[rng.integer(1, len(words) - 1)]


def _noun(rng: Rng, category: int) -> str:
    noun = f"{_word(rng, COLORS[category // len(SHAPES)])} {_word(rng, SHAPES[category % len(SHAPES)])}"
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def phrase(rng: Rng, categories: Sequence[int], grounds: Sequence[int] = ()) -> str:
    """Compose a caption that names the given things in the given order, then the grounds.

    Args:
        rng: random numbers that choose synonyms and wording.
        categories: thing class ids; may be empty if ``grounds`` is not.
        grounds: ground ids.

    Returns:
        The caption, without a full stop.

    Raises:
        ValueError: If ``categories`` and ``grounds`` are both empty.
    """
    if not categories and not grounds:
        raise ValueError("a caption must name at least one thing or one ground")
    nouns = [_noun(rng, c) for c in categories]
    floors = " and ".join(_word(rng, GROUNDS[g]) for g in grounds)
    opening = _OPENINGS[rng.integer(0, len(_OPENINGS) - 1)]
    if not nouns:
        return opening + floors
    things = nouns[0] if len(nouns) == 1 else ", ".join(nouns[:-1]) + " and " + nouns[-1]
    if not floors:
        return opening + things
    return opening + things + _JOINTS[rng.integer(0, len(_JOINTS) - 1)] + floors


def captions(scene: Scene, rng: Rng, n: int = 5) -> list[str]:
    """Compose captions of a scene.

    A caption may leave out things and grounds. It never names one that the scene does not contain.

    Args:
        scene: scene to describe.
        rng: random numbers that choose content and wording.
        n: number of captions.

    Returns:
        ``n`` captions.
    """
    areas = sorted(scene.things, key=lambda t: -int(t.mask.sum()))
    shares = [(g, float((scene.ground == g).mean())) for g in range(len(GROUNDS))]
    seen_grounds = [g for g, share in sorted(shares, key=lambda p: -p[1]) if share > 0.05]
    result = []
    for _ in range(n):
        named = [t.category for i, t in enumerate(areas) if rng.uniform(0, 1) < (0.9 if i < 3 else 0.5)]
        floors = [g for g in seen_grounds if rng.uniform(0, 1) < 0.6]
        if not named and not floors:
            named, floors = [t.category for t in areas[:1]], seen_grounds[:1]
        result.append(phrase(rng, [named[i] for i in rng.permutation(len(named))], floors))
    return result
