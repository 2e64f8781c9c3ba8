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

    @staticmethod
    def split(name: str, shape: tuple[int, ...], dim: int, rank: int, size: int) -> ParamSpec:
        """Equal parts along `dim`; this process has part `rank` of `size`."""
        if shape[dim] % size:
            raise ValueError(f"ParamSpec: {name} has {shape[dim]} rows along dimension {dim}, wants a multiple of {size}")
        part = shape[dim] // size
        slices = tuple((rank * part, (rank + 1) * part) if d == dim else (0, n) for d, n in enumerate(shape))
        return ParamSpec(name, shape, slices)

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.slices)
