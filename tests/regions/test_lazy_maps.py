"""Maps computed in bands equal those computed at once."""

import pytest
import torch
import torch.nn.functional as F

from clipdense.regions import LazyMaps
from clipdense.regions.lazy_maps import slices


def resized(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


@pytest.fixture
def source() -> torch.Tensor:
    return 8 * torch.randn(5, 24, 17, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("output", [(131, 90), (40, 23), (90, 68), (90, 31)])
@pytest.mark.parametrize("band", [1, 7, 50])
def test_bands_are_rows_of_the_whole(source: torch.Tensor, output: tuple[int, int], band: int) -> None:
    """Resized to the padded image, cropped, resized to the output, and mixed."""
    mix = torch.rand(3, 5, generator=torch.Generator().manual_seed(1))
    whole = resized(resized(source, (96, 68))[:, :90, :61], output).sigmoid()
    lazy = LazyMaps(source).resize((96, 68)).crop((90, 61)).resize(output).apply(torch.sigmoid)
    assert torch.equal(lazy.compute(), whole) and lazy.shape == whole.shape
    rows = torch.cat([lazy.rows(part.start, part.stop) for part in slices(output[0], band)], dim=1)
    torch.testing.assert_close(rows, whole, atol=1e-5, rtol=0)
    mixed = lazy.apply(lambda maps: torch.einsum("kc,chw->khw", mix, maps), channels=3)
    torch.testing.assert_close(mixed.rows(2, 9), torch.einsum("kc,chw->khw", mix, whole)[:, 2:9])


def test_large_maps_are_computed_in_bands(source: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = LazyMaps(source).resize((131, 90))
    whole = lazy.compute()
    assert [*lazy.bands()] == [slice(0, 131)] and lazy.cached().steps == ()
    monkeypatch.setattr("clipdense.regions.lazy_maps.WHOLE", 5 * 131 * 90 * 4 - 1)
    monkeypatch.setattr("clipdense.regions.lazy_maps.BAND", 5 * 20 * 90 * 4)
    assert [band.stop for band in lazy.bands()] == [20, 40, 60, 80, 100, 120, 131]
    torch.testing.assert_close(lazy.compute(), whole, atol=1e-4, rtol=0)
    assert lazy.cached() is lazy


def test_maps_are_selected_before_their_number_changes(source: torch.Tensor) -> None:
    lazy = LazyMaps(source).resize((40, 23))
    chosen = torch.tensor([True, False, False, True, False])
    assert torch.equal(lazy[chosen].compute(), lazy.compute()[chosen])
    assert len(lazy[5:]) == 0 and lazy[5:].compute().shape == (0, 40, 23)
    with pytest.raises(ValueError, match="before their number changes"):
        lazy.apply(lambda maps: maps[:2], channels=2)[:1]


def test_groups_of_maps(source: torch.Tensor) -> None:
    lazy = LazyMaps(source).resize((40, 23))
    assert [*lazy.parts()] == [slice(0, 5)]
    assert [*lazy.parts(whole=0, part=2 * 40 * 23 * 4)] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert [*lazy.parts(whole=0, part=1)] == [slice(i, i + 1) for i in range(5)]
