"""Which parameters full tuning trains: all of them, less what is frozen, plus what is opened again (ms-swift's keys).

1. freeze_parameters_ratio: the first parameters in the order of the checkpoint (embedding, blocks, norm, head), as many whole
   ones as have at most this share of all elements;
2. freeze_parameters: names that start with one of these; freeze_parameters_regex: names in which it is found;
3. trainable_parameters, trainable_parameters_regex: trained after all, the same way.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping

from swiftk.config import TunerConfig
from swiftk.model.adapter import EMBED
from swiftk.model.parameters import HEAD

KEYS = (
    "freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio",
    "trainable_parameters", "trainable_parameters_regex",
)  # fmt: skip


WITH_LORA = (
    "wants tuner_type full: lora freezes the whole base, target_modules says where adapters are and modules_to_save what is "
    "trained whole"
)


def frozen(tuner: TunerConfig, shapes: Mapping[str, tuple[int, ...]]) -> frozenset[str]:
    """Names of the parameters that full tuning leaves as they are. shapes: of all parameters, in the order of the checkpoint.

    Raises: ValueError for a prefix or regex that no name has, where nothing is opened again or nothing is left to train, and
    for any of KEYS with lora.
    """
    if tuner.tuner_type == "lora":
        for key in KEYS:
            if getattr(tuner, key):
                raise ValueError(f"{key}: is given with tuner_type lora, {WITH_LORA}")
    held: set[str] = set()
    room = int(tuner.freeze_parameters_ratio * sum(math.prod(shape) for shape in shapes.values()))
    for name, shape in shapes.items():
        room -= math.prod(shape)
        if room < 0:
            break
        held.add(name)
    held |= _named("freeze_parameters", tuner.freeze_parameters, tuner.freeze_parameters_regex, shapes)
    opened = _named("trainable_parameters", tuner.trainable_parameters, tuner.trainable_parameters_regex, shapes)
    if opened and not opened & held:
        raise ValueError(
            "trainable_parameters: names nothing that is frozen, wants freeze_parameters_ratio 1 to train this alone, or none"
        )
    held -= opened
    if len(held) == len(shapes):
        raise ValueError("freeze_parameters: has every parameter, wants some left to train; trainable_parameters opens some")
    return frozenset(held)


def _named(key: str, prefixes: Iterable[str], regex: str | None, names: Mapping[str, object]) -> set[str]:
    found: set[str] = set()
    for prefix in prefixes:
        here = {name for name in names if name.startswith(prefix)}
        if not here:
            raise ValueError(f"{key}: no parameter's name starts with {prefix!r}; {nearest(prefix, names, parts=False)}")
        found |= here
    if regex is not None:
        try:
            here = {name for name in names if re.search(regex, name)}
        except re.error as error:
            raise ValueError(f"{key}_regex: {regex!r} is not a regex ({error})") from None
        if not here:
            raise ValueError(f"{key}_regex: {regex!r} is found in no parameter's name; {nearest(regex, names)}")
        found |= here
    return found


def nearest(wanted: str, names: Iterable[str], *, parts: bool = True) -> str:
    """What an error says of a prefix or regex that fits no name: the nearest beginnings and, with parts, parts of names."""
    names = list(names)
    if "lm_head" in wanted and f"{EMBED}.weight" in names and HEAD not in names:
        return f"the head is tied: it is {EMBED}.weight"
    candidates = {name[:end] for name in names for end, letter in enumerate(f"{name}.") if letter == "."}
    if parts:
        candidates |= {part for name in names for part in name.split(".") if not part.isdigit()}
    near = difflib.get_close_matches(wanted.replace("\\", ""), sorted(candidates), n=3, cutoff=0.4)
    return f"the nearest are {', '.join(near)}" if near else f"names are like {', '.join(names[:3])}"


def ambiguous_prefixes(tuner: TunerConfig, names: Iterable[str]) -> list[str]:
    """Prefixes that end within a number: model.layers.1 is that of model.layers.10 too."""
    prefixes, names = (*tuner.freeze_parameters, *tuner.trainable_parameters), list(names)
    return [p for p in prefixes if p[-1:].isdigit() and any(n.startswith(p) and n[len(p)].isdigit() for n in names)]
