"""Calls in threads at once, for tests that shall fail rather than hang."""

import threading
import time


def in_threads(count, call, seconds=60):
    """Run ``call(number)`` in threads at once; fail, not hang, if they do not come back."""
    errors = []

    def body(number):
        try:
            call(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(n,), daemon=True) for n in range(count)]
    for t in threads:
        t.start()
    end = time.monotonic() + seconds
    for t in threads:
        t.join(max(0.0, end - time.monotonic()))
    assert not any(t.is_alive() for t in threads), "stuck"
    if errors:
        raise errors[0]
