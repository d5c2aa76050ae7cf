"""Training order: a function of seed and position, however many processes share it and wherever it starts."""

from itertools import islice

import pytest
import torch

from clipdense.data.samplers import GlobalBatchSampler, RepeatFactorSampler, ResumableTrainingSampler

FACTORS = torch.tensor([1.0, 2.5, 1.0, 3.0, 1.2, 1.0, 1.0])


def make(kind: str, **options: int) -> ResumableTrainingSampler:
    if kind == "uniform":
        return ResumableTrainingSampler(7, **options)
    return RepeatFactorSampler(FACTORS, **options)


def test_every_epoch_is_another_permutation():
    indices = list(islice(ResumableTrainingSampler(10, seed=3), 30))
    epochs = [indices[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert indices != list(islice(ResumableTrainingSampler(10, seed=4), 30))
    assert list(islice(ResumableTrainingSampler(3, shuffle=False), 7)) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("kind", ["uniform", "repeat"])
@pytest.mark.parametrize("start", [0, 1, 6, 7, 13, 14, 40])
def test_resumed_stream_goes_on(kind: str, start: int):
    whole = list(islice(make(kind, seed=5), 80))
    assert list(islice(make(kind, seed=5, start=start), 80 - start)) == whole[start:]


@pytest.mark.parametrize("kind", ["uniform", "repeat"])
def test_ranks_share_one_stream(kind: str):
    whole = list(islice(make(kind, seed=5), 60))
    for rank in range(3):
        assert list(islice(make(kind, seed=5, rank=rank, world=3), 20)) == whole[rank::3]


def test_repeat_factors():
    indices = list(islice(RepeatFactorSampler(FACTORS, seed=1), 50_000))
    share = torch.bincount(torch.tensor(indices), minlength=7) / 50_000
    assert torch.allclose(share, FACTORS / FACTORS.sum(), atol=0.01)


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one sample"):
        ResumableTrainingSampler(0)
    with pytest.raises(ValueError, match="rank 2"):
        ResumableTrainingSampler(5, rank=2, world=2)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH = 5.*2"):
        GlobalBatchSampler(ResumableTrainingSampler(5), 5, world=2)


@pytest.mark.parametrize("kind", ["uniform", "repeat"])
@pytest.mark.parametrize("groups", [None, [0, 1, 0, 1, 1, 0, 0]])
def test_global_batches(kind: str, groups: list[int] | None):
    def batches(count: int, **options: int) -> list[list[tuple[int, int]]]:
        return list(islice(GlobalBatchSampler(make(kind, seed=2), 4, groups=groups, **options), count))

    whole = batches(12)
    stream = list(islice(make(kind, seed=2), 200))
    assert all(index == stream[position] for batch in whole for position, index in batch)
    positions = [position for batch in whole for position, _ in batch]
    assert len(set(positions)) == len(positions)
    if groups is None:
        assert positions == list(range(48))
    else:
        assert all(len({groups[index] for _, index in batch}) == 1 for batch in whole)
    # a resumed run
    assert batches(5, start_batch=7) == whole[7:]
    # two processes with half the batch each
    halves = [batches(12, rank=rank, world=2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]
    assert all(len(batch) == 2 for half in halves for batch in half)


def test_groups_lose_no_sample():
    """Grouped batches hold the positions of the stream, except the few that wait for a full group."""
    groups = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    sampler = GlobalBatchSampler(ResumableTrainingSampler(10, seed=0), 4, groups=groups)
    seen = sorted(p for batch in islice(sampler, 100) for p, _ in batch)
    assert len(set(range(seen[-1] + 1)) - set(seen)) <= 6
