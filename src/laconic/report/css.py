"""How the page looks. The colours of lines are from Okabe and Ito's set, told apart with any kind of colour vision."""

LIGHT = """
--paper: #ffffff; --panel: #f5f6f8; --ink: #1a1e24; --muted: #5c6572; --grid: #d9dde3;
--before: #b9c2cd; --after: #0068a8; --mark: #bf4a00;
--line0: #0068a8; --line1: #c75300; --line2: #00805d; --line3: #a94a86; --line4: #7d6500; --line5: #414a57;
"""
DARK = """
--paper: #14171b; --panel: #1e2329; --ink: #e8ebef; --muted: #a0aab6; --grid: #363d46;
--before: #5b6673; --after: #5ab4ea; --mark: #f5964f;
--line0: #5ab4ea; --line1: #f5964f; --line2: #35c99c; --line3: #e49ac6; --line4: #e3c64c; --line5: #c6ced8;
"""
CSS = f"""
:root {{ color-scheme: light dark; {LIGHT.strip()} --font: system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK.strip()} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 var(--font); }}
main {{ max-width: 1040px; margin: 0 auto; padding: 40px 28px 64px; }}
h1 {{ font-size: 30px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 18px; margin: 44px 0 12px; }}
.kicker {{ margin: 0 0 2px; color: var(--muted); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 24px 0 0; }}
.tiles div {{ background: var(--panel); border-radius: 8px; padding: 14px 16px; }}
.tiles dt, .below {{ color: var(--muted); font-size: 13px; }}
dd {{ margin: 0; }}
.value {{ font-size: 27px; line-height: 1.3; font-weight: 600; font-variant-numeric: tabular-nums; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: 5px 0 5px 14px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }}
th:first-child, td:first-child {{ padding-left: 0; }}
thead tr:nth-child(2) th:first-child {{ padding-left: 14px; }}
th {{ font-weight: 500; color: var(--muted); vertical-align: bottom; }}
thead tr:first-child:not(:last-child) th.pair {{ border-bottom: 0; padding-bottom: 0; }}
.num, .pair {{ text-align: right; }}
td.num {{ white-space: nowrap; }}
.note {{ color: var(--muted); min-width: 140px; }}
.dense td {{ color: var(--muted); }}
.ours td, tfoot td {{ font-weight: 650; }}
tfoot td {{ border-bottom: 0; white-space: nowrap; }}
code {{ font: 0.94em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }}
figure {{ margin: 20px 0 0; overflow-x: auto; }}
figure svg {{ display: block; width: 100%; height: auto; stroke-linejoin: round; stroke-linecap: butt; font-variant-numeric: tabular-nums; }}
figcaption, .missing {{ color: var(--muted); font-size: 13px; margin: 6px 0 0; max-width: 104ch; }}
ul {{ margin: 0; padding-left: 20px; }}
.context {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 2px 28px; margin: 0; font-size: 13.5px; }}
.context div {{ display: flex; gap: 12px; justify-content: space-between; border-bottom: 1px solid var(--grid); padding: 4px 0; }}
.context dt {{ color: var(--muted); }}
.context dd {{ text-align: right; overflow-wrap: anywhere; }}
@media (max-width: 720px) {{ main {{ padding: 24px 16px 48px; }} figure svg {{ width: 720px; }} }}
@media print {{
:root {{ {LIGHT.strip()} }}
body {{ font-size: 11px; }}
main {{ max-width: none; padding: 0; }}
h2 {{ break-after: avoid; }}
tr, .tiles div {{ break-inside: avoid; }}
.tiles div {{ border: 1px solid var(--grid); }}
.wide, figure {{ overflow: visible; }}
}}
"""
