"""Commands that hints and reports tell a person to type, each in one place."""

#: Goes on after a cut in post-copy, or asks the destination whether it runs the guest.
RECOVER = "pageferry migrate --recover --control PATH URI"
#: Has a guest here that surely runs nowhere else.
TAKE_BACK = "pageferry resume --force --control PATH"
