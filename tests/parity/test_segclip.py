"""SegCLIP: semantic groups, image and text embeddings, training losses."""

import pytest
import torch
import torch.nn.functional as F

from clipdense.checkpoint import load_strict, model_layout, rename
from clipdense.clip.tokenizer import build_tokenizer
from clipdense.run.config import add_clipdense_config
from clipdense.run.keys import set_options
from clipdense.systems.segclip.convert import PREFIXES, SEGCLIP
from clipdense.systems.segclip.decoder import mask_tokens, patch_pixels, reconstruction_loss
from clipdense.systems.segclip.groups import SemanticGroups, TokenReconstruction
from clipdense.systems.segclip.loss import divergences
from clipdense.systems.segclip.model import run_blocks

from detectron2.config import get_cfg
from detectron2.modeling import build_model

FULL_VOCABULARY = 49408


def _groups(golden, **changes):
    args, state = golden.args, golden.part("state")
    settings = {"centers": args["num_centers"], "layers": args["cross_layers"]} | changes
    groups = SemanticGroups(args["width"], args["heads"], **settings)
    own = {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith("semantic_layer2.")}
    load_strict(groups, own, source=golden.id)
    rest = {k: v for k, v in state.items() if not k.startswith("semantic_layer2.")}
    reconstruction = TokenReconstruction(args["num_centers"])
    load_strict(
        reconstruction,
        {k.removeprefix("reconstruct_layer2.rec_proj_a."): v for k, v in rest.items()},
        source=golden.id,
    )
    return groups.eval(), reconstruction.eval()


@pytest.mark.golden(case="segclip_group")
@torch.no_grad()
def test_semantic_groups(golden):
    groups, reconstruction = _groups(golden)
    results = {}
    for name, x in golden.part("in").items():
        q = groups.semantic_center.expand(len(x), -1, -1)
        for i, block in enumerate(groups.cross_att):
            q = results[f"{name}.centers_after_cross_{i}"] = block(q, x)
        results[f"{name}.queries"] = groups.queries(x)
        results[f"{name}.keys"], results[f"{name}.values"] = groups.keys_values(x)
        results[f"{name}.scores"] = results[f"{name}.queries"] @ results[f"{name}.keys"].transpose(1, 2)
        found = groups(x)
        results |= {f"{name}.group_tokens": found.tokens, f"{name}.hard_assignment": found.hard}
        results |= {f"{name}.soft_assignment": found.soft, f"{name}.reconstructed": reconstruction(found)}
        assert torch.equal(found.hard.sum(1), torch.ones(x.shape[0], x.shape[1]))
    golden.check(results)


@pytest.mark.golden(case="segclip_group")
@torch.no_grad()
def test_the_published_key_layout_differs_for_batches(golden):
    groups, _ = _groups(golden)
    mixed, _ = _groups(golden, mixed_keys=True)
    name = "centers_after_cross_0"
    for key, x in golden.part("in").items():
        q = mixed.semantic_center.expand(len(x), -1, -1)
        found = mixed.cross_att[0](q, x)
        if len(x) == 1:  # the layouts are the same
            assert not golden.differs(f"{key}.{name}", found)
        else:
            assert golden.differs(f"{key}.{name}", found)
        flipped = groups.cross_att[0](-q, x)
        assert golden.differs(f"{key}.{name}", flipped)


def _model(golden, **changes):
    """The file's model; its token table is scattered to the full vocabulary."""
    state, inputs = golden.part("state"), golden.part("in")
    ids = inputs["vocab_ids"]
    if len(ids):
        compact = state["clip.token_embedding.weight"]
        state["clip.token_embedding.weight"] = torch.zeros(FULL_VOCABULARY, compact.shape[1])
        state["clip.token_embedding.weight"][ids] = compact
    assert model_layout(state) is SEGCLIP
    cfg = get_cfg()
    add_clipdense_config(cfg)
    options = {**SEGCLIP.options(state, None), "MODEL.DEVICE": "cpu", **changes}
    set_options(cfg, options, golden.id)
    model = build_model(cfg)
    load_strict(model, SEGCLIP.convert(state), source=golden.id)
    return model


def _tokens(golden):
    length = golden.args["max_words"]
    tokens = build_tokenizer("CLIP", {}, FULL_VOCABULARY, length)(golden.args["texts"], context_length=length)
    assert torch.equal(tokens, golden.part("in")["token_ids_bpe"])
    return tokens


@pytest.mark.golden(case="segclip_encode")
@torch.no_grad()
def test_embeddings(golden):
    def run(**changes):
        model = _model(golden, **changes).eval()
        text = model.text(_tokens(golden))
        results = {"text_features": text}
        for name, images in golden.part("in").items():
            if not name.startswith("image"):
                continue
            x, _ = model.visual.embed(images)
            x = run_blocks(model.visual.patch_blocks, x)
            found = model.visual(images)
            cosine = F.normalize(found.image, dim=-1) @ F.normalize(text, dim=-1).T
            results |= {
                f"{name}.patch_tokens_after_stage1": x,
                f"{name}.hard_assignment": found.grouping.hard,
                f"{name}.soft_assignment": found.grouping.soft,
                f"{name}.image_features": found.image,
                f"{name}.projected_tokens_cls_then_groups": torch.cat(
                    [found.image[:, None], found.groups], dim=1
                ),
                f"{name}.similarity": model.logit_scale.exp() * cosine,
            }
        return results

    results = run()
    golden.check({name: results[name] for name in golden.part("out")})
    exact = run(**{"MODEL.CLIP.CONFIG.quick_gelu": False})
    name = next(n for n in golden.part("out") if n.endswith("patch_tokens_after_stage1"))
    assert golden.differs(name, exact[name])


@pytest.mark.golden(case="segclip_loss")
def test_losses(golden):
    model, inputs = _model(golden).train(), golden.part("in")
    images, tokens = inputs["image"], _tokens(golden)
    segments = inputs["patch_segment_ids"].flatten(1)
    mask = mask_tokens(inputs["mask_noise"])
    noise = inputs["gumbel_noise_full"]
    losses, found = model.losses_of(
        images, tokens, segments, mask, noise=noise, masked_noise=inputs["gumbel_noise_masked"]
    )
    grouping = model.visual.group_visible(images, mask, inputs["gumbel_noise_masked"])
    u, t = F.normalize(found.image, dim=-1), F.normalize(model.text(tokens), dim=-1)
    logits = model.logit_scale.exp() * u @ t.T
    total = sum(losses.values())
    total.backward()
    assignment = found.grouping.hard.transpose(1, 2)
    results = {
        "loss_contrastive": losses["loss_contrastive"],
        "loss_superpixel": losses["loss_superpixel"],
        "loss_reconstruction": losses["loss_reconstruction"],
        "loss_total": total,
        "kl_sums": divergences(assignment, segments),
        "logits_image_to_text": logits,
        "logits_text_to_image": logits.T,
        "hard_assignment_full": found.grouping.hard,
        "soft_assignment_full": found.grouping.soft,
        "hard_assignment_masked": grouping.hard,
        "reconstruct_mask": mask.masked,
        "reconstruct_ids_restore": mask.restore,
        "reconstruct_tokens_cls_first": model.visual.reconstruct_grouping(grouping),
    }
    names = dict(model.named_parameters())
    for key in golden.args["grad_keys"]:
        results[f"grad.{key}"] = names[rename(key, PREFIXES)].grad
    golden.check({name: results[name].detach() for name in golden.part("out")})
    # labels of other patches, and pixels in another order
    other = divergences(assignment, segments.flip(1))
    if not torch.equal(segments, segments.flip(1)):
        assert golden.differs("kl_sums", other.detach())
    pixels = patch_pixels(images, model.visual.patch_size)
    predicted = model.decoder(model.visual.reconstruct_grouping(grouping), mask.restore)
    wrong = reconstruction_loss(predicted, pixels.flip(2), mask.masked[:, 1:])
    assert golden.differs("loss_reconstruction", wrong.detach())
