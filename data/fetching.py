"""Images that rows name by URL: fetched with limits, and never from where a stranger's data should not reach."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import ssl
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

import datasets
import urllib3

from .rows import BadSample
from .sources import digest

LONGEST_S = 60.0  # for a whole file
LARGEST = 256 * 2**20  # bytes
_REDIRECTS = 5
_TIMEOUT = urllib3.Timeout(connect=10.0, read=20.0)
_PORTS = {"http": 80, "https": 443}


def fetch(url: str, private_hosts: Collection[str] = ()) -> bytes:
    """The content behind a URL, from the cache of `datasets` where it was fetched before.

    Addresses that are not public (loopback, private, link-local, reserved) are refused, in redirects too, and the
    address that was looked at is the one that is asked: a name cannot mean another one a moment later. Proxies of the
    environment are not used, because they would look the name up themselves.

    Args:
        url: http or https.
        private_hosts: names whose addresses need not be public.

    Raises:
        BadSample: when it cannot be had.
    """
    kept = Path(datasets.config.HF_DATASETS_CACHE, "panorama_vlm", digest(url) + digest(url[::-1]))
    if kept.is_file():
        return kept.read_bytes()
    try:
        data = _follow(url, private_hosts)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(f"not fetched: {url}: {type(error).__name__}: {str(error)[:200]}") from error
    with contextlib.suppress(OSError):  # without a cache it is fetched again in the next epoch
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, kept)
    return data


def _follow(url: str, private_hosts: Collection[str]) -> bytes:
    end = time.monotonic() + LONGEST_S
    for _ in range(_REDIRECTS + 1):
        target = urlsplit(url)
        if target.scheme not in _PORTS or not target.hostname:
            raise BadSample(f"not fetched: {url} is no http or https URL")
        address = _allowed_address(target, private_hosts)
        with _connect(target, address) as pool:
            path = (target.path or "/") + (f"?{target.query}" if target.query else "")
            headers = {"Host": target.netloc.rsplit("@", 1)[-1], "User-Agent": "panorama-vlm", "Accept": "image/*"}
            answer = pool.urlopen(
                *("GET", path), headers=headers, redirect=False, retries=False, timeout=_TIMEOUT, preload_content=False
            )
            with contextlib.closing(answer):
                if answer.get_redirect_location():
                    url = urljoin(url, str(answer.get_redirect_location()))
                    continue
                if answer.status != 200:
                    raise BadSample(f"not fetched: {url}: status {answer.status}")
                return _read(answer, url, end)
    raise BadSample(f"not fetched: {url}: more than {_REDIRECTS} redirects")


def _allowed_address(target: SplitResult, private_hosts: Collection[str]) -> str:
    """The address to ask; every address of the name has to be allowed."""
    assert target.hostname is not None
    port = target.port or _PORTS[target.scheme]
    found = [info[4][0] for info in socket.getaddrinfo(target.hostname, port, type=socket.SOCK_STREAM)]
    private = [address for address in found if not ipaddress.ip_address(str(address).split("%")[0]).is_global]
    if private and target.hostname not in private_hosts:
        raise BadSample(
            f"not fetched: {target.hostname} has the address {private[0]}, which is not public; `private_hosts` of the "
            "source may name it"
        )
    return str(found[0])


def _connect(target: SplitResult, address: str) -> urllib3.HTTPConnectionPool:
    """Connections to an address under the name of the URL."""
    port = target.port or _PORTS[target.scheme]
    if target.scheme == "http":
        return urllib3.HTTPConnectionPool(address, port)
    name = target.hostname
    trusted = ssl.create_default_context()
    return urllib3.HTTPSConnectionPool(address, port, server_hostname=name, assert_hostname=name, ssl_context=trusted)


def _read(answer: Any, url: str, end: float) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while piece := answer.read1(2**16, decode_content=True):  # what has come by now: a slow server cannot hold us
        size += len(piece)
        if size > LARGEST:
            raise BadSample(f"not fetched: {url} has more than {LARGEST // 2**20} MiB")
        if time.monotonic() > end:
            raise BadSample(f"not fetched: {url} took more than {LONGEST_S:.0f} s")
        pieces.append(piece)
    return b"".join(pieces)
