"""Draw docs/images/imports.png: which folder of code imports which, read from the code."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PLACES = {  # folder -> (x, layer), the lowest layer at the bottom
    "ir": (2.0, 0),
    "passes": (1.2, 1),
    "frontend": (3.1, 2),
    "backends": (0.2, 2),
    "sampling": (4.1, 3),
    "storage": (1.7, 3),
    "runtime": (0.9, 4),
    "learning": (3.3, 4),
    "api": (3.0, 5),
    "tools": (1.2, 6),
    "guards": (2.9, -1),
    "files": (1.1, -1),
}
COLOURS = {
    name: f"C{k + (k > 2)}" if k < 9 else ("#34506f", "#7a5c00", "#5c7a00")[k - 9] for k, name in enumerate(PLACES)
}  # C3 is red


def imports() -> Counter[tuple[str, str]]:
    """How many imports there are from one folder to another."""
    found: Counter[tuple[str, str]] = Counter()
    for path in sorted([*ROOT.glob("fxmask/**/*.py"), *ROOT.glob("passes/*.py"), *ROOT.glob("backends/*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        source = parts[1] if parts[0] == "fxmask" else parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for module in modules(node):
                target = module.split(".")[1]
                if target != source and source in PLACES and target in PLACES:
                    found[source, target] += 1
    return found


def modules(node: ast.AST) -> list[str]:
    """Modules of fxmask that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"fxmask.{alias.name}" for alias in node.names] if node.module == "fxmask" else [node.module]
    else:
        names = []
    return [name for name in names if name.startswith("fxmask.")]


def draw(path: Path) -> None:
    """Folders as boxes, imports as arrows that point at what is imported; upward ones would be red."""
    figure, axes = plt.subplots(figsize=(9, 8), layout="constrained")
    for (source, target), count in sorted(imports().items()):
        (x0, y0), (x1, y1) = PLACES[source], PLACES[target]
        axes.add_patch(
            FancyArrowPatch(
                (x0 + 0.33, y0),
                (x1 + 0.33, y1 + 0.5),
                arrowstyle="-|>",
                mutation_scale=11,
                connectionstyle="arc3,rad=0.06",
                color="#c62828" if y1 >= y0 else COLOURS[source],
                linewidth=0.6 + min(count, 20) / 10,
                alpha=0.8,
                zorder=1,
            )
        )
    for name, (x, y) in PLACES.items():
        axes.add_patch(
            FancyBboxPatch(
                (x, y),
                0.66,
                0.5,
                boxstyle="round,pad=0.02",
                facecolor="#f4f6fa",
                edgecolor=COLOURS[name],
                linewidth=1.8,
                zorder=2,
            )
        )
        axes.text(x + 0.33, y + 0.25, name, ha="center", va="center", fontsize=11, zorder=3)
    axes.set_xlim(0, 5)
    axes.set_ylim(-1.2, 6.7)
    axes.set_title("imports go down; an arrow has the colour of its importer, wider: more imports", fontsize=11)
    axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(DOCS / "images" / "imports.png")
