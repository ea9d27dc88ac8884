"""How well-known secrets look in a text. Pure.

Sources: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html (AKIA, ASIA),
https://docs.github.com/en/authentication/keeping-your-account-and-data-secure/about-authentication-to-github (ghp_ and
others), https://docs.slack.dev/authentication/tokens (xox), RFC 6750 (Bearer), RFC 7468 (PEM), RFC 7519 (JWT).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["likely", "secrets_in"]

_START = "(?<![A-Za-z0-9])"
_VALUE = r"""(?: "(?:[^"\\]|\\.)*"? | '(?:[^'\\]|\\.)*'? | \\{1,8}["'] .*? (?: \\{1,8}["'] | \Z ) | %s )"""
"""In quotes, in quotes inside of a text in quotes, or bare."""
_SAYS = r"""s? \\{0,8}["']? \s{0,3} [:=] \s{0,3}"""
_BARE = r"""(?: (?:basic|digest|token) \s{1,3} )? [^\s"'\\,;&<>()\[\]{}]+"""


def _named(names: str, bare: str = _BARE) -> re.Pattern[str]:
    """What is said after a name, as in forms, in headers, in JSON inside of a text, and in what Python shows."""
    return re.compile(f"(?isx) (?:{names}) {_SAYS} ({_VALUE % bare})")


def _after(*words: str) -> str:
    return "(?:" + "|".join(f"(?<={word})|(?<={word}[_-])" for word in words) + ")"


def _shapes() -> dict[str, re.Pattern[str]]:
    """What to match where a text has these words, in lower case; the first group is the secret."""
    key = re.compile(rf"{_START}((?:sk-|tsk_|[sr]k_live_)[A-Za-z0-9_-]{{16,}})")
    aws = re.compile(rf"{_START}((?:AKIA|ASIA)[A-Z0-9]{{12,}})")
    github = re.compile(rf"{_START}((?:gh[pousr]|github_pat)_[A-Za-z0-9_]{{16,}})")
    pem = r"(?s)(-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY.*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY-----|\Z))"
    return {
        **dict.fromkeys(("sk-", "tsk_", "sk_live_", "rk_live_"), key),
        "bearer": re.compile(r"(?i)bearer\s{1,3}([A-Za-z0-9._~+/-]{16,}=*)"),
        **dict.fromkeys(("akia", "asia"), aws),
        **dict.fromkeys(("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"), github),
        "xox": re.compile(rf"{_START}(xox[a-z]-[A-Za-z0-9-]{{8,}})"),
        "aiza": re.compile(rf"{_START}(AIza[A-Za-z0-9_-]{{30,}})"),
        # Not after - or _ either: a run of them would be read anew from each of its places.
        "eyj": re.compile(r"(?<![A-Za-z0-9_-])(eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){1,4})"),
        "-----begin": re.compile(pem),
        **dict.fromkeys(("password", "passwd", "passphrase", "secret"), _named("password|passwd|passphrase|secret")),
        "key": _named(_after("api", "private", "secret", "access") + "key"),
        "token": _named(_after("access", "refresh", "auth") + "token"),
        "authorization": _named("authorization", bare=r"[^\r\n]+"),
        "cookie": _named(r"(?<![\w\ ])cookie", bare=r"[^\r\n]+"),
    }


_SHAPES = _shapes()


def likely(whole: str) -> list[str]:
    """The words in a text that may belong to a secret: what `secrets_in` looks for in the texts that make it up."""
    lowered = whole.lower()
    return [word for word in _SHAPES if word in lowered]


def secrets_in(text: str, words: Iterable[str]) -> list[tuple[int, int]]:
    """Where secrets stand in a text, from and up to; those that overlap are several."""
    lowered = text.lower()
    if len(lowered) != len(text):  # some letters become two
        lowered = "".join(letter.lower() if letter.isascii() else letter for letter in text)
    found = []
    for word in words:
        pattern = _SHAPES[word]
        at = lowered.find(word)
        while at >= 0:
            match = pattern.match(text, at)
            if match is not None:
                found.append(match.span(1))
            at = lowered.find(word, at + 1 if match is None else max(match.end(), at + 1))
    return found
