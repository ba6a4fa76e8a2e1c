"""The style of the report's page: light, dark, narrow and printed."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f9f9f7; --card: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --faint: #75746f; --line: #e1e0d9;
  --warn: #8a3b00; --s0: #75746f; --s1: #2a78d6; --s2: #1baf7a; --s3: #c98500; --s4: #4a3aa7; --s5: #e34948; --s6: #e87ba4; }
@media (prefers-color-scheme: dark) { :root {
  --page: #0d0d0d; --card: #1a1a19; --ink: #ffffff; --soft: #c3c2b7; --faint: #98978f; --line: #2c2c2a;
  --warn: #ffb27a; --s0: #98978f; --s1: #3987e5; --s2: #199e70; --s3: #c98500; --s4: #9085e9; --s5: #e66767; --s6: #d55181; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 24px 20px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; }
h3 { font-size: 14px; margin: 0 0 6px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 0 0 10px; color: var(--soft); max-width: 75ch; overflow-wrap: anywhere; }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; min-width: 0; }
.scroll { overflow-x: auto; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 12px; padding: 0; list-style: none; color: var(--soft); }
.legend svg { width: 26px; height: 10px; margin-right: 6px; vertical-align: middle; }
.warning { color: var(--warn); }
svg { display: block; width: 100%; height: auto; } .legend svg { display: inline-block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--faint); font-variant-numeric: tabular-nums; }
svg text.y { text-anchor: end; } svg text.x, svg text.label { text-anchor: middle; } svg text.label { fill: var(--soft); }
.grid { stroke: var(--line); stroke-width: 1; } .axis { stroke: var(--faint); stroke-width: 1; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; } .dashed { stroke-dasharray: 5 4; }
circle { stroke: var(--card); stroke-width: 1.5; }
polyline.s0 { stroke: var(--s0); } polyline.s1 { stroke: var(--s1); } polyline.s2 { stroke: var(--s2); }
polyline.s3 { stroke: var(--s3); } polyline.s4 { stroke: var(--s4); } polyline.s5 { stroke: var(--s5); }
polyline.s6 { stroke: var(--s6); } circle.s0 { fill: var(--s0); } circle.s1 { fill: var(--s1); } circle.s2 { fill: var(--s2); }
circle.s3 { fill: var(--s3); } circle.s4 { fill: var(--s4); } circle.s5 { fill: var(--s5); } circle.s6 { fill: var(--s6); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
table.words td, table.words th { text-align: left; vertical-align: top; white-space: normal; overflow-wrap: anywhere; }
table.words td:first-child { white-space: nowrap; color: var(--soft); padding-right: 20px; } td.same { color: var(--faint); }
img { display: block; max-width: none; border-radius: 4px; } figure { margin: 0 0 14px; }
figcaption { color: var(--soft); margin-bottom: 6px; }
footer { margin-top: 40px; color: var(--faint); font-size: 13px; }
@media (max-width: 500px) { body { padding: 16px 12px 32px; } h1 { font-size: 21px; }
  table.words td:first-child { white-space: normal; min-width: 92px; padding-right: 10px; } }
@media print { :root { --page: #fff; --card: #fff; --ink: #000; --soft: #333; --faint: #666; --line: #ccc; }
  body { max-width: none; padding: 0; font-size: 11px; } .card, figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  img { max-width: 100%; height: auto; } .scroll { overflow: visible; }
  .cards { grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); } }
"""
