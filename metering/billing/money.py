"""Exact arithmetic on money, currencies and their smallest units, and the one place where money is rounded."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Context, Decimal, DivisionByZero, Inexact, InvalidOperation

__all__ = ["CURRENCIES", "EXACT", "minor_digits", "quotient", "round_money"]

EXACT = Context(prec=200, traps=[Inexact, InvalidOperation, DivisionByZero])
"""Raises rather than rounds. Two numbers of DECIMAL(38,12) have a product of 76 digits, so nothing here comes close."""

_ENDLESS = Context(prec=200, traps=[InvalidOperation, DivisionByZero])
_LAST_PLACE = Decimal(1).scaleb(-40)

_ACTIVE = """
    AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CLP CNY COP
    CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR
    IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP MRU
    MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG
    SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD UYU UZS VED VES VND VUV
    WST XAF XCD XCG XOF XPF YER ZAR ZMW ZWG
"""
_WHOLE = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF"
_THOUSANDTHS = "BHD IQD JOD KWD LYD OMR TND"

_MINOR_DIGITS = (
    dict.fromkeys(_ACTIVE.split(), 2) | dict.fromkeys(_WHOLE.split(), 0) | dict.fromkeys(_THOUSANDTHS.split(), 3)
)
"""ISO 4217, list one, without what is not money to pay with: metals, fund codes, bond units, test codes."""

CURRENCIES = frozenset(_MINOR_DIGITS)
"""Codes a plan may be priced in."""


def quotient(numerator: Decimal, divisor: int) -> Decimal:
    """`numerator / divisor`, exact; where it never ends, rounded at the 40th decimal.

    A numerator of at most 24 decimals over a divisor of at most 10^12 is either on a half cent or further from it than
    that, so rounding the result to money is rounding the fraction itself.
    """
    try:
        return EXACT.divide(numerator, Decimal(divisor))
    except Inexact:
        return _ENDLESS.divide(numerator, Decimal(divisor)).quantize(_LAST_PLACE, context=_ENDLESS)


def minor_digits(currency: str) -> int:
    """Decimals of the currency's minor unit by ISO 4217: 2 for USD, 0 for JPY, 3 for KWD.

    Raises `ValueError` for a code that is not on its list of active currencies.
    """
    digits = _MINOR_DIGITS.get(currency)
    if digits is None:
        raise ValueError(f"{currency!r} is not an active ISO 4217 currency code, such as USD or EUR")
    return digits


def round_money(exact: Decimal, currency: str) -> Decimal:
    """`exact` rounded half away from zero to the currency's minor unit, with exactly that many decimals; never -0."""
    rounded = exact.quantize(Decimal(1).scaleb(-minor_digits(currency)), ROUND_HALF_UP, _ENDLESS)
    return rounded if rounded else abs(rounded)
