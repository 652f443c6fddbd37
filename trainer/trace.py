"""The trace of a learner step: its losses, and a fingerprint of every gradient, by which a replay is compared.

Invariant: fingerprints are sums of integers, so they do not depend on the order of adding, nor on the device that adds;
one changed bit of a gradient changes its fingerprint.

Shape legend: `U` updates of a step, `P` parameters.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_DAMAGE = (ValueError, KeyError, EOFError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged archive raises, `NotImplementedError` for a method of compression among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """`losses` and `grad_norms` float64, shape (U,); `fingerprints` int64, shape (U, P, 2); `names` of the parameters.

    Gradients are taken before they are clipped. `made_on` says what computed them: other hardware rounds otherwise.
    """

    names: tuple[str, ...]
    losses: NDArray[np.float64]
    grad_norms: NDArray[np.float64]
    fingerprints: NDArray[np.int64]
    made_on: str = ""

    def to_bytes(self) -> bytes:
        """Compressed, for the ledger."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            names=np.array(self.names, dtype=np.str_),
            losses=self.losses,
            grad_norms=self.grad_norms,
            fingerprints=self.fingerprints,
            made_on=np.array(self.made_on, dtype=np.str_),
        )
        return buffer.getvalue()

    @staticmethod
    def from_bytes(data: bytes) -> StepTrace:
        """Inverse of `to_bytes`; raises `ValueError` on damaged bytes."""
        try:
            _check_sums(data)
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                return StepTrace(
                    names=tuple(str(name) for name in arrays["names"]),
                    losses=arrays["losses"],
                    grad_norms=arrays["grad_norms"],
                    fingerprints=arrays["fingerprints"],
                    made_on=str(arrays["made_on"]),
                )
        except _DAMAGE as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def difference(self, other: StepTrace) -> str | None:
        """The first thing in which another trace differs, by name; None when they agree to the last bit."""
        if self.names != other.names:
            return f"the model has other parameters: {len(self.names)} and {len(other.names)}"
        if len(self.losses) != len(other.losses):
            return f"{len(self.losses)} updates and {len(other.losses)}"
        for update in range(len(self.losses)):
            where = f"update {update + 1} of {len(self.losses)}" if len(self.losses) > 1 else "the update"
            if self.losses[update] != other.losses[update]:
                return f"the loss of {where} is {float(other.losses[update])}, was {float(self.losses[update])}"
            wrong = np.flatnonzero((self.fingerprints[update] != other.fingerprints[update]).any(axis=1))
            if len(wrong):
                name = self.names[int(wrong[0])]
                return f"the gradient of {name} in {where} differs, as do those of {len(wrong) - 1} others"
        return None

    @property
    def is_zero(self) -> bool:
        """Whether every gradient was zero, as where no advantage was: then equal gradients prove little."""
        return not self.fingerprints.any()


def _check_sums(data: bytes) -> None:
    """Read everything once, so that no array is made of bytes that changed."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        wrong = archive.testzip()
    if wrong is not None:
        raise ValueError(f"the checksum of {wrong} differs")
