"""The page's requests to its own address when the environment names a proxy."""

import contextlib
import os
from collections.abc import Iterator
from urllib.request import getproxies_environment


@contextlib.contextmanager
def past_proxies(hosts: str = "*") -> Iterator[None]:
    """Bypass the proxies for these hosts (comma-separated; * for all) in the block, then restore the environment."""
    names = ("NO_PROXY", "no_proxy")  # programs read one or the other
    before = {name: os.environ[name] for name in names if name in os.environ}
    known = getproxies_environment().get("no")
    os.environ |= dict.fromkeys(names, f"{known},{hosts}" if known and hosts != "*" else hosts)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ |= before
