"""The page's style sheet."""

from __future__ import annotations

# Colours are Okabe and Ito's, which colour-blind readers tell apart, darker on white and lighter on black.
STYLE = """
:root { color-scheme: light dark; --bg: #fff; --panel: #f5f6f8; --ink: #1b1f24; --dim: #57606a; --rule: #d5dae0;
  --m0: #0067a5; --m1: #c04a00; --m2: #007a5a; --m3: #9c3f86; --m4: #7a5c00; --bundle: #0067a5; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171b; --panel: #1e2329; --ink: #e8ebee; --dim: #a3adb8;
  --rule: #38414b; --m0: #62b8f0; --m1: #f79552; --m2: #35c79b; --m3: #e191cb; --m4: #e3c04a; --bundle: #62b8f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, footer { max-width: 1320px; margin: 0 auto; padding: 0 clamp(14px, 3vw, 40px); }
footer { color: var(--dim); padding-block: 24px 40px; font-size: 14px; }
h1 { font-size: clamp(22px, 4vw, 32px); line-height: 1.2; margin: 32px 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 44px 0 8px; padding-top: 14px; border-top: 1px solid var(--rule); }
p { max-width: 75ch; margin: 8px 0 14px; }
.lead { color: var(--dim); overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 16px 0; }
.tile { background: var(--panel); border-radius: 8px; padding: 12px 14px; }
.tile dt { color: var(--dim); font-size: 14px; }
.tile dd { margin: 0; }
.tile b { display: block; font-size: 26px; line-height: 1.25; }
.tile span { color: var(--dim); font-size: 14px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 24px 28px; }
figure { margin: 0 0 8px; min-width: 0; }
.charts figure { max-width: 480px; display: flex; flex-direction: column; }
.charts svg { margin-top: auto; }
figcaption { font-weight: 600; font-size: 15px; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font: 13px system-ui, sans-serif; }
.grid { stroke: var(--rule); stroke-width: 1; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.thin { stroke-width: 1.5; }
.bundle { stroke: var(--bundle); stroke-width: 1.2; opacity: 0.7; }
.line.teacher { stroke: var(--ink); } .line.m0 { stroke: var(--m0); } .line.m1 { stroke: var(--m1); }
.line.m2 { stroke: var(--m2); } .line.m3 { stroke: var(--m3); } .line.m4 { stroke: var(--m4); }
.dot.teacher { fill: var(--ink); } .dot.m0 { fill: var(--m0); } .dot.m1 { fill: var(--m1); }
.dot.m2 { fill: var(--m2); } .dot.m3 { fill: var(--m3); } .dot.m4 { fill: var(--m4); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 4px 0; padding: 0; font-size: 14px; }
.legend li { display: flex; align-items: center; gap: 6px; overflow-wrap: anywhere; }
.legend svg { width: 30px; flex: none; margin: 0; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--m0); }
.strip { min-width: 640px; margin-bottom: 6px; }
.strip span { display: block; font-size: 14px; color: var(--dim); position: sticky; left: 0; width: fit-content; }
.strip img { display: block; width: 100%; height: auto; border-radius: 3px; }
figure.scroll { margin-bottom: 22px; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { text-align: left; padding: 5px 18px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { color: var(--dim); font-weight: 600; }
tbody th { font-weight: 400; }
td, thead th { white-space: nowrap; }
.settings td { white-space: normal; overflow-wrap: anywhere; }
details { margin: 10px 0; }
summary { cursor: pointer; color: var(--dim); }
"""
