"""Options of OVSeg that save time: precision and compilation of CLIP, and skipped queries."""

from typing import Any

import pytest
import torch
from torch import Tensor

from clipdense.clip import load_clip
from clipdense.clip.mask_prompts import MaskPrompts
from clipdense.regions import FusionSettings, RegionEncoder, cosine_logits
from clipdense.systems.two_stage import Scoring


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    """An image, and masks of which the last but one is empty."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 48, 64), generator=generator, dtype=torch.uint8)
    masks = torch.zeros(6, 48, 64)
    for i in range(6):
        masks[i, 5 * i : 5 * i + 12, 8 * i : 8 * i + 20] = float(i != 4)
    return image, masks


def encoder(**options: Any) -> RegionEncoder:
    torch.manual_seed(0)
    clip = load_clip("shapes-vit", text=False)
    height, width = clip.visual.grid
    prompts = MaskPrompts(2, height * width, clip.visual.tap_channels[0])
    return RegionEncoder(clip, mask_prompts=prompts, batch_size=4, **options).requires_grad_(False)


@pytest.fixture(scope="module")
def exact() -> RegionEncoder:
    return encoder()


def test_precision_changes_little(exact: RegionEncoder, data: tuple[Tensor, Tensor]) -> None:
    expected, valid = exact(*data)
    assert valid.tolist() == [True, True, True, True, False, True]
    found, same = encoder(precision="bf16")(*data)
    cosine = torch.cosine_similarity(found, expected)
    assert found.dtype == torch.float32 and torch.equal(same, valid)
    assert not torch.equal(found, expected) and cosine.min() > 0.999
    with pytest.raises(ValueError, match="unknown precision 'int8'; known: fp32, fp16, bf16"):
        encoder(precision="int8")


def test_compilation_is_of_all_sizes_at_once(
    exact: RegionEncoder, data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def compile(run: Any, dynamic: bool) -> Any:
        def compiled(*args: Any) -> Any:
            calls.append((len(args[0]), dynamic))
            return run(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    found, _ = encoder(compile=True)(*data)
    assert calls == [(4, True), (1, True)]
    torch.testing.assert_close(found, exact(*data)[0])


@pytest.mark.slow
def test_compiled_embeddings_are_the_same(exact: RegionEncoder, data: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(encoder(compile=True)(*data)[0], exact(*data)[0], atol=1e-4, rtol=1e-4)


def test_crops_of_several_images_share_batches(
    exact: RegionEncoder, data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third image has no crop; the last one skips masks, and is cropped one mask at a time."""
    image, masks = data
    wide = torch.cat([image, image.flip(2)], dim=2)[:, :40]
    images = [image, wide, image, wide]
    stacks = [masks, torch.cat([masks.flip(2), masks], dim=2)[:5, :40], torch.zeros(2, 48, 64)]
    stacks.append(stacks[1])
    chosen = [None, None, None, torch.tensor([True, False, True, False, True])]
    alone = [exact(*inputs) for inputs in zip(images, stacks, chosen, strict=True)]
    counts = [len(embeddings) for embeddings, _ in alone]
    assert counts[2] == 0 and min(counts[0], counts[1], counts[3]) > 0 and sum(counts) % 4

    sizes, encode = [], exact._encode
    monkeypatch.setattr(
        exact, "_encode", lambda regions, *rest: (sizes.append(len(regions)), encode(regions, *rest))[1]
    )
    monkeypatch.setattr("clipdense.regions.encoder._PART", 1)
    found = exact.embed_images(images, stacks, chosen)
    assert sizes == [4] * (sum(counts) // 4) + [sum(counts) % 4]
    for (embeddings, valid), (expected, same) in zip(found, alone, strict=True):
        assert torch.equal(valid, same)
        torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)
    assert [len(e) for e, _ in exact.embed_images(images[2:3], stacks[2:3])] == [0]


@pytest.mark.parametrize("empty", ["neutral", "boost"])
def test_queries_of_low_scores_are_skipped(
    exact: RegionEncoder, data: tuple[Tensor, Tensor], empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They keep the proposals' scores, whatever becomes of empty masks; the others do not change."""
    generator = torch.Generator().manual_seed(1)
    proposals = 3 * torch.randn(6, 5, generator=generator)
    text = torch.randn(4, exact.clip.embed_dim, generator=generator)
    p = proposals.softmax(1)
    best = p[:, :-1].amax(1)
    scoring = Scoring("ensemble", "ovseg", FusionSettings(0.7, 0.7), empty)
    pruning = Scoring(
        "ensemble", "ovseg", FusionSettings(0.7, 0.7), empty, min_query_score=best.median().item() + 1e-6
    )

    seen = []
    encode = exact._encode
    monkeypatch.setattr(exact, "_encode", lambda *args: seen.append(len(args[0])) or encode(*args))

    def scores(scoring: Scoring) -> Tensor:
        seen.clear()
        query_mask = scoring.query_mask(proposals)
        embeddings, valid = exact(*data, query_mask)
        return scoring(proposals, cosine_logits(embeddings, text), valid, None, query_mask)

    whole = scores(scoring)
    assert sum(seen) == 5
    min_query_scored = scores(pruning)
    kept = best >= pruning.min_query_score
    assert 0 < kept.sum() < 6 and sum(seen) == (kept & data[1].flatten(1).any(1)).sum()
    torch.testing.assert_close(min_query_scored[kept], whole[kept])
    torch.testing.assert_close(min_query_scored[~kept], p[~kept])
    assert (min_query_scored - whole).abs().max() > 1e-3
