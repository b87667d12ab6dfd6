# SPDX-License-Identifier: Apache-2.0
"""Results as a picture: for each metric a bar for each contestant, with its quartiles."""

from html import escape

from report import number

LEFT, WIDTH, BAR, GAP = 150, 420, 16, 34
COLOURS = ("#2f6f9f", "#b5651d", "#6b8e4e", "#7a5c99")


def svg(results):
    y, body = 16, []
    for result in results:
        stats = result["contestants"]
        if not stats:
            continue
        most = max(s["q3"] for s in stats.values()) or 1
        body.append(f'<text x="8" y="{y + 12}" font-weight="bold">{escape(result["row"])}: '
                    f'{escape(result["title"])}, {escape(result["unit"])}</text>')
        y += 20
        for i, (name, s) in enumerate(stats.items()):
            at = [LEFT + WIDTH * s[key] / most for key in ("q1", "median", "q3")]
            middle = y + BAR / 2
            body.append(
                f'<text x="{LEFT - 8}" y="{y + 12}" text-anchor="end">{escape(name)}</text>'
                f'<rect x="{LEFT}" y="{y}" width="{at[1] - LEFT:.1f}" height="{BAR - 3}" '
                f'fill="{COLOURS[i % len(COLOURS)]}"/>'
                f'<path d="M{at[0]:.1f} {middle - 1} H{at[2]:.1f}" stroke="#222"/>'
                f'<text x="{max(at[1], at[2]) + 6:.1f}" y="{y + 12}">{number(s["median"])}</text>')
            y += BAR
        y += GAP - BAR
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 80}" height="{y}" '
            f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" '
            f'fill="#fff"/>{"".join(body)}</svg>\n')


def write(path, results):
    with open(path, "w") as f:
        f.write(svg(results))
