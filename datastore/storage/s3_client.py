"""Clients for S3, made as s3fs makes its own, from the same options and the same usual places.

botocore, which s3fs brings along, looks for credentials, profile, region and endpoint in the environment, in `~/.aws` and
at the machine's role; nothing of that is done here. An option that only s3fs understands makes `understands` say no, and the
caller takes s3fs. Retries are switched off (ours are the only layer), and so is the check of a body against S3's own
checksum, which would copy every byte: what this package reads it checks against digests of its own.

A client is kept for its options, for making one takes 50 ms; a forked child makes its own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["S3Client", "forget_clients", "s3_client", "understands"]

_SESSION = {"profile"}
_LOGIN = {"key": "aws_access_key_id", "secret": "aws_secret_access_key", "token": "aws_session_token"}
_CLIENT = {"endpoint_url", "use_ssl"}
_NESTED = {"client_kwargs", "config_kwargs"}
_IGNORED = {"anon", "default_block_size", "use_listings_cache", "max_concurrency"}
"""`anon` is looked at; the others tune what is not used here."""

_CONFIG: dict[str, object] = {
    "connect_timeout": 5,
    "read_timeout": 60,
    "max_pool_connections": 64,
    "retries": {"total_max_attempts": 1, "mode": "standard"},
    "response_checksum_validation": "when_required",
}

_clients: dict[tuple[int, str], "S3Client"] = {}
"""Of this process, by its options. Two threads that make the same one at once do no harm."""


@dataclass(frozen=True, slots=True)
class S3Client:
    """botocore's client, and the secrets that it signs with as far as they are known."""

    client: Any
    secrets: tuple[str, ...]


def understands(options: Mapping[str, Any]) -> bool:
    """Return whether a client for these options of s3fs can be made here."""
    return not options.keys() - _SESSION - _LOGIN.keys() - _CLIENT - _NESTED - _IGNORED


def s3_client(options: Mapping[str, Any]) -> S3Client:
    """Return the client for these options of s3fs.

    Raises:
        botocore.exceptions.BotoCoreError: a profile that does not exist, a malformed setting, and the like.
    """
    name = os.getpid(), repr(sorted(options.items(), key=lambda item: item[0]))
    if name not in _clients:
        _clients[name] = _make(options)
    return _clients[name]


def forget_clients() -> None:
    """Have clients made anew: the environment, or a file they were made from, has changed."""
    _clients.clear()


def _make(options: Mapping[str, Any]) -> S3Client:
    from botocore import UNSIGNED  # noqa: PLC0415 - optional, and takes 100 ms
    from botocore.config import Config  # noqa: PLC0415
    from botocore.session import Session  # noqa: PLC0415

    config = _CONFIG | dict(options.get("config_kwargs") or {})
    arguments = {name: options[name] for name in _CLIENT if options.get(name) is not None}
    login = {ours: options[name] for name, ours in _LOGIN.items() if options.get(name) is not None}
    if options.get("anon"):
        config["signature_version"], login = UNSIGNED, {}
    arguments |= login | dict(options.get("client_kwargs") or {})
    session = Session(profile=options.get("profile"))
    client = session.create_client("s3", config=Config(**config), **arguments)
    found = session.get_credentials() if not login and not options.get("anon") else None
    # Credentials of a role are fetched anew now and then, and asking for them is a request: they are not known.
    known = (found.access_key, found.secret_key, found.token) if type(found).__name__ == "Credentials" and found else ()
    return S3Client(client, tuple(secret for secret in known if secret))
