"""`keep_finite_statistics` of the modules that run BatchNorms by themselves: what they were made with, and what `fuse_`
makes of it for as long as a model is fused."""

from __future__ import annotations

_OWN = "_own_keep_finite_statistics"


class KeepsStatistics:
    """A module with the option: whether a channel whose running mean or variance would not be finite keeps both."""

    keep_finite_statistics: bool = False  # of a module, too, that an older version has pickled

    def _kept_repr(self) -> str:
        return ", keep_finite_statistics=True" if self.keep_finite_statistics else ""


def let_keep(module: KeepsStatistics, keep: bool) -> None:
    """Have a module keep them whatever it was made with, or (False) as it was made."""
    own = vars(module)
    made_with = own.pop(_OWN, own.get("keep_finite_statistics", False))
    if keep and not made_with:
        own[_OWN] = made_with
    own["keep_finite_statistics"] = keep or made_with
