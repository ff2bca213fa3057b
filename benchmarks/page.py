"""The frame of the report: one HTML page with its style inside; nothing is fetched when it is read."""

from __future__ import annotations

from string import Template

STYLE = """
:root{color-scheme:light dark;--bg:#fbfbfa;--panel:#fff;--ink:#1d1f23;--muted:#646a73;--line:#e4e4e0;--grid:#e6e6e2;--accent:#2563c9;
--good:#1b8a4b;--bad:#c9352b;--warn:#a86300;--warnbg:#fff3dc;--badbg:#fdeceb;--goodbg:#e6f5ec;
--k1:#8a8f98;--k2:#8250c4;--k3:#2563c9;--k4:#0f8b8d;
--s1:#2563c9;--s2:#e07b1a;--s3:#0f8b8d;--s4:#8250c4;--s5:#c9352b;--s6:#7a7f87;--s1-full:#2563c9;--s1-mid:#8fb2ea;--s1-pale:#d5e2f7}
@media (prefers-color-scheme:dark){:root{--bg:#131518;--panel:#1b1e23;--ink:#e8e9eb;--muted:#9ca3ad;--line:#2e3238;--grid:#31363d;--accent:#7aa8f5;
--good:#54c886;--bad:#f0776d;--warn:#e9b04f;--warnbg:#3a2d12;--badbg:#3c1f1d;--goodbg:#16301f;
--k1:#9aa0a9;--k2:#b68cf0;--k3:#6ea1f4;--k4:#3cc0c0;
--s1:#6ea1f4;--s2:#f0a04b;--s3:#3cc0c0;--s4:#b68cf0;--s5:#f0776d;--s6:#9aa0a9;--s1-full:#6ea1f4;--s1-mid:#3f5f94;--s1-pale:#28384f}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main,header.top,footer{max-width:1080px;margin:0 auto;padding:0 20px}
header.top{padding-top:44px}
h1{font-size:clamp(1.7rem,4.5vw,2.6rem);line-height:1.15;margin:0 0 8px;letter-spacing:-.02em}
h2{font-size:1.45rem;margin:0 0 6px;letter-spacing:-.01em}
h3{font-size:1.02rem;margin:22px 0 8px}
p{margin:0 0 12px;max-width:72ch}
.lead{font-size:1.1rem;color:var(--muted)}
.muted{color:var(--muted)}
.small{font-size:.86rem}
a{color:var(--accent)}
:focus-visible{outline:3px solid var(--accent);outline-offset:2px;border-radius:3px}
nav{display:flex;flex-wrap:wrap;gap:6px 16px;margin:18px 0 0;padding:10px 0;border-top:1px solid var(--line);border-bottom:1px solid var(--line);font-size:.92rem}
nav a{text-decoration:none}
nav a:hover{text-decoration:underline}
section{margin:44px 0 0;scroll-margin-top:12px}
.panel{background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(225px,1fr));gap:12px;margin:22px 0 0;padding:0;list-style:none}
.tiles li{background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:14px 16px}
.tiles .figure{display:block;font-size:1.75rem;font-weight:650;letter-spacing:-.02em;line-height:1.15;font-variant-numeric:tabular-nums}
.tiles .name{display:block;font-size:.87rem;color:var(--muted);line-height:1.35;margin-top:4px}
.tiles .interval{font-size:.82rem;color:var(--muted);font-variant-numeric:tabular-nums}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px;margin:14px 0}
figure{margin:0;min-width:0}
figure.chart{background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:14px}
figure.chart svg{display:block;width:100%;max-width:620px;height:auto;margin:0 auto}
figcaption{font-size:.9rem;color:var(--muted);margin-bottom:8px}
figcaption b{color:var(--ink);font-weight:600}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(104px,1fr));gap:12px;margin:12px 0;padding:0;list-style:none}
.gallery img,.hit img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:#fff;border-radius:8px}
.gallery li{font-size:.83rem;line-height:1.3;min-width:0;overflow-wrap:anywhere}
.gallery .frame{display:block;border:2px solid var(--line);border-radius:10px;padding:3px;margin-bottom:5px;background:var(--panel)}
.gallery .noisy .frame{border-color:var(--warn)}
.badge{display:inline-block;font-size:.72rem;font-weight:600;padding:1px 7px;border-radius:99px;white-space:nowrap}
.badge.warn{background:var(--warnbg);color:var(--warn)}
.badge.bad{background:var(--badbg);color:var(--bad)}
.badge.good{background:var(--goodbg);color:var(--good)}
.badge.plain{background:var(--grid);color:var(--ink)}
.examples{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,470px),1fr));gap:14px}
.example{padding:14px}
.example .query{font-weight:600;margin:0 0 10px;display:flex;gap:8px;align-items:baseline;flex-wrap:wrap;overflow-wrap:anywhere}
.row{display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:8px}
.hit{font-size:.74rem;line-height:1.25;color:var(--muted);overflow-wrap:anywhere;min-width:0}
.hit .frame{display:block;border:3px solid var(--line);border-radius:10px;padding:2px;background:var(--panel);margin-bottom:4px}
.hit.right .frame{border-color:var(--good)}
.hit.wrong .frame{border-color:var(--bad);border-style:dashed}
.hit.target{padding-right:8px;border-right:1px solid var(--line)}
.hit b{color:var(--ink);font-weight:600}
.hit.right b{color:var(--good)}
.hit.wrong b{color:var(--bad)}
.none{display:grid;place-items:center;aspect-ratio:1;font-size:.7rem}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:12px;background:var(--panel);margin:10px 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:12px 14px 8px;font-weight:600}
th,td{padding:7px 12px;text-align:right;border-top:1px solid var(--line);white-space:nowrap;vertical-align:top}
thead th{white-space:normal;vertical-align:bottom;font-weight:600;color:var(--muted);font-size:.82rem;border-top:0}
th[scope=row],td.text,th.text{text-align:left}
th[scope=row]{font-weight:550}
th[scope=row] .why{display:block;max-width:24em;white-space:normal;font-weight:400;font-size:.8rem;color:var(--muted)}
td .interval{display:inline-block;min-width:7.4em;padding-left:.7em;font-size:.8rem;color:var(--muted)}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.5em}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.86rem;color:var(--muted);margin:6px 0}
details{margin:10px 0}
summary{cursor:pointer;color:var(--accent);padding:4px 0}
ul.plain{padding-left:1.2em;margin:8px 0}
ul.plain li{margin:4px 0}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0;font-size:.92rem}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;overflow-wrap:anywhere}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:5px 12px;align-items:center;font-size:.9rem;font-variant-numeric:tabular-nums}
.bars .bar{height:14px;border-radius:3px;background:var(--s1);min-width:2px}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.82rem;margin:0}
footer{margin-top:52px;padding-top:16px;padding-bottom:48px;border-top:1px solid var(--line);color:var(--muted);font-size:.86rem}
.skip{position:absolute;left:-9999px}
.skip:focus{left:12px;top:12px;background:var(--panel);padding:8px}
@media (max-width:720px){td .interval{display:block;min-width:0;padding:0}}
@media (max-width:560px){
  main,header.top,footer{padding-left:14px;padding-right:14px}
  header.top{padding-top:26px}
  section{margin-top:34px}
  .row{grid-template-columns:repeat(3,minmax(0,1fr))}
  .hit.target{border-right:0;padding-right:0}
  .tiles{grid-template-columns:repeat(2,minmax(0,1fr))}
  .tiles .figure{font-size:1.4rem}
  figure.chart{padding:10px 6px}
  dl.facts{grid-template-columns:1fr;gap:0}
  dl.facts dd{margin-bottom:6px}
  .gallery{grid-template-columns:repeat(3,minmax(0,1fr))}
  th,td{padding:6px 7px}
  table{font-size:.82rem}
  th[scope=row]{white-space:normal}
  td .interval{font-size:.72rem}}
@media print{nav{display:none}
  section{break-inside:avoid}}
"""

PAGE = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>$title</title><style>$style</style></head>
<body><a class="skip" href="#content">Skip to the content</a>
<header class="top"><h1>$title</h1><p class="lead">$lead</p>$tiles<nav aria-label="Sections">$nav</nav></header>
<main id="content">$sections</main>
<footer>$footer</footer></body></html>
"""
)


def page(*, title: str, lead: str, tiles: str, sections: list[tuple[str, str, str]], footer: str) -> str:
    """The whole page. `sections` are (id, heading, inner HTML); all texts must be escaped already."""
    nav = "".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{heading}</h2>{inner}</section>' for name, heading, inner in sections)
    return PAGE.substitute(title=title, style=STYLE, lead=lead, tiles=tiles, nav=nav, sections=body, footer=footer)
