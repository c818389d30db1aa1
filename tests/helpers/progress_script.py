"""Shows a recorded migration on standard error as `pageferry migrate` does, step by step: one for each line of input.

Run as a program, on a terminal or not.
"""

import sys

from pageferry.cli.progress import ProgressView
from pageferry.cli.stdio import ERR

DECISION = {"action": "next-round", "reason": "the downtime fits when it is done → soon"}
STATS = {
    "index": 0,
    "final": False,
    "sent_pages": 123456,
    "sent_bytes": 123456 * 4096,
    "duration_s": 1.5,
    "remaining_pages": 77,
}
STEPS = (
    [{"type": "RoundBegan", "final": False, "index": 0, "dirty_pages": 123456}],
    [{"type": "RoundProgress", "sent_pages": 1000, "eta_s": 3.25, "eta_reason": "the first rates are known now"}],
    [{"type": "RoundProgress", "sent_pages": 100000, "eta_s": None, "eta_reason": "the guest writes 90 MB/s"}],
    [{"type": "RoundEnded", "stats": STATS, "decision": DECISION}],
    [
        {"type": "Warned", "text": "a warning that is told"},
        {"type": "Notice", "text": "cancelling"},
        {"type": "Status", "status": "pre-switchover"},
        {"type": "Status", "status": "active"},
        {"type": "RoundBegan", "final": True, "index": 1, "dirty_pages": 77},
    ],
    [{"type": "RoundEnded", "stats": {**STATS, "index": 1, "final": True, "sent_pages": 77}, "decision": None}],
    [{"type": "PostcopyProgress", "missing_pages": 50, "sent_pages": 25, "eta_s": 1.0, "eta_reason": ""}],
)


def show() -> None:
    """Show all steps, each when a line has come."""
    with ProgressView(ERR) as view:
        for step in STEPS:
            sys.stdin.readline()
            for event in step:
                view.show(event)


if __name__ == "__main__":
    show()
