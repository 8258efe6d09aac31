"""Loaded by the server that ranks are forked from, so that no rank loads or compiles it again."""

import contextlib

with contextlib.suppress(Exception):  # a rank that needs it will say what is wrong
    from planaria.checkpoint.capture.warming import warm

    warm()
