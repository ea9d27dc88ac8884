"""The plots of the summary page, as inline SVG.

The text is laid out in Liberation Sans, which vl-convert carries, and shown in it or in a font of the same widths, so
the picture does not depend on the fonts of the machine; nor, since dates stay dates, on its time zone.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd  # type: ignore[import-untyped]
import vl_convert
from markupsafe import Markup, escape

from reports.formats import amount, day, exact_sum, number, rounded, short

if TYPE_CHECKING:
    from collections.abc import Sequence
    from decimal import Decimal

    from reports.summary import AccountRow, ModelRow, UsageDay

__all__ = ["Figure", "margin_by_account", "revenue_by_plan", "usage_by_day", "usage_by_model"]

WIDTH = 480
PLOT_WIDTH = 400
"""About what is left of `WIDTH` beside the axis."""
BAR = 18
MAX_SERIES = 7
MAX_BARS = 10
MAX_DAY_LABELS = 8
EARLIER = "(earlier periods)"

NAVY, SKY, TEAL, GREY = "#1f4e79", "#7fb0da", "#2a9d8f", "#a3adb8"
PALETTE = (NAVY, TEAL, "#e9a23b", SKY, "#c8553d", "#7d5ba6", "#8a9a5b")
INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"

# d3 writes 0.05 as 50m and 10^9 as 1G.
SI_LABEL = (
    "datum.value !== 0 && abs(datum.value) < 1 ? format(datum.value, '.3~g') "
    ": replace(replace(format(datum.value, '.4~s'), 'k', 'K'), 'G', 'B')"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One plot with its words. Without anything to plot `pictures` is empty and `note` says so."""

    title: str
    note: str
    pictures: tuple[Markup, ...] = ()
    """SVG elements, each with a label for those who do not see it."""


def usage_by_day(days: Sequence[UsageDay]) -> Figure:
    """Tokens of each day, stacked by series."""
    title = "Usage by day"
    if not any(part.tokens for part in days):
        return Figure(title=title, note="No tokens were used in this period.")
    frame = pd.DataFrame(
        {"series": [part.series for part in days], "tokens": _positions([part.tokens for part in days])}
    )
    frame["day"] = [part.date.isoformat() for part in days]
    ranked = _ranked(frame, "series", "tokens")
    kept = ranked if len(ranked) <= MAX_SERIES else ranked[: MAX_SERIES - 1]
    others = f"{len(ranked) - len(kept)} others"
    frame["series"] = frame["series"].where(frame["series"].isin(kept), others)
    names = kept if len(kept) == len(ranked) else [*kept, others]
    frame["rank"] = frame["series"].map({name: rank for rank, name in enumerate(names)})
    frame = frame.groupby(["day", "series", "rank"], as_index=False)["tokens"].sum()
    by_day = frame.groupby("day")["tokens"].sum()
    busiest = date.fromisoformat(by_day.idxmax())
    note = (
        f"{short(int(by_day.sum()))} tokens over {_count(len(by_day), 'day')}; "
        f"the busiest was {day(busiest)} with {short(int(by_day.max()))}."
    )
    shown = [moment.date().isoformat() for moment in pd.date_range(by_day.index.min(), by_day.index.max())]
    colors = [*PALETTE[: len(kept)], *([GREY] if len(names) > len(kept) else [])]
    plot = (
        alt.Chart(frame)
        .mark_bar(size=min(2 * BAR, 0.85 * PLOT_WIDTH / len(shown)))
        .encode(
            x=alt.X("day:O", title="Day")
            .scale(domain=shown)
            .axis(
                # A bare date is UTC to JavaScript, whatever the machine's zone.
                labelExpr="utcFormat(toDate(datum.value), '%-d %b')",
                values=shown[:: -(-len(shown) // MAX_DAY_LABELS)],
                labelAngle=0,
                grid=False,
            ),
            y=alt.Y("tokens:Q", title="Tokens").axis(labelExpr=SI_LABEL, tickCount=5),
            color=alt.Color("series:N", sort=names).scale(domain=names, range=colors).legend(columns=3),
            order=alt.Order("rank:Q"),
        )
    )
    return Figure(title=title, note=note, pictures=(_svg(plot, height=300, label=f"{title}, stacked bars. {note}"),))


def usage_by_model(models: Sequence[ModelRow]) -> Figure:
    """Input and output tokens of the models used most."""
    title = "Usage by model"
    used = sorted(
        (row for row in models if row.input_tokens or row.output_tokens),
        key=lambda row: (-(row.input_tokens + row.output_tokens), row.model or "", row.provider or ""),
    )
    if not used:
        return Figure(title=title, note="No tokens were used in this period.")
    top = used[:MAX_BARS]
    names = [_model_name(row, models) for row in top]
    kinds = ["Input", "Output"]
    frame = pd.DataFrame(
        {
            "model": [name for name in names for _ in kinds],
            "kind": kinds * len(top),
            "tokens": _positions([tokens for row in top for tokens in (row.input_tokens, row.output_tokens)]),
        }
    )
    first = top[0].input_tokens + top[0].output_tokens
    note = f"{_shown(len(top), len(used), 'model')}. The most, {short(first)} tokens, are of {names[0]}."
    plot = (
        alt.Chart(frame)
        .mark_bar(size=BAR)
        .encode(
            x=alt.X("tokens:Q", title="Tokens").axis(labelExpr=SI_LABEL, tickCount=5),
            y=_names_axis("model", names, "Model"),
            color=_legend("kind", kinds, [NAVY, SKY]),
            order=alt.Order("kind:N"),
        )
    )
    picture = _svg(plot, height=_height(len(top)), label=f"{title}, bars of input and output tokens. {note}")
    return Figure(title=title, note=note, pictures=(picture,))


def revenue_by_plan(accounts: Sequence[AccountRow]) -> Figure:
    """What each plan brought in: one picture a currency, since currencies do not add up. One row is an account's."""
    title = "Revenue by plan"
    if not accounts:
        return Figure(title=title, note="No account was billed in this period.")
    uses = Counter(row.currency for row in accounts)
    billed = _count(len({row.account for row in accounts}), "account")
    currencies = sorted(uses, key=lambda currency: (-uses[currency], currency))
    return Figure(
        title=title,
        note=f"Invoice totals of {billed}, by the plan in force at the end of the period.",
        pictures=tuple(_revenue(currency, [r for r in accounts if r.currency == currency]) for currency in currencies),
    )


def margin_by_account(accounts: Sequence[AccountRow]) -> Figure:
    """Provider cost beside margin, for the accounts billed most in USD. One row is an account's."""
    title = "Margin against provider cost"
    in_usd = sorted((row for row in accounts if row.margin is not None), key=lambda row: (-row.total, row.account))
    if not in_usd:
        return Figure(
            title=title,
            note="Known where an account is billed in USD and the provider's price of all its calls is known.",
        )
    top = in_usd[:MAX_BARS]
    kinds = ["Provider cost", "Margin"]
    frame = pd.DataFrame(
        {
            "account": [row.account for row in top for _ in kinds],
            "kind": kinds * len(top),
            "usd": _positions([value for row in top for value in (row.provider_cost, row.margin) if value is not None]),
        }
    )
    cost, margin = exact_sum(r.provider_cost for r in top), exact_sum(r.margin for r in top if r.margin is not None)
    note = (
        f"{_shown(len(top), len(in_usd), 'account')} billed in USD, by invoice total. "
        f"Provider cost {rounded(cost, 'USD')} USD, margin {rounded(margin, 'USD')} USD."
    )
    plot = (
        alt.Chart(frame)
        .mark_bar(size=BAR / 2)
        .encode(
            x=alt.X("usd:Q", title="USD").axis(labelExpr=SI_LABEL, tickCount=5),
            y=_names_axis("account", [row.account for row in top], "Account"),
            yOffset=alt.YOffset("kind:N", sort=kinds),
            color=_legend("kind", kinds, [GREY, TEAL]),
        )
    )
    picture = _svg(plot, height=_height(len(top)), label=f"{title}, bars by account. {note}")
    return Figure(title=title, note=note, pictures=(picture,))


def _revenue(currency: str, rows: list[AccountRow]) -> Markup:
    of_plans = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.plan or EARLIER):
        of_plans[row.plan or EARLIER].append(row.total)
    totals = {plan: exact_sum(parts) for plan, parts in of_plans.items()}
    plans = sorted(totals, key=lambda plan: -totals[plan])
    words = [amount(totals[plan], currency) for plan in plans]
    frame = pd.DataFrame({"plan": plans, "revenue": _positions([totals[plan] for plan in plans]), "words": words})
    low, high = min(frame["revenue"].min(), 0), max(frame["revenue"].max(), 0)
    room = 0.25 * (high - low) or 1  # for the words beside the longest bar
    base = alt.Chart(frame).encode(
        x=alt.X("revenue:Q", title=f"Revenue, {currency}")
        .axis(labelExpr=SI_LABEL, tickCount=5)
        .scale(domain=[low - room if low else 0, high + room], nice=False),
        y=_names_axis("plan", plans, "Plan"),
    )
    plot = base.mark_bar(size=BAR, color=NAVY) + base.mark_text(
        align="left", dx=5, font=FONT, fontSize=12, color=INK
    ).encode(text="words:N")
    listed = ", ".join(f"{plan} {word}" for plan, word in zip(plans, words, strict=True))
    return _svg(plot, height=_height(len(plans)), label=f"Revenue by plan in {currency}, bars: {listed}.")


def _ranked(frame: pd.DataFrame, by: str, value: str) -> list[str]:
    totals = frame.groupby(by)[value].sum()
    return sorted(totals.index, key=lambda name: (-totals[name], name))


def _positions(values: Sequence[Decimal | int]) -> list[float]:
    """Where a bar ends, as floats: a sum of tokens may need more than 64 bits. Nothing written as money goes here."""
    return [float(value) for value in values]


def _model_name(row: ModelRow, models: Sequence[ModelRow]) -> str:
    name = row.model or "unnamed model"
    shared = sum(other.model == row.model for other in models) > 1
    return f"{name} ({row.provider or 'no provider'})" if shared else name


def _shown(shown: int, of: int, what: str) -> str:
    if of == 1:
        return f"One {what}"
    return f"All {of} {what}s" if shown == of else f"The top {shown} of {of} {what}s"


def _count(count: int, what: str) -> str:
    return f"{number(count)} {what}" if count == 1 else f"{number(count)} {what}s"


def _names_axis(field: str, names: list[str], title: str) -> alt.Y:
    return alt.Y(f"{field}:N", sort=names, title=title).axis(labelLimit=150, labelPadding=8, grid=False, ticks=False)


def _legend(field: str, names: list[str], colors: list[str]) -> alt.Color:
    return alt.Color(f"{field}:N", sort=names).scale(domain=names, range=colors)


def _height(bars: int) -> int:
    return 90 + 26 * bars


def _svg(plot: alt.Chart | alt.LayerChart, *, height: int, label: str) -> Markup:
    styled = (
        plot.properties(width=WIDTH, height=height, autosize=alt.AutoSizeParams(type="fit", contains="padding"))
        .configure(aria=False, background="transparent", font=FONT, padding=4)
        .configure_view(stroke=None)
        .configure_axis(
            domainColor=GRID,
            gridColor=GRID,
            tickColor=GRID,
            labelColor=INK,
            labelFontSize=12,
            titleColor=MUTED,
            titleFontSize=12,
            titleFontWeight="normal",
            titlePadding=8,
        )
        .configure_legend(
            orient="bottom", title=None, labelColor=INK, labelFontSize=12, labelLimit=110, symbolType="square"
        )
    )
    spec: dict[str, Any] = styled.to_dict()
    svg = vl_convert.vegalite_to_svg(spec, vl_version=alt.SCHEMA_VERSION.rsplit(".", 1)[0], allowed_base_urls=[])
    # Inside HTML an SVG needs no namespaces, and the root says what the picture shows.
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1))  # noqa: S704
