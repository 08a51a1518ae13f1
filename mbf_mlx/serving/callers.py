"""Who may ask `mbf serve`: the names that it answers to, the web pages that may call it, and its key.

Any web page can make a browser send requests to this machine. A page of a foreign site is known by its `Origin`; a
foreign name that was made to lead to this machine (DNS rebinding) is known by its `Host`.
"""

import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from mbf_mlx.config import ServeConfig
from mbf_mlx.serving.request_checks import Refused


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach an address."""
    found = _address(address)
    return found is not None and found.is_loopback


def check_host(hosts: Sequence[str], local: str, config: ServeConfig) -> None:
    """Refuse a request for a name that is not this server's.

    Args:
        hosts: The request's Host headers. A request without one comes from no browser.
        local: The address at which the request arrived.
        config: The name that the server listens on, and others that it answers to.

    Raises:
        Refused: there are several, it cannot be read, or it is a foreign name.
    """
    if not hosts:
        return
    name = _host_name(hosts[0]) if len(hosts) == 1 else None
    if name is None:
        raise Refused(400, "Host: expected one name or address")
    allowed = {_plain(each) for each in (config.host, *config.allow_host)} - {"0.0.0.0", "::", ""}
    address, own = _address(name), _address(local)
    if name in allowed or (address is not None and address == own):
        return
    if own is not None and own.is_loopback and (name == "localhost" or (address is not None and address.is_loopback)):
        return
    raise Refused(403, "Host: this server is not known by that name; --allow-host NAME lets it answer to another one")


def check_origin(origins: Sequence[str], hosts: Sequence[str], config: ServeConfig) -> str | None:
    """Return the Origin that an answer may be shown to, None if no web page asks.

    Raises:
        Refused: a page of a foreign site asks.
    """
    if not origins:
        return None
    origin = origins[0].strip().lower()
    if len(origins) == 1 and origin.isascii() and origin.isprintable():  # it is written into the answer's head
        if "*" in config.allowed_origins or origin in {each.lower().rstrip("/") for each in config.allowed_origins}:
            return origins[0].strip()
        if len(hosts) == 1 and origin == f"http://{hosts[0].strip().lower()}":
            return origins[0].strip()
    raise Refused(403, "Origin: web pages of that site may not call this server; --cors ORIGIN lets them")


def check_key(headers: Sequence[str], key: str | None) -> None:
    """Refuse a request without the server's key.

    Raises:
        Refused: the key is missing or another one.
    """
    if key is None:
        return
    kind, _, given = headers[0].strip().partition(" ") if len(headers) == 1 else ("", "", "")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1", "replace"), key.encode()):
        raise Refused(401, "Authorization: expected Bearer and the key that the server was started with (--api-key)")


def _host_name(host: str) -> str | None:
    try:
        parts = urlsplit(f"//{host.strip()}")
        _ = parts.port
    except ValueError:
        return None
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc or not parts.hostname:
        return None
    return _plain(parts.hostname)


def _plain(name: str) -> str:
    return name.lower().strip("[]").removesuffix(".")


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
