"""The HTML of a report. Whatever comes from a run is escaped here."""

import html
from collections.abc import Sequence

STYLE = '''
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b1f26; --muted: #667080; --line: #e3e6ea;
  --grid: #e9ecf0; --band: #f3f5f8; --warn: #fff6e0; --warnline: #e9b949;
  --c0: #2563c9; --c1: #d9663b; --c2: #2a9465; --c3: #8a57c4; --c4: #c28a12; --c5: #c8447e;
  --c6: #1c93a6; --c7: #70757e; }
@media (prefers-color-scheme: dark) { :root {
  --page: #121417; --card: #1b1e23; --ink: #e6e9ee; --muted: #98a1ae; --line: #2c3138;
  --grid: #2a2f36; --band: #22262c; --warn: #2e2716; --warnline: #b98c2b;
  --c0: #6ea3f7; --c1: #f0906a; --c2: #55c390; --c3: #b990ee; --c4: #e2b54a; --c5: #ee82ae;
  --c6: #58c4d4; --c7: #a3a9b3; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1320px; padding: 28px 24px 60px; background: var(--page);
  color: var(--ink); font: 15px/1.5 var(--font); }
h1 { margin: 0; font-size: 26px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 17px; }
.facts { margin: 4px 0 0; color: var(--muted); overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 14px 0 0; }
.legend span::before { content: ""; display: inline-block; width: 14px; height: 4px;
  border-radius: 2px; margin-right: 7px; vertical-align: middle; background: var(--c); }
.runs { position: sticky; top: 0; z-index: 1; padding: 8px 0; background: var(--page); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 20px; }
.card, figure, .box { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 12px 16px; }
.card div { color: var(--muted); font-size: 13px; }
.card b { display: block; font-size: 25px; font-weight: 650; letter-spacing: -0.01em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr));
  gap: 14px; }
figure { margin: 0; padding: 12px 14px 8px; }
figcaption { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px;
  font-weight: 600; font-size: 14px; margin-bottom: 4px; overflow-wrap: anywhere; }
figcaption .legend { margin: 0; gap: 0 12px; font-weight: 400; font-size: 12.5px;
  color: var(--muted); }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; }
svg text { font-family: var(--font); font-variant-numeric: tabular-nums; }
.box { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 7px 14px; text-align: left; vertical-align: top;
  border-top: 1px solid var(--line); font-variant-numeric: tabular-nums; }
thead th { border-top: 0; color: var(--muted); font-weight: 500; font-size: 13px; }
td.number { white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 190px;
  font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
td.text div { max-height: 14em; overflow: auto; }
.best { color: var(--c2); } .worst { color: var(--c1); }
.warnings { margin-top: 20px; padding: 10px 16px; background: var(--warn); border-radius: 10px;
  border: 1px solid var(--warnline); }
.warnings ul { margin: 4px 0; padding-left: 20px; overflow-wrap: anywhere; }
details { margin-top: 14px; padding: 10px 16px; }
details .box { border: 0; margin-top: 8px; }
summary { cursor: pointer; font-weight: 600; }
pre { margin: 10px 0 4px; overflow-x: auto; font-size: 12.5px; line-height: 1.45; }
.note { color: var(--muted); font-size: 13px; margin-top: 40px; }
@media (max-width: 560px) { body { padding: 18px 12px 40px; } th, td { padding: 6px 9px; } }
'''
# Byte tokenizers decode to anything; a page may not contain most control characters.
VISIBLE = {i: 0x2400 + i for i in range(32) if i not in (9, 10)} | {127: 0x2421, 13: 0x240D}


def escape(value: object) -> str:
  return html.escape(str(value).translate(VISIBLE))


def document(title: str, parts: Sequence[str]) -> str:
  return f'''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
{chr(10).join(parts)}
<p class="note">Charts are over steps. Thin lines are the logged values, thick ones a mean of
neighbours; dots are evaluations.</p>
</body></html>
'''


def heading(title: str, facts: Sequence[str]) -> str:
  lines = ''.join(f'<p class="facts">{escape(fact)}</p>' for fact in facts)
  return f'<header><h1>{escape(title)}</h1>{lines}</header>'


def section(title: str, content: str) -> str:
  return f'<section><h2>{escape(title)}</h2>\n{content}</section>'


def legend(entries: Sequence[tuple[str, int]], kind: str = '') -> str:
  spans = ''.join(f'<span style="--c: var(--c{color % 8})">{escape(name)}</span>'
                  for name, color in entries)
  return f'<div class="legend {kind}">{spans}</div>'


def cards(entries: Sequence[tuple[str, str, str]]) -> str:
  return '<div class="cards">' + ''.join(
      f'<div class="card"><div>{escape(name)}</div><b>{escape(number)}</b>'
      f'<div>{escape(remark)}</div></div>' for name, number, remark in entries) + '</div>'


def grid(figures: Sequence[str]) -> str:
  return f'<div class="grid">{"".join(figures)}</div>'


def figure(title: str, svg: str, entries: Sequence[tuple[str, int]]) -> str:
  names = legend(entries) if entries else ''
  return f'<figure><figcaption>{escape(title)}{names}</figcaption>{svg}</figure>\n'


def table(rows: Sequence[Sequence[str]]) -> str:
  """The first row is the header."""
  head = ''.join(f'<th>{escape(cell)}</th>' for cell in rows[0])
  cell = lambda text: f'<td{" class=number" if len(text) < 50 else ""}>{escape(text)}</td>'
  body = ''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows[1:])
  return _table(head, body)


def _table(head: str, body: str) -> str:
  return (f'<div class="box"><table><thead><tr>{head}</tr></thead>'
          f'<tbody>{body}</tbody></table></div>')


def warnings(name: str, entries: Sequence[tuple[int, str]]) -> str:
  items = ''.join(f'<li>{f"step {step}: " if step >= 0 else ""}{escape(text)}</li>'
                  for step, text in entries)
  title = f'Warnings of {name}' if name else 'Warnings'
  return f'<div class="warnings"><b>{escape(title)}</b><ul>{items}</ul></div>'


def samples(picked: Sequence[tuple[int, Sequence[tuple[str, dict]]]]) -> str:
  """Samples by step; fields beside prompt, response and reward in a last column."""
  rows = []
  for step, entries in picked:
    for kind, sample in entries:
      rest = {k: v for k, v in sample.items()
              if k not in ('step', 'time', 'phase', 'prompt', 'response', 'reward')}
      reward = sample.get('reward', '')
      shown = f'{reward:.3g}' if isinstance(reward, float) else reward
      more = ', '.join(f'{k} {v}' for k, v in rest.items())
      rows.append(
          f'<tr><td class="number">{step}</td>'
          f'<td class="number"><b class="{kind}">{escape(shown)}</b> {kind}</td>'
          + ''.join(f'<td class="text"><div>{escape(sample.get(k, ""))}</div></td>'
                    for k in ('prompt', 'response')) + f'<td>{escape(more)}</td></tr>')
  head = ''.join(f'<th>{name}</th>' for name in ('step', 'reward', 'prompt', 'response', 'more'))
  return _table(head, ''.join(rows))


def text(content: str) -> str:
  return f'<pre>{escape(content)}</pre>'


def details(title: str, content: str) -> str:
  """Folded away until it is clicked. content: HTML."""
  return f'<details class="box"><summary>{escape(title)}</summary>{content}</details>'
