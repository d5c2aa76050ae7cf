"""Prompt template sets by name.

A template has exactly one `{}`, the place of the class name; `{article}` (at most once) becomes "a" or "an"
depending on the first letter of the name. A set also says how it cleans names, and whether "This is" is put
before a sentence that begins with an article.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["NAME_RULES", "TEMPLATE_SETS", "TemplateSet", "article", "get"]


def article(name: str) -> str:
    """Return the indefinite article of a name: "an" before a written vowel, otherwise "a" (ViLD's rule)."""
    return "an" if name[:1].lower() in set("aeiou") else "a"


def _spaces(name: str) -> str:
    """`air_conditioner` -> `air conditioner`, `bow_(weapon)` -> `bow (weapon)`."""
    return " ".join(name.replace("_", " ").split())


def _vild(name: str) -> str:
    """ViLD's cleaning: also "/" -> " or ", lower case, no dot at the end."""
    return " ".join(_spaces(name).replace("/", " or ").lower().rstrip(".").split())


def _words(name: str) -> str:
    """SigLIP's cleaning, as RADIO does it: underscores are spaces, no punctuation, lower case."""
    letters = "".join(c if c.isalnum() or c.isspace() else "" for c in name.replace("_", " "))
    return " ".join(letters.lower().split())


def _verbatim(name: str) -> str:
    return name.strip()


NAME_RULES: dict[str, Callable[[str], str]] = {
    "spaces": _spaces,
    "vild": _vild,
    "words": _words,
    "verbatim": _verbatim,
}


@dataclass(frozen=True)
class TemplateSet:
    """Prompt templates whose embeddings are averaged.

    Attributes:
        name: name of the set; not part of its fingerprint.
        templates: sentences with one `{}` each, in the published order.
        source: origin of the list.
        names: rule by which class names are cleaned, a key of `NAME_RULES`.
        this_is: put "This is" before sentences that begin with "a", "an" or "the" (ViLD).

    Raises:
        ValueError: If there is no template, or a template has other placeholders than the module describes.
    """

    name: str
    templates: tuple[str, ...]
    source: str = "the caller"
    names: str = "spaces"
    this_is: bool = False

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError(f"template set '{self.name}' has no template")
        for template in self.templates:
            fields = re.findall(r"\{[^{}]*\}", template)
            rest = re.sub(r"\{(article)?\}", "", template)
            if fields.count("{}") != 1 or fields.count("{article}") > 1 or "{" in rest or "}" in rest:
                raise ValueError(
                    f"template {template!r} of set '{self.name}' must hold exactly one {{}}, the class"
                    " name, at most one {article} and no other braces"
                )
        if self.names not in NAME_RULES:
            raise ValueError(f"unknown name rule '{self.names}'; known: {sorted(NAME_RULES)}")

    def __len__(self) -> int:
        return len(self.templates)

    def clean(self, name: str) -> str:
        """Return a class name as it is written in prompts."""
        return NAME_RULES[self.names](name)

    def fill(self, name: str) -> list[str]:
        """Return the prompts of a class name, one per template, in order."""
        name = self.clean(name)
        prompts = []
        for template in self.templates:
            prompt = template.replace("{article}", article(name)).replace("{}", name)
            if self.this_is and template.startswith(("a ", "an ", "the ")):
                prompt = "This is " + prompt
            prompts.append(prompt)
        return prompts

    def fingerprint(self) -> str:
        """Hash everything that determines the prompts."""
        content = json.dumps([self.templates, self.names, self.this_is])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def get(templates: str | Sequence[str] | TemplateSet) -> TemplateSet:
    """Return a template set by name, from one template (a string with `{}`), or from a list of templates.

    Raises:
        ValueError: If the name is unknown (the message has near matches), or a template does not have exactly
            one `{}`.
    """
    if isinstance(templates, TemplateSet):
        return templates
    if not isinstance(templates, str):
        return TemplateSet("custom", tuple(templates))
    if "{" in templates:
        return TemplateSet("custom", (templates,))
    if templates not in TEMPLATE_SETS:
        near = difflib.get_close_matches(templates, TEMPLATE_SETS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ValueError(f"unknown template set {templates!r}; {hint}known: {', '.join(TEMPLATE_SETS)}")
    return TEMPLATE_SETS[templates]


_CLIP_80 = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

_VILD_63 = (
    "There is {article} {} in the scene.",
    "There is the {} in the scene.",
    "a photo of {article} {} in the scene.",
    "a photo of the {} in the scene.",
    "a photo of one {} in the scene.",
    "itap of {article} {}.",
    "itap of my {}.",
    "itap of the {}.",
    "a photo of {article} {}.",
    "a photo of my {}.",
    "a photo of the {}.",
    "a photo of one {}.",
    "a photo of many {}.",
    "a good photo of {article} {}.",
    "a good photo of the {}.",
    "a bad photo of {article} {}.",
    "a bad photo of the {}.",
    "a photo of a nice {}.",
    "a photo of the nice {}.",
    "a photo of a cool {}.",
    "a photo of the cool {}.",
    "a photo of a weird {}.",
    "a photo of the weird {}.",
    "a photo of a small {}.",
    "a photo of the small {}.",
    "a photo of a large {}.",
    "a photo of the large {}.",
    "a photo of a clean {}.",
    "a photo of the clean {}.",
    "a photo of a dirty {}.",
    "a photo of the dirty {}.",
    "a bright photo of {article} {}.",
    "a bright photo of the {}.",
    "a dark photo of {article} {}.",
    "a dark photo of the {}.",
    "a photo of a hard to see {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of {article} {}.",
    "a low resolution photo of the {}.",
    "a cropped photo of {article} {}.",
    "a cropped photo of the {}.",
    "a close-up photo of {article} {}.",
    "a close-up photo of the {}.",
    "a jpeg corrupted photo of {article} {}.",
    "a jpeg corrupted photo of the {}.",
    "a blurry photo of {article} {}.",
    "a blurry photo of the {}.",
    "a pixelated photo of {article} {}.",
    "a pixelated photo of the {}.",
    "a black and white photo of the {}.",
    "a black and white photo of {article} {}.",
    "a plastic {}.",
    "the plastic {}.",
    "a toy {}.",
    "the toy {}.",
    "a plushie {}.",
    "the plushie {}.",
    "a cartoon {}.",
    "the cartoon {}.",
    "an embroidered {}.",
    "the embroidered {}.",
    "a painting of the {}.",
    "a painting of a {}.",
)

_OVSEG_14 = (
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    "a photo of a small {}.",
    "a photo of a medium {}.",
    "a photo of a large {}.",
    "This is a photo of a small {}.",
    "This is a photo of a medium {}.",
    "This is a photo of a large {}.",
    "There is a small {} in the scene.",
    "There is a medium {} in the scene.",
    "There is a large {} in the scene.",
)

_ZEGFORMER_8 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
    "A photo of a {} in the scene",
)

_ZEGFORMER_32 = (
    "a bad photo of the {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "a cropped photo of a {}.",
    "This is a photo of a {}",
    "This is a photo of a small {}",
    "This is a photo of a medium {}",
    "This is a photo of a large {}",
    "This is a masked photo of a {}",
    "This is a masked photo of a small {}",
    "This is a masked photo of a medium {}",
    "This is a masked photo of a large {}",
    "This is a cropped photo of a {}",
    "This is a cropped photo of a small {}",
    "This is a cropped photo of a medium {}",
    "This is a cropped photo of a large {}",
    "A photo of a {} in the scene",
    "a bad photo of the {} in the scene",
    "a photo of the large {} in the scene",
    "a photo of the small {} in the scene",
    "a cropped photo of a {} in the scene",
    "a photo of a masked {} in the scene",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "This is a {} in the scene",
    "This is the {} in the scene",
    "This is one {} in the scene",
    "There is a masked {} in the scene",
    "There is the masked {} in the scene",
    "This is a masked {} in the scene",
    "This is the masked {} in the scene",
    "This is one masked {} in the scene",
)

_MASKCLIP_5 = (
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)

_SUB_IMAGENET_7 = (
    "itap of a {}.",
    "a bad photo of a {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

TEMPLATE_SETS: dict[str, TemplateSet] = {
    s.name: s
    for s in (
        TemplateSet("name", ("{}",), "the class name alone (DenseCLIP)"),
        TemplateSet("single", ("a photo of a {}.",), "CLIP, section 3.1.4"),
        TemplateSet("single_scene", ("A photo of a {} in the scene",), "CAT-Seg; ZegFormer's evaluation"),
        TemplateSet("clip_80", _CLIP_80, "CLIP's ImageNet prompts"),
        TemplateSet("siglip_80", _CLIP_80, "CLIP's 80 with SigLIP's cleaning of names", names="words"),
        TemplateSet("sub_imagenet_7", _SUB_IMAGENET_7, "Talk2DINO ('sub_imagenet_template')"),
        TemplateSet("vild_63", _VILD_63, "ViLD; CLIPSelf and F-ViT text tables", names="vild", this_is=True),
        TemplateSet("ovseg_14", _OVSEG_14, "OVSeg ('vild'); FC-CLIP", names="verbatim"),
        TemplateSet("maskclip_85", _CLIP_80 + _MASKCLIP_5, "MaskCLIP: CLIP's 80 and five of ViLD's kind"),
        TemplateSet("zegformer_8", _ZEGFORMER_8, "ZegFormer, query classifier ('imagenet_select')"),
        TemplateSet("zegformer_32", _ZEGFORMER_32, "ZegFormer, CLIP branch"),
    )
}
