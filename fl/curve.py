"""A run's course as a picture."""

from __future__ import annotations


def curve(points: list[tuple[int, float, float]], title: str, width: int = 640, height: int = 320) -> str:
    """An SVG of (round, accuracy in [0, 1], loss): accuracy as a line with dots, loss dashed on its own scale."""
    left, right, top, bottom = 52, width - 52, 36, height - 40
    last = max(max(p[0] for p in points), 1)
    peak = max(max(p[2] for p in points), 1e-9)

    def at(x: float, y: float) -> str:
        return f"{left + (right - left) * x / last:.1f},{bottom - (bottom - top) * y:.1f}"

    accuracy = " ".join(at(r, a) for r, a, _ in points)
    loss = " ".join(at(r, v / peak) for r, _, v in points)
    dots = "".join('<circle cx="{}" cy="{}" r="3" fill="#1f6f8b"/>'.format(*at(r, a).split(",")) for r, a, _ in points)
    grid = "".join(
        f'<line x1="{left}" x2="{right}" y1="{bottom - (bottom - top) * t:.1f}" y2="{bottom - (bottom - top) * t:.1f}" stroke="#ddd"/>'
        f'<text x="{left - 6}" y="{bottom - (bottom - top) * t + 4:.1f}" text-anchor="end">{t:.0%}</text>'
        f'<text x="{right + 6}" y="{bottom - (bottom - top) * t + 4:.1f}" fill="#b5651d">{t * peak:.2f}</text>'
        for t in (0, 0.25, 0.5, 0.75, 1)
    )
    ticks = "".join(
        f'<text x="{at(r, 0).split(",")[0]}" y="{bottom + 16}" text-anchor="middle">{r}</text>'
        for r in sorted({round(last * i / 5) for i in range(6)})
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/><text x="{left}" y="20" font-size="13">{title}</text>{grid}{ticks}'
        f'<text x="{(left + right) / 2}" y="{height - 8}" text-anchor="middle">round</text>'
        f'<polyline points="{loss}" fill="none" stroke="#b5651d" stroke-dasharray="5 4"/>'
        f'<polyline points="{accuracy}" fill="none" stroke="#1f6f8b" stroke-width="2"/>{dots}'
        f'<text x="{right}" y="20" text-anchor="end"><tspan fill="#1f6f8b">accuracy</tspan> '
        f'<tspan fill="#b5651d">loss (dashed)</tspan></text></svg>\n'
    )
