"""The one shape of an error on the device side: what is wrong, where, and the way out.

A command prints `str(error)` and exits non-zero; a caller can read the three parts. Standard library only.
"""

from __future__ import annotations

#: Ways out that several errors have.
DRIVER = "Install or restart NVIDIA's driver, and see what nvidia-smi says"
MAKE_AGAIN = "Make the bundle again"
RUN_AGAIN = "Open the session again; if it recurs, look at the report's gates or choose another artifact"


class Fault(Exception):
    """Base of every error the runtime raises on purpose.

    `what` says what is wrong, `where` names the file, field or tensor, `way_out` says what to do about it.
    """

    def __init__(self, what: str, where: str = "", way_out: str = "") -> None:
        self.what, self.where, self.way_out = what, where, way_out
        super().__init__(what, where, way_out)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.way_out}" if self.way_out else text
