"""One HTML page about a cache, complete in itself: nothing is loaded from anywhere, no script runs."""

from __future__ import annotations

import html
from collections.abc import Sequence

from nemo_kd.evaluation.inspect_cache import InspectedToken, visible

MOST_ENTROPY_NATS = 4.0

STYLE = """
:root { color-scheme: light dark; --ink: #1d1f24; --paper: #fbfaf7; --card: #fff; --line: #dcd8cf; --quiet: #75726a; --hot: 14, 90%, 55%; --bar: #3a6ea5 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e3dc; --paper: #17181b; --card: #22242a; --line: #383b43; --quiet: #96928a; --bar: #7fb0e0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 12rem; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 2.5rem 0 .75rem }
p.note { color: var(--quiet); margin: .25rem 0 1rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 1.25rem 0 }
dt { color: var(--quiet) } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
.histograms { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1.5rem }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: .35rem }
th { font-weight: 400; color: var(--quiet); text-align: right; padding-right: .6rem; white-space: nowrap; width: 1% }
td { padding: .05rem 0 } td.share { text-align: right; width: 3.5rem }
.bar { display: block; height: .7rem; background: var(--bar); border-radius: 2px; min-width: 1px }
.legend { display: flex; align-items: center; gap: .6rem; color: var(--quiet); font-size: .85rem; flex-wrap: wrap }
.scale { width: 12rem; height: .8rem; border-radius: 3px; background: linear-gradient(90deg, hsla(var(--hot), 0), hsla(var(--hot), .75)) }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1rem 1.1rem; margin: 0 0 1rem; font: 15px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
article h3 { font: 600 .8rem/1.5 system-ui, sans-serif; color: var(--quiet); margin: 0 0 .5rem; white-space: normal }
.t { position: relative; border-radius: 3px; padding: .1rem 0; outline-offset: 1px } .p { color: var(--quiet) }
.t[tabindex] { cursor: help } .t[tabindex]:hover, .t[tabindex]:focus { outline: 2px solid var(--bar); z-index: 2 }
.miss { text-decoration: underline wavy; text-decoration-thickness: 1px; text-underline-offset: 4px }
.c { display: none; position: fixed; left: 50%; bottom: 1rem; transform: translateX(-50%); width: min(34rem, calc(100vw - 2rem)); background: var(--card); color: var(--ink); border: 1px solid var(--line); border-radius: 8px; padding: .75rem 1rem; box-shadow: 0 6px 28px rgba(0, 0, 0, .28); font: .85rem/1.45 system-ui, sans-serif; white-space: normal; z-index: 9 }
.t:hover > .c, .t:focus > .c { display: block }
.c b { font: 600 .95rem ui-monospace, monospace; overflow-wrap: anywhere } .c .facts { color: var(--quiet); margin: .1rem 0 .5rem }
.c th { text-align: left; font: .85rem ui-monospace, monospace; color: var(--ink); max-width: 13rem; overflow: hidden; text-overflow: ellipsis } .c tr.label th { font-weight: 700 } .c tr.tail th { color: var(--quiet); font-family: system-ui, sans-serif }
"""


def page(
    title: str,
    summary: Sequence[tuple[str, str]],
    histograms: Sequence[tuple[str, Sequence[tuple[str, float]]]],
    examples: Sequence[tuple[int, Sequence[InspectedToken]]],
) -> str:
    """The page.

    Args:
        examples: (index, tokens) of each.
    """
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in summary)
    charts = "".join(_histogram(name, bars) for name, bars in histograms)
    articles = "\n".join(_article(index, tokens) for index, tokens in examples)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p class="note">What the teacher thought, token by token.</p>
<dl>{facts}</dl>
<div class="histograms">{charts}</div>
<h2>Examples</h2>
<p class="legend"><span>entropy of the teacher: 0</span><span class="scale"></span><span>{MOST_ENTROPY_NATS:g} nats and more</span>
<span class="p">grey: not in the loss</span><span class="miss">waved: not among the kept tokens</span>
<span>hover, tap or tab to a token for its alternatives</span></p>
{articles}
</body>
</html>
"""


def _histogram(title: str, bars: Sequence[tuple[str, float]]) -> str:
    largest = max((share for _, share in bars), default=0) or 1
    rows = "".join(
        f'<tr><th>{html.escape(label)}</th><td><span class="bar" style="width:{100 * share / largest:.1f}%"></span></td>'
        f'<td class="share">{share:.1%}</td></tr>'
        for label, share in bars
    )
    return f"<table><caption>{html.escape(title)}</caption>{rows}</table>"


def _article(index: int, tokens: Sequence[InspectedToken]) -> str:
    return f"<article><h3>example {index}</h3>{''.join(map(_token, tokens))}</article>"


def _token(token: InspectedToken) -> str:
    # A line break is shown and takes place.
    text = html.escape(token.text).replace("\n", "⏎\n")
    if not token.in_loss:
        return f'<span class="t p">{text}</span>'
    strength = 0.75 * min(1.0, token.entropy / MOST_ENTROPY_NATS)
    missed = " miss" if token.rank is None else ""
    return f'<span class="t{missed}" tabindex="0" style="background:hsla(var(--hot),{strength:.2f})">{text}{_card(token)}</span>'


def _card(token: InspectedToken) -> str:
    rank = "not kept" if token.rank is None else f"rank {token.rank}"
    probability = "" if token.probability is None else f", probability {token.probability:.4f}"
    largest = max([other.probability for other in token.alternatives] + [token.tail_mass, 1e-9])
    rows = "".join(
        _row(visible(other.text), other.probability, largest, "label" if place + 1 == token.rank else "")
        for place, other in enumerate(token.alternatives)
    )
    rows += _row("everything not kept", token.tail_mass, largest, "tail")
    return (
        f'<span class="c" role="tooltip"><b>{html.escape(visible(token.text))}</b><span class="facts"> {rank}{probability}; '
        f"entropy {token.entropy:.2f} nats</span><table>{rows}</table></span>"
    )


def _row(text: str, probability: float, largest: float, kind: str) -> str:
    return (
        f'<tr class="{kind}"><th>{html.escape(text)}</th><td><span class="bar" style="width:{100 * probability / largest:.1f}%">'
        f'</span></td><td class="share">{probability:.3f}</td></tr>'
    )
