import json

import pytest

from clipdense.clip import templates
from clipdense.clip.templates import TEMPLATE_SETS, TemplateSet, article


def test_published_sets_equal_their_source(data_dir):
    facts = json.loads((data_dir / "prompt_templates.json").read_text())
    named = {
        "clip_80": "clip_imagenet_80",
        "vild_63": "vild_full",
        "ovseg_14": "vild_ovseg_14",
        "maskclip_85": "maskclip_85",
        "zegformer_8": "zegformer_train_8",
        "zegformer_32": "zegformer_clip_branch_32",
    }
    for ours, theirs in named.items():
        assert list(TEMPLATE_SETS[ours].templates) == facts[theirs], ours
    assert set(facts) - {"_about"} == set(named.values())


@pytest.mark.parametrize("name", TEMPLATE_SETS)
def test_a_set_has_the_length_in_its_name_and_fills_every_template(name):
    templates_ = TEMPLATE_SETS[name]
    prompts = templates_.fill("zebra")
    assert len(prompts) == len(templates_) and all(p.count("zebra") == 1 and "{" not in p for p in prompts)
    digits = name.rpartition("_")[2]
    assert len(templates_) == (int(digits) if digits.isdigit() else 1)
    assert templates_.source != "the caller"


def test_vild_takes_articles_and_leads_with_this_is():
    vild = TEMPLATE_SETS["vild_63"]
    prompts = vild.fill("Orange_Juice/Soda.")
    assert prompts[0] == "There is an orange juice or soda in the scene."
    assert prompts[1] == "There is the orange juice or soda in the scene."
    assert prompts[2] == "This is a photo of an orange juice or soda in the scene."
    assert prompts[5] == "itap of an orange juice or soda."
    assert "This is an embroidered orange juice or soda." in prompts
    assert "This is the plushie orange juice or soda." in prompts
    assert (
        TEMPLATE_SETS["clip_80"].fill("apple")[0] == "a bad photo of a apple."
    )  # CLIP's own list has no articles


def test_article():
    assert [article(n) for n in ("apple", "Umbrella", "cat", "hour", "")] == ["an", "an", "a", "a", "a"]


def test_names_are_cleaned_as_the_set_says():
    assert TEMPLATE_SETS["single"].fill("bow_(weapon) ") == ["a photo of a bow (weapon)."]
    assert TEMPLATE_SETS["ovseg_14"].clean(" road_sign, route ") == "road_sign, route"
    assert TEMPLATE_SETS["vild_63"].clean("St. Bernard.") == "st. bernard"
    assert TEMPLATE_SETS["siglip_80"].clean("St._Bernard, (dog)") == "st bernard dog"
    assert TemplateSet("x", ("{article} {}",)).fill("{article}") == [
        "a {article}"
    ]  # a name is never a template


def test_get():
    assert templates.get("clip_80") is TEMPLATE_SETS["clip_80"]
    assert templates.get(TEMPLATE_SETS["single"]) is TEMPLATE_SETS["single"]
    assert templates.get("my {}").templates == ("my {}",)
    assert templates.get(["a {}", "{article} {}"]).fill("elk") == ["a elk", "an elk"]


def test_an_unknown_set_names_near_ones():
    with pytest.raises(ValueError, match="'vild_62'.*did you mean 'vild_63'"):
        templates.get("vild_62")
    with pytest.raises(ValueError, match="known: name, single"):
        templates.get("qqqq")


@pytest.mark.parametrize(
    "bad", ["no place", "two {} places {}", "{} {article} {article}", "{name}", "{} {other}", "{} }", "{0}"]
)
def test_a_template_needs_exactly_one_placeholder(bad):
    with pytest.raises(ValueError, match="exactly one {}"):
        templates.get([bad])


def test_no_template_and_unknown_name_rule():
    with pytest.raises(ValueError, match="no template"):
        templates.get([])
    with pytest.raises(ValueError, match="unknown name rule 'upper'"):
        TemplateSet("x", ("{}",), names="upper")


def test_fingerprint_sees_all_that_decides_prompts_and_no_more():
    one = TemplateSet("x", ("a {}",))
    assert one.fingerprint() == TemplateSet("y", ("a {}",), "elsewhere").fingerprint()
    others = [
        TemplateSet("x", ("the {}",)),
        TemplateSet("x", ("a {}", "a {}")),
        TemplateSet("x", ("a {}",), names="vild"),
        TemplateSet("x", ("a {}",), this_is=True),
    ]
    assert len({t.fingerprint() for t in [one, *others]}) == 5
