"""Rows to packs to optimizer steps to token-first batches: no padding, no row dropped or repeated, one order for every layout.

Packing is best-fit decreasing (Johnson 1973: at most 11/9 of the fewest packs, plus 4): rows from long to short, each into
the pack with the least room that still takes it. It sees lengths alone, so the number of packs and the lengths in each are
the same in every epoch; an epoch chooses which of the equally long rows goes where, and the order of the packs. That order
is a function of (seed, epoch): the only state of a resumed run is the number of steps it has taken.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from swiftk.trainer.shuffle import shuffle_keys

if TYPE_CHECKING:
    from swiftk.trainer.data import Dataset

IGNORE_INDEX = -100  # a label without a loss, as in torch.nn.functional.cross_entropy

Pack = tuple[int, ...]  # row indices, in the order in which they lie in the sequence


@dataclass(frozen=True)
class Batch:
    """Documents one after the other, tokens first; attention never crosses a boundary of cu_seqlens.

    input_ids, labels, positions: int64 (total,); labels[i] is the token after input_ids[i] in the same document, or -100
    where that token is not trained or the document ends; positions restart at 0 in each document. token_index: int64
    (total,), row << 32 | position: the token's name in the data set, whatever it is packed with.
    cu_seqlens: int32 (documents + 1,), starts at 0, ends at total. rows: the dataset row of each document.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    token_index: torch.Tensor
    rows: Pack

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that count in the loss; summed over ranks and micro-batches it divides the loss of a step."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device) -> Batch:
        """Itself where it lies there; else copied through pinned memory, so that the copy waits for nothing."""
        if self.input_ids.device.type == device.type:
            return self
        move = {name: t.pin_memory().to(device, non_blocking=True) for name, t in vars(self).items() if name != "rows"}
        return replace(self, **move)


def collate(dataset: Dataset, micro_batch: Sequence[Pack]) -> Batch:
    """The rows of all packs of a micro-batch as one token-first batch."""
    rows = tuple(row for pack in micro_batch for row in pack)
    if not rows:
        raise ValueError("collate: micro_batch has no rows, wants at least one (a rank without rows skips the forward)")
    encoded = [dataset.rows[row] for row in rows]
    lengths = np.array([len(e.input_ids) for e in encoded])
    ends = np.cumsum(lengths)
    ids = np.concatenate([e.input_ids for e in encoded]).astype(np.int64)
    trained = np.concatenate([e.loss_mask for e in encoded])
    labels = np.full(len(ids), IGNORE_INDEX, np.int64)
    labels[:-1] = np.where(trained[1:], ids[1:], IGNORE_INDEX)  # the mask of a token counts where it is the label
    labels[ends - 1] = IGNORE_INDEX  # the next token is another document's
    positions = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    cu_seqlens = np.concatenate([[0], ends]).astype(np.int32)
    token_index = np.repeat(np.array(rows, np.int64) << 32, lengths) | positions
    arrays = (ids, labels, positions, cu_seqlens, token_index)
    input_ids, targets, places, bounds, index = (torch.from_numpy(a) for a in arrays)
    return Batch(input_ids, targets, places, bounds, index, rows)


# --- packing -----------------------------------------------------------------------------------------------------


def pack_lengths(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Best-fit decreasing of lengths that already run from long to short: the pack number of each, int64 (n,).

    `rooms` holds the distinct free sizes in order, `packs_with` the packs that have each: one binary search per row.
    """
    out = np.empty(len(lengths), np.int64)
    rooms: list[int] = []
    packs_with: dict[int, list[int]] = {}
    num_packs = 0
    for i, length in enumerate(lengths.tolist()):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            packs = packs_with[room]
            pack = packs.pop()
            if not packs:
                del packs_with[room], rooms[at]
        else:
            pack, room = num_packs, capacity
            num_packs += 1
        out[i] = pack
        if room := room - length:
            if room in packs_with:
                packs_with[room].append(pack)
            else:
                packs_with[room] = [pack]
                rooms.insert(bisect_left(rooms, room), room)
    return out


class BatchPlan:
    """Which rows each rank sees in each optimizer step.

    An epoch is a list of packs in an order that (seed, epoch) gives; step s takes the next global_batch_size of them. The
    last step of an epoch takes what is left: it is smaller, never filled up. Within a step the packs are dealt to the ranks
    from long to short, so that all ranks get about the same number of tokens; the set of rows of a step is the same for
    every dp_size and micro_batch_size. A rank may get fewer micro-batches than another, or none.

    Args:
        lengths: tokens of each row, all >= 1 and with packing <= packing_length.
        packing_length: tokens of a pack; None: each row is a pack of its own.
        micro_batch_size: packs per forward on one rank. global_batch_size: packs per optimizer step over all ranks.
        dp_rank, dp_size: this rank's place along the data-parallel axis.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        packing_length: int | None,
        micro_batch_size: int,
        global_batch_size: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        for name, value in (("micro_batch_size", micro_batch_size), ("global_batch_size", global_batch_size)):
            if value < 1:
                raise ValueError(f"BatchPlan: {name} has {value}, wants at least 1")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"BatchPlan: dp_rank has {dp_rank}, dp_size {dp_size} needs 0 <= dp_rank < {dp_size}")
        if not len(self.lengths) or self.lengths.min() < 1:
            raise ValueError("BatchPlan: lengths has no rows or an empty row, wants at least one row of at least one token")
        longest = int(self.lengths.max())
        if packing_length is not None and longest > packing_length:
            raise ValueError(
                f"BatchPlan: row {int(self.lengths.argmax())} has {longest} tokens, wants at most packing_length "
                f"{packing_length}; raise packing_length or lower max_length"
            )
        self.packing_length = packing_length
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.seed, self.dp_rank, self.dp_size = seed, dp_rank, dp_size
        if packing_length is None:
            self._slots = np.arange(len(self.lengths))  # slot (rank of a row from long to short) -> pack
        else:
            self._slots = pack_lengths(np.sort(self.lengths)[::-1], packing_length)
        self.num_packs = int(self._slots.max()) + 1
        self._epoch: tuple[int, list[Pack]] | None = None  # the packs of one epoch, kept because steps come in order

    def packs(self, epoch: int) -> list[Pack]:
        """All packs of an epoch in training order."""
        if self._epoch is None or self._epoch[0] != epoch:
            ties = shuffle_keys(len(self.lengths), self.seed, epoch, 0)
            rows = np.lexsort((ties, -self.lengths))  # one row per slot
            by_pack = np.argsort(self._slots, kind="stable")
            starts = np.searchsorted(self._slots[by_pack], np.arange(1, self.num_packs))
            packs = [tuple(part.tolist()) for part in np.split(rows[by_pack], starts)]
            order = np.argsort(shuffle_keys(self.num_packs, self.seed, epoch, 1), kind="stable")
            self._epoch = (epoch, [packs[i] for i in order.tolist()])
        return self._epoch[1]

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """Optimizer steps of an epoch: the same for every epoch and every dp_size."""
        return -(-self.num_packs // self.global_batch_size)

    def epoch_of(self, global_step: int) -> tuple[int, int]:
        """(epoch, step within it) of a global step; all count from 0."""
        return divmod(global_step, self.steps_per_epoch())

    def global_batch(self, global_step: int) -> list[Pack]:
        """The packs of a step over all ranks, from long to short."""
        epoch, step = self.epoch_of(global_step)
        packs = self.packs(epoch)[step * self.global_batch_size : (step + 1) * self.global_batch_size]
        return sorted(packs, key=lambda pack: -int(self.lengths[list(pack)].sum()))

    def step(self, global_step: int) -> list[list[Pack]]:
        """This rank's micro-batches of a step, each a list of packs for `collate`; may be empty in an epoch's last step."""
        mine = self.global_batch(global_step)[self.dp_rank :: self.dp_size]
        return [mine[i : i + self.micro_batch_size] for i in range(0, len(mine), self.micro_batch_size)]

    @property
    def efficiency(self) -> float:
        """Share of num_packs x packing_length that holds tokens; 1.0 without packing, where no room is set aside."""
        if self.packing_length is None:
            return 1.0
        return float(self.lengths.sum() / (self.num_packs * self.packing_length))
