"""Training order that depends only on the seed and the position, so that a resumed run continues it exactly.

One global stream of samples is divided into global batches, and each process takes its share of each batch.
Two processes with batches of b therefore use, step by step, the samples of one process with batches of 2b.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data.sampler import Sampler

__all__ = ["GlobalBatchSampler", "RepeatFactorSampler", "ResumableTrainingSampler", "ShardSampler"]


class ResumableTrainingSampler(Sampler[int]):
    """Infinite stream of dataset indices, reshuffled every epoch.

    Args:
        size: number of samples in the dataset.
        shuffle: whether each epoch is a new permutation; if False, every epoch is 0, 1, 2, ...
        seed: determines the permutations, with the epoch number; must be equal in all processes.
        rank, world: this process takes positions rank, rank + world, ... of the stream.
        start: global position of the first sample; after t steps of global batches of n samples it is t * n.

    Raises:
        ValueError: If the dataset is empty, the rank is not in the world, or start is negative.
    """

    def __init__(
        self, size: int, shuffle: bool = True, seed: int = 0, rank: int = 0, world: int = 1, start: int = 0
    ) -> None:
        if size <= 0:
            raise ValueError(f"a training sampler needs at least one sample, got a dataset of {size}")
        if not 0 <= rank < world or start < 0:
            raise ValueError(
                f"need 0 <= rank < world and start >= 0, got rank {rank}, world {world}, start {start}"
            )
        self.size, self.shuffle, self.seed = size, shuffle, seed
        self.rank, self.world, self.start = rank, world, start

    @property
    def order(self) -> dict[str, int]:
        """What, beside the seed, decides the stream."""
        return {"samples": self.size}

    def __iter__(self) -> Iterator[int]:
        yield from itertools.islice(self.stream(self.start), self.rank, None, self.world)

    def stream(self, start: int = 0) -> Iterator[int]:
        """Yield the indices at global positions start, start + 1, ..., for all ranks."""
        for epoch in itertools.count(start // self.size):
            yield from self._epoch(epoch)[start - epoch * self.size if start > epoch * self.size else 0 :]

    def _epoch(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.size))
        return torch.randperm(self.size, generator=self._generator(epoch)).tolist()

    def _generator(self, epoch: int) -> torch.Generator:
        # similar seeds give similar streams: spread them
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch * 7_919) % 2**63)


class ShardSampler(ResumableTrainingSampler):
    """Infinite stream of the indices of samples that are stored in shards; each epoch has each of them once.

    Every epoch shuffles the shards, takes a few of them at a time, and shuffles the samples of these. Reading
    stays within few shards, and the memory does not grow with the dataset. Any position of the stream is
    found without reading what is before it.

    Args:
        parts: numbers of samples of the shards, whose indices follow one another.
        mixed: number of shards whose samples are shuffled together, 1 or more.
        seed, rank, world, start: as in `ResumableTrainingSampler`.

    Raises:
        ValueError: If there is no sample, or ``mixed`` is less than 1.
    """

    def __init__(
        self,
        parts: Sequence[int],
        mixed: int = 16,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        if mixed < 1:
            raise ValueError(f"DATALOADER.SHUFFLE_SHARDS = {mixed}: expected 1 or more")
        super().__init__(sum(parts), True, seed, rank, world, start)
        self.mixed, self.parts = mixed, np.asarray(parts, np.int64)
        self._first = np.cumsum(self.parts) - self.parts

    @property
    def order(self) -> dict[str, int]:
        """See `ResumableTrainingSampler.order`."""
        return {"samples": self.size, "shards": len(self.parts), "shards_mixed": self.mixed}

    def stream(self, start: int = 0) -> Iterator[int]:
        """Yield the indices at global positions start, start + 1, ..., for all ranks."""
        for epoch in itertools.count(start // self.size):
            skipped = max(0, start - epoch * self.size)
            seed = self.seed % 2**64
            order = np.random.default_rng((seed, epoch)).permutation(len(self.parts))
            for number, first in enumerate(range(0, len(order), self.mixed)):
                shards = order[first : first + self.mixed]
                if skipped < (count := int(self.parts[shards].sum())):
                    ranges = [np.arange(self._first[k], self._first[k] + self.parts[k]) for k in shards]
                    indices = np.concatenate(ranges)
                    np.random.default_rng((seed, epoch, number)).shuffle(indices)
                    yield from indices[skipped:].tolist()
                skipped = max(0, skipped - count)


class RepeatFactorSampler(ResumableTrainingSampler):
    """Repeat-factor sampling for long-tailed data (LVIS, Gupta et al., 2019, appendix B.2), resumable.

    An image whose factor is 2.3 appears two times in an epoch, and a third time with probability 0.3.

    Args:
        repeat_factors: one float >= 1 for each image, as
            `detectron2.data.samplers.RepeatFactorTrainingSampler.repeat_factors_from_category_frequency`
            returns them.
        shuffle, seed, rank, world, start: as in `ResumableTrainingSampler`.
    """

    def __init__(
        self,
        repeat_factors: torch.Tensor,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        start: int = 0,
    ) -> None:
        super().__init__(len(repeat_factors), shuffle, seed, rank, world, start)
        self.repeat_factors = repeat_factors.double()

    def stream(self, start: int = 0) -> Iterator[int]:
        """Yield the indices at global positions start, start + 1, ...; epochs differ in length."""
        for epoch in itertools.count():
            indices = self._epoch(epoch)
            yield from indices[start:]
            start = max(0, start - len(indices))

    def _epoch(self, epoch: int) -> list[int]:
        generator = self._generator(epoch)
        whole = self.repeat_factors.floor()
        more = torch.rand(self.size, generator=generator, dtype=torch.float64) < self.repeat_factors - whole
        indices = torch.arange(self.size).repeat_interleave((whole + more).long())
        if self.shuffle:
            indices = indices[torch.randperm(len(indices), generator=generator)]
        return indices.tolist()


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """Batches of a sampler's global stream, reduced to the share of this process.

    Args:
        sampler: source of the global stream; its own ``start``, ``rank`` and ``world`` are not used.
        batch_size: samples of a global batch, over all processes.
        rank, world: this process takes samples rank, rank + world, ... of each batch.
        start_batch: number of batches that a resumed run has already used.
        groups: one integer for each dataset index; a batch then contains samples of one group only (images of
            similar aspect ratio). A sample waits until its group fills a batch. None: batches follow the
            stream.

    Yields:
        list of (position, index): the position in the global stream, which seeds the augmentation, and the
        dataset index.

    Raises:
        ValueError: If the batch cannot be divided evenly among the processes.
    """

    def __init__(
        self,
        sampler: ResumableTrainingSampler,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        start_batch: int = 0,
        groups: Sequence[int] | None = None,
    ) -> None:
        if batch_size <= 0 or batch_size % world:
            raise ValueError(
                f"SOLVER.IMS_PER_BATCH = {batch_size} must be a positive multiple of "
                f"the number of processes, {world}"
            )
        self.sampler, self.batch_size, self.groups = sampler, batch_size, groups
        self.rank, self.world, self.start_batch = rank, world, start_batch

    @property
    def order(self) -> dict[str, int]:
        """What, beside the seed, decides which samples a batch has; a resumed run must find it unchanged."""
        return {**self.sampler.order, "batch_size": self.batch_size}

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._batches():
            yield batch[self.rank :: self.world]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        if self.groups is None:
            first = self.start_batch * self.batch_size
            samples = enumerate(self.sampler.stream(first), first)
            while True:
                yield list(itertools.islice(samples, self.batch_size))
        # which samples wait depends on all previous ones: replay the stream of integers
        waiting: dict[int, list[tuple[int, int]]] = {}
        done = 0
        for position, index in enumerate(self.sampler.stream()):
            bucket = waiting.setdefault(self.groups[index], [])
            bucket.append((position, index))
            if len(bucket) == self.batch_size:
                del waiting[self.groups[index]]
                done += 1
                if done > self.start_batch:
                    yield bucket
