"""What torch.jit.script is told by modules that it cannot compile."""

from __future__ import annotations

from torch import nn


class NotScriptable:
    """A module whose forward decides at the call what runs, which TorchScript's language cannot say."""

    def __prepare_scriptable__(self) -> nn.Module:
        """Asked for by torch.jit.script.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose forward decides at the call what runs; "
            "use torch.jit.trace, torch.export.export or torch.compile"
        )
