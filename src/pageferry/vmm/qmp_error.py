"""An error answer of QMP."""

from enum import StrEnum

from pageferry.core.errors import PageferryError


class ErrorKind(StrEnum):
    """Whose fault an error is: of what was asked, now or at all; of what the host lacks; of the guest or process."""

    USAGE = "usage"
    UNSUPPORTED = "unsupported"
    FAILED = "failed"


class QmpError(PageferryError):
    """The other side answered a command with an error; ``error_class`` is QMP's, ``kind`` ours."""

    def __init__(
        self,
        message: str,
        *,
        error_class: str = "GenericError",
        hint: str = "",
        kind: ErrorKind = ErrorKind.USAGE,
    ) -> None:
        super().__init__(message, hint=hint)
        self.error_class = error_class
        self.kind = kind
