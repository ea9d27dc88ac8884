"""How well-known secrets look in a text. Pure.

Sources: https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html (AKIA, ASIA),
https://docs.github.com/en/authentication/keeping-your-account-and-data-secure/about-authentication-to-github (ghp_ and
others), https://docs.slack.dev/authentication/tokens (xox), https://docs.stripe.com/keys (sk_test_ and others),
https://huggingface.co/docs/hub/security-tokens (hf_), https://replicate.com/docs/topics/security/api-tokens (r8_),
RFC 3986 section 3.2.1 (passwords in URLs), RFC 6750 (Bearer), RFC 7468 (PEM), RFC 7519 (JWT).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["likely", "secrets_in"]

_START = "(?<![A-Za-z0-9])"
_PREFIX = r"""(?: (?:bytearray\()? [bfrtu]{0,2} (?= \\{0,8}["'] ) )?"""
"""What Python shows before the quotes of a text, and of bytes."""
_VALUE = r"""(?: "(?:[^"\\]|\\.)*"? | '(?:[^'\\]|\\.)*'? | \\{1,8}["'] .*? (?: \\{1,8}["'] | \Z ) | %s )"""
"""In quotes, in quotes inside of a text in quotes, or bare."""
_SAYS = r"""\\{0,8}["']? \s{0,3} [:=] \s{0,3}"""
_AS_VALUE = r"""\\{0,8}["']value\\{0,8}["'] \s{0,3} : \s{0,3}"""
"""As in `{"name": "Cookie", "value": "..."}`, which is how HAR files list headers."""
_THEN = r"""\\{0,8}["'] \s{0,3} , \s{0,3}"""
_NO_SIGN = r"""\s"'\\,;&<>()\[\]{}"""
_BARE = rf"""(?: (?:basic|digest|token) \s{{1,3}} )? [^{_NO_SIGN}]+"""


def _named(names: str, bare: str = _BARE, *, pairs: bool = False) -> re.Pattern[str]:
    """What is said after a name, as in forms, in headers, in JSON inside of a text, and in what Python shows.

    With `pairs` also as the second of a pair in quotes, such as `(b'x-api-key', b'...')`.
    """
    in_pair = rf"""{_THEN} (?:{_AS_VALUE})? (?= {_PREFIX} \\{{0,8}}["'] )""" if pairs else _THEN + _AS_VALUE
    return re.compile(f"(?isx) (?:{names}) (?: {_SAYS} | {in_pair} ) ( {_PREFIX} {_VALUE % bare} )")


def _after(*words: str) -> str:
    return "(?:" + "|".join(f"(?<={word})|(?<={word}[_.-])" for word in words) + ")"


def _shapes() -> dict[str, re.Pattern[str]]:
    """What to match where a text has these words, in lower case; the first group is the secret."""
    key = re.compile(rf"{_START}((?:sk-|tsk_|[sr]k_(?:live|test)_)[A-Za-z0-9_-]{{16,}})")
    # Fewer signs in these: names of functions and of models begin so, too.
    other_key = re.compile(rf"{_START}((?:gsk_|hf_|r8_)[A-Za-z0-9]{{16,}}|xai-[A-Za-z0-9_]{{16,}})")
    aws = re.compile(rf"{_START}((?:AKIA|ASIA)[A-Z0-9]{{12,}})")
    github = re.compile(rf"{_START}((?:gh[pousr]|github_pat)_[A-Za-z0-9_]{{16,}})")
    in_query = re.compile(rf"(?i)(?:[?&]|\\u0026)key=([^#{_NO_SIGN}]+)")
    pem = r"(?s)(-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY.*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY-----|\Z))"
    password = _named("(?:password|passwd|passphrase|secret)s?")
    # Counts of tokens are in the plural; and a parser's "unexpected token: x" is none.
    token = _named(
        f"{_after('access', 'refresh', 'auth')}tokens? | {_after('id', 'session', 'api')}token"
        rf""" | (?<![\w.-]) token (?= \\{{0,8}}["'] | \s{{0,3}}= ) | (?<![^\r\n]) token"""
    )
    # Not "a cookie: sweet".
    cookie = r"(?: (?<![A-Za-z0-9\ ]) | (?<=set) | (?= cookies?=) ) cookies?"
    return {
        **dict.fromkeys(("sk-", "tsk_", "sk_live_", "rk_live_", "sk_test_", "rk_test_"), key),
        **dict.fromkeys(("gsk_", "xai-", "hf_", "r8_"), other_key),
        "bearer": re.compile(r"(?i)bearer\s{1,3}([A-Za-z0-9._~+/-]{16,}=*)"),
        **dict.fromkeys(("akia", "asia"), aws),
        **dict.fromkeys(("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"), github),
        "xox": re.compile(rf"{_START}(xox[a-z]-[A-Za-z0-9-]{{8,}})"),
        "aiza": re.compile(rf"{_START}(AIza[A-Za-z0-9_-]{{30,}})"),
        # Not after - or _ either: a run of them would be read anew from each of its places.
        "eyj": re.compile(r"(?<![A-Za-z0-9_-])(eyJ[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*){1,4})"),
        "-----begin": re.compile(pem),
        "://": re.compile(r"""://[^\s/:@"'<>]*:([^\s/"'<>]+)@"""),
        **dict.fromkeys(("?key=", "&key=", r"\u0026key="), in_query),
        **dict.fromkeys(("password", "passwd", "passphrase", "secret"), password),
        "pwd": _named(r"(?<![A-Za-z0-9])pwd"),
        "key": _named(_after("api", "private", "secret", "access") + "keys?", pairs=True),
        "token": token,
        "authorization": _named("authorizations?", bare=r"[^\r\n]+", pairs=True),
        "cookie": _named(cookie, bare=r"[^\r\n]+", pairs=True),
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
