"""`ParamSpec`: what init, clip, optimizer, save and load know of one parameter's place in the layout."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ParamSpec:
    """name: as in the Hugging Face checkpoint; shape: global; slices: (start, stop) per dimension held here;
    grad_axes: mesh axes over which the gradient is summed (the parameter is replicated along them)."""

    name: str
    shape: tuple[int, ...]
    slices: tuple[tuple[int, int], ...]
    grad_axes: tuple[str, ...] = ("dp",)

    @staticmethod
    def replicated(name: str, shape: tuple[int, ...]) -> ParamSpec:
        return ParamSpec(name, shape, tuple((0, n) for n in shape))

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.slices)
