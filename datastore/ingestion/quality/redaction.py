"""Personal data taken out of texts: mail addresses, IP addresses, telephone numbers and keys.

What is found is replaced by a word that says what was there, and counted. Patterns find what looks like such data, no more:
names are not found, and a version such as 10.2.15.1 may be taken for an address. Only addresses that are global are replaced, unless
asked: 127.0.0.1 and 192.168.0.1 tell nothing of anybody.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import Literal

from typing_extensions import override

from datastore.ingestion.quality.filter import Filter
from datastore.ingestion.quality.text import Text, Verdict

__all__ = ["Redact"]

Kind = Literal["mail", "ip", "phone", "key"]

_MAIL = re.compile(
    r"\b[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,64}){0,8}"
    r"@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\b"
)
"""After RFC 5322, as datatrove's `PIIFormatter`, with the lengths of RFC 5321 as bounds, which also bound the time."""

_IPV4 = re.compile(r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])")
_LEAST_GROUPS = 3
"""Of an IPv6 address: `a[1::2]` is a slice."""

_PHONE = re.compile(
    r"(?<![\w.+/=-])(?:\+\d{1,3}[ .-]?(?:\(0\))?(?:\(\d{1,5}\)[ .-]?)?\d(?:[ .-]?\d){5,12}"
    r"|\(\d{3}\)[ .-]?\d{3}[ .-]\d{4}|\d{3}[ .-]\d{3}[ .-]\d{4})(?![\w-]|\.\d)"
)
"""International numbers with a plus, and North American ones with their area code."""

_KEY = re.compile(
    r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----[\s\S]{0,20000}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"
    r"|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,255}\b|\bgithub_pat_[A-Za-z0-9_]{22,255}\b"
    r"|\bglpat-[A-Za-z0-9_-]{20,64}\b|\bxox[abprs]-[A-Za-z0-9-]{10,250}\b|\bAIza[0-9A-Za-z_-]{35}\b|\bhf_[A-Za-z0-9]{34,64}\b"
    r"|\bsk-(?:proj-|ant-)?[A-Za-z0-9_-]{32,200}\b|\b[rs]k_live_[A-Za-z0-9]{16,99}\b|\bnpm_[A-Za-z0-9]{36}\b|\bpypi-[A-Za-z0-9_-]{50,250}\b"
    r"|\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,2000}"
)
"""Keys that are known by how they begin: private keys, AWS, GitHub, GitLab, Slack, Google, Hugging Face, OpenAI, Stripe, npm, PyPI, JWT."""


class Redact(Filter, frozen=True, kw_only=True, tag="redact"):
    """Replaces personal data; drops nothing."""

    kinds: tuple[Kind, ...] = ("mail", "ip", "phone", "key")
    only_global_ips: bool = True
    """Whether addresses stay that are not of the internet, such as 127.0.0.1."""

    replacement: str = "<{kind}>"
    """What stands for it; `{kind}` is one of `kinds`."""

    @override
    def apply(self, text: Text) -> Verdict:
        left = text.text
        counts: Counter[str] = Counter()
        for kind in sorted({*self.kinds}, key=_ORDER.index):
            for is_there, pattern in _PATTERNS[kind]:
                if is_there(left):
                    left = pattern.sub(self._replace(kind, counts), left)
        return text.changed(left, counts) if counts else text

    def _replace(self, kind: Kind, counts: Counter[str]) -> Callable[[re.Match[str]], str]:
        put = self.replacement.replace("{kind}", kind)

        def replace(found: re.Match[str]) -> str:
            if kind == "ip" and not self._is_meant(found[0]):
                return found[0]
            counts[kind] += 1
            return put

        return replace

    def _is_meant(self, address: str) -> bool:
        if ":" in address and sum(map(bool, address.split(":"))) < _LEAST_GROUPS:
            return False
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        return found.is_global or not self.only_global_ips


_ORDER: tuple[Kind, ...] = ("key", "mail", "ip", "phone")
"""A key may hold what looks like a number; a mail address may end like an IP address."""

_KEY_SIGNS = (
    *(
        "PRIVATE KEY",
        "AKIA",
        "ASIA",
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
        "github_pat_",
        "glpat-",
        "xox",
        "AIza",
        "hf_",
    ),
    *("sk-", "k_live_", "npm_", "pypi-", "eyJ"),
)
_IPV4_SIGN = re.compile(r"\d\.\d{1,3}\.\d")
_IPV6_SIGN = re.compile(r":[0-9A-Fa-f]{0,4}:")
_PHONE_SIGN = re.compile(r"\+\d|\d{3}[ .-]\d{4}")

_PATTERNS: dict[Kind, tuple[tuple[Callable[[str], object], re.Pattern[str]], ...]] = {
    "key": ((lambda text: any(sign in text for sign in _KEY_SIGNS), _KEY),),
    "mail": ((lambda text: "@" in text, _MAIL),),
    "ip": ((_IPV4_SIGN.search, _IPV4), (_IPV6_SIGN.search, _IPV6)),
    "phone": ((_PHONE_SIGN.search, _PHONE),),
}
"""What finds each kind, and a quick look whether there can be any: most texts have none."""
