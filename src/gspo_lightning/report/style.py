"""The style sheet of the report."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --bg: #ffffff; --fg: #1a1c20; --soft: #5d6470; --line: #e1e4e9; --card: #f7f8fa;
  --a: #2563eb; --b: #c2570c; --right: #15803d;
  --c: #15803d; --d: #a21caf; --e: #0e7490; --f: #be123c; --g: #6b7280; --h: #a16207;
}
@media (prefers-color-scheme: dark) {
  :root {
    --bg: #14161a; --fg: #e8eaee; --soft: #a0a7b3; --line: #2e333c; --card: #1c1f25;
    --a: #7aa2ff; --b: #f5a65b; --right: #4ade80;
    --c: #4ade80; --d: #e879f9; --e: #22d3ee; --f: #fb7185; --g: #9ca3af; --h: #facc15;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1000px; padding: 28px 16px 64px; background: var(--bg); color: var(--fg);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .8rem; }
p { margin: .3rem 0; }
.soft, small, dt, th { color: var(--soft); font-weight: 400; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.cards { margin-top: 20px; }
.card, figure, .pair, pre, .phases {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
}
.card { padding: 12px 14px; font-size: .88rem; }
.card b { display: block; font-size: 1.3rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.card.main { grid-column: span 2; }
.card.main b { font-size: 1.7rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px; }
figure { margin: 0; padding: 12px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
small { font-size: .85rem; margin-left: 4px; }
svg { width: 100%; height: auto; display: block; }
.tick { font-size: 12px; fill: var(--soft); }
.grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
polyline.s0 { stroke: var(--a); }
polyline.s1 { stroke: var(--b); }
polyline.s2 { stroke: var(--c); }
polyline.s3 { stroke: var(--d); }
polyline.s4 { stroke: var(--e); }
polyline.s5 { stroke: var(--f); }
polyline.s6 { stroke: var(--g); }
polyline.s7 { stroke: var(--h); }
polyline.pale { opacity: .3; stroke-width: 1.2; }
circle.s0 { fill: var(--a); }
circle.s1 { fill: var(--b); }
circle.s2 { fill: var(--c); }
circle.s3 { fill: var(--d); }
circle.s4 { fill: var(--e); }
circle.s5 { fill: var(--f); }
circle.s6 { fill: var(--g); }
circle.s7 { fill: var(--h); }
polyline.again { stroke-dasharray: 5 4; }
polygon { opacity: .18; }
polygon.s0 { fill: var(--a); }
polygon.s1 { fill: var(--b); }
polygon.s2 { fill: var(--c); }
polygon.s3 { fill: var(--d); }
polygon.s4 { fill: var(--e); }
polygon.s5 { fill: var(--f); }
polygon.s6 { fill: var(--g); }
polygon.s7 { fill: var(--h); }
circle.hit { fill: transparent; }
circle:hover { stroke: var(--fg); stroke-width: 2; }
.keys { margin: 4px 0 0; font-size: .85rem; }
.key { margin-right: 14px; }
.key::before {
  content: ""; display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px;
  background: var(--a);
}
.key.s1::before { background: var(--b); }
.key.s2::before { background: var(--c); }
.key.s3::before { background: var(--d); }
.key.s4::before { background: var(--e); }
.key.s5::before { background: var(--f); }
.key.s6::before { background: var(--g); }
.key.s7::before { background: var(--h); }
.phases {
  padding: 12px 14px; display: grid; grid-template-columns: auto 1fr auto; gap: 6px 12px; align-items: center;
}
.bar { background: var(--a); height: 10px; border-radius: 5px; min-width: 2px; }
.num { font-variant-numeric: tabular-nums; text-align: right; }
.pair {
  padding: 12px 14px; margin-bottom: 12px; display: grid; grid-template-columns: 1fr 1fr; gap: 10px 18px;
}
.pair > .ask { grid-column: 1 / -1; font-weight: 600; }
.ask img { height: 84px; margin-right: 12px; vertical-align: middle; }
.text { white-space: pre-wrap; }
.tag { font-size: .82rem; color: var(--soft); }
.tag.right { color: var(--right); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
dd { margin: 0; }
pre { padding: 12px; overflow: auto; font-size: .82rem; white-space: pre-wrap; }
summary { cursor: pointer; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: 6px 12px 6px 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
@media (max-width: 600px) {
  .pair { grid-template-columns: 1fr; }
  .cards { grid-template-columns: 1fr 1fr; }
  .card.main { grid-column: 1 / -1; }
}
@media print { .pair, figure { break-inside: avoid; } }
"""
