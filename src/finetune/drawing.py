"""Pictures drawn on the spot, for trying everything without files: an ant or a bee somewhere on varied ground."""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, ...]  # red, green, blue, and opacity where it is not 255
Shape = tuple[np.ndarray, Colour, float]  # points [n, 2]; width of the line through them, 0 for a filled polygon

OVERSAMPLING = 4  # pixels drawn for one pixel of the picture, in each direction
GROUNDS: list[Colour] = [
    (116, 158, 84),  # grass
    (70, 108, 66),  # shade
    (214, 192, 146),  # sand
    (146, 112, 82),  # bark
    (176, 174, 170),  # stone
    (232, 224, 210),  # plaster
    (230, 158, 178),  # petals: pink, yellow, violet
    (238, 200, 84),
    (168, 150, 206),
    (150, 190, 222),  # sky in water
]
ANTS: list[Colour] = [(34, 28, 30), (66, 40, 28), (128, 56, 32), (172, 100, 40)]  # black, brown, red, amber
BEES: list[Colour] = [(246, 196, 44), (226, 158, 40), (250, 220, 108)]  # the light stripes
DARK: Colour = (38, 28, 24)


def ant(rng: np.random.Generator, size: int) -> Image.Image:
    """Return a drawn RGB picture of an ant, size × size px."""
    return _picture(rng, size, _ant_shapes(rng))


def bee(rng: np.random.Generator, size: int) -> Image.Image:
    """Return a drawn RGB picture of a bee, size × size px."""
    return _picture(rng, size, _bee_shapes(rng))


CLASSES: dict[str, Callable[[np.random.Generator, int], Image.Image]] = {"ants": ant, "bees": bee}


# The picture --------------------------------------------------------------------------------------------------------


def _picture(rng: np.random.Generator, size: int, insect: list[Shape]) -> Image.Image:
    """Return the insect with its shadow on some ground: near the middle, at any angle, in varied light, with noise."""
    side = size * OVERSAMPLING
    canvas = _ground(rng, side)
    insect = _placed(
        insect, rng.uniform(0, 2 * np.pi), rng.uniform(0.34, 0.44) * side, rng.uniform(0.42, 0.58, 2) * side
    )
    fall = rng.uniform(0.015, 0.03, 2) * side
    shadow = Image.new("L", canvas.size)
    _draw(shadow, [(points + fall, (110,), width) for points, _, width in insect])
    canvas.paste((20, 16, 24), mask=shadow.filter(ImageFilter.BoxBlur(side / 80)))
    _draw(canvas, insect)

    pixels = np.asarray(canvas.resize((size, size), Image.Resampling.BOX), dtype=np.float64)
    pixels = pixels * rng.uniform(0.8, 1.1) * rng.uniform(0.94, 1.06, 3)  # light, and its tint
    pixels += rng.normal(0, rng.uniform(2, 6), pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _ground(rng: np.random.Generator, side: int) -> Image.Image:
    """Return side × side px of one colour, lighter towards one edge, strewn with blades or pebbles of like colours."""
    base = np.array(GROUNDS[rng.integers(len(GROUNDS))])
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0.05, 0.2) * (np.cos(angle) * x + np.sin(angle) * y)
    canvas = Image.fromarray(np.clip(base * light[..., None], 0, 255).astype(np.uint8))
    canvas = canvas.resize((side, side), Image.Resampling.BICUBIC)

    blades = rng.random() < 0.5
    strewn = []
    for _ in range(rng.integers(8, 30)):
        colour = (*_shade(base, rng.uniform(0.7, 1.25)), 150)
        middle, turn = rng.uniform(0, side, 2), rng.uniform(0, np.pi)
        if blades:
            bend = rng.uniform(-0.5, 0.5)
            shape = [_curve((0, -1), (bend, 0), (0, 1), colour, rng.uniform(0.04, 0.12))]
            strewn += _placed(shape, angle + turn / 5, rng.uniform(0.15, 0.4) * side, middle)
        else:
            shape = [_ellipse((0, 0), (1, rng.uniform(0.5, 1)), colour)]
            strewn += _placed(shape, turn, rng.uniform(0.02, 0.1) * side, middle)
    _draw(canvas, strewn)
    return canvas


# The insects, looking up, from -1 to 1 ------------------------------------------------------------------------------


def _ant_shapes(rng: np.random.Generator) -> list[Shape]:
    """Return an ant: elbowed feelers, six long legs, and three parts of which the last is the largest."""
    colour = _shade(ANTS[rng.integers(len(ANTS))], rng.uniform(0.8, 1.2))
    limb, gloss = _shade(colour, 0.75), (*_shade(colour, 1.5), 200)
    stout = rng.uniform(0.85, 1.15)
    shapes = []
    for side in (-1, 1):
        for root, foot in ((-0.25, -0.75), (-0.12, 0.05), (0.0, 0.75)):
            foot += rng.uniform(-0.15, 0.15)
            knee = (side * 0.4, (root + foot) / 2 - 0.12)
            shapes.append(_line([(0, root), knee, (side * rng.uniform(0.6, 0.75), foot)], limb, 0.05))
        elbow = (side * rng.uniform(0.2, 0.3), -0.95)
        shapes.append(_line([(side * 0.08, -0.68), elbow, (side * rng.uniform(0.3, 0.5), -1.15)], limb, 0.04))
    shapes += [
        _ellipse((0, -0.12), (0.13 * stout, 0.28), colour),
        _ellipse((0, 0.2), (0.07, 0.09), colour),
        _ellipse((0, -0.58), (0.22 * stout, 0.24), colour),
        _ellipse((0, 0.62), (0.29 * stout, 0.4), colour),
        _ellipse((-0.07, -0.64), (0.07, 0.08), gloss),
        _ellipse((-0.09, 0.5), (0.08, 0.16), gloss),
    ]
    return shapes


def _bee_shapes(rng: np.random.Generator) -> list[Shape]:
    """Return a bee: short legs and feelers, a striped body, and four clear wings over it."""
    light = _shade(BEES[rng.integers(len(BEES))], rng.uniform(0.9, 1.1))
    fur = _shade(light, rng.uniform(0.5, 0.8))
    stout = rng.uniform(0.85, 1.1)
    shapes = []
    for side in (-1, 1):
        for root, foot in ((-0.35, -0.6), (-0.2, 0.0), (-0.1, 0.45)):
            foot += rng.uniform(-0.1, 0.1)
            shapes.append(_line([(0, root), (side * 0.42, root), (side * 0.52, foot)], DARK, 0.06))
        shapes.append(_line([(side * 0.06, -0.75), (side * 0.12, -1.0), (side * 0.25, -1.08)], DARK, 0.045))
    shapes += [
        _ellipse((0, 0.38), (0.4 * stout, 0.62), light),
        *[_ellipse((0, 0.38), (0.4 * stout, 0.62), DARK, (y, y + 0.2)) for y in (-0.55, -0.1, 0.32, 0.72)],
        _ellipse((0, -0.68), (0.24 * stout, 0.2), DARK),
        _ellipse((0, -0.32), (0.33 * stout, 0.3), fur),
    ]
    spread = rng.uniform(0.3, 0.9)
    for side in (-1, 1):
        for length, turn in ((0.42, spread + 0.55), (0.55, spread)):
            wing = _ellipse((0, -length), (0.24, length), (236, 244, 252, 150))
            vein = _line([(0, -0.1), (0.05, -1.7 * length)], (120, 110, 110, 130), 0.02)
            shapes += _placed([wing, vein], side * (np.pi / 2 + 0.75 - turn), 1, (side * 0.14, -0.3))
    return shapes


# Shapes -------------------------------------------------------------------------------------------------------------


def _ellipse(middle: tuple, radii: tuple, colour: Colour, band: tuple[float, float] = (-1, 1)) -> Shape:
    """Return an ellipse, or the band of it between two heights that are parts of its vertical radius."""
    start, end = np.arcsin(np.clip(band, -1, 1))
    right = np.linspace(start, end, 24)
    angle = np.concatenate([right, np.pi - right[::-1]])
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radii + middle, colour, 0


def _line(points: list[tuple], colour: Colour, width: float) -> Shape:
    """Return a line through the points."""
    return np.array(points, dtype=float), colour, width


def _curve(start: tuple, pull: tuple, end: tuple, colour: Colour, width: float) -> Shape:
    """Return a line from start to end that bends towards `pull`: a quadratic Bézier curve."""
    t = np.linspace(0, 1, 12)[:, None]
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * np.array(pull) + t**2 * end, colour, width


def _shade(colour: Colour | np.ndarray, factor: float) -> Colour:
    """Return the colour, darker for a factor below 1, lighter above."""
    return tuple(int(min(255, round(channel * factor))) for channel in colour[:3])


def _placed(shapes: list[Shape], angle: float, scale: float, shift: tuple | np.ndarray) -> list[Shape]:
    """Return the shapes turned clockwise by an angle (radians), then scaled, then moved."""
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    return [(points @ turn * scale + shift, colour, width * scale) for points, colour, width in shapes]


def _draw(canvas: Image.Image, shapes: list[Shape]) -> None:
    """Draw the shapes, first to last, on an RGB picture or a mask (L)."""
    pen = ImageDraw.Draw(canvas, "RGBA" if canvas.mode == "RGB" else None)
    for points, colour, width in shapes:
        corners = [tuple(point) for point in points.tolist()]
        if width:
            pen.line(corners, colour, max(1, round(width)), joint="curve")
        else:
            pen.polygon(corners, colour)
