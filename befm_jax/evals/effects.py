"""Effects that a respondent predicts, against published ones, as columns to be summed.

With `x` the published difference of a contrast, `s` its standard error and `y` the predicted one,
the correlation is `sum xy / sqrt(sum x^2 sum y^2)` and the slope of `y` on `x` is
`sum xy / sum (x^2 - s^2)`: through the origin, since a contrast turned round is the same contrast;
and corrected for the error in `x`, which makes a slope too small (errors in variables).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Predicted differences that are less have no sign.
_NO_DIFFERENCE = 1e-9


@dataclass(frozen=True, eq=False)
class Effects:
    """Contrasts, as shares of the range of their answers; NaN where something is not known.

    Attributes:
        predicted, published, standard_error, low, high: `[E]`; the last two are the published
            interval.
        direction: `[E]` 1, 0 or -1.
    """

    predicted: Float64[np.ndarray, " E"]
    published: Float64[np.ndarray, " E"]
    standard_error: Float64[np.ndarray, " E"]
    low: Float64[np.ndarray, " E"]
    high: Float64[np.ndarray, " E"]
    direction: Float64[np.ndarray, " E"]

    @property
    def columns(self) -> Mapping[str, Float64[np.ndarray, "E K"]]:
        """What the measure of each name is made of: see `FINISH`.

        A contrast of which something is not known is 0 in all columns of a measure that needs it.
        """
        x, y = self.published, self.predicted
        signed = np.abs(self.direction) == 1
        right = np.where(np.abs(y) < _NO_DIFFERENCE, 0.5, np.sign(y) == self.direction)
        inside = (self.low <= y) & (y <= self.high)
        return {
            "sign": _known(signed, right),
            "correlation": _known(np.isfinite(x), x * y, x * x, y * y),
            "slope": _known(np.isfinite(self.standard_error), x * y, x**2 - self.standard_error**2),
            "coverage": _known(np.isfinite(self.low), inside),
        }


def _known(known: NDArray[np.bool_], *columns: Floats | NDArray[np.bool_]) -> Floats:
    """The columns `[E, K + 1]` where they are known, the first of them how many that are."""
    return np.stack([known, *(np.where(known, one, 0.0) for one in columns)], 1).astype(float)


def share(sums: Float64[np.ndarray, "... 2"]) -> Floats:
    """The mean of a column."""
    return _quotient(sums[..., 1], sums[..., 0])


def correlation(sums: Float64[np.ndarray, "... 4"]) -> Floats:
    """The correlation through the origin; NaN where a side has no differences."""
    _, xy, xx, yy = np.moveaxis(sums, -1, 0)
    return _quotient(xy, np.sqrt(np.maximum(xx, 0.0) * np.maximum(yy, 0.0)))


def slope(sums: Float64[np.ndarray, "... 3"]) -> Floats:
    """The slope; NaN where the published differences are no larger than their errors."""
    return _quotient(sums[..., 1], sums[..., 2])


def _quotient(numerator: Floats, denominator: Floats) -> Floats:
    defined = np.asarray(denominator) > 1e-12
    return np.where(defined, numerator / np.where(defined, denominator, 1.0), np.nan)


FINISH = {"sign": share, "correlation": correlation, "slope": slope, "coverage": share}
