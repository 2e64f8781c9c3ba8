"""What the model will see and what it is trained on, before anything is trained: `--preview N`."""

from __future__ import annotations

from itertools import pairwise
from typing import IO

import numpy as np
from transformers import PreTrainedTokenizerBase

from swiftk.trainer.data import Dataset
from swiftk.trainer.packing import BatchPlan
from swiftk.trainer.template import Encoded

MASKED, TRAINED = "bright_black", "bold green"  # the two colours on a terminal
OPEN, CLOSE = "{+", "+}"  # around trained text elsewhere, as in git's word diff


def segments(row: Encoded, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """(text, is it trained) of each run of tokens. A document's first token is the label of nothing, so never trained."""
    trained = row.loss_mask.copy()
    trained[:1] = False
    cuts = [0, *(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(trained)]
    return [
        (str(tokenizer.decode(row.input_ids[start:stop].tolist())), bool(trained[start]))
        for start, stop in pairwise(cuts)
        if start < stop
    ]


def preview(
    dataset: Dataset, plan: BatchPlan, tokenizer: PreTrainedTokenizerBase, count: int, file: IO[str] | None = None
) -> None:
    """Prints the first `count` packs of epoch 0, document by document, trained text green (or in {+ +} without a terminal).

    file: None is standard output.
    """
    from rich.console import Console  # a run without a preview needs no rich
    from rich.text import Text

    console = Console(file=file, highlight=False)
    colour = console.is_terminal and not console.no_color
    legend = Text.assemble(("masked", MASKED), " ", ("trained", TRAINED)) if colour else Text(f"masked {OPEN}trained{CLOSE}")
    packs = plan.packs(0)[:count]
    for number, pack in enumerate(packs, 1):
        tokens = int(plan.lengths[list(pack)].sum())
        room = f" of {plan.packing_length}" if plan.packing_length else ""
        head = Text(f"=== pack {number} of {len(packs)} shown: {len(pack)} documents, {tokens}{room} tokens; ")
        console.print(head.append_text(legend), soft_wrap=True)
        begin = 0
        for place, index in enumerate(pack, 1):
            row = dataset.rows[index]
            end = begin + len(row.input_ids)
            console.print(Text(f"--- document {place}, tokens {begin}-{end - 1}, {row.source}"), soft_wrap=True)
            line = Text()
            for text, trained in segments(row, tokenizer):
                text = text.replace("\x1b", "\u241b")  # data must not drive the terminal
                shown = text if colour or not trained else f"{OPEN}{text}{CLOSE}"
                line.append(shown, style=(TRAINED if trained else MASKED) if colour else "")
            console.print(line, soft_wrap=True)
            begin = end
